"""What benchmarks/memory_layer.py measures of this project: the memory layer, its core, and the inner gradient.

Legend of shape suffixes: B batch, T tokens, N batch x heads, R chunks of C tokens, D width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch import Tensor

from titans_ds.config import FeatureConfig, MemoryConfig, RuleConfig
from titans_ds.memory import Access, NeuralMemory, chunks, graphed, kernels, network
from titans_ds.memory.chunks import Work
from titans_ds.memory.gates import Coefficients
from titans_ds.memory.graphed import MemoryGraphs
from titans_ds.memory.kernels import launch
from titans_ds.memory.kernels.capture import capture_of
from titans_ds.memory.kernels.graphs import Graphs, Result, Tensors
from titans_ds.memory.network import Form
from titans_ds.memory.optimizers import Fast
from titans_ds.memory.rule import Inner, Pairs
from titans_ds.memory_config import named_memory

LEARNED = {"key_projection": "learned", "value_projection": "learned", "output_projection": "learned"}


@dataclass(frozen=True)
class Shape:
    """One size of a layer."""

    batch: int
    tokens: int
    dim: int
    heads: int
    chunk: int

    @property
    def head_dim(self) -> int:
        """D."""
        return self.dim // self.heads

    @property
    def label(self) -> str:
        """For the table."""
        return f"B{self.batch} T{self.tokens} {self.heads}x{self.head_dim} C{self.chunk}"

    def product(self, width: int | None = None) -> float:
        """Floating-point operations of all tokens through one matrix of every head."""
        return 2.0 * self.batch * self.tokens * self.heads * self.head_dim * (width or self.head_dim)

    def layer_flops(self, backward: bool) -> float:
        """Depth 2: seven products a token forward (two to the loss, one back, two gradients, two reads) and four
        projections; the backward is twice the forward, recomputation not counted."""
        once = 7 * self.product() + 4 * 2.0 * self.batch * self.tokens * self.dim**2
        return once * (3 if backward else 1)


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        group: rows of a group are compared with one another.
        name: of the row.
        shape: label of the size.
        make: what to build on a device; returns a function of `backward` to time.
        flops: counted operations, forward only and with the backward.
        ours: this project's, and the whole work: other rows' ratios are taken against the fastest of these.
    """

    group: str
    name: str
    shape: str
    make: Callable[[torch.device], Callable[[bool], None]]
    flops: tuple[float, float]
    ours: bool = False
    settings: dict[str, object] = field(default_factory=dict)


