"""`span` without a loop over chunks: all gradients at the call's start, then reads as linear attention over chunks.

One autograd function for the read and the write of a call. It keeps its inputs, the reads of the hidden layers before
their activation, and two fp32 states per block of chunks; everything else is computed again in the backward, block by
block, so that the peak does not grow with the text.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head, O/I a matrix's output/input width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from titans_ds.memory import network
from titans_ds.memory.gates import Coefficients
from titans_ds.memory.kernels.attention import Gradients, State, Written, attend, attend_backward, read_backward
from titans_ds.memory.kernels.gradients import Problem, Tensors, chunk_gradients, chunk_gradients_backward
from titans_ds.memory.kernels.transfer import Factors, Transfer, factors, transfer
from titans_ds.memory.network import Form, Weights
from titans_ds.memory.optimizers import Fast
from titans_ds.memory.rule import Inner, Pairs

_BLOCK_BYTES = 64 * 2**20  # of one matrix's states in a block; about six such exist at a time
_MOST_CHUNKS = 32  # in a block: the backward holds about ten copies of its tokens


@dataclass(frozen=True)
class Plan:
    """What the tensors of a call mean.

    Args:
        problem: of the inner gradients.
        names: of the tensors, in order.
        first_order: only the reads are differentiated, and W_0 only where the first chunk reads it.
        block: chunks worked on at a time.
    """

    problem: Problem
    names: tuple[str, ...]
    first_order: bool
    block: int

    @property
    def form(self) -> Form:
        """f_W and its loss, without its norm."""
        return self.problem.form

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
    finished_NR: Tensor,
    inner: Inner,
    queries_NRCD: Tensor | None,
    graph: bool,
    triton: bool,
) -> tuple[Tensor | None, Fast]:
    """Read every chunk with the weights before it, and write all of them.

    Args:
        fast: at the start.
        pairs: of all chunks, [N, R, C, D].
        c: of all chunks.
        finished_NR: true where a chunk is written.
        inner: the inner problem: sgd or momentum, one step.
        queries_NRCD: by chunk; None reads nothing.
        graph: differentiate through the write.
        triton: the gradients of the chunks by the Triton kernel.
    """
    tensors = _tensors(fast, pairs, c, finished_NR, inner, graph)
    if queries_NRCD is not None:
        tensors["queries"] = queries_NRCD
    plan = Plan(
        Problem(replace(inner.form, norm=None), inner.rule.max_gradient_norm, len(fast.weights), triton),
        tuple(tensors),
        not graph,
        _block_size(pairs.keys, fast.weights),
    )
    outputs = SpanMemory.apply(plan, *tensors.values())  # type: ignore[no-untyped-call]
    states = outputs if queries_NRCD is None else outputs[1:]
    if not graph:
        states = tuple(t.detach() for t in states)
    new = Fast(tuple(states[: plan.depth]), tuple(states[plan.depth :]))
    if queries_NRCD is None:
        return None, new
    reads, queries = outputs[0].flatten(1, 2), queries_NRCD.flatten(1, 2)
    return network.finish(reads, queries, inner.form).view(queries_NRCD.shape), new


def _tensors(fast: Fast, pairs: Pairs, c: Coefficients, finished_NR: Tensor, inner: Inner, graph: bool) -> Tensors:
    f = factors(c, finished_NR, inner.rule.has_momentum)
    by_token = {"surprise": c.surprise, "to_weights": c.to_weights, "to_momentum": c.to_momentum}
    mask = finished_NR.unsqueeze(-1)
    found: dict[str, Tensor | None] = {n: None if t is None else t * mask for n, t in by_token.items()}
    found |= {"keys": pairs.keys, "values": pairs.values, "step_sizes": inner.step_sizes}
    found |= {"keep": f.keep, "momentum_keep": f.momentum_keep, "carry": f.carry}
    if inner.form.norm is not None:
        found |= {"scale": inner.form.norm[0], "bias": inner.form.norm[1]}
    kept = {name: t if graph else t.detach() for name, t in found.items() if t is not None}
    return kept | {f"w{i}": w for i, w in enumerate(fast.weights)} | {f"s{i}": s for i, s in enumerate(fast.momentum)}


def _block_size(keys_NRCD: Tensor, weights: Weights) -> int:
    """Chunks of a block, blocks of about the same size."""
    num_rows, num_chunks = keys_NRCD.shape[:2]
    one = num_rows * max(w.shape[1] * w.shape[2] for w in weights) * keys_NRCD.element_size()
    most = max(1, min(_BLOCK_BYTES // one, _MOST_CHUNKS, num_chunks))
    return -(-num_chunks // -(-num_chunks // most))


class SpanMemory(torch.autograd.Function):
    """(plan, tensors by plan.names) -> reads [N, R, C, D] (where there are queries), W_l, S_l after the call."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *flat: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(plan.names, flat, strict=True))
        starts, hidden, reads = [_states(given, plan)], [], []
        factors_ = _Factors(given, plan)
        for index, chunks in enumerate(plan.blocks(given["keys"].shape[1])):
            block, transfers = _block(given, chunks), factors_.of_block(index)
            sums = chunk_gradients(_of_gradients(block), plan.problem)
            x = block.get("queries")
            outputs: list[Tensor] = []
            end: list[State] = []
            for level, start in enumerate(starts[-1]):
                x = x if x is None or level == 0 else _activate(outputs[-1], plan.form)
                out, new = attend(x, Written(sums[level], transfers[level]), start)
                end.append(new)
                outputs += [] if out is None else [out]
            starts.append(end)
            hidden.append(outputs[:-1])
            reads += outputs[-1:]
        _keep(ctx, plan, flat, starts[1:-1], hidden)
        weights = [w for w, _ in starts[-1]]
        momenta = [s for _, s in starts[-1] if s is not None]
        first = [reads[0] if len(reads) == 1 else torch.cat(reads, dim=1)] if reads else []
        return (*first, *weights, *momenta)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        given, starts, hidden = _kept(ctx)
        back = _first_order if plan.first_order else _second_order
        found = back(given, starts, hidden, plan, list(d_outputs))
        return (None, *(found.get(name) for name in plan.names))


