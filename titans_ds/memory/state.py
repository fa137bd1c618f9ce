"""MemoryState: the fast weights of every grafted layer, as a value that nothing changes in place.

A layer's state is a dict of tensors with a leading batch dimension. Which ones, its kind says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from titans_ds.errors import StateError
from titans_ds.files import atomic_file

LayerState = dict[str, Tensor]
_FORMAT = "titans-ds memory state 1"


@dataclass(frozen=True)
class MemoryState:
    """Fast weights of every grafted layer, by layer index. All methods return new values."""

    layers: dict[int, LayerState]

    @property
    def batch_size(self) -> int:
        """Number of samples B that the state holds."""
        return next(iter(next(iter(self.layers.values())).values())).shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        """The state with `function` applied to every tensor."""
        return MemoryState({i: {n: function(t) for n, t in layer.items()} for i, layer in self.layers.items()})

    def detach(self) -> MemoryState:
        """Cut off from the graph that wrote it: what makes training first order."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> MemoryState:
        """The same state with all tensors on another device."""
        return self.map(lambda t: t.to(device))

    def select(self, indices: Tensor) -> MemoryState:
        """The samples at `indices` [N], in that order; a sample may be taken more than once."""
        return self.map(lambda t: t.index_select(0, indices.to(t.device)))

    def repeat(self, times: int) -> MemoryState:
        """Each sample `times` times, next to each other, as generate() expands its inputs."""
        return self.map(lambda t: t.repeat_interleave(times, dim=0))

    def where(self, mask_B: Tensor, other: MemoryState) -> MemoryState:
        """Rows of this state where the mask [B] is true, of `other` elsewhere."""
        layers = {
            index: {name: choose_rows(mask_B, t, other.layers[index][name]) for name, t in layer.items()}
            for index, layer in self.layers.items()
        }
        return MemoryState(layers)

    @staticmethod
    def concatenate(states: Sequence[MemoryState]) -> MemoryState:
        """One batch out of several. Raises StateError where there are none, or they have other layers."""
        if not states or any(s.layers.keys() != states[0].layers.keys() for s in states):
            raise StateError("concatenate expects one state or more, all with the same layers")
        layers = {
            index: {name: torch.cat([s.layers[index][name] for s in states]) for name in layer}
            for index, layer in states[0].layers.items()
        }
        return MemoryState(layers)

    def all_finite(self) -> Tensor:
        """Whether no sample has a NaN or an infinity: a scalar, in a handful of launches."""
        return torch.isfinite(nn.utils.get_total_norm(self._filled(), math.inf))

    def is_finite(self) -> Tensor:
        """[B], false where a sample has a NaN or an infinity in any layer."""
        tensors = self._filled()
        most = [torch.linalg.vector_norm(t.reshape(t.shape[0], -1), math.inf, dim=1) for t in tensors]
        return torch.isfinite(torch.stack(most)).all(dim=0)

    def mended(self) -> tuple[MemoryState, Tensor | None]:
        """The state with 0 in samples that are not finite, and which ones are, [B]; itself and None where all are.

        A NaN would pass through products with masks, also in a sample that starts anew. Waits for the device.
        """
        if bool(self.all_finite()):
            return self, None
        finite_B = self.is_finite()
        return self.where(finite_B, self.map(torch.zeros_like)), finite_B

    def _filled(self) -> list[Tensor]:
        return [t for layer in self.layers.values() for t in layer.values() if t.numel() > 0]

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write one safetensors file, whole or not at all, with `metadata` in its header."""
        tensors = {
            f"{i}.{n}": t.detach().cpu().contiguous() for i, layer in self.layers.items() for n, t in layer.items()
        }
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"format": _FORMAT, "user": json.dumps(metadata or {})})

    @staticmethod
    def load(path: str | Path) -> tuple[MemoryState, dict[str, str]]:
        """The inverse of `save`: state on the CPU, and its metadata. Raises StateError for any other file."""
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            user: dict[str, str] = json.loads(header.get("user", "{}"))
        except Exception as error:
            raise StateError(
                f"{path} is not a readable memory state ({error}); expected a file of MemoryState.save"
            ) from error
        named = [(name.partition("."), tensor) for name, tensor in tensors.items()]
        whole = named and isinstance(user, dict) and all(index.isdecimal() for (index, _, _), _ in named)
        if header.get("format") != _FORMAT or not whole:
            raise StateError(
                f"{path} is a safetensors file, but not a memory state; expected a file of MemoryState.save"
            )
        layers: dict[int, LayerState] = {}
        for (index, _, field), tensor in named:
            layers.setdefault(int(index), {})[field] = tensor
        return MemoryState(layers), user


def choose_rows(mask_B: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Row by row: `yes` where the mask is true, else `no`; a NaN in the row not chosen goes no further."""
    return torch.where(mask_B.view(-1, *([1] * (yes.dim() - 1))), yes, no)
