"""What a delta memory holds of a text: the residuals that it wrote add up to its state, their shares to its reads."""

from __future__ import annotations

import pytest
import torch

from titans_ds.errors import ConfigError
from titans_ds.memory import READ, WRITE
from titans_ds.memory.delta.config import DeltaConfig
from titans_ds.memory.delta.memory import DeltaMemory
from titans_ds.memory.delta.recall import WriteLog, recorded

TOKENS, ASKED, WIDTH = 40, 7, 24


def read_and_ask(config: DeltaConfig) -> tuple[WriteLog, DeltaMemory, dict[str, torch.Tensor], torch.Tensor]:
    """A text read in three calls, one of them with padding in the middle, then another asked of it."""
    torch.manual_seed(0)
    memory, log = DeltaMemory(WIDTH, config, 3).double(), WriteLog(stride=8)
    for parameter in memory.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    text, asked = torch.randn(1, TOKENS, WIDTH).double(), torch.randn(1, ASKED, WIDTH).double()
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[0, 5:9] = False
    state = memory.initial_state(1, text)
    with recorded(memory, log), torch.no_grad():
        for piece, keep in ((text[:, :20], mask), (text[:, 20:21], None), (text[:, 21:], None)):
            state = memory(piece, state, keep, plan=WRITE).state
        memory(asked, state, plan=READ)
    return log, memory, state, asked


@pytest.mark.parametrize(
    "config",
    [
        DeltaConfig(dim=8),
        DeltaConfig(dim=16, heads=2, step_size="token", forget_gate=True),
        DeltaConfig(dim=8, token_shift=False, query_projection="learned"),
    ],
    ids=["delta", "gated", "unshifted"],
)
def test_terms_add_up_to_state_and_reads(config: DeltaConfig) -> None:
    log, memory, state, asked = read_and_ask(config)
    torch.testing.assert_close(log.state, state["matrices"][0], rtol=1e-10, atol=1e-10)
    keys, residuals = torch.stack(log.keys), torch.stack(log.residuals)
    log_keep = torch.stack(log.log_keep)
    kept = (log_keep.sum(0) - log_keep.cumsum(0)).exp()
    torch.testing.assert_close(
        torch.einsum("tnv,tnk,tn->nvk", residuals, keys, kept), log.state, rtol=1e-10, atol=1e-10
    )
    shares = log.shares()
    assert shares.shape == (ASKED, TOKENS)
    torch.testing.assert_close(shares.sum(1), torch.ones(ASKED).double(), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        queries = memory._queries(asked, None, READ, None, None)[0][0]
    torch.testing.assert_close(torch.stack(log.queries), queries)


def test_what_was_written_last_is_there_and_what_was_never_written_is_not() -> None:
    """b = 1 stores a pair whole; padding and a text's first token, which has no token before it, write nothing."""
    log, memory, _, _ = read_and_ask(DeltaConfig(dim=8, initial_step_size=0.5))
    written, held = log.written(), log.still_there()
    assert (written == 0).nonzero().flatten().tolist() == [0, 5, 6, 7, 8]
    assert held[[0, 5, 6, 7, 8]].abs().max() == 0
    assert bool((held <= 1 + 1e-9).all())
    with torch.no_grad():
        memory.step_bias.fill_(40.0)
        whole, text = WriteLog(stride=8), torch.randn(1, TOKENS, WIDTH).double()
        with recorded(memory, whole):
            memory(text, None, plan=WRITE)
    assert whole.still_there()[-1] == pytest.approx(1.0, abs=1e-9)
    assert whole.still_there()[:8].mean() < 0.9
    assert len(whole.norms) == len(whole.ranks) == TOKENS // 8
    assert all(1 <= rank <= 8 for rank in whole.ranks)


def test_one_text_at_a_time() -> None:
    memory = DeltaMemory(WIDTH, DeltaConfig(dim=8), 0)
    with recorded(memory, WriteLog()), pytest.raises(ConfigError, match="one text at a time; this call has 2"):
        memory(torch.randn(2, 4, WIDTH), None)
    memory(torch.randn(2, 4, WIDTH), None)  # outside of it as before
