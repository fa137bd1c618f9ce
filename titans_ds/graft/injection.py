"""How a memory enters a layer: the gate, and the hooks around the layer's token mixer.

Additive injection: Attn(h) + s P_o f_W(q), s = floor(sigmoid(g)). The mixer's own code and parameter names stay as they
are; the graft is one child module, `titans`, and two hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from titans_ds.config import GraftConfig
from titans_ds.graft.call import KEYWORD, Call
from titans_ds.memory import Access, LayerState, NeuralMemory

CHILD = "titans"
_IN_FLIGHT = "_titans_in_flight"


class GraftedMemory(nn.Module):
    """A memory and the gate of its layer.

    Args:
        hidden_size: model width H.
        config: of the graft.
        layer_index: the layer it is grafted on.
    """

    def __init__(self, hidden_size: int, config: GraftConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.floor, self.floor_mode = config.gate_floor, config.gate_floor_mode
        self.memory = NeuralMemory(hidden_size, config.memory, layer_index)
        self.gate = nn.Parameter(torch.full((1,), float(config.gate_init)))  # g; [1]: ZeRO breaks on 0-dim parameters

    def gate_value(self) -> Tensor:
        """s in [floor, 1], shape [1], at least fp32."""
        s = torch.sigmoid(self.gate.to(torch.promote_types(self.gate.dtype, torch.float32)))
        return s.clamp(min=self.floor) if self.floor_mode == "clamp" else self.floor + (1 - self.floor) * s

    def forward(
        self,
        hidden_BTH: Tensor,
        mixed_BTH: Tensor,
        state: LayerState | None,
        mask_BT: Tensor | None,
        reset_B: Tensor | None,
        access: Access,
    ) -> tuple[Tensor, LayerState, LayerState]:
        """The mixer's output with the read added to it, the state after this segment, and the write's stats."""
        read_BTH, new_state, stats = self.memory(hidden_BTH, state, mask_BT, reset_B, access)
        s = self.gate_value()
        if access.stats:
            stats = {**stats, "gate": s.detach().expand(hidden_BTH.shape[0])}
        return mixed_BTH + (s * read_BTH).to(mixed_BTH.dtype), new_state, stats


def take_call(
    mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of every token mixer: keep the call from the mixer's kernels, which would not know the keyword.

    It waits on the module for the forward hook of the same call; a recomputation passes here again.
    """
    kwargs = dict(kwargs)
    call = kwargs.pop(KEYWORD, None)
    object.__setattr__(mixer, _IN_FLIGHT, call)
    return args, kwargs


def inject(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a grafted token mixer: add the read, and note the state that the segment would write."""
    call: Call | None = getattr(mixer, _IN_FLIGHT)
    object.__setattr__(mixer, _IN_FLIGHT, None)
    if call is None:
        return output
    grafted: GraftedMemory = getattr(mixer, CHILD)
    index = grafted.layer_index
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    mixed = output[0] if isinstance(output, tuple) else output
    given = None if call.given is None else dict(call.given[index])  # ZeRO-3 changes the dicts it meets, in place
    mixed, new_state, stats = grafted(hidden, mixed, given, call.mask, call.reset, call.access)
    if call.access.write:
        call.new[index] = new_state
    call.stats[index] = stats
    return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def hook(mixer: nn.Module, grafted: bool) -> list[RemovableHandle]:
    """Install the hooks of one mixer; those without a memory only drop the keyword."""
    handles = [mixer.register_forward_pre_hook(take_call, with_kwargs=True)]
    if grafted:
        handles.append(mixer.register_forward_hook(inject, with_kwargs=True))
    return handles
