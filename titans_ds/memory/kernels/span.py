"""`span` without PyTorch's autograd from chunk to chunk: all gradients at the call's start, then a scan, then reads.

One autograd function for the read and the write of a call. It keeps its inputs, and the fp32 states at the start of
every block of chunks; everything else is computed again in the backward, block by block, so that the peak does not grow
with the text.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head, O/I a matrix's output/input width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from titans_ds.memory import network
from titans_ds.memory.gates import Coefficients
from titans_ds.memory.kernels import Engine, launch
from titans_ds.memory.kernels.capture import is_used_up
from titans_ds.memory.kernels.factors import factors
from titans_ds.memory.kernels.gradients import Problem, Sums, Tensors, chunk_gradients, chunk_gradients_backward
from titans_ds.memory.kernels.reads import read, read_backward
from titans_ds.memory.kernels.scan import Scan, State, num_shares, scan_backward, scan_forward
from titans_ds.memory.network import Weights
from titans_ds.memory.optimizers import Fast
from titans_ds.memory.rule import Inner, Pairs

_BLOCK_BYTES = 4 * 2**20  # of one matrix's states in a block; the backward has six such of two matrices
_LEAST_CHUNKS = 16  # in a block, whatever they take: their products must fill the device


@dataclass(frozen=True)
class Plan:
    """What the tensors of a call mean.

    Args:
        problem: of the inner gradients and the reads.
        names: of the tensors, in order.
        first_order: only the reads are differentiated, and W_0 only where the first chunk reads it.
        block: chunks worked on at a time.
    """

    problem: Problem
    names: tuple[str, ...]
    first_order: bool
    block: int

    @property
    def depth(self) -> int:
        """Number of matrices."""
        return self.problem.depth

    def blocks(self, num_chunks: int) -> Iterator[slice]:
        """In order."""
        return (slice(i, min(i + self.block, num_chunks)) for i in range(0, num_chunks, self.block))


def run_span(
    fast: Fast,
    pairs: Pairs,
    c: Coefficients,
    finished_NR: Tensor | None,
    inner: Inner,
    queries_NRCD: Tensor | None,
    graph: bool,
    engine: Engine,
) -> tuple[Tensor | None, Fast]:
    """Read every chunk with the weights before it, and write all of them.

    Args:
        fast: at the start.
        pairs: of all chunks, [N, R, C, D].
        c: of all chunks.
        finished_NR: true where a chunk is written; None: everywhere.
        inner: the inner problem: sgd or momentum, one step.
        queries_NRCD: by chunk; None reads nothing.
        graph: differentiate through the write.
        engine: the scan by its Triton kernel; where fused the gradients and the reads too.
    """
    tensors = _tensors(fast, pairs, c, finished_NR, inner, graph)
    if queries_NRCD is not None:
        tensors["queries"] = queries_NRCD
    form, depth = replace(inner.form, norm=None), len(fast.weights)
    problem = Problem(form, inner.rule.max_gradient_norm, depth, engine.fused, engine.triton)
    plan = Plan(problem, tuple(tensors), not graph, _block_size(pairs.keys, fast.weights))
    outputs = SpanMemory.apply(plan, *tensors.values())  # type: ignore[no-untyped-call]
    states = outputs if queries_NRCD is None else outputs[1:]
    if not graph:
        states = tuple(t.detach() for t in states)
    new = Fast(tuple(states[: plan.depth]), tuple(states[plan.depth :]))
    if queries_NRCD is None:
        return None, new
    reads, queries = outputs[0].flatten(1, 2), queries_NRCD.flatten(1, 2)
    return network.finish(reads, queries, inner.form).view(queries_NRCD.shape), new


def _tensors(
    fast: Fast, pairs: Pairs, c: Coefficients, finished_NR: Tensor | None, inner: Inner, graph: bool
) -> Tensors:
    f = factors(c, finished_NR, inner)
    found = {"keys": pairs.keys, "values": pairs.values, "a": f.a, "keep": f.keep}
    if c.to_momentum is not None:
        found["b"] = f.b
    if inner.rule.max_gradient_norm is not None:
        found["c"] = f.c
    if inner.rule.has_momentum:
        found |= {"eta": f.eta, "carry": f.carry}
    if inner.form.norm is not None:
        found |= {"scale": inner.form.norm[0], "bias": inner.form.norm[1]}
    kept = {name: t if graph else t.detach() for name, t in found.items()}
    return kept | {f"w{i}": w for i, w in enumerate(fast.weights)} | {f"s{i}": s for i, s in enumerate(fast.momentum)}


def _block_size(keys_NRCD: Tensor, weights: Weights) -> int:
    """Chunks of a block, blocks of about the same size."""
    num_rows, num_chunks = keys_NRCD.shape[:2]
    one = num_rows * max(w.shape[1] * w.shape[2] for w in weights) * keys_NRCD.element_size()
    most = max(1, min(max(_BLOCK_BYTES // one, _LEAST_CHUNKS), num_chunks))
    return -(-num_chunks // -(-num_chunks // most))


class SpanMemory(torch.autograd.Function):
    """(plan, tensors by plan.names) -> reads [N, R, C, D] (where there are queries), W_l, S_l after the call."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *flat: Tensor) -> tuple[Tensor, ...]:
        given = {name: _plain(name, t) for name, t in zip(plan.names, flat, strict=True)}
        starts, narrow = [_states(given, plan)], _narrow(given)
        reads = [torch.empty_like(given["queries"])] if "queries" in given else []
        for chunks in plan.blocks(given["keys"].shape[1]):
            sums, _ = chunk_gradients(narrow, chunks, plan.problem)
            weights, _, end = _scan(given, sums, chunks, starts[-1], plan, save=False)
            starts.append(end)
            for out in reads:
                read(weights, given["queries"], chunks, plan.problem, out)
            del sums, weights
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *given.values(), *(t for start in starts[1:-1] for s in start for t in s if t is not None)
        )
        return (*reads, *(w for w, _ in starts[-1]), *(s for _, s in starts[-1] if s is not None))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        given, starts = _kept(ctx)
        back = _first_order if plan.first_order else _second_order
        found = back(given, starts, plan, list(d_outputs))
        return (None, *(found.get(name) for name in plan.names))


