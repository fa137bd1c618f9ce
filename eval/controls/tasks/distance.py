"""How far back a memory reaches: a needle at growing distance, and induction at none.

Legend of shape suffixes: B episodes, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..episodes import Episode, Integers, ignored
from .recall import draw


@dataclass(frozen=True)
class Needle:
    """`[MARK k v1 v2]`, then `level` tokens of hay; then `[ASK k]`: v1 and v2.

    Hay is made of the same symbols, and written like the needle. Chance is 1 / symbols^2.

    Args:
        symbols: of needles and hay.
        needles: in front of the hay, with different keys, all of them asked for.
    """

    symbols: int = 62
    needles: int = 1

    @property
    def vocab_size(self) -> int:
        """Symbols, MARK and ASK."""
        return self.symbols + 2

    def episode(self, rng: np.random.Generator, level: int, batch: int) -> Episode:
        """Episodes with `level` tokens between the last needle and the end of the context."""
        keys = draw(rng, self.symbols, self.needles, batch)[..., None]
        values = rng.integers(0, self.symbols, (batch, self.needles, 2))
        hay = rng.integers(0, self.symbols, (batch, level))
        needles = self._marked(self.symbols, keys, values)
        ids = self._marked(self.symbols + 1, keys, values[..., :1])
        labels = ignored(*ids.shape)
        labels[..., -2:] = values
        context = np.concatenate([needles.reshape(batch, -1), hay], axis=1)
        return Episode(context, ids.reshape(batch, -1), labels.reshape(batch, -1), 2)

    def _marked(self, mark: int, keys: Integers, values: Integers) -> Integers:
        return np.concatenate([np.full_like(keys, mark), keys, values], axis=-1)


@dataclass(frozen=True)
class Induction:
    """`level` different symbols in random order; then the same again: each symbol's successor.

    Chance is 1 / (symbols - 1), or what is left once the symbols seen so far are ruled out.

    Args:
        symbols: of which `level` are taken.
    """

    symbols: int = 62

    @property
    def vocab_size(self) -> int:
        """The symbols."""
        return self.symbols

    def episode(self, rng: np.random.Generator, level: int, batch: int) -> Episode:
        """Episodes of `level` symbols; asked about all but the last."""
        sequence = draw(rng, self.symbols, level, batch)
        return Episode(sequence, sequence[:, :-1], sequence[:, 1:], 1)
