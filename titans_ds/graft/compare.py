"""What a memory is worth on one text: its loss with the right memory, another's, an empty one, and none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_ds.errors import DataError
from titans_ds.graft.session import MemorySession

if TYPE_CHECKING:
    from titans_ds.graft.titans_model import TitansModel

Files = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Comparison:
    """Losses of the same tokens, in nats a token; `wrong - own` and `empty - own` above 0 say that it remembers.

    Args:
        own: with the memory of what belongs to the text.
        wrong: with the memory of something else.
        empty: with a memory that has read nothing.
        ablated: without the memory's path: the base model (and LoRA, where there is one).
        tokens: that were counted.
    """

    own: float
    wrong: float
    empty: float
    ablated: float
    tokens: int


@torch.no_grad()
def compare(
    model: TitansModel, *, read: Files, wrong: Files, text: Sequence[int], prompt_tokens: int = 1
) -> Comparison:
    """Prime two memories, and predict the same text with each, without writing it.

    Args:
        model: with a trained memory.
        read: files that belong to the text, as token ids, in reading order.
        wrong: as much of something else.
        text: token ids.
        prompt_tokens: how many of its first tokens are given and don't count, at least 1.

    Raises:
        DataError: nothing is left to predict.
    """
    if not 1 <= prompt_tokens < len(text):
        raise DataError(
            f"compare: the text has {len(text)} tokens and prompt_tokens is {prompt_tokens}; at least one token must "
            "be given and one be left to predict"
        )
    losses = {}
    for name, files in (("own", read), ("wrong", wrong), ("empty", [])):
        with primed(model, files) as memory:
            losses[name] = float(token_losses(model, text, prompt_tokens, memory).mean())
    with model.disable_memory():
        losses["ablated"] = float(token_losses(model, text, prompt_tokens, None).mean())
    return Comparison(**losses, tokens=len(text) - prompt_tokens)


@contextlib.contextmanager
def primed(model: TitansModel, files: Files) -> Iterator[MemorySession]:
    """A session of one sample that has read these files, each from its own first token."""
    with model.memory_session(batch_size=1) as memory:
        for file in files:
            if len(file):
                model.prime([list(file)], memory)
        yield memory


def token_losses(model: TitansModel, text: Sequence[int], prompt_tokens: int, memory: MemorySession | None) -> Tensor:
    """The loss in nats of every token of a text but its first `prompt_tokens`, [T - prompt_tokens]; nothing is written.

    Args:
        model: called without gradients.
        text: T token ids.
        prompt_tokens: at least 1.
        memory: of one sample; None for that of `reading`, or none inside of `disable_memory`.
    """
    ids = torch.tensor([list(text)], device=model.device)
    logits = model(ids, memory=None if memory is None else memory.state).logits[0, prompt_tokens - 1 : -1]
    return F.cross_entropy(logits.float(), ids[0, prompt_tokens:], reduction="none")
