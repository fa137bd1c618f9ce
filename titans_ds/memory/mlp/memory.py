"""MLPMemory: one layer's memory. Reads with the state it is given, and returns the state that it would write.

Legend of shape suffixes: B batch, T tokens, H model width, D memory dim, N batch x heads, R chunks of C tokens,
S = R C slots, d width of a head.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_ds.memory.graphs import Answer
from titans_ds.memory.interface import UNCHANGED, Controls, LayerTrace, Pass
from titans_ds.memory.mlp import chunks, features, kernels, network, write_function
from titans_ds.memory.mlp.chunks import Stream, Work
from titans_ds.memory.mlp.gates import GateValues, coefficients, shares
from titans_ds.memory.mlp.network import Form, Weights
from titans_ds.memory.mlp.optimizers import Fast
from titans_ds.memory.mlp.parts import MemoryParts, Written, first_state, pack, unpack
from titans_ds.memory.mlp.rule import Inner, Pairs, pool
from titans_ds.memory.positions import Positions, last_token
from titans_ds.memory.projection import merge_heads, split_heads
from titans_ds.memory.state import LayerState, choose_rows


class MLPMemory(MemoryParts):
    """The memory of one layer: see MemoryParts for its arguments."""

    @property
    def graph_key(self) -> Hashable:
        """The kernels that were chosen: a graph captured with others must not be replayed."""
        return kernels.chosen()

    @property
    def launches_many(self) -> bool:
        """Chunk after chunk; a whole segment as one chunk is a few large products."""
        return self.config.rule.chunk_size is not None

    @property
    def is_parallel(self) -> bool:
        """Where chunk follows chunk, half the samples take as long as all."""
        return self.config.rule.chunk_size is None

    def compute(
        self,
        hidden_BTH: Tensor,
        state: LayerState | None,
        mask_BT: Tensor | None,
        reset_B: Tensor | None,
        plan: Pass,
        queries_ND: Tensor | None,
        trace: LayerTrace | None,
    ) -> Answer:
        """See LayerMemory.forward. Where the queries are convolved, a read moves the state on by its tokens too."""
        if state is not None and not hidden_BTH.shape[1]:
            return Answer(hidden_BTH, self._close(state, plan), {})
        fresh = state is None
        state = self._start(hidden_BTH, state, reset_B, trace)
        positions = Positions(mask_BT, hidden_BTH.shape[0], hidden_BTH.shape[1], hidden_BTH.device)
        inner = self._inner(state, plan, trace)
        call = _Call(state, positions, unpack(state, self.config), inner, plan, trace, fresh)
        if trace is not None and trace.again and trace.queries is not None:
            queries = trace.queries.to(hidden_BTH.device, non_blocking=True)
        elif queries_ND is None:
            queries = self.queries(hidden_BTH, state, positions, plan.controls.query == "key")
        else:
            queries = queries_ND.to(hidden_BTH.dtype).expand(hidden_BTH.shape[0], -1, -1)
            queries = features.normalize(queries, self.config.heads, self.config.features)
        source_BTH = hidden_BTH if plan.through_base else hidden_BTH.detach()
        moved = self._moved(source_BTH, call)
        if not plan.write:
            return Answer(self._finish(self._read(queries, call), queries, call), state | moved, {})
        with plan.writing():
            written = self.written(source_BTH, state, positions)
        if self.config.rule.chunk_size is None:
            read, new, stats = self._write_whole(queries, written, call)
        else:
            read, new, stats = self._write_chunks(queries, written, call, by_token=queries_ND is None)
        return Answer(self._finish(read, queries, call), state | moved | new, stats)

    def close(self, state: LayerState, controls: Controls = UNCHANGED) -> LayerState:
        """Write the unfinished chunk of every sample now, as a shorter one. Nothing is pending afterwards.

        Without this the last tokens of a text can't be read: a token reads what finished chunks wrote. The next token
        starts a chunk of its own. A state without anything pending comes back as it is.

        Args:
            state: see first_state in parts.py.
            controls: changes for control experiments, those that the state was written with.
        """
        if (self.config.rule.chunk_size or 1) == 1:
            return state
        no_tokens = state["pending_keys"][:, :0]
        closed: LayerState = self(no_tokens, state, plan=Pass(controls=controls)).state
        return closed

    def _close(self, state: LayerState, plan: Pass) -> LayerState:
        no_tokens = Positions(None, state["w0"].shape[0], 0, state["w0"].device)
        call = _Call(state, no_tokens, unpack(state, self.config), self._inner(state, plan, None), plan, None, False)
        # The chunk as if it were full, with one slot more than was carried; slots without a token have no pair.
        keys, values, logits, paired = (
            F.pad(state[f"pending_{name}"], (0, 0, 0, 1)) for name in ("keys", "values", "gates", "paired")
        )
        with plan.writing():
            work = self._work(Written(keys, values, logits, paired.squeeze(-1) > 0), None, (1, 0), call)
        _, fast = chunks.run(call.fast, work, call.inner, None, plan.writing)
        nothing = {name: torch.zeros_like(t) for name, t in state.items() if name.startswith("pending_")}
        return state | pack(fast, self.config) | nothing

    @property
    def reads_own_writes(self) -> bool:
        """Whether a token reads what chunks before it have written in the same call."""
        return self.config.rule.chunk_size is not None

    def keeps_little(self, plan: Pass) -> bool:
        """Whether a write's graph is its keys, values and what it wrote: one chunk a call, and back by hand."""
        if not plan.derived or self.reads_own_writes or self.config.residual_norm:
            return False  # without a look at a norm's parameters, which ZeRO-3 gathers inside the memory alone
        return write_function.covers(self.config.rule, self.form(1))

    def initial_state(self, batch_size: int, like_BTH: Tensor) -> LayerState:
        """W_0 for every sample, fp32 (fp64 where it is), no momentum, no tokens before."""
        weights: list[Tensor] = [getattr(self, f"initial_w{level}") for level in range(self.config.depth)]
        return first_state(weights, batch_size, like_BTH, self.config, self.tail_length)

    def _finish(self, read_NTd: Tensor, queries: Tensor, call: _Call) -> Tensor:
        trace = call.trace
        if trace is not None and trace.again:
            return trace.surrogate(read_NTd)
        if trace is not None:
            read_NTd = trace.trace_read(queries, read_NTd) + self._zero(trace, call).to(read_NTd.dtype)
        return self.output(read_NTd)

    def _zero(self, trace: LayerTrace, call: _Call) -> Tensor:
        """0, made of all that writes alone use: so that it gets a gradient, 0, in the first phase too.

        ZeRO-3 adds a parameter's gradients to those of the step before, unless there is one in a step's first backward.
        """
        token = Positions(None, trace.hidden.shape[0], 1, trace.hidden.device)
        written = self.written(trace.hidden[:, :1], call.state, token)
        own = [getattr(self, f"initial_w{level}") for level in range(self.config.depth)]
        norm = self.form(1).norm or ()
        used = [written.keys, written.values, written.logits, call.inner.step_sizes, *own, *norm]
        return torch.stack([0 * t.to(call.inner.step_sizes.dtype).sum() for t in used]).sum()

    def _start(
        self, hidden_BTH: Tensor, state: LayerState | None, reset_B: Tensor | None, trace: LayerTrace | None
    ) -> LayerState:
        if state is None:
            state = self.initial_state(hidden_BTH.shape[0], hidden_BTH[:, :1].detach())
        elif reset_B is not None:
            first = self.initial_state(hidden_BTH.shape[0], hidden_BTH[:, :1].detach())
            state = {name: choose_rows(reset_B, first[name].to(given.dtype), given) for name, given in state.items()}
        # A traced read goes back to what wrote the weights, and to W_0, in its second phase only.
        cut = trace is not None and not trace.again
        return {name: t.detach() if cut else t for name, t in state.items()}

    def _inner(self, state: LayerState, plan: Pass, trace: LayerTrace | None) -> Inner:
        controls, form = plan.controls, self.form(state["w0"].shape[0])
        if trace is not None and not trace.again and form.norm is not None:
            form = replace(form, norm=(form.norm[0].detach(), form.norm[1].detach()))  # the second phase has it whole
        steps = self.config.inner_steps if controls.inner_steps is None else controls.inner_steps
        if plan.write or trace is not None:
            sizes = self.step_sizes(state["w0"])
            sizes = sizes if controls.sign == 1 else sizes * controls.sign
        else:  # a read needs none
            sizes = state["w0"].new_empty(0)
        return Inner(self.config.rule, form, sizes, steps, plan.derived, self.fan)

    def _moved(self, hidden_BTH: Tensor, call: _Call) -> LayerState:
        """What tokens leave behind, beside writes."""
        moved: LayerState = {}
        if self.tail_length and (call.plan.write or self.config.features.convolve_queries):
            moved["tail_hidden"] = features.next_tail(call.state["tail_hidden"], hidden_BTH, call.positions)
        if self.config.token_shift and call.plan.write:
            moved |= last_token(hidden_BTH, call.positions.mask_BT, call.state)
        return moved

    def _read(self, queries_BTD: Tensor, call: _Call) -> Tensor:
        """f_W(q) with the weights that the call started with, [N, T, d]."""
        return network.forward(call.fast.weights, split_heads(queries_BTD, self.config.heads), call.inner.form)

    def _write_whole(self, queries_BTD: Tensor, written: Written, call: _Call) -> tuple[Tensor, LayerState, LayerState]:
        """All tokens of the call as one chunk."""
        with call.plan.writing():
            # Plain gradient descent without a token to write changes nothing.
            rule = self.config.rule
            certain = written.paired is None or (rule.optimizer == "sgd" and rule.forget_gate == 0)
            work = self._work(written, None, (1, int(certain)), call)
        _, fast = chunks.run(call.fast, work, call.inner, None, call.plan.writing)
        return self._read(queries_BTD, call), pack(fast, self.config), self._stats(fast, work, call)

    def _write_chunks(
        self, queries_BTD: Tensor, written: Written, call: _Call, by_token: bool
    ) -> tuple[Tensor, LayerState, LayerState]:
        """Chunk after chunk of the samples' streams; reads in between, unless the queries are not the tokens'."""
        state, heads = call.state, self.config.heads
        stream = Stream(call.positions, self.config.rule.chunk_size or 1, state["pending_count"], call.fresh)
        with call.plan.writing():
            laid, pending = _lay_out(written, state, stream)
            certain = 0 if self.config.token_shift else stream.num_certain
            finished_BR = None if stream.full else stream.finished_BR
            work = self._work(laid, finished_BR, (stream.num_writes, certain), call)
        queries = self._chunked(stream.lay_out(None, queries_BTD), stream.num_reads) if by_token else None
        reads, fast = chunks.run(call.fast, work, call.inner, queries, call.plan.writing)
        new, stats = pack(fast, self.config) | pending, self._stats(fast, work, call)
        if reads is None:
            return self._read(queries_BTD, call), new, stats
        if stream.aligned:
            return reads.flatten(1, 2)[:, : stream.num_tokens], new, stats
        read_BTD = stream.gather(merge_heads(reads.flatten(1, 2), heads))
        read_NTd = split_heads(read_BTD, heads)
        if not call.positions.all_written:
            mask_NT1 = call.positions.mask_BT.repeat_interleave(heads, dim=0).unsqueeze(-1)
            read_NTd = torch.where(mask_NT1, read_NTd, self._read(queries_BTD, call))
        return read_NTd, new, stats

    def _chunked(self, x_BSD: Tensor, num_chunks: int) -> Tensor:
        """[B, S, heads * d] (or [B, S, heads, d]) -> [N, R, C, d]."""
        return torch.unflatten(split_heads(x_BSD, self.config.heads), 1, (num_chunks, -1))

    def _work(self, laid: Written, finished_BR: Tensor | None, counts: tuple[int, int], call: _Call) -> Work:
        """Split into heads and chunks, pool, and compute what the gates make of the gradients.

        Args:
            laid: by slot.
            finished_BR: None: all that have something to write.
            counts: chunks that can be finished; those at the start that are.
            call: of the memory.
        """
        config, rule = self.config, self.config.rule
        num_chunks = 1 if rule.chunk_size is None else laid.keys.shape[1] // rule.chunk_size
        keys, values = self._chunked(laid.keys, num_chunks), self._chunked(laid.values, num_chunks)
        active = None
        if laid.paired is not None:
            active = torch.unflatten(laid.paired.repeat_interleave(config.heads, dim=0), 1, (num_chunks, -1))
        logits = self._gate_logits(laid.logits, num_chunks)
        if config.write == "pooled":
            keys, values, logits, active = _pooled(keys, values, logits, active)
        gates = GateValues(active, **dict(zip(rule.token_gates, logits, strict=True)))
        finished = None if finished_BR is None else finished_BR.repeat_interleave(config.heads, dim=0)
        if active is not None:
            finished = active.any(dim=-1) if finished is None else finished & active.any(dim=-1)
        coefficients_ = coefficients(gates, rule, keys.new_empty(keys.shape[:3], dtype=call.fast.weights[0].dtype))
        return Work(Pairs(keys, values), active, coefficients_, finished, *counts)

    def _gate_logits(self, laid_BSG: Tensor, num_chunks: int) -> list[Tensor]:
        """[B, S, gates * heads] -> of every gate [N, R, C]."""
        if not self.config.rule.token_gates:
            return []
        by_gate = torch.unflatten(laid_BSG, -1, (-1, self.config.heads)).permute(2, 0, 3, 1).flatten(1, 2)
        return list(torch.unflatten(by_gate, 2, (num_chunks, -1)).unbind())

    def _stats(self, fast: Fast, work: Work, call: _Call) -> LayerState:
        return _write_stats(call.fast, fast, work, call.inner.form, self.config.heads) if call.plan.stats else {}


