"""What a delta memory holds of a text: how much each token wrote, how much is still there, what a read recalls.

A state is the sum of what its tokens wrote. With the residuals u_s = b_s (v_s - a_s S_(s-1) k_s),

    S_T = sum over s of c_s u_s k_s^T        c_s = a_(s+1) ... a_T
    o = S_T q = sum over s of c_s (k_s . q) u_s

so that a read divides, exactly, into one term for every token that was read before.

Legend of shape suffixes: T tokens that were read, Q queries, N heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from titans_ds.errors import ConfigError
from titans_ds.memory.delta.memory import DeltaMemory, Writes
from titans_ds.memory.interface import READ
from titans_ds.memory.state import LayerState

_REST = ("mask_BT", "reset_B", "plan", "queries_ND", "trace")  # of a memory's call, after hidden states and state


@dataclass
class WriteLog:
    """What one text wrote into one layer's memory, and what was read afterwards; filled inside `recorded`.

    Args:
        keys, values, residuals: k_s, v_s and u_s of every token that was read, [N, D] each; a token that writes nothing
            has u_s = 0.
        log_keep: log a_s of every token, [N].
        norms, ranks: of the state after every `stride`-th token: Frobenius norm, and stable rank |S|_F^2 / |S|_2^2, of
            all heads together.
        stride: tokens between two of these.
        state: S after the last token, [N, D, D].
        queries: q of every token that was read without writing, [N, D] each.
    """

    stride: int = 64
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)
    log_keep: list[Tensor] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    state: Tensor = field(default_factory=lambda: torch.empty(0))
    queries: list[Tensor] = field(default_factory=list)

    def written(self) -> Tensor:
        """|u_s| of every token, all heads together, [T]."""
        norms: Tensor = torch.stack(self.residuals).flatten(1).norm(dim=1)
        return norms

    def still_there(self) -> Tensor:
        """1 - |S_T k_s - v_s|^2 / |v_s|^2, [T]: 1 where the memory still answers a token's key with its value, 0 (or
        less) where nothing is left of it, or it wrote nothing."""
        keys, values = torch.stack(self.keys), torch.stack(self.values)
        error = torch.einsum("nvk,tnk->tnv", self.state, keys) - values
        held = 1 - error.square().sum((1, 2)) / values.square().sum((1, 2)).clamp(min=1e-12)
        return held.where(self.written() > 0, torch.zeros_like(held))

    def shares(self) -> Tensor:
        """Each token's share of what a query reads: its term's part along o, divided by |o|^2, [Q, T].

        A query's shares add up to 1, and to 0 where it reads nothing. Some may be negative: what works against o.
        """
        keys, residuals, queries = torch.stack(self.keys), torch.stack(self.residuals), torch.stack(self.queries)
        log_keep = torch.stack(self.log_keep)
        kept_TN = (log_keep.sum(0) - log_keep.cumsum(0)).exp()
        match_QTN = torch.einsum("qnd,tnd->qtn", queries, keys) * kept_TN
        reads_QND = torch.einsum("qtn,tnd->qnd", match_QTN, residuals)
        along_QTN = torch.einsum("tnd,qnd->qtn", residuals, reads_QND)
        return (match_QTN * along_QTN).sum(-1) / reads_QND.square().sum((1, 2)).clamp(min=1e-12).unsqueeze(-1)


@contextmanager
def recorded(memory: DeltaMemory, log: WriteLog) -> Iterator[None]:
    """Inside, every call of the memory with a batch of one is written down: what it writes, or what it asks.

    Token by token, in double precision, whatever backend the call itself takes: for looking at texts of some thousand
    tokens. MAC's own queries are none of the text's, and are not for this.

    Raises:
        ConfigError: a call has more than one sample.
    """

    def note(hidden: Tensor, state: LayerState | None, *given: Any, **named: Any) -> None:
        rest = dict(zip(_REST, given, strict=False)) | named
        plan, reset = rest.get("plan", READ), rest.get("reset_B")
        if hidden.shape[0] != 1:
            raise ConfigError(f"a memory is looked at one text at a time; this call has {hidden.shape[0]}")
        if state is None or (reset is not None and bool(reset[0])):
            state = memory.initial_state(1, hidden[:, :1])
        with torch.no_grad():
            if plan.write:
                _follow_writes(log, memory.writes(hidden, state, rest.get("mask_BT"), plan), state)
            elif hidden.shape[1]:
                log.queries += memory._queries(hidden, None, plan, None, None)[0][0].double().unbind(0)

    handle = memory.register_forward_pre_hook(lambda _, args, kwargs: note(*args, **kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _follow_writes(log: WriteLog, writes: Writes, state: LayerState) -> None:
    """The rule of naive.py, with its residuals kept."""
    keys, values, step = (t[0].double() for t in (writes.keys, writes.values, writes.step))
    log_keep = torch.zeros_like(step) if writes.log_keep is None else writes.log_keep[0].double()
    matrices = state["matrices"][0].double()
    for key, value, share, keep in zip(keys, values, step, log_keep, strict=True):
        matrices = matrices * keep.exp()[:, None, None]
        residual = share[:, None] * (value - torch.einsum("nvk,nk->nv", matrices, key))
        matrices = matrices + residual[:, :, None] * key[:, None, :]
        log.keys.append(key)
        log.values.append(value)
        log.residuals.append(residual)
        log.log_keep.append(keep)
        if len(log.keys) % log.stride == 0:
            squares = torch.linalg.svdvals(matrices.float()).square()
            log.norms.append(float(squares.sum().sqrt()))
            log.ranks.append(float(squares.sum() / squares.max().clamp(min=1e-24)))
    log.state = matrices
