"""What every memory of a repository is asked: write these files, predict this text, say how many bytes it takes.

A text memory reads files once and keeps a state, whatever that is made of: matrices, keys and values, counts, weights.
A reader of that state predicts texts, in one call or token by token alike, so that scoring and generation take the same
way. `python -m eval.frontier` puts all of them side by side.

Legend of shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from titans_ds.errors import DataError

State = dict[str, Tensor]  # of one repository; it can be saved, moved and counted
Rights = Literal["query-agnostic", "query-aware"]  # may a write see the prompt that will be asked?


class Reader(ABC):
    """Predicts one text after a state, which stays as it is."""

    @abstractmethod
    def advance(self, ids_T: Tensor) -> Tensor:
        """Read tokens, and say what comes after each of them.

        Args:
            ids_T: token ids, at least one; they go on where the call before ended.

        Returns:
            Log-probabilities [T, V], fp32 or wider: row t is of the token after ids_T[t], whatever comes later.
        """


class TextMemory(ABC):
    """A memory that reads a repository's files and predicts texts with what it kept."""

    rights: ClassVar[Rights] = "query-agnostic"

    @abstractmethod
    def write(self, files: Sequence[Tensor], query_T: Tensor | None = None) -> State:
        """The state after reading.

        Args:
            files: token ids [T] of each file, in order; none gives the empty state.
            query_T: the prompt that will be asked, where `rights` is `query-aware`; others never see one.
        """

    @abstractmethod
    def reader(self, state: State) -> Reader:
        """Of a new text after a state."""

    def num_bytes(self, state: State) -> int:
        """Of one state, in the precision in which it is read. Weights that all repositories share don't count."""
        return sum(t.numel() * t.element_size() for t in state.values())

    @torch.no_grad()
    def losses(self, state: State, text_T: Tensor, prompt_tokens: int = 1) -> Tensor:
        """Loss in nats of every token of a text but its first ones, [T - prompt_tokens].

        Args:
            state: read only.
            text_T: token ids.
            prompt_tokens: how many are given, at least 1.

        Raises:
            DataError: nothing is left to predict.
        """
        if not 1 <= prompt_tokens < len(text_T):
            raise DataError(
                f"losses: the text has {len(text_T)} tokens and prompt_tokens is {prompt_tokens}; at least one token "
                "must be given and one be left to predict"
            )
        given = self.reader(state).advance(text_T[:-1])[prompt_tokens - 1 :]
        return -given.gather(1, text_T[prompt_tokens:].unsqueeze(1)).squeeze(1)

    @torch.no_grad()
    def generate(self, state: State, prompt_T: Tensor, num_tokens: int) -> Tensor:
        """The likeliest next tokens, one after the other, [num_tokens]."""
        reader, made = self.reader(state), []
        given = prompt_T
        for _ in range(num_tokens):
            given = reader.advance(given)[-1].argmax().unsqueeze(0)
            made.append(given)
        return torch.cat(made) if made else prompt_T[:0]
