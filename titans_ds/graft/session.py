"""MemorySession: the memory of a batch of texts, from the first priming to the last completion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from titans_ds.errors import StateError
from titans_ds.memory import MemoryState


@dataclass
class MemorySession:
    """Holds the current state of a batch; `TitansModel.prime` replaces it.

    Args:
        initial: the state of an unwritten memory.
        fingerprint: gives the fingerprint of the adapter whose memories these are; called on save and load only.
    """

    initial: MemoryState
    fingerprint: Callable[[], str]

    def __post_init__(self) -> None:
        self.state: MemoryState = self.initial
        # Token ids that were read in this process: of a session of one sample, where they can be looked up.
        self.primed: list[list[int]] = [[] for _ in range(self.batch_size)]

    @property
    def batch_size(self) -> int:
        """Number of samples B that the state holds."""
        return self.state.batch_size

    def reset(self, rows: torch.Tensor | None = None) -> None:
        """Forget: all samples, or those where `rows` [B] is true."""
        self.state = self.initial if rows is None else self.initial.where(rows, self.state)
        self.primed = [[] if rows is None or bool(rows[i]) else ids for i, ids in enumerate(self.primed)]

    def save(self, path: str | Path, about: dict[str, str] | None = None) -> None:
        """Write the state to one safetensors file, with what `about` says of it in its header."""
        self.state.save(path, {"fingerprint": self.fingerprint(), **(about or {})})

    def load(self, path: str | Path) -> None:
        """Take over a saved state.

        Raises:
            StateError: the file is damaged, of another adapter, or of another batch size.
        """
        state, metadata = MemoryState.load(path)
        expected = self.fingerprint()
        if metadata.get("fingerprint") != expected:
            raise StateError(
                f"{path} was written by another adapter (fingerprint {metadata.get('fingerprint')}, expected "
                f"{expected}); load the adapter that wrote it, or prime again"
            )
        theirs, ours = _shapes(state), _shapes(self.initial)
        wrong = sorted(name for name in theirs.keys() ^ ours.keys() or {n for n in ours if theirs[n] != ours[n]})
        if wrong:
            raise StateError(
                f"{path} does not fit this model: {wrong[0]} has shape {theirs.get(wrong[0], 'none')} for each sample, "
                f"expected {ours.get(wrong[0], 'none')}; load the adapter that wrote it, or prime again"
            )
        if state.batch_size != self.batch_size:
            raise StateError(
                f"{path} holds {state.batch_size} samples, this session {self.batch_size}; "
                f"open the session with memory_session({state.batch_size})"
            )
        device = next(iter(next(iter(self.initial.layers.values())).values())).device
        self.state = state.to(device)
        self.primed = [[] for _ in range(self.batch_size)]  # of what it was made is not in the file


def _shapes(state: MemoryState) -> dict[str, list[int]]:
    """Of one sample, by layer and name."""
    return {f"{i}.{name}": list(t.shape[1:]) for i, layer in state.layers.items() for name, t in layer.items()}
