"""Activations in host memory: what autograd keeps for the backward pass waits there, and comes back when it is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_ds.memory.interface import to_host

LEAST_BYTES = 1 << 16  # smaller tensors stay: moving them costs more than they hold


class OffloadActivations(torch.autograd.graph.saved_tensors_hooks):
    """torch.autograd.graph.save_on_cpu, which leaves parameters where they are (a frozen base would be copied whole).

    Around a forward pass. Inside activation checkpointing nothing is kept anyway; there its layers' inputs go to the
    host. Copies from a GPU go to pinned memory, in the order of its stream.

    Args:
        module: its parameters and buffers stay, and views of them.
    """

    def __init__(self, module: nn.Module) -> None:
        held = [*module.parameters(), *module.buffers()]
        self._held = {t.untyped_storage().data_ptr() for t in held} - {0}
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if tensor.nbytes < LEAST_BYTES or self._is_held(tensor):
            return tensor.detach() if tensor.grad_fn is not None else tensor  # an output would keep its own graph alive
        return tensor.device, to_host(tensor)

    def _unpack(self, packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    def _is_held(self, tensor: Tensor) -> bool:
        # ZeRO-3 gathers a parameter into storage of its own, for as long as its layer runs.
        parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        return parameter or tensor.untyped_storage().data_ptr() in self._held
