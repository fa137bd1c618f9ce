"""The optimizer's step: skipped as a whole where one entry of one gradient is not finite, and otherwise AdamW's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from titans_ds.zero.adamw import SkippableAdamW


def parameters() -> list[nn.Parameter]:
    """One of them empty, as a rank's share may be."""
    made = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(0))]
    for parameter in made:
        parameter.grad = torch.full_like(parameter, 0.5)
    return made


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_one_entry_that_is_not_finite_skips_the_step(value: float, where: int) -> None:
    given = parameters()
    optimizer = SkippableAdamW(given, lr=0.1)
    given[where].grad.view(-1)[-1] = value
    optimizer.prepare(0.1, skip=False)
    optimizer.step()
    assert not optimizer.applied
    assert all(bool((p == 1).all()) for p in given)
    assert not optimizer.state


def test_gradients_whose_norm_overflows_are_finite() -> None:
    given, theirs = parameters(), parameters()
    for p in (*given, *theirs):
        p.grad.fill_(3e38)
    optimizer, reference = SkippableAdamW(given, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    optimizer.prepare(0.1, skip=False)
    optimizer.step()
    reference.step()
    assert optimizer.applied
    torch.testing.assert_close(given, theirs)


def test_another_ranks_word_skips_the_step() -> None:
    given = parameters()
    optimizer = SkippableAdamW(given, lr=0.1)
    optimizer.agree = lambda flag: ~flag
    optimizer.prepare(0.1, skip=False)
    optimizer.step()
    assert not optimizer.applied
    assert bool((given[0] == 1).all())


def test_without_gradients_there_is_nothing_to_skip() -> None:
    given = parameters()
    for p in given:
        p.grad = None
    optimizer = SkippableAdamW(given, lr=0.1)
    optimizer.prepare(0.1, skip=False)
    optimizer.step()
    assert optimizer.applied
