"""The next token of every row: the best or a drawn one, among those that agree with what the row must still write."""

from __future__ import annotations

import torch
from torch import Tensor

from .jobs import Decoding, Row
from .token_bytes import TokenBytes


class Chooser:
    """Chooses for rows that decode together.

    Args:
        vocabulary: what tokens write.
        temperature: 0 is greedy.
        top_p: sample among the most likely tokens with this mass.
    """

    def __init__(self, vocabulary: TokenBytes, temperature: float, top_p: float) -> None:
        self._vocabulary = vocabulary
        self._temperature, self._top_p = temperature, top_p
        self._allowed: dict[bytes, Tensor] = {}

    def choose(self, active: Decoding) -> list[int]:
        """One token a row."""
        if self._temperature > 0:
            return [self._draw(active.logits(i), row) for i, row in enumerate(active.rows)]
        chosen = active.best()
        bound = [i for i, row in enumerate(active.rows) if row.missing]
        if bound:  # all in one transfer
            found = torch.cat([self._best_spelling(active.logits(i), active.rows[i].missing) for i in bound])
            for i, token in zip(bound, found.tolist(), strict=True):
                chosen[i] = token
        return chosen

    def _best_spelling(self, logits: Tensor, missing: bytes) -> Tensor:
        """The best token that agrees with `missing`, [1], left on its device."""
        allowed = self._spelling(missing, logits.device)
        return allowed.index_select(0, logits[allowed].argmax(dim=0, keepdim=True))

    def _draw(self, logits: Tensor, row: Row) -> int:
        if not row.missing:
            return self._sample(logits, row.generator)
        allowed = self._spelling(row.missing, logits.device)
        return int(allowed[self._sample(logits[allowed], row.generator)])

    def _spelling(self, missing: bytes, device: torch.device) -> Tensor:
        """The tokens that agree with `missing`; prompts end alike, so most are asked for many times."""
        if missing not in self._allowed:
            self._allowed[missing] = torch.tensor(self._vocabulary.spelling(missing), device=device)
        return self._allowed[missing]

    def _sample(self, logits: Tensor, generator: torch.Generator) -> int:
        """Draw one index of logits [V]: the smallest set of most likely tokens with mass top_p, renormalised."""
        values, order = torch.sort(torch.softmax(logits.float() / self._temperature, dim=-1), descending=True)
        cumulative = values.cumsum(dim=0)
        count = max(1, int((cumulative - values < self._top_p).sum()))
        cumulative = cumulative[:count].cpu()
        draw = torch.rand((), generator=generator) * cumulative[-1]
        return int(order[min(int(torch.searchsorted(cumulative, draw, right=True)), count - 1)])
