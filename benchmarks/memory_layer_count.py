"""Launches, operations and peak memory of the memory layer, counted without running it: fake tensors, on a CPU.

    python -m benchmarks.memory_layer_count            # the sizes of docs/kernels.md, titans-pytorch beside them
    python -m benchmarks.memory_layer_count --tiny     # a small size

A launch is an operator that is not a view. Operations are those of the matrix products. Peak memory is the bytes of all
tensors alive at once in forward + backward, parameters, input and gradients included. A Triton kernel counts as one
launch and no operations. Rows `as graphs` (titans_ds.memory.graphed; `whole`: without slices) add to what is alive
around the graphs what the larger of the two has alive at once. A GPU adds what the allocator rounds up, and cuBLAS's
workspace. The inner gradient alone, in closed form and by torch.func, follows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import memory_layer_cases
from benchmarks.memory_layer_cases import Shape, gradient, layer, named_layer
from benchmarks.memory_layer_peers import titans_pytorch
from titans_ds.memory import graphed, kernels
from titans_ds.memory.graphed import MemoryGraphs
from titans_ds.memory.kernels import graphs, heads
from titans_ds.memory.kernels.capture import Capture
from titans_ds.memory.optimizers import Fast

_NO_KERNEL = frozenset(
    (
        "view",
        "transpose",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "t",
        "permute",
        "detach",
        "alias",
        "as_strided",
        "split",
        "unbind",
        "_unsafe_view",
        "_reshape_alias",
        "empty",
        "empty_like",
        "new_empty",
        "new_empty_strided",
        "empty_strided",
        "unflatten",
    )
)


class Counter(TorchDispatchMode):
    """Of everything inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.operations, self.live, self.peak = 0, 0, 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        space, name = function._schema.name.split("::")
        if space != "prim" and name not in _NO_KERNEL:
            self.launches += 1
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:] if len(args) == 2 else args[1:3]
            self.operations += 2 * left.numel() * right.shape[-1]
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._see(t.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            self._sizes[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class _Kernels(ModuleType):
    """A module of Triton kernels, of which a launch is counted and does nothing."""

    def __init__(self, name: str, counter: Counter) -> None:
        super().__init__(name)
        self._counter = counter

    def __getattr__(self, name: str) -> _Kernels:
        return self

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*_: object, **__: object) -> None:
            self._counter.launches += 1

        return launch


def _convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply for fake tensors, which it cannot exchange in place."""
    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = None if p is None else nn.Parameter(function(p.detach()))
        for name, b in part._buffers.items():
            part._buffers[name] = None if b is None else function(b)
    return module


@contextlib.contextmanager
def faking(engine: str | None, counter: Counter) -> Iterator[None]:
    """Fake tensors, and Triton kernels that count."""

    # Functions, no mocks: these keep what they are called with, and so its memory.
    def can(*_: object) -> bool:
        return engine == "triton"

    def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        return (left @ right).to(dtype)  # one launch on a GPU

    def chosen(fast: Fast, _: object, keys: Tensor) -> kernels.Engine | None:
        narrow = max(keys.shape[3], fast.weights[0].shape[1]) <= kernels.MOST_WIDTH
        return None if engine == "loop" else kernels.Engine(engine == "triton", engine == "triton" and narrow)

    names = ("chunk", "head", "pair", "scan", "single", "span", "wide", "wide_backward")
    modules = [f"titans_ds.memory.kernels.{name}_kernels" for name in names]
    patches = [mock.patch.object(nn.Module, "_apply", _convert)]
    if engine is not None:
        patches.append(mock.patch.object(heads, "can", can))
        patches.append(mock.patch.object(heads, "wide_product", product))
        patches.append(mock.patch.object(kernels, "engine", chosen))
        patches.append(mock.patch.dict(sys.modules, {name: _Kernels(name, counter) for name in modules}))
    with contextlib.ExitStack() as stack:
        for patch in (*patches, FakeTensorMode(allow_non_fake_inputs=True)):
            stack.enter_context(patch)
        yield


def count(make: Callable[[torch.device], Any], engine: str | None) -> Counter:
    """Forward + backward of what `make` builds."""
    gc.collect()
    counter = Counter()
    with faking(engine, counter), counter:
        step = make(torch.device("cpu"))
        counter.launches = counter.operations = 0
        step(True)
    return counter


def count_call(make: Callable[[torch.device], Any]) -> Counter:
    """A call without a backward pass; its peak is what it takes beyond its inputs."""
    gc.collect()
    counter = Counter()
    with faking(None, counter), counter:
        step = make(torch.device("cpu"))
        gc.collect()
        counter.launches, counter.operations, counter.peak, before = 0, 0, counter.live, counter.live
        step(False)
    counter.peak -= before
    return counter


class CountedCapture(Capture):
    """Of functions that run when they are captured, and do nothing when they are replayed.

    Args:
        counter: of what is alive.
    """

    def __init__(self, counter: Counter) -> None:
        super().__init__(torch.device("cpu"))
        self._counter = counter
        self.pool = 0

    def apart(self, function: Callable[[], Any]) -> Any:
        """Here: another thread would count nothing."""
        return function()

    def warm_up(self, function: Callable[[], None]) -> None:
        """Nothing to compile."""
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """The pool is as large as the largest function needs."""
        gc.collect()
        counter = self._counter
        launches, operations, counter.peak = counter.launches, counter.operations, counter.live
        before = counter.live
        function()
        self.pool = max(self.pool, counter.peak - before)
        launches, operations = counter.launches - launches, counter.operations - operations

        def replay() -> None:
            counter.launches += launches
            counter.operations += operations

        return replay


def count_graphs(make: Callable[[torch.device], Any], engine: str | None, whole: bool = False) -> Counter:
    """Forward + backward of what `make` builds, replayed in slices of rows; `whole`: in one."""
    gc.collect()
    counter = Counter()
    capture = CountedCapture(counter)
    with replaying(capture, whole), faking(engine, counter), counter:
        step = make(torch.device("cpu"))
        step(True)
        gc.collect()
        counter.launches, counter.operations, counter.peak = 0, 0, counter.live
        step(True)
    counter.peak += capture.pool
    return counter


@contextlib.contextmanager
def replaying(capture: Capture, whole: bool) -> Iterator[None]:
    """Memories of fake tensors, which lie nowhere, as graphs."""
    tokens = sys.maxsize if whole else graphed.SLICE_TOKENS

    def made(_: str) -> MemoryGraphs:
        return MemoryGraphs("on", lambda _: capture)

    def watched(*_: object) -> bool:
        return False

    def places(_: object) -> list[object]:
        return []

    with (
        mock.patch.object(memory_layer_cases, "MemoryGraphs", made),
        mock.patch.multiple(graphed, _watched=watched, SLICE_TOKENS=tokens),
        mock.patch.object(graphs, "places", places),
    ):
        yield


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small size, for a test")
    options = parser.parse_args()
    shapes = [Shape(2, 64, 32, 2, 4)] if options.tiny else [
        Shape(2, 2048, 512, 8, 64), Shape(4, 4096, 512, 8, 64), Shape(4, 4096, 512, 1, 64)
    ]  # fmt: skip
    print("| size | what | launches | GFLOP in products | peak MiB |\n|---|---|---|---|---|")
    for shape in shapes:
        for name, make, engine, whole in _rows(shape):
            found = count(make, engine) if whole is None else count_graphs(make, engine, whole)
            cells = f"{found.launches:,} | {found.operations / 1e9:,.1f} | {found.peak / 2**20:,.0f}"
            print(f"| {shape.label} | {name} | {cells} |", flush=True)
    rows, tokens, dims = (4, 16, (8, 16)) if options.tiny else (256, 64, (64, 128, 256, 512))
    heading = f"inner gradient of {rows} memories, {tokens} tokens"
    print(f"\n| {heading} | launches | GFLOP | MiB beyond inputs |\n|---|---|---|---|")
    for dim in dims:
        for how in ("closed form", "vmap(grad)"):
            found = count_call(gradient(rows, tokens, dim, how))
            cells = f"{found.launches:,} | {found.operations / 1e9:,.1f} | {found.peak / 2**20:,.1f}"
            print(f"| {how}, D{dim} | {cells} |", flush=True)


def _rows(shape: Shape) -> Iterator[tuple[str, Callable[[torch.device], Any], str | None, bool | None]]:
    """Name, what to build, with which kernels, and, as graphs, whether whole."""
    for semantics in ("span", "chunk"):
        make = layer(shape, "auto", semantics)
        for engine in ("triton", "torch", "loop"):
            yield f"{semantics}, {engine}", make, engine, None
        yield f"{semantics}, triton, as graphs", make, "triton", False
        yield f"{semantics}, triton, as graphs, whole", make, "triton", True
    shipped, graphs = (named_layer(shape, "titans", graphs) for graphs in (False, True))
    for engine in ("triton", "torch", "loop"):
        yield f"titans as shipped, {engine}", shipped, engine, None
    yield "titans as shipped, triton, as graphs, whole", graphs, "triton", True
    small = dataclasses.replace(shape, chunk=min(shape.chunk, 16))
    if small.head_dim <= kernels.MOST_WIDTH:
        make = named_layer(small, "ttt_linear")
        for engine in ("triton", "loop"):
            yield f"TTT-Linear, chunk {small.chunk}, {engine}", make, engine, None
        graphs = named_layer(small, "ttt_linear", graphs=True)
        yield f"TTT-Linear, chunk {small.chunk}, triton, as graphs, whole", graphs, "triton", True
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        yield f"titans-pytorch {name}", titans_pytorch(shape, dtype, False), None, None


if __name__ == "__main__":
    main()