def _plain(name: str, t: Tensor) -> Tensor:
    """As the kernels need it; states may share their memory."""
    return t if _is_state(name) else t.contiguous()


def _is_state(name: str) -> bool:
    return name[0] in "ws" and name[1:].isdigit()


def _narrow(given: Tensors) -> Tensors:
    """What the chunks' gradients depend on, weights in the dtype of the keys."""
    others = {n: given[n] for n in ("keys", "values", "a", "b", "c", "scale", "bias") if n in given}
    dtype = given["keys"].dtype
    return others | {n: t.to(dtype).contiguous() for n, t in given.items() if _is_state(n) and n[0] == "w"}


def _states(given: Tensors, plan: Plan) -> list[State]:
    return [(given[f"w{i}"], given.get(f"s{i}")) for i in range(plan.depth)]


def _kept(ctx: Any) -> tuple[Tensors, list[list[State]]]:
    plan: Plan = ctx.plan
    saved = list(ctx.saved_tensors)
    given = dict(zip(plan.names, saved, strict=False))
    del saved[: len(plan.names)]
    starts, has_momentum = [_states(given, plan)], "s0" in given
    for _ in list(plan.blocks(given["keys"].shape[1]))[1:]:
        starts.append([(saved.pop(0), saved.pop(0) if has_momentum else None) for _ in range(plan.depth)])
    return given, starts


def _of(given: Tensors, chunks: slice, plan: Plan) -> Scan:
    keep = given["keep"][:, chunks]
    eta, carry = (given[n][:, chunks] if n in given else keep for n in ("eta", "carry"))
    return Scan(keep, eta, carry, "s0" in given, "b" in given, plan.problem.triton)


def _scan(
    given: Tensors, sums: Sums, chunks: slice, start: list[State], plan: Plan, save: bool
) -> tuple[list[Tensor], list[Tensor | None], list[State]]:
    """W_r and (save) S_r of a block by matrix, and its end; the sums are overwritten."""
    scan = _of(given, chunks, plan)
    results = [scan_forward(sums[level], start[level], scan, save) for level in range(plan.depth)]
    return [w for w, _, _ in results], [s for _, s, _ in results], [end for _, _, end in results]


def _first_order(given: Tensors, starts: list[list[State]], plan: Plan, d_outputs: list[Tensor | None]) -> Tensors:
    """In the queries, and in W_0 from the first chunk's reads."""
    d_read = d_outputs[0] if "queries" in given else None
    if d_read is None:
        return {}
    narrow, found, d_reads = _narrow(given), {"queries": _place(given, "queries")}, d_read.contiguous()
    for index, chunks in enumerate(plan.blocks(given["keys"].shape[1])):
        sums, _ = chunk_gradients(narrow, chunks, plan.problem)
        weights, _, _ = _scan(given, sums, chunks, starts[index], plan, save=False)
        d_weights = read_backward(weights, given["queries"], chunks, plan.problem, d_reads, found["queries"])
        if index == 0:
            found |= {f"w{level}": d[:, 0].to(given["w0"].dtype) for level, d in enumerate(d_weights)}
    return found


