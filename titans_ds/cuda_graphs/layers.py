"""Layers of a model as CUDA graphs: the forward pass of a layer is one launch, and so is its backward pass.

They are captured by torch.cuda.make_graphed_callables, all of them in one order; what lies between runs as before.
What a layer keeps for its backward pass lies in its graph, so a segment has to go back before the next one comes.
Passes without gradients, on a CPU, and of shapes that were not captured, run as before.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from titans_ds.cuda_graphs.capture import addresses, no_collection, reason_of

_LOG = logging.getLogger(__name__)
_MOST = 4  # captured shapes; inputs, outputs and their gradients are held once for each
_MOST_KNOWN = 64  # shapes that are counted

Graphed = Callable[[Tensor], Tensor]
# (functions, their sample arguments, pool=) -> the functions as graphs, as torch.cuda.make_graphed_callables
MakeGraphed = Callable[..., tuple[Graphed, ...]]


@dataclass(frozen=True)
class _Given:
    """What one call of a layer is given; what a graph depends on of it is `key`.

    Args:
        hidden: hidden states [B, T, H]: shape, dtype, device and whether they need a gradient.
        training: the layer's mode.
        leaves, spec: all other arguments, flat, and how they were nested.
        kinds: of the leaves: a tensor's shape and dtype, another value itself.
    """

    hidden: tuple[torch.Size, torch.dtype, torch.device, bool]
    training: bool
    leaves: list[Any]
    spec: Any
    kinds: tuple[Hashable, ...]

    @property
    def key(self) -> Hashable:
        """Calls that have it in common may share a graph."""
        return self.hidden, self.training, self.spec, self.kinds

    def sample(self) -> Tensor:
        """Hidden states of this kind."""
        shape, dtype, device, needs = self.hidden
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=needs)


@dataclass
class _Fixed:
    """A tensor beside the hidden states, at the place where graphs look for it."""

    place: Tensor
    last: Tensor | None = None  # what was copied there
    version: int = -1
    number: int = -1  # of the pass that did it

    def takes(self, tensor: Tensor, number: int) -> bool:
        """Copy, once for all layers that are given the same tensor; false where one pass has two for one place."""
        if self.last is tensor and self.version == tensor._version:
            self.number = number
            return True
        if self.number == number:
            return False
        self.place.copy_(tensor)
        self.last, self.version, self.number = tensor, tensor._version, number
        return True


@dataclass
class _Layer:
    """One captured layer: its graphs, the key of its inputs, and by leaf the tensors beside the hidden states."""

    graphed: Graphed
    key: Hashable
    fixed: list[_Fixed | None]

    def takes(self, given: _Given, number: int) -> bool:
        """Whether it can be replayed with these inputs, in the pass of this number; they are in their places then."""
        if self.key != given.key:
            return False
        pairs = zip(self.fixed, given.leaves, strict=True)
        return all(fixed.takes(leaf, number) for fixed, leaf in pairs if fixed is not None)


@dataclass
class LayerGraphs:
    """The layers of one model, in the order in which they run.

    Args:
        layers: frozen ones.
        make: captures; None for PyTorch's, which knows GPUs alone.
        ignored: keyword arguments that these layers don't look at.
    """

    layers: list[nn.Module]
    make: MakeGraphed | None
    ignored: frozenset[str] = frozenset()
    _plain: list[Callable[..., Tensor]] = field(init=False)
    _seen: dict[Hashable, dict[int, _Given]] = field(default_factory=dict)  # by what the first layer was given
    _captured: dict[Hashable, list[_Layer]] = field(default_factory=dict)
    _now: list[_Layer] | None = None  # graphs of the pass that runs
    _noted: dict[int, _Given] | None = None  # inputs of the pass that runs
    _addresses: list[tuple[int, torch.dtype]] = field(default_factory=list)
    _number: int = 0  # of the pass that runs
    _pool: Any = None
    _off: bool = False

    def __post_init__(self) -> None:
        self._plain = [layer.forward for layer in self.layers]

    def wrapped(self, index: int) -> Callable[..., Tensor]:
        """What takes the place of a layer's forward."""
        plain = self._plain[index]

        @functools.wraps(plain)
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            given = None if self._off else self._inputs(index, hidden_states, args, kwargs)
            if index == 0:
                self._begin(given)
            if given is not None and self._now is not None and self._now[index].takes(given, self._number):
                return self._now[index].graphed(hidden_states)  # whose place it has until the next pass
            if given is not None and self._noted is not None:
                self._noted[index] = given
            return plain(hidden_states, *args, **kwargs)

        return forward

    def _inputs(self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Given | None:
        """None where a layer has to run as it is: without gradients, in a recomputation, for generation."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return None
        if torch.is_autocast_enabled(hidden.device.type) or not (hidden.is_cuda or self.make is not None):
            return None
        leaves, spec = pytree.tree_flatten((args, {k: v for k, v in kwargs.items() if k not in self.ignored}))
        kinds = tuple(_kind(leaf, hidden.device) for leaf in leaves)
        if None in kinds:
            return None
        like = (hidden.shape, hidden.dtype, hidden.device, hidden.requires_grad)
        return _Given(like, self.layers[index].training, leaves, spec, kinds)

    def _begin(self, given: _Given | None) -> None:
        """A pass through the layers begins."""
        self._now = self._noted = None
        self._number += 1
        if given is None:
            return
        if self._captured and self._addresses != self._find_addresses():
            self._give_up("parameters have moved")
            return
        self._now = self._captured.get(given.key)
        if self._now is not None or len(self._captured) >= _MOST:
            return
        seen = self._seen.get(given.key)
        if seen is not None and len(seen) == len(self.layers):
            del self._seen[given.key]
            self._now = self._capture([seen[i] for i in range(len(self.layers))])
            if self._now is not None:
                self._captured[given.key] = self._now
            if len(self._captured) >= _MOST:
                self._seen.clear()
        elif len(self._seen) < _MOST_KNOWN:
            self._noted = self._seen.setdefault(given.key, {})

    def _capture(self, seen: list[_Given]) -> list[_Layer] | None:
        """All layers, at the shapes of one pass: forward from the first to the last, then backward to the first."""
        fixed: dict[int, _Fixed] = {}
        for leaf in (leaf for given in seen for leaf in given.leaves if isinstance(leaf, Tensor)):
            fixed.setdefault(id(leaf), _Fixed(leaf.detach().clone()))
        kept = [[fixed[id(leaf)] if isinstance(leaf, Tensor) else None for leaf in given.leaves] for given in seen]
        functions = tuple(
            _bound(plain, given, places) for plain, given, places in zip(self._plain, seen, kept, strict=True)
        )
        samples = tuple((given.sample(),) for given in seen)
        device = seen[0].hidden[2]
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if self._pool is None and stream is not None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with no_collection(), warnings.catch_warnings():
                # Samples meet two streams, that of warming up and that of the capture: no gradient gathers in them.
                warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
                make = self.make or cast(MakeGraphed, torch.cuda.make_graphed_callables)
                graphed = make(functions, samples, pool=self._pool)
        except RuntimeError as error:
            if stream is not None:
                torch.cuda.set_stream(stream)  # which a capture that ends badly doesn't
            self._give_up(reason_of(error))
            return None
        self._addresses = self._find_addresses()
        return [_Layer(g, given.key, places) for g, given, places in zip(graphed, seen, kept, strict=True)]

    def _find_addresses(self) -> list[tuple[int, torch.dtype]]:
        return addresses(p for layer in self.layers for p in layer.parameters())

    def _give_up(self, reason: str) -> None:
        _LOG.warning(
            "frozen layers run kernel by kernel from here on, not as CUDA graphs: %s. A run with training.layer_graphs "
            "switched off takes less memory",
            reason,
        )
        self._off = True
        self._now = self._noted = None
        self._captured.clear()
        self._seen.clear()


def _kind(leaf: Any, device: torch.device) -> Hashable | None:
    """What a graph depends on of an argument; None where it can't have it."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype) if leaf.device == device and not leaf.requires_grad else None
    return ("value", leaf) if leaf is None or isinstance(leaf, (bool, int, float, str)) else None


def _bound(plain: Callable[..., Tensor], given: _Given, places: list[_Fixed | None]) -> Graphed:
    """A layer as a function of its hidden states alone."""
    leaves = [leaf if fixed is None else fixed.place for leaf, fixed in zip(given.leaves, places, strict=True)]
    args, kwargs = pytree.tree_unflatten(leaves, given.spec)

    def function(hidden: Tensor) -> Tensor:
        return plain(hidden, *args, **kwargs)

    return function
