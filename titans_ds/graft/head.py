"""What a base model makes of its decoder's last hidden states: logits.

Most causal LMs take them through one linear map. Others cap them (Gemma 2), scale them (Cohere, Granite, Falcon-H1,
MiniCPM3) or have a small network there (BERT's). Those are asked to do it themselves: their own forward pass runs with
the hidden states in place of the decoder's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from titans_ds.graft.call import Call, active
from titans_ds.graft.placement import device_of, dtype_of

_KNOWN = "_titans_linear_head"


def logits(base_model: nn.Module, last_hidden: Tensor) -> Tensor:
    """Logits [..., vocabulary] of last hidden states [..., H], as the base model itself computes them."""
    return cast(Tensor, (_linear if has_linear_head(base_model) else _own)(base_model, last_hidden))


@torch.no_grad()
def has_linear_head(base_model: nn.Module) -> bool:
    """Whether the output embedding alone makes the logits: tried once on two large hidden states, by every rank.

    So it is said, too, of a model that asks a part of its decoder, and can't be given hidden states.
    """
    known = getattr(base_model, _KNOWN, None)
    if known is None:
        embedding: nn.Module = base_model.get_output_embeddings()  # type: ignore[operator]
        width = int(cast(Any, base_model).config.get_text_config().hidden_size)
        hidden = 1000 * torch.arange(2 * width, device=device_of(embedding, base_model)).view(2, width).sin()
        hidden = hidden.to(dtype_of(base_model))
        own = _own(base_model, hidden)
        ours = _linear(base_model, hidden) if getattr(embedding, "in_features", width) == width else None
        known = own is None or (ours is not None and ours.shape == own.shape and torch.allclose(ours, own, rtol=1e-2))
        object.__setattr__(base_model, _KNOWN, known)
    return bool(known)


def decoder_of(base_model: nn.Module) -> nn.Module:
    """The base model without its language-modelling head."""
    base: Any = base_model
    return cast(nn.Module, getattr(base, base.base_model_prefix, None) or base.model)


def _linear(base_model: nn.Module, last_hidden: Tensor) -> Tensor:
    return cast(Tensor, base_model.get_output_embeddings()(last_hidden))  # type: ignore[operator]


def _own(base_model: nn.Module, last_hidden: Tensor) -> Tensor | None:
    """None where the model did not ask its decoder. `forward` itself, and a call: its hooks are for passes of texts."""
    rows = last_hidden.reshape(1, -1, last_hidden.shape[-1])
    ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
    answer = _Answer(rows)
    with active(base_model, Call), _answering(decoder_of(base_model), answer):
        found: Tensor = base_model.forward(input_ids=ids, use_cache=False, return_dict=True).logits
    return found.view(*last_hidden.shape[:-1], -1) if answer.given else None


class _Answer:
    """A decoder's output that holds last hidden states and nothing else."""

    def __init__(self, last_hidden: Tensor) -> None:
        self.last_hidden_state, self.given = last_hidden, False

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _answering(decoder: nn.Module, answer: _Answer) -> Iterator[None]:
    """Inside, the decoder gives this answer, whatever it is given."""

    def forward(*_: Any, **__: Any) -> _Answer:
        answer.given = True
        return answer

    before = decoder.__dict__.get("forward")
    object.__setattr__(decoder, "forward", forward)
    try:
        yield
    finally:
        if before is None:
            del decoder.__dict__["forward"]
        else:
            object.__setattr__(decoder, "forward", before)