def _states(given: Tensors, plan: Plan) -> list[State]:
    return [(given[f"w{i}"], given.get(f"s{i}")) for i in range(plan.depth)]


_BY_CHUNK = ("queries", "keys", "values", "surprise", "to_weights", "to_momentum", "keep", "momentum_keep", "carry")


def _block(given: Tensors, chunks: slice) -> Tensors:
    return {name: t[:, chunks] if name in _BY_CHUNK else t for name, t in given.items()}


def _keep(ctx: Any, plan: Plan, flat: Sequence[Tensor], starts: list[Any], hidden: list[list[Tensor]]) -> None:
    """Inputs; W and S at the start of every block but the first; the hidden layers' reads."""
    between = [t for start in starts for pair in start for t in pair if t is not None]
    ctx.plan = plan
    ctx.save_for_backward(*flat, *between, *(t for block in hidden for t in block))


def _kept(ctx: Any) -> tuple[Tensors, list[list[State]], list[list[Tensor]]]:
    plan: Plan = ctx.plan
    saved = list(ctx.saved_tensors)
    given = dict(zip(plan.names, saved, strict=False))
    del saved[: len(plan.names)]
    starts, has_momentum = [_states(given, plan)], "s0" in given
    blocks = list(plan.blocks(given["keys"].shape[1]))
    for _ in blocks[1:]:
        starts.append([(saved.pop(0), saved.pop(0) if has_momentum else None) for _ in range(plan.depth)])
    levels = plan.depth - 1 if "queries" in given else 0
    return given, starts, [[saved.pop(0) for _ in range(levels)] for _ in blocks]


_TRANSFER = ("keep", "momentum_keep", "carry", "step_sizes")


