"""Key-value recall: pairs are written, then asked for.

KeyValueRecall is GradMem's key-value retrieval; MultiQueryRecall is MQAR (Zoology, arXiv 2312.04927) with the questions
in a segment of their own. A level is the number of pairs N.

Legend of shape suffixes: B episodes, N pairs, M questions, L tokens of a key or value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..episodes import Episode, Integers, ignored


@dataclass(frozen=True)
class KeyValueRecall:
    """`[SEP k1 k2 v1 v2]` N times; then `[ASK k1 k2 v1]`: v1 and v2, both right or it is wrong.

    Chance is 1 / symbols^2. The questions of an episode ask for different pairs, so that no answer helps with the
    questions after it, which have it before them.

    Args:
        symbols: of which keys and values are made.
        questions: most questions an episode.
    """

    symbols: int = 62
    questions: int = 16

    @property
    def vocab_size(self) -> int:
        """Symbols, SEP and ASK."""
        return self.symbols + 2

    def episode(self, rng: np.random.Generator, level: int, batch: int) -> Episode:
        """Episodes of `level` pairs with different keys."""
        codes = draw(rng, self.symbols**2, level, batch)
        keys = np.stack([codes // self.symbols, codes % self.symbols], axis=-1)
        values = rng.integers(0, self.symbols, keys.shape)
        asked = draw(rng, level, min(level, self.questions), batch)
        key_BML, value_BML = pick(keys, asked), pick(values, asked)
        ids = _joined(self.symbols + 1, key_BML, value_BML[..., :1])
        labels = ignored(*ids.shape)
        labels[..., -2:] = value_BML
        written, permuted = (_joined(self.symbols, keys, v) for v in (values, np.roll(values, 1, axis=1)))
        return Episode(flat(written), flat(ids), flat(labels), 2, flat(permuted))


@dataclass(frozen=True)
class MultiQueryRecall:
    """`k v` N times; then keys at gaps of a power law, filler between them: each key's value.

    Chance is 1 / values; keys and values are different symbols.

    Args:
        keys, values: how many symbols of each.
        questions: most questions an episode.
        gap_power: of the gaps' distribution g^(power - 1), as in Zoology.
        max_gap: the longest gap, in filler tokens.
    """

    keys: int = 128
    values: int = 128
    questions: int = 16
    gap_power: float = 0.1
    max_gap: int = 8

    @property
    def vocab_size(self) -> int:
        """Keys, values and one filler symbol."""
        return self.keys + self.values + 1

    def episode(self, rng: np.random.Generator, level: int, batch: int) -> Episode:
        """Episodes of `level` pairs with different keys."""
        keys = draw(rng, self.keys, level, batch)[..., None]
        values = self.keys + rng.integers(0, self.values, keys.shape)
        asked = draw(rng, level, min(level, self.questions), batch)
        ids, labels = self._questions(rng, pick(keys, asked)[..., 0], pick(values, asked)[..., 0])
        written, permuted = (np.concatenate([keys, v], axis=-1) for v in (values, np.roll(values, 1, axis=1)))
        return Episode(flat(written), ids, labels, 1, flat(permuted))

    def _questions(self, rng: np.random.Generator, key_BM: Integers, value_BM: Integers) -> tuple[Integers, Integers]:
        """All rows get the gaps of one draw, so that they are equally long."""
        weights = np.arange(1, self.max_gap + 1) ** (self.gap_power - 1.0)
        gaps = rng.choice(self.max_gap, size=key_BM.shape[1], p=weights / weights.sum())
        places = np.cumsum(gaps + 1) - 1
        ids = np.full((len(key_BM), int(places[-1]) + 1), self.keys + self.values, dtype=np.int64)
        labels = ignored(*ids.shape)
        ids[:, places], labels[:, places] = key_BM, value_BM
        return ids, labels


def draw(rng: np.random.Generator, among: int, count: int, batch: int) -> Integers:
    """`count` different numbers below `among` for each row, in random order: [B, count]."""
    return np.stack([rng.choice(among, size=count, replace=False) for _ in range(batch)]).astype(np.int64)


def pick(x_BNL: Integers, index_BM: Integers) -> Integers:
    """x[b, index[b, m]]: [B, M, L]."""
    return np.take_along_axis(x_BNL, index_BM[..., None], axis=1)


def flat(x_BNL: Integers) -> Integers:
    """[B, N, L] -> [B, N L]."""
    return x_BNL.reshape(len(x_BNL), -1)


def _joined(mark: int, *parts: Integers) -> Integers:
    """A mark in front of each: [B, N, 1 + ...]."""
    return np.concatenate([np.full((*parts[0].shape[:2], 1), mark), *parts], axis=-1).astype(np.int64)
