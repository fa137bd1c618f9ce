"""The hand-derived backward of a write: torch's gradcheck, autograd's gradients for all it covers, what it keeps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from titans_ds.memory.mlp import RuleConfig, write_function
from titans_ds.memory.mlp.gates import Coefficients
from titans_ds.memory.mlp.network import Form
from titans_ds.memory.mlp.optimizers import Fast
from titans_ds.memory.mlp.rule import Inner, Pairs, write_chunk

N, C, D, HIDDEN = 2, 3, 3, 4


class Problem:
    """A chunk to write, with every tensor a leaf in fp64 that gets a gradient."""

    def __init__(self, depth: int, tokens: int = C, width: int = D, by_token: bool = False, **settings: Any) -> None:
        of_rule = {k: v for k, v in settings.items() if k in RuleConfig.__annotations__}
        self.rule = RuleConfig(gate_scope="token" if by_token else "chunk", **of_rule)
        self.form = Form(settings.get("activation", "silu"), 1.3)
        self.depth, self.steps = depth, settings.get("inner_steps", 1)
        generator = torch.Generator().manual_seed(0)
        momentum = self.rule.optimizer == "momentum"
        self.inputs: dict[str, Tensor] = {}

        def add(name: str, *shape: int, share: bool = False) -> None:
            draw = torch.rand if share else torch.randn
            self.inputs[name] = draw(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        add("keys", N, tokens, width)
        add("values", N, tokens, width)
        add("sizes", depth, share=True)
        add("surprise", N, tokens, share=True)
        add("keep", N, share=True)
        for name in ("to_weights", *(["to_momentum"] if momentum else [])) if by_token else ():
            add(name, N, tokens, share=True)
        for name in ("momentum_keep", *(["carry"] if by_token else [])) if momentum else ():
            add(name, N, share=True)
        widths = [width, *[HIDDEN if width == D else width] * (depth - 1), width]
        for letter in "ws" if momentum else "w":
            for level in range(depth):
                add(f"{letter}{level}", N, widths[level + 1], widths[level])

    def write(self, derived: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The new fast weights and momenta."""
        given = dict(zip(self.inputs, tensors, strict=True))
        weights, momentum = (
            tuple(given.pop(f"{letter}{i}") for i in range(self.depth) if f"{letter}{i}" in given) for letter in "ws"
        )
        keys, values, sizes = (given.pop(name) for name in ("keys", "values", "sizes"))
        inner = Inner(self.rule, self.form, sizes, self.steps, derived)
        new = write_chunk(Fast(weights, momentum), Pairs(keys, values), Coefficients(**given), inner)
        return (*new.weights, *new.momentum)

    def gradients(self, derived: bool) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """What was written, and the gradients of a random product with it."""
        written = self.write(derived, *self.inputs.values())
        generator = torch.Generator().manual_seed(1)
        outer = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in written]
        found = torch.autograd.grad(written, list(self.inputs.values()), outer, allow_unused=True)
        zeros = (torch.zeros_like(t) if g is None else g for g, t in zip(found, self.inputs.values(), strict=True))
        return written, dict(zip(self.inputs, zeros, strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_it_is_the_gradient_of_the_write(optimizer: str) -> None:
    """By finite differences, at depth 2, with the gates of every token and a limit on the gradient's norm."""
    problem = Problem(2, optimizer=optimizer, by_token=True, max_gradient_norm=0.7)
    inputs = tuple(problem.inputs.values())
    assert torch.autograd.gradcheck(lambda *tensors: problem.write(True, *tensors), inputs, atol=1e-7)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_it_equals_autograd(depth: int) -> None:
    """Everything that it covers, in every combination: what is written bit for bit, and its gradients."""
    options = {
        "activation": ("silu", "linear"),
        "optimizer": ("sgd", "momentum"),
        "max_gradient_norm": (None, 0.7, 1e6),
        "by_token": (False, True),
    }
    for choice in itertools.product(*options.values()):
        settings: dict[str, Any] = dict(zip(options, choice, strict=True))
        for steps in (1,) if settings["by_token"] else (1, 3):
            problem = Problem(depth, inner_steps=steps, **settings)
            (written, derived), (plain, expected) = (problem.gradients(d) for d in (True, False))
            assert all(torch.equal(a, b) for a, b in zip(written, plain, strict=True))
            for name, gradient in expected.items():
                error = (derived[name] - gradient).norm()
                assert error <= 1e-10 * gradient.norm(), (settings, steps, name, error, gradient.norm())


@pytest.mark.parametrize("depth", [2, 4])
def test_it_keeps_its_inputs_alone(depth: int) -> None:
    """However deep and whatever the optimizer; autograd keeps several times as much."""
    kept: dict[bool, int] = {}
    problem = Problem(depth, tokens=32, width=32, optimizer="momentum", max_gradient_norm=1.0)
    for derived in (True, False):
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            written = problem.write(derived, *problem.inputs.values())
        kept[derived] = sum(storages.values())
        assert written[0].grad_fn is not None
    inputs = sum(t.nbytes for t in problem.inputs.values())
    assert kept[True] <= inputs + 64
    assert kept[False] > 2.5 * kept[True]


@pytest.mark.parametrize(
    ("settings", "covered"),
    [
        ({}, True),
        ({"optimizer": "momentum"}, True),
        ({"optimizer": "adamw"}, False),
        ({"optimizer": "muon"}, False),
    ],
)
def test_what_is_left_to_autograd(settings: dict[str, Any], covered: bool) -> None:
    """As the module says."""
    assert write_function.covers(RuleConfig(**settings), Form()) is covered
    normed = Form(norm=(torch.ones(1, 1, D), torch.zeros(1, 1, D)))
    assert not write_function.covers(RuleConfig(**settings), normed)
