"""Are the fast paths right on this device: reads, states and gradients against the loop over chunks in fp64.

    python -m benchmarks.memory_layer_check            # bf16, 20 random shapes, and 65,536 tokens
    python -m benchmarks.memory_layer_check --tiny     # smaller heads, for a CPU (float32, no Triton)

An error is |fast - exact| / |exact| over all of reads, states and gradients, the worst of them; beside it the error of
the loop in the same precision. Leaves non-zero where a fast path is more than three times as far off as the loop.
"""

from __future__ import annotations

import argparse
import random
import sys

import torch
from torch import Tensor

from titans_ds.config import FeatureConfig, MemoryConfig, RuleConfig
from titans_ds.memory import Access, NeuralMemory, kernels

GATES = {"token_step_size": True, "token_momentum": True, "token_forget_gate": True, "forget_gate": 0.01}
RULES: dict[str, dict[str, object]] = {
    "titans": {"optimizer": "momentum", "max_gradient_norm": 1.0, **GATES},
    "gates by chunk": {"optimizer": "momentum", "gate_scope": "chunk", **GATES},
    "plain": {},
    "forgetting": {"forget_gate": 0.01},
    "one matrix": {"token_step_size": True},  # TTT-Linear's
}
WRITE = Access(write=True, graph=True)


def make(rng: random.Random, semantics: str, rule: str, tiny: bool) -> tuple[NeuralMemory, MemoryConfig]:
    """A memory of random size whose gates are not the neutral ones that it starts with."""
    heads = rng.choice([1, 2, 4])
    network = {"depth": 1, "residual_norm": True} if rule == "one matrix" else {}
    config = MemoryConfig(
        dim=heads * rng.choice([8, 12] if tiny else [48, 64, 256, 128 if rule == "plain" else 64]),
        heads=heads,
        write="token",
        step_size=0.05,
        key_projection="learned",
        value_projection="learned",
        output_projection="learned",
        learn_initial_weights=True,
        features=FeatureConfig(activation="silu", normalize_keys=True),
        **network,  # type: ignore[arg-type]
        rule=RuleConfig(chunk_size=rng.choice([33, 64]), chunk_semantics=semantics, **RULES[rule]),  # type: ignore[arg-type]
    )
    memory = NeuralMemory(256, config, 0)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return memory, config


def run(memory: NeuralMemory, h: Tensor, mask: Tensor | None, kernel: str) -> list[Tensor]:
    """Reads, states and gradients of one call, in fp64."""
    h = h.clone().requires_grad_()
    with kernels.choice(kernel):
        read, state, _ = memory(h, None, mask, None, WRITE)
    final = [state[name] for name in sorted(state) if name[0] in "ws"]
    loss = (read * torch.linspace(0, 1, 256, dtype=h.dtype, device=h.device)).sum() + sum(t.sum() for t in final)
    loss.backward()
    gradients = [p.grad for p in memory.parameters() if p.grad is not None]
    memory.zero_grad(set_to_none=True)
    return [t.detach().double() for t in (read, *final, h.grad, *gradients) if t is not None]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The worst relative error; not a number where something is not finite."""
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, exact, strict=True))


def check(seed: int, tiny: bool, device: torch.device, dtype: torch.dtype) -> bool:
    """One random shape."""
    rng = random.Random(seed)
    semantics, rule = ("span", "chunk")[seed % 2], list(RULES)[seed // 2 % len(RULES)]
    memory, config = make(rng, semantics, rule, tiny)
    memory = memory.to(device)
    batch, tokens = rng.choice([1, 3]), rng.randint(1, 40 if tiny else 400)
    h = torch.randn(batch, tokens, 256, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)).to(device) < 0.8
    mask[0] = False
    mask_or_none = mask if seed % 3 else None
    exact = run(memory.double(), h.double(), mask_or_none, "loop")
    memory = memory.float()
    fast, loop = (error(run(memory, h, mask_or_none, kernel), exact) for kernel in ("auto", "loop"))
    good = fast <= 3 * loop + 1e-3
    size = f"B{batch} T{tokens} {config.heads}x{config.head_dim} C{config.rule.chunk_size}"
    print(f"{semantics:5} {rule:15} {size:24} fast {fast:.2e} loop {loop:.2e} {'' if good else 'WRONG'}", flush=True)
    return good


def check_length(tokens: int, semantics: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Everything finite over a long text."""
    memory, _ = make(random.Random(0), semantics, "titans", tiny=device.type != "cuda")
    h = torch.randn(1, tokens, 256, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    good = all(bool(torch.isfinite(t).all()) for t in run(memory.to(device), h, None, "auto"))
    print(f"{semantics:5} {tokens} tokens: {'finite' if good else 'NOT FINITE'}", flush=True)
    return good


def main() -> None:
    """Check, print, and say so in the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="for a CPU")
    parser.add_argument("--shapes", type=int, default=20, help="number of random shapes")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    good = [check(seed, options.tiny, device, dtype) for seed in range(options.shapes)]
    tokens = 2_048 if options.tiny else 65_536
    good += [check_length(tokens, semantics, device, dtype) for semantics in ("span", "chunk")]
    print("all right" if all(good) else f"{good.count(False)} of {len(good)} wrong")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