def leaf(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Random numbers that gradients are asked for, the same in every run."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(device, dtype).requires_grad_()


def stepper(forward: Callable[[], Tensor], leaves: Callable[[], list[Tensor]]) -> Callable[[bool], None]:
    """Forward, and with `backward` the gradients of what is learned and of the input."""

    def step(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            out = forward()
        if backward:
            out.backward(torch.ones_like(out))
            for t in leaves():
                t.grad = None

    return step


def layer(
    shape: Shape,
    kernel: str,
    semantics: str,
    graph: bool = True,
    warps: int | None = None,
    graphs: bool = False,
    slices: int | None = None,
) -> Callable[[torch.device], object]:
    """NeuralMemory as titans-pytorch has it: gates once a chunk, momentum, forget gate, all projections learned."""

    def make(device: torch.device) -> Callable[[bool], None]:
        rule = RuleConfig(
            chunk_size=shape.chunk,
            chunk_semantics=semantics,  # type: ignore[arg-type]
            optimizer="momentum",
            reduction="sum",
            gate_scope="chunk",
            forget_gate=0.01,
            token_step_size=True,
            token_momentum=True,
            token_forget_gate=True,
        )
        config = MemoryConfig(
            dim=shape.dim,
            heads=shape.heads,
            write="token",
            step_size=0.1 / shape.head_dim,
            learn_initial_weights=True,
            features=FeatureConfig(activation="silu", normalize_keys=True),
            rule=rule,
            **LEARNED,  # type: ignore[arg-type]
        )
        step = _layer_step(config, shape, device, kernel, graph, graphs)
        if slices is not None:
            step = _under(mock.patch.object(graphed, "SLICE_TOKENS", shape.batch * shape.tokens // slices), step)
        if warps is not None:
            step = _under(mock.patch.dict(launch.WARPS, dict.fromkeys(launch.WARPS, (warps, warps))), step)
        return step

    return make


def named_layer(shape: Shape, name: str, graphs: bool = False) -> Callable[[torch.device], object]:
    """NeuralMemory with the rule of a known name, in heads and chunks of this shape."""

    def make(device: torch.device) -> Callable[[bool], None]:
        memory = named_memory(name, dim=shape.dim, heads=shape.heads)
        config = replace(memory, rule=replace(memory.rule, chunk_size=shape.chunk))
        return _layer_step(config, shape, device, "auto", True, graphs)

    return make


def _layer_step(
    config: MemoryConfig, shape: Shape, device: torch.device, kernel: str, graph: bool, graphs: bool
) -> Callable[[bool], None]:
    memory = NeuralMemory(shape.dim, config, 0).to(device)
    memory.graphs = MemoryGraphs("auto" if graphs else "off")
    x = leaf(shape.batch, shape.tokens, shape.dim, device=device)

    def forward() -> Tensor:
        with kernels.choice(kernel):
            return memory(x, None, None, None, Access(write=True, graph=graph))[0]

    return stepper(forward, lambda: [x, *memory.parameters()])


def _under(patch: contextlib.AbstractContextManager[object], step: Callable[[bool], None]) -> Callable[[bool], None]:
    """The step, every time inside of a patch."""

    def run(backward: bool) -> None:
        with patch:
            step(backward)

    return run


def core(shape: Shape, kernel: str, hidden: int, graphs: bool = False) -> Callable[[torch.device], object]:
    """Reads and writes alone, from keys, values, queries and step sizes; plain gradient descent, `chunk`."""

    def make(device: torch.device) -> Callable[[bool], None]:
        rows, num_chunks, d = shape.batch * shape.heads, shape.tokens // shape.chunk, shape.head_dim
        split = (rows, num_chunks, shape.chunk, d)
        given = {n: leaf(*split, device=device, scale=d**-0.5) for n in ("keys", "values", "queries")}
        given["steps"] = leaf(*split[:3], device=device, dtype=torch.float32, scale=0.01)
        for name, matrix in (("w0", (hidden, d)), ("w1", (d, hidden))):
            given[name] = leaf(rows, *matrix, device=device, dtype=torch.float32, scale=matrix[1] ** -0.5)

        def run(given: Tensors, _: Tensors) -> Result:
            active = torch.ones(split[:3], dtype=torch.bool, device=device)
            inner = Inner(RuleConfig(chunk_size=shape.chunk), Form(), torch.ones(2, device=device), 1)
            coefficients, pairs = Coefficients(given["steps"]), Pairs(given["keys"], given["values"])
            work = Work(pairs, active, coefficients, active[..., 0], num_chunks, num_chunks)
            fast = Fast((given["w0"], given["w1"]))
            with kernels.choice(kernel):
                reads, _ = chunks.run(fast, work, inner, given["queries"], contextlib.nullcontext)
            assert reads is not None
            return Result({"reads": reads})

        replays, where = Graphs(), capture_of(device) if graphs else None

        def forward() -> Tensor:
            found = None if where is None else replays.call(where, "core", run, given, {})
            return (found or run(given, {}).outputs)["reads"]

        return stepper(forward, lambda: list(given.values()))

    return make


def gradient(rows: int, tokens: int, dim: int, how: str) -> Callable[[torch.device], object]:
    """The inner gradient of `rows` memories: in closed form, or by torch.func; eager or compiled."""

    def make(device: torch.device) -> Callable[[bool], None]:
        w = tuple(leaf(rows, dim, dim, device=device, scale=dim**-0.5).detach() for _ in range(2))
        keys, values = (leaf(rows, tokens, dim, device=device).detach() for _ in range(2))
        shares = torch.full((rows, tokens), 1 / tokens, device=device, dtype=keys.dtype)

        def closed(w: tuple[Tensor, ...], k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
            return network.gradient(network.terms(w, k, v, Form(), m))

        def loss(w: tuple[Tensor, ...], k: Tensor, v: Tensor, m: Tensor) -> Tensor:
            y = torch.nn.functional.silu(k @ w[0].mT) @ w[1].mT
            return 0.5 * ((y - v).square().sum(dim=-1) * m).sum()

        function = closed if how.startswith("closed") else torch.func.vmap(torch.func.grad(loss))
        function = torch.compile(function, dynamic=False) if how.endswith("compiled") else function

        def step(backward: bool) -> None:
            if not backward:
                function(w, keys, values, shares)

        return step

    return make