def _pooled(
    keys: Tensor, values: Tensor, logits: list[Tensor], active: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    """The means over a chunk's pairs to store, as a chunk of one: [N, R, 1, d], and of logits [N, R, 1]."""
    if active is None:
        means = (keys.mean(dim=2, keepdim=True), values.mean(dim=2, keepdim=True))
        return *means, [part.mean(dim=2, keepdim=True) for part in logits], None
    of_pairs = shares(active, keys.dtype)
    if logits:
        of_gates = shares(active, logits[0].dtype)
        logits = [pool(part.unsqueeze(-1), of_gates).squeeze(-1) for part in logits]
    return pool(keys, of_pairs), pool(values, of_pairs), logits, active.any(dim=-1, keepdim=True)


@dataclass(frozen=True)
class _Call:
    """One call of a memory: the state it was given (fresh: none), its tokens, and the inner problem."""

    state: LayerState
    positions: Positions
    fast: Fast
    inner: Inner
    plan: Pass
    trace: LayerTrace | None
    fresh: bool


def _lay_out(written: Written, state: LayerState, stream: Stream) -> tuple[Written, LayerState]:
    """Carried and new tokens by slot, and the unfinished chunk to carry on."""
    names = ("keys", "values", "gates", "paired")
    if stream.full and written.paired is None:
        return written, {f"pending_{n}": state[f"pending_{n}"] for n in (*names, "count")}  # nothing, as before
    paired_BT = stream.positions.mask_BT if written.paired is None else written.paired
    paired = paired_BT.to(state["pending_paired"].dtype).unsqueeze(-1)
    laid = [
        stream.lay_out(state[f"pending_{name}"], x)
        for name, x in zip(names, (written.keys, written.values, written.logits, paired), strict=True)
    ]
    pending = {
        f"pending_{n}": stream.left_over(x).to(state[f"pending_{n}"].dtype) for n, x in zip(names, laid, strict=True)
    }
    count = stream.total_B % stream.chunk_size
    pending["pending_count"] = count.to(state["pending_count"].dtype)
    return Written(laid[0], laid[1], laid[2], laid[3].squeeze(-1) > 0), pending


@torch.no_grad()
def _write_stats(before: Fast, after: Fast, work: Work, form: Form, heads: int) -> LayerState:
    """inner_loss_before, inner_loss_after (means over the pairs written, sums over heads) and write_norm, each [B]."""
    keys, values = work.pairs.keys, work.pairs.values
    stored = keys.new_ones(keys.shape[:3], dtype=torch.bool) if work.active_NRC is None else work.active_NRC
    stored = stored if work.finished_NR is None else stored & work.finished_NR.unsqueeze(-1)
    shares_NS = shares(stored.flatten(1), torch.float32)
    keys, values = keys.flatten(1, 2), values.flatten(1, 2)

    def loss(weights: Weights) -> Tensor:
        return torch.unflatten(network.loss(weights, keys, values, shares_NS, form), 0, (-1, heads)).sum(dim=1)

    moved = [(a - b).flatten(1).square().sum(dim=1) for a, b in zip(after.weights, before.weights, strict=True)]
    square = torch.unflatten(torch.stack(moved).sum(dim=0), 0, (-1, heads)).sum(dim=1)
    return {
        "inner_loss_before": loss(before.weights),
        "inner_loss_after": loss(after.weights),
        "write_norm": square.sqrt(),
    }
