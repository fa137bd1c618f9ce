"""Logits are the base model's own, whatever it does with the last hidden states."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import titans_ds
from tests.support.model_types import tiny_model
from titans_ds.graft.head import has_linear_head
from titans_ds.memory import READ
from titans_ds.training.module import PlainModel, TrainingModule

CHANGED: dict[str, dict[str, float]] = {
    "gemma2": {"final_logit_softcapping": 0.1},
    "cohere": {},
    "granite": {"logits_scaling": 8.0},
    "falcon_h1": {"lm_head_multiplier": 0.25},
    "minicpm3": {},
    "electra": {},
}


@pytest.mark.parametrize("model_type", [*CHANGED, "llama", "opt"])
def test_losses_are_those_of_the_base_models_own_logits(model_type: str) -> None:
    base = tiny_model(model_type, **CHANGED.get(model_type, {}))
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    assert has_linear_head(base) == (model_type not in CHANGED)
    labels, mask, reset = ids.roll(-1, 1), None, torch.zeros(2, dtype=torch.bool)
    losses = nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="none").view(2, -1)
    plain = TrainingModule(PlainModel(base), loss_chunk_tokens=5)
    torch.testing.assert_close(plain(ids, labels, mask, reset, None, READ)[1], losses.sum(1))
    model = titans_ds.attach(base)
    del base._titans_linear_head
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody called the model without a memory
        found = model.logits(model.read_write(ids, plan=READ).last_hidden)
    torch.testing.assert_close(found, expected)
