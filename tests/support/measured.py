"""What an engine holds and sends, counted: against the formulas of titans_ds.zero.footprint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor

from titans_ds.zero.engine import DeepSpeedEngine, Module, import_deepspeed

_KINDS = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter", "all_reduce": "all_reduce"}


@dataclass(frozen=True)
class Held:
    """Bytes on this rank, each piece of memory counted once."""

    parameters: int
    gradients: int
    optimizer: int


class Watched(DeepSpeedEngine[Module], Generic[Module]):
    """An engine that notes after every backward pass what it holds."""

    peak = Held(0, 0, 0)

    def backward(self, loss: Tensor, last: bool) -> None:
        """As the engine's."""
        super().backward(loss, last)
        now = held(self)
        most = (max(a, b) for a, b in zip(vars(self.peak).values(), vars(now).values(), strict=True))
        self.peak = Held(*most)


def held(engine: DeepSpeedEngine[Any]) -> Held:
    """Parameters, gradients and optimizer of an engine on this rank, right now."""
    parameters = _storages(_parameters(engine))
    optimizer = {k: v for k, v in _storages(_optimizer(engine)).items() if k not in parameters}
    taken = {**parameters, **optimizer}
    gradients = {k: v for k, v in _storages(_gradients(engine)).items() if k not in taken}
    return Held(sum(parameters.values()), sum(gradients.values()), sum(optimizer.values()))


@contextlib.contextmanager
def collectives() -> Iterator[dict[str, float]]:
    """Inside, DeepSpeed's collectives are counted; afterwards bytes of the whole tensors by kind."""
    import_deepspeed()
    from deepspeed.comm.comm import comms_logger

    before, found = comms_logger.enabled, dict[str, float]()
    comms_logger.enabled = comms_logger.prof_all = True
    comms_logger.verbose = comms_logger.debug = False
    comms_logger.comms_dict.clear()
    try:
        yield found
    finally:
        comms_logger.enabled = before
    ranks = torch.distributed.get_world_size()
    for name, sizes in comms_logger.comms_dict.items():
        if name in _KINDS:
            logged = sum(int(size) * entry[0] for size, entry in sizes.items())
            found[_KINDS[name]] = logged * (ranks if name.startswith("all_gather") else 1)  # logged: a rank's share


def _parameters(engine: DeepSpeedEngine[Any]) -> Iterator[Tensor]:
    for parameter in engine.module.parameters():
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def _optimizer(engine: DeepSpeedEngine[Any]) -> Iterator[Tensor]:
    for group in engine.optimizer.param_groups:
        yield from group["params"]
    for parameter, state in engine.optimizer.state.items():
        yield parameter
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _gradients(engine: DeepSpeedEngine[Any]) -> Iterator[Tensor]:
    yield from (p.grad for p in engine.module.parameters() if p.grad is not None)
    zero = engine._engine.optimizer
    for name in ("averaged_gradients", "all_grad_tensors"):  # stages 1 and 2
        for entry in (getattr(zero, name, None) or {}).values():
            yield from [entry] if isinstance(entry, Tensor) else (entry or [])
    flat = getattr(zero, "grad_partitions_flat_buffer", None)  # stage 3
    if flat is not None:
        yield flat


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the memory behind the tensors."""
    storages = (t.untyped_storage() for t in tensors)
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}
