"""Launches, operations and peak memory of the memory layer, counted without running it: fake tensors, on a CPU.

    python -m benchmarks.memory_layer_count            # the sizes of docs/kernels.md, titans-pytorch beside them
    python -m benchmarks.memory_layer_count --tiny     # a small size

A launch is an operator that is not a view. Operations are those of the matrix products. Peak memory is the bytes of all
tensors alive at once in forward + backward, parameters, input and gradients included. A Triton kernel counts as one
launch and no operations.
"""

from __future__ import annotations

import argparse
import contextlib
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

from benchmarks.memory_layer_cases import Shape, layer
from benchmarks.memory_layer_peers import titans_pytorch
from titans_ds.memory import kernels
from titans_ds.memory.kernels import heads
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

    # A function, no mock: that keeps what it is called with, and so its memory.
    def chosen(fast: Fast, _: object, keys: Tensor) -> kernels.Engine | None:
        narrow = max(keys.shape[3], fast.weights[0].shape[1]) <= kernels.MOST_WIDTH
        return None if engine == "loop" else kernels.Engine(engine == "triton", engine == "triton" and narrow)

    names = ("chunk", "head", "pair", "scan", "span", "wide", "wide_backward")
    modules = [f"titans_ds.memory.kernels.{name}_kernels" for name in names]
    patches = [mock.patch.object(nn.Module, "_apply", _convert)]
    if engine is not None:
        patches.append(mock.patch.object(heads, "can", return_value=engine == "triton"))
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
        rows = [
            (f"{semantics}, {engine}", layer(shape, "auto", semantics), engine)
            for semantics in ("span", "chunk")
            for engine in ("triton", "torch", "loop")
        ]
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            rows.append((f"titans-pytorch {name}", titans_pytorch(shape, dtype, False), None))
        for name, make, engine in rows:
            found = count(make, engine)
            cells = f"{found.launches:,} | {found.operations / 1e9:,.1f} | {found.peak / 2**20:,.0f}"
            print(f"| {shape.label} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