def _of_gradients(given: Tensors) -> Tensors:
    """What the chunks' gradients depend on."""
    return {n: t for n, t in given.items() if n not in _TRANSFER and n != "queries" and not _is_momentum(n)}


def _is_momentum(name: str) -> bool:
    return name[0] == "s" and name[1:].isdigit()


class _Factors:
    """The factors of every block and matrix, computed for all blocks of the same size at once, and back."""

    def __init__(self, given: Tensors, plan: Plan, graph: bool = False) -> None:
        num_rows, num_chunks = given["surprise"].shape[:2]
        self.leaves = {n: t.detach().requires_grad_(graph) for n, t in given.items() if n in _TRANSFER}
        whole = num_chunks // plan.block  # blocks; the last may be shorter
        sizes = [(slice(0, whole * plan.block), whole)]
        if num_chunks > whole * plan.block:
            sizes.append((slice(whole * plan.block, num_chunks), 1))
        with torch.set_grad_enabled(graph):
            self.groups = [self._make(given, chunks, count) for chunks, count in sizes]
        self.counts, self.num_rows = [count for _, count in sizes], num_rows
        self.backs: dict[int, list[Gradients]] = {}

    def _make(self, given: Tensors, chunks: slice, count: int) -> list[Transfer]:
        def folded(name: str) -> Tensor | None:
            t = self.leaves.get(name)
            return None if t is None else torch.unflatten(t[:, chunks], 1, (count, -1)).flatten(0, 1)

        like = torch.unflatten(given["surprise"][:, chunks, 0], 1, (count, -1)).flatten(0, 1)
        t = transfer(Factors(*(folded(n) for n in _TRANSFER[:3])), "to_momentum" in given, like)
        return [_with_step_size(t, -theta) for theta in self.leaves["step_sizes"]]

    def of_block(self, index: int) -> list[Transfer]:
        """By matrix; no graph."""
        group, place = (0, index) if index < self.counts[0] else (1, 0)

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else torch.unflatten(t.detach(), 0, (self.num_rows, -1))[:, place]

        return [Transfer(*(pick(t) for t in vars(one).values())) for one in self.groups[group]]  # type: ignore[arg-type]

    def collect(self, index: int, backs: list[Gradients]) -> None:
        """Keep what a block's backward found."""
        self.backs[index] = backs

    def backward(self) -> Tensors:
        """In the gates' factors and the step sizes."""
        outputs: list[Tensor] = []
        d_outputs: list[Tensor] = []
        for group, transfers in enumerate(self.groups):
            blocks = range(self.counts[0]) if group == 0 else [self.counts[0]]
            for level, t in enumerate(transfers):
                found = [self.backs[i][level].of_transfer() for i in blocks]
                for name, factor in vars(t).items():
                    if factor is not None and factor.requires_grad:
                        outputs.append(factor)
                        d_outputs.append(torch.stack([f[name] for f in found], dim=1).flatten(0, 1))
        d_leaves = torch.autograd.grad(outputs, list(self.leaves.values()), d_outputs, allow_unused=True)
        pairs = zip(self.leaves.items(), d_leaves, strict=True)
        return {name: torch.zeros_like(t) if d is None else d for (name, t), d in pairs}


def _with_step_size(t: Transfer, factor: Tensor) -> Transfer:
    to_momentum = None if t.to_momentum is None else t.to_momentum * factor
    return replace(t, to_weights=t.to_weights * factor, to_momentum=to_momentum)


def _activate(z: Tensor, form: Form) -> Tensor:
    x = torch.nn.functional.silu(z) if form.activation == "silu" else z
    return x if form.hidden_scale == 1.0 else x * form.hidden_scale


def _activate_backward(d_x: Tensor, z: Tensor, form: Form) -> Tensor:
    d_x = d_x if form.hidden_scale == 1.0 else d_x * form.hidden_scale
    return torch.ops.aten.silu_backward(d_x, z) if form.activation == "silu" else d_x  # type: ignore[no-any-return]


