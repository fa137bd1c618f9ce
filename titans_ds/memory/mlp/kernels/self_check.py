"""Whether a Triton kernel does on this device what PyTorch does: asked once for every size and rule, before it is used.

A compiler or a driver may get a kernel wrong that is right elsewhere. So the kernel that a call needs first works on a
few random chunks, forward and backward; what it returns is compared with PyTorch's in fp32. The compiled kernel is the
one that the call uses afterwards: the check costs milliseconds beside the compilation.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_ds.memory.mlp.chunks import Work, run
from titans_ds.memory.mlp.config import RuleConfig
from titans_ds.memory.mlp.gates import GateValues, coefficients
from titans_ds.memory.mlp.kernels import choice
from titans_ds.memory.mlp.kernels.chunkwise import run_chunk
from titans_ds.memory.mlp.network import Form
from titans_ds.memory.mlp.optimizers import Fast
from titans_ds.memory.mlp.rule import Inner, Pairs

_ROWS, _CHUNKS = 2, 3
_TOLERANCE = 5e-2  # of the norm; products of bf16 are within 1e-2, a wrong kernel is nowhere near
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for."""

    device: torch.device
    dtype: torch.dtype
    chunk: int
    dim: int
    shapes: tuple[tuple[int, int], ...]  # of the matrices
    form: Form
    rule: str  # RuleConfig's repr: step sizes are a list, which no cache takes
    normed: bool  # residual_norm


def passes(keys_NRCD: Tensor, fast: Fast, inner: Inner) -> bool:
    """Whether the Triton kernel for this call agrees with PyTorch; says so in the log where not."""
    chunk, dim = keys_NRCD.shape[2:]
    form = replace(inner.form, norm=None)
    _rules[repr(inner.rule)] = inner.rule
    shapes = tuple((w.shape[1], w.shape[2]) for w in fast.weights)
    normed = inner.form.norm is not None
    case = Case(keys_NRCD.device, keys_NRCD.dtype, chunk, dim, shapes, form, repr(inner.rule), normed)
    return _passes(case)


_rules: dict[str, RuleConfig] = {}


@functools.cache
def _passes(case: Case) -> bool:
    return close(case, lambda: _error(case))


def close(case: object, error: Callable[[], float]) -> bool:
    """Whether a kernel's error is small; says so in the log where not, or where it does not run."""
    try:
        # In a thread of its own: a call may be inside torch.inference_mode, or inside activation checkpointing, which
        # counts what autograd saves, and does not meet the check again when it recomputes.
        with ThreadPoolExecutor(max_workers=1) as thread:
            found = thread.submit(error).result()
    except Exception as problem:
        _log.warning("the Triton kernel for %s failed; PyTorch does it instead: %s", case, problem)
        return False
    if not found < _TOLERANCE:
        _log.warning("the Triton kernel for %s is off by %.1e; PyTorch does it instead", case, found)
        return False
    return True


def _error(case: Case) -> float:
    """The worst relative error over reads, states and gradients."""
    with torch.cuda.device(case.device) if case.device.type == "cuda" else contextlib.nullcontext():
        found, exact = _run(case, case.dtype, triton=True), _run(case, torch.float32, triton=False)
    return largest_error(found, exact)


def largest_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error."""
    return max(float((a - b).norm() / b.norm().clamp(min=1e-20)) for a, b in zip(found, exact, strict=True))


def _run(case: Case, dtype: torch.dtype, triton: bool) -> list[Tensor]:
    rule, depth, generator = _rules[case.rule], len(case.shapes), torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(case.device)

    split = (_ROWS, _CHUNKS, case.chunk)
    # The same numbers at either precision.
    tokens = [normal(*split, case.dim, scale=case.dim**-0.5).to(case.dtype).to(dtype) for _ in range(3)]
    states = [normal(_ROWS, *s, scale=s[1] ** -0.5) for s in case.shapes]
    states += [normal(_ROWS, *s, scale=0.1 * s[1] ** -0.5) for s in case.shapes if rule.has_momentum]
    logits = {name: normal(*split) for name in rule.token_gates}
    norm = [1 + 0.1 * normal(_ROWS, 1, case.dim), 0.1 * normal(_ROWS, 1, case.dim)] if case.normed else []
    leaves = [t.requires_grad_() for t in (*tokens, *states, *logits.values(), *norm)]
    active = torch.ones(split, dtype=torch.bool, device=case.device)
    active[0, -1, case.chunk // 2 :] = False
    finished = torch.ones(split[:2], dtype=torch.bool, device=case.device)
    finished[1, -1] = False
    c = coefficients(GateValues(active, **logits), rule, active.float())
    form = replace(case.form, norm=(norm[0], norm[1])) if norm else case.form
    inner = Inner(rule, form, torch.full((depth,), 0.1, device=case.device), 1)
    fast, pairs = Fast(tuple(states[:depth]), tuple(states[depth:])), Pairs(tokens[0], tokens[1])
    if triton:
        reads, new = run_chunk(fast, pairs, c, finished, inner, tokens[2], graph=True, triton=True)
    else:
        with choice("loop"):
            work = Work(pairs, active, c, finished, _CHUNKS, 0)
            reads, new = run(fast, work, inner, tokens[2], contextlib.nullcontext)
    outputs = [t for t in (reads, *new.weights, *new.momentum) if t is not None]
    # Random directions: a sum would hide errors that cancel.
    loss = torch.stack([(t.float() * normal(*t.shape)).sum() for t in outputs]).sum()
    with torch.autograd.set_multithreading_enabled(False):  # in this thread, as captured
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [t.detach().float() for t in (*outputs, *grads) if t is not None]
