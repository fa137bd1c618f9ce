"""NeuralMemory: one layer's memory. Reads with the state it is given, and returns the state that it would write.

Legend of shape suffixes: B batch, T tokens, H model width, D memory dim, N batch x heads, R chunks of C tokens,
S = R C slots, d width of a head.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from titans_ds.config import MemoryConfig
from titans_ds.memory import chunks, features, network
from titans_ds.memory.chunks import Stream, Work
from titans_ds.memory.fast_state import first_state, pack, unpack
from titans_ds.memory.gates import GateValues, coefficients, log_keeps, shares
from titans_ds.memory.graphed import Inputs, MemoryGraphs
from titans_ds.memory.optimizers import Fast
from titans_ds.memory.parts import MemoryParts, Written
from titans_ds.memory.positions import Positions, last_token
from titans_ds.memory.replay import Record
from titans_ds.memory.rule import Controls, Inner, Pairs, pool
from titans_ds.memory.state import LayerState, choose_rows
from titans_ds.memory.statistics import write_stats


@dataclass(frozen=True)
class Access:
    """What one call does beside the read.

    Args:
        write: compute the state after this segment; a chunked memory then reads what earlier chunks of it wrote.
        graph: keep the autograd graph of the write (second order).
        stats: report inner losses and the write's norm.
        controls: changes for control experiments.
        through_base: with `graph`, writes see the hidden states attached to the graph that made them.
        derived: with `graph`, take the hand-derived backward of the write, where there is one.
        record: first phase of the second order: reads leave their gradient here; see titans_ds.memory.replay.
        replay: second phase: write a segment's record again, and answer with <f_W(q), g> in place of the reads.
    """

    write: bool = False
    graph: bool = False
    stats: bool = False
    controls: Controls = field(default_factory=Controls)
    through_base: bool = False
    derived: bool = True
    record: Record | None = None
    replay: Record | None = None

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """The context that writes run in."""
        return contextlib.nullcontext() if self.graph else torch.no_grad()


class NeuralMemory(MemoryParts):
    """The memory of one layer: see MemoryParts for its arguments."""

    def __init__(self, hidden_size: int, config: MemoryConfig, layer_index: int) -> None:
        super().__init__(hidden_size, config, layer_index)
        self.graphs = MemoryGraphs()

    def forward(
        self,
        hidden_BTH: Tensor,
        state: LayerState | None,
        mask_BT: Tensor | None = None,
        reset_B: Tensor | None = None,
        access: Access = Access(),
        queries_ND: Tensor | None = None,
    ) -> tuple[Tensor, LayerState, LayerState]:
        """Read every token with the given state; write the segment, if asked.

        Args:
            hidden_BTH: input of the layer that this memory is grafted on.
            state: see titans_ds.memory.state; None starts every sample from W_0.
            mask_BT: true (1) where a token may be written; all of them if None.
            reset_B: true where a sample starts from W_0 whatever the state says.
            access: see Access.
            queries_ND: read these N queries instead of the tokens', with the weights from before this segment (MAC).

        Returns:
            read [B, T, H] (or [B, N, H]; or the answer [1] of a replay); the state after the write (or the given one,
            moved on by these tokens where the queries are convolved); stats, each [B]: inner_loss_before,
            inner_loss_after, write_norm.
        """
        inputs = Inputs(hidden_BTH, state, mask_BT, reset_B, queries_ND)
        replayed = self.graphs.answer(self, inputs, access)
        if replayed is not None:
            return replayed
        return self.compute(hidden_BTH, state, mask_BT, reset_B, access, queries_ND)

    def compute(
        self,
        hidden_BTH: Tensor,
        state: LayerState | None,
        mask_BT: Tensor | None,
        reset_B: Tensor | None,
        access: Access,
        queries_ND: Tensor | None,
    ) -> tuple[Tensor, LayerState, LayerState]:
        """`forward`, kernel by kernel. Never waits for the device, so that it can be captured."""
        fresh = state is None
        state = self._start(hidden_BTH, state, reset_B, access)
        positions = Positions(mask_BT, hidden_BTH.shape[0], hidden_BTH.shape[1], hidden_BTH.device)
        call = _Call(state, positions, unpack(state, self.config), self._inner(state, access), access, fresh)
        if access.replay is not None and access.replay.queries is not None:
            queries = access.replay.queries.to(hidden_BTH.device, non_blocking=True)
        elif queries_ND is None:
            queries = self.queries(hidden_BTH, state, positions, access.controls.query == "key")
        else:
            queries = queries_ND.to(hidden_BTH.dtype).expand(hidden_BTH.shape[0], -1, -1)
            queries = features.normalize(queries, self.config.heads, self.config.features)
        source_BTH = hidden_BTH if access.through_base else hidden_BTH.detach()
        moved = self._moved(source_BTH, call)
        if not access.write:
            return self._say(self._read(queries, call), queries, call), state | moved, {}
        with access.writing():
            written = self.written(source_BTH, state, positions)
        if self.config.rule.chunk_size is None:
            read, new, stats = self._write_whole(queries, written, call)
        else:
            read, new, stats = self._write_chunks(queries, written, call, by_token=queries_ND is None)
        return self._say(read, queries, call), state | moved | new, stats

    def initial_state(self, batch_size: int, like_BTH: Tensor) -> LayerState:
        """W_0 for every sample, fp32 (fp64 where it is), no momentum, no tokens before."""
        weights: list[Tensor] = [getattr(self, f"initial_w{level}") for level in range(self.config.depth)]
        return first_state(weights, batch_size, like_BTH, self.config, self.tail_length)

    def _say(self, read_NTd: Tensor, queries: Tensor, call: _Call) -> Tensor:
        access = call.access
        if access.replay is not None:
            return access.replay.answer(read_NTd)
        if access.record is not None:
            read_NTd = access.record.listen(queries, read_NTd) + self._nothing(access.record, call).to(read_NTd.dtype)
        return self.output(read_NTd)

    def _nothing(self, record: Record, call: _Call) -> Tensor:
        """0, made of all that writes alone use: so that it gets a gradient, 0, in the first phase too.

        ZeRO-3 adds a parameter's gradients to those of the step before, unless there is one in a step's first backward.
        """
        token = Positions(None, record.hidden.shape[0], 1, record.hidden.device)
        written = self.written(record.hidden[:, :1], call.state, token)
        own = [getattr(self, f"initial_w{level}") for level in range(self.config.depth)]
        norm = self.form(1).norm or ()
        used = [written.keys, written.values, written.logits, call.inner.step_sizes, *own, *norm]
        return torch.stack([0 * t.to(call.inner.step_sizes.dtype).sum() for t in used]).sum()

    def _start(
        self, hidden_BTH: Tensor, state: LayerState | None, reset_B: Tensor | None, access: Access
    ) -> LayerState:
        if state is None:
            state = self.initial_state(hidden_BTH.shape[0], hidden_BTH[:, :1].detach())
        elif reset_B is not None:
            first = self.initial_state(hidden_BTH.shape[0], hidden_BTH[:, :1].detach())
            state = {name: choose_rows(reset_B, first[name].to(given.dtype), given) for name, given in state.items()}
        # A recorded read goes back to what wrote the weights, and to W_0, in its second phase only.
        return dict(state) if access.record is None else {name: t.detach() for name, t in state.items()}

    def _inner(self, state: LayerState, access: Access) -> Inner:
        controls, form = access.controls, self.form(state["w0"].shape[0])
        if access.record is not None and form.norm is not None:
            form = replace(form, norm=(form.norm[0].detach(), form.norm[1].detach()))  # the second phase has it whole
        steps = self.config.inner_steps if controls.inner_steps is None else controls.inner_steps
        if access.write or access.record is not None or access.replay is not None:
            sizes = self.step_sizes(state["w0"])
            sizes = sizes if controls.sign == 1 else sizes * controls.sign
        else:  # a read needs none
            sizes = state["w0"].new_empty(0)
        return Inner(self.config.rule, form, sizes, steps, access.derived, self.fan)

    def _moved(self, hidden_BTH: Tensor, call: _Call) -> LayerState:
        """What tokens leave behind, beside writes."""
        moved: LayerState = {}
        if self.tail_length and (call.access.write or self.config.features.convolve_queries):
            moved["tail_hidden"] = features.next_tail(call.state["tail_hidden"], hidden_BTH, call.positions)
        if self.config.token_shift and call.access.write:
            moved |= last_token(hidden_BTH, call.positions.mask_BT, call.state)
        return moved

    def _read(self, queries_BTD: Tensor, call: _Call) -> Tensor:
        """f_W(q) with the weights that the call started with, [N, T, d]."""
        return network.forward(call.fast.weights, features.split_heads(queries_BTD, self.config.heads), call.inner.form)

    def _write_whole(self, queries_BTD: Tensor, written: Written, call: _Call) -> tuple[Tensor, LayerState, LayerState]:
        """All tokens of the call as one chunk."""
        with call.access.writing():
            # Plain gradient descent without a token to write changes nothing.
            rule = self.config.rule
            certain = written.paired is None or (rule.optimizer == "sgd" and rule.forget_gate == 0)
            work = self._work(written, None, (1, int(certain)), call)
        _, fast = chunks.run(call.fast, work, call.inner, None, call.access.writing)
        return self._read(queries_BTD, call), pack(fast, self.config), self._stats(fast, work, call)

    def _write_chunks(
        self, queries_BTD: Tensor, written: Written, call: _Call, by_token: bool
    ) -> tuple[Tensor, LayerState, LayerState]:
        """Chunk after chunk of the samples' streams; reads in between, unless the queries are not the tokens'."""
        state, heads = call.state, self.config.heads
        stream = Stream(call.positions, self.config.rule.chunk_size or 1, state["pending_count"], call.fresh)
        with call.access.writing():
            laid, pending = _lay_out(written, state, stream)
            certain = 0 if self.config.token_shift else stream.num_certain
            finished_BR = None if stream.full else stream.finished_BR
            work = self._work(laid, finished_BR, (stream.num_writes, certain), call)
        queries = self._chunked(stream.lay_out(None, queries_BTD), stream.num_reads) if by_token else None
        reads, fast = chunks.run(call.fast, work, call.inner, queries, call.access.writing)
        new, stats = pack(fast, self.config) | pending, self._stats(fast, work, call)
        if reads is None:
            return self._read(queries_BTD, call), new, stats
        if stream.aligned:
            return reads.flatten(1, 2)[:, : stream.num_tokens], new, stats
        read_BTD = stream.gather(features.merge_heads(reads.flatten(1, 2), heads))
        read_NTd = features.split_heads(read_BTD, heads)
        if not call.positions.all_written:
            mask_NT1 = call.positions.mask_BT.repeat_interleave(heads, dim=0).unsqueeze(-1)
            read_NTd = torch.where(mask_NT1, read_NTd, self._read(queries_BTD, call))
        return read_NTd, new, stats

    def _chunked(self, x_BSD: Tensor, num_chunks: int) -> Tensor:
        """[B, S, heads * d] (or [B, S, heads, d]) -> [N, R, C, d]."""
        return torch.unflatten(features.split_heads(x_BSD, self.config.heads), 1, (num_chunks, -1))

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
        log_keep = log_keeps(gates, rule, coefficients_.surprise) if rule.chunk_semantics == "delta" else None
        return Work(Pairs(keys, values, log_keep), active, coefficients_, finished, *counts)

    def _gate_logits(self, laid_BSG: Tensor, num_chunks: int) -> list[Tensor]:
        """[B, S, gates * heads] -> of every gate [N, R, C]."""
        if not self.config.rule.token_gates:
            return []
        by_gate = torch.unflatten(laid_BSG, -1, (-1, self.config.heads)).permute(2, 0, 3, 1).flatten(1, 2)
        return list(torch.unflatten(by_gate, 2, (num_chunks, -1)).unbind())

    def _stats(self, fast: Fast, work: Work, call: _Call) -> LayerState:
        return write_stats(call.fast, fast, work, call.inner.form, self.config.heads) if call.access.stats else {}


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
    access: Access
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