def _first_order(
    given: Tensors, starts: list[Any], hidden: list[list[Tensor]], plan: Plan, d_outputs: list[Tensor]
) -> Tensors:
    """In the queries, and in W_0 from the first chunk's reads."""
    found: Tensors = {}
    if "queries" not in given:
        return found
    d_queries, factors_ = [], _Factors(given, plan)
    for index, chunks in enumerate(plan.blocks(given["keys"].shape[1])):
        block, transfers = _block(given, chunks), factors_.of_block(index)
        sums = chunk_gradients(_of_gradients(block), plan.problem)
        d_x = d_outputs[0][:, chunks]
        for level in reversed(range(plan.depth)):
            x = block["queries"] if level == 0 else _activate(hidden[index][level - 1], plan.form)
            if index == 0:
                found[f"w{level}"] = d_x[:, 0].mT.to(given["w0"].dtype) @ x[:, 0].to(given["w0"].dtype)
            d_x = read_backward(Written(sums[level], transfers[level]), starts[index][level], d_x)
            d_x = d_x if level == 0 else _activate_backward(d_x, hidden[index][level - 1], plan.form)
        d_queries.append(d_x)
    return found | {"queries": d_queries[0] if len(d_queries) == 1 else torch.cat(d_queries, dim=1)}


def _second_order(
    given: Tensors, starts: list[Any], hidden: list[list[Tensor]], plan: Plan, d_outputs: list[Tensor]
) -> Tensors:
    """In everything, from the last block to the first."""
    d_reads = d_outputs.pop(0) if "queries" in given else None
    d_end = _states({f"w{i}": d for i, d in enumerate(d_outputs[: plan.depth])}
                    | {f"s{i}": d for i, d in enumerate(d_outputs[plan.depth :])}, plan)  # fmt: skip
    found = {name: torch.empty_like(t) if name in _BY_CHUNK else torch.zeros_like(t) for name, t in given.items()}
    blocks, factors_ = list(plan.blocks(given["keys"].shape[1])), _Factors(given, plan, graph=True)
    for index in reversed(range(len(blocks))):
        chunks = blocks[index]
        d_block = None if d_reads is None else d_reads[:, chunks]
        block = _block(given, chunks)
        backs, d_end, gradients = _block_backward(
            block, factors_.of_block(index), starts[index], hidden[index], plan, d_block, d_end
        )
        factors_.collect(index, backs)
        for name, d in gradients.items():
            if name in _BY_CHUNK:
                found[name][:, chunks] = d
            else:
                found[name] += d
    found |= factors_.backward()
    for level, (d_weight, d_momentum) in enumerate(d_end):
        found[f"w{level}"] += d_weight
        if d_momentum is not None:
            found[f"s{level}"] = d_momentum
    return found


def _block_backward(
    block: Tensors,
    transfers: list[Transfer],
    start: list[State],
    hidden: list[Tensor],
    plan: Plan,
    d_x: Tensor | None,
    d_end: list[State],
) -> tuple[list[Gradients], list[State], Tensors]:
    """What each matrix's reads say, the gradients in W and S at the block's start, and those in its tensors."""
    sums = chunk_gradients(_of_gradients(block), plan.problem)
    backs: list[Gradients] = []
    for level in reversed(range(plan.depth)):
        x = None
        if d_x is not None:
            x = block["queries"] if level == 0 else _activate(hidden[level - 1], plan.form)
        back = attend_backward(x, Written(sums.pop(), transfers[level]), start[level], d_x, d_end[level])
        backs.insert(0, back)
        d_x, back.queries = back.queries, None
        if level > 0 and d_x is not None:
            d_x = _activate_backward(d_x, hidden[level - 1], plan.form)
    gradients = chunk_gradients_backward(_of_gradients(block), plan.problem, [back.gradients for back in backs])
    for back in backs:
        back.gradients = []  # as large as the states
    return backs, [back.start for back in backs], gradients | ({} if d_x is None else {"queries": d_x})