def _second_order(given: Tensors, starts: list[list[State]], plan: Plan, d_outputs: list[Tensor | None]) -> Tensors:
    """In everything, from the last block to the first."""
    d_read = d_outputs[0] if "queries" in given else None
    d_reads = None if d_read is None else d_read.contiguous()
    d_states = _own(d_outputs[-(1 + ("s0" in given)) * plan.depth :], given, plan)
    d_end: list[State] = [(d_states[i], d_states[i + plan.depth] if "s0" in given else None) for i in range(plan.depth)]
    narrow, found = _narrow(given), _places(given, plan)
    if d_reads is not None:
        found["queries"] = _place(given, "queries")
    shares = given["keep"].new_empty(3, sum(_shares(given, plan)), *given["keep"].shape)
    for index, chunks in reversed(list(enumerate(plan.blocks(given["keys"].shape[1])))):
        sums, trace = chunk_gradients(narrow, chunks, plan.problem)
        sums, d_end = _block_backward(given, sums, chunks, starts[index], plan, d_reads, d_end, shares, found)
        chunk_gradients_backward(narrow, chunks, plan.problem, trace, sums, found)
        del sums, trace
    for level, (d_weight, d_momentum) in enumerate(d_end):
        launch.add(found, f"w{level}", d_weight)
        if d_momentum is not None:
            found[f"s{level}"] = d_momentum
    return found | dict(zip(("keep", "eta", "carry"), shares.sum(dim=1), strict=True))


def _shares(given: Tensors, plan: Plan) -> list[int]:
    return [num_shares(given[f"w{level}"], plan.problem.triton) for level in range(plan.depth)]


def _own(d_states: list[Tensor | None], given: Tensors, plan: Plan) -> list[Tensor]:
    """Copies to work on, zeros where nothing depends on a state."""
    likes = [given[f"w{level}"] for level in range(plan.depth)] * 2
    return [
        torch.zeros_like(like, memory_format=torch.contiguous_format)
        if d is None
        else d.clone(memory_format=torch.contiguous_format)
        for d, like in zip(d_states, likes, strict=False)
    ]


def _places(given: Tensors, plan: Plan) -> Tensors:
    """Where derivatives go: written chunk by chunk, or summed. Those in the weights come with the first block."""
    found = {n: _place(given, n) for n in ("keys", "values")}
    found |= {n: torch.empty_like(given[n]) for n in ("a", "b", "c") if n in given}  # others may look at these
    return found | {n: torch.zeros_like(given[n]) for n in ("scale", "bias") if n in given}


def _place(given: Tensors, name: str) -> Tensor:
    """For the derivative in keys, values, queries: where they lie, if nobody looks there again; chunks come once."""
    own = given[name].untyped_storage()._cdata
    if not is_used_up(given[name]) or any(t.untyped_storage()._cdata == own for n, t in given.items() if n != name):
        return torch.empty_like(given[name])
    torch.autograd.graph.increment_version(given[name])  # autograd will say so, if somebody does look
    return given[name]


def _block_backward(
    given: Tensors,
    sums: Sums,
    chunks: slice,
    start: list[State],
    plan: Plan,
    d_reads: Tensor | None,
    d_end: list[State],
    shares: Tensor,
    found: Tensors,
) -> tuple[Sums, list[State]]:
    """In the chunks' gradients, which are overwritten, and in W and S at the block's start."""
    weights, momenta = _scan(given, sums, chunks, start, plan, save=True)[:2]
    sums.clear()
    d_weights: list[Tensor] | list[None] = [None] * plan.depth
    if d_reads is not None:
        d_weights = read_backward(weights, given["queries"], chunks, plan.problem, d_reads, found["queries"])
    scan, d_sums, d_start = _of(given, chunks, plan), [], []
    parts = torch.split(shares[..., chunks], _shares(given, plan), dim=1)
    for d_w, d_last, part in zip(d_weights, d_end, parts, strict=True):
        d_sum, d_first = scan_backward(d_w, weights.pop(0), momenta.pop(0), d_last, scan, part)
        d_sums.append(d_sum)
        d_start.append(d_first)
    return d_sums, d_start
