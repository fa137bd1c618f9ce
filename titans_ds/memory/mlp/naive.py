"""The executable specification of this memory: one sample, one head, one token at a time, through torch.func.

Slow and plain on purpose: no batching, no padding, no closed form. The tests compare everything else with it, in fp64.
Can itself be differentiated (torch.func.grad over `parameters`), which is what second-order gradients are compared to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_ds.memory.mlp.config import MLPConfig
from titans_ds.memory.mlp.optimizers import ADAM_BETA2, NEWTON_SCHULZ_STEPS
from titans_ds.memory.mlp.parts import hidden_scale

Parameters = dict[str, Tensor]


@dataclass
class Token:
    """One token of one head: key, value and query [d], logits of its gates, and whether it has a pair to store."""

    key: Tensor
    value: Tensor
    query: Tensor
    logits: dict[str, Tensor]
    paired: bool


@dataclass
class Memory:
    """What a sample's head remembers."""

    weights: list[Tensor]
    momentum: list[Tensor]
    second: list[Tensor]
    steps: int = 0
    unfinished: list[Token] = field(default_factory=list)


def run(
    parameters: Parameters, hidden_TH: Tensor, config: MLPConfig, calls: Sequence[int]
) -> tuple[Tensor, list[Memory]]:
    """A whole text of one sample, cut into calls of these lengths.

    Args:
        parameters: the memory's parameters and buffers by name.
        hidden_TH: hidden states of its tokens, all of them written.
        config: of the memory.
        calls: tokens of each call.

    Returns:
        reads [T, H], and what each head remembers at the end.
    """
    heads = [
        _run_head(parameters, tokens, head, config, calls)
        for head, tokens in enumerate(zip(*features(parameters, hidden_TH, config), strict=True))
    ]
    reads_TD = torch.cat([_read_norm(reads, config) for reads, _ in heads], dim=1)
    if config.features.read_norm:
        reads_TD = reads_TD * parameters["read_norm"]
    out = parameters.get("output_projection.weight", parameters["key_projection.weight"].T)
    return reads_TD @ out.T, [memory for _, memory in heads]


def close(parameters: Parameters, heads: list[Memory], config: MLPConfig) -> None:
    """Write what each head's unfinished chunk holds, as a chunk of its own."""
    for head, memory in enumerate(heads):
        _write(parameters, memory, head, config)


def features(parameters: Parameters, hidden_TH: Tensor, config: MLPConfig) -> list[list[Token]]:
    """Every token of every head, [T][heads]."""
    normed = [_rms(h) * parameters["pre_norm"] if config.features.pre_norm else h for h in hidden_TH]
    zero = torch.zeros_like(hidden_TH[0])
    sources = [zero, *normed[:-1]] if config.token_shift else normed
    query = "key" if config.query_projection == "tied" else "query"
    keys = _feature(parameters, sources, "key", "key", config)
    values = _feature(parameters, normed, "value", "value", config)
    queries = _feature(parameters, normed, query, "query", config)
    tokens = []
    for t, h in enumerate(normed):
        paired = not (config.token_shift and t == 0)
        tokens.append(
            [
                Token(
                    _unit(keys[t][head], config),
                    values[t][head],
                    _unit(queries[t][head], config),
                    _logits(parameters, h, head, config),
                    paired,
                )
                for head in range(config.heads)
            ]
        )
    return tokens


def _feature(
    parameters: Parameters, sources: Sequence[Tensor], projection: str, name: str, config: MLPConfig
) -> list[list[Tensor]]:
    projected = [parameters[f"{projection}_projection.weight"] @ h for h in sources]
    if config.features.convolution and (name != "query" or config.features.convolve_queries):
        weight = parameters[f"{name}_convolution.weight"]
        projected = [
            sum((weight[d] * projected[t - d] for d in range(len(weight)) if t >= d), torch.zeros_like(weight[0]))
            for t in range(len(projected))
        ]
    if config.features.activation == "silu":
        projected = [F.silu(x) for x in projected]
    return [list(torch.split(x, config.head_dim)) for x in projected]


def _logits(parameters: Parameters, h: Tensor, head: int, config: MLPConfig) -> dict[str, Tensor]:
    rows = {name: i * config.heads + head for i, name in enumerate(config.rule.token_gates)}
    return {n: parameters["gates.weight"][row] @ h + parameters["gates.bias"][row] for n, row in rows.items()}


def _run_head(
    parameters: Parameters, tokens: Sequence[Token], head: int, config: MLPConfig, calls: Sequence[int]
) -> tuple[Tensor, Memory]:
    initial = [parameters[f"initial_w{level}"] for level in range(config.depth)]
    weights = [w if config.heads == 1 else w[head] for w in initial]
    memory = Memory(weights, [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights])
    reads, rest = [], list(tokens)
    for length in calls:
        now, rest = rest[:length], rest[length:]
        for token in now:
            # A token reads what was finished before its own chunk.
            reads.append(network(parameters, memory.weights, token.query, head, config))
            memory.unfinished.append(token)
            if len(memory.unfinished) == config.rule.chunk_size:
                _write(parameters, memory, head, config)
        if config.rule.chunk_size is None:
            _write(parameters, memory, head, config)
    return torch.stack(reads), memory


def network(parameters: Parameters, weights: Sequence[Tensor], x: Tensor, head: int, config: MLPConfig) -> Tensor:
    """f_W(x) of one head, x [d]."""
    y = x
    for level, weight in enumerate(weights):
        y = weight @ y
        if level < len(weights) - 1:
            y = (F.silu(y) if config.activation == "silu" else y) * hidden_scale(config)
    if config.residual_norm:
        part = slice(head * config.head_dim, (head + 1) * config.head_dim)
        scale, bias = parameters["residual_scale"][part], parameters["residual_bias"][part]
        y = x + scale * F.layer_norm(y, y.shape, eps=1e-6) + bias
    return y


def _loss(parameters: Parameters, weights: list[Tensor], token: Token, head: int, config: MLPConfig) -> Tensor:
    y = network(parameters, weights, token.key, head, config)
    return 0.5 * (y - token.value).square().sum()


def _write(parameters: Parameters, memory: Memory, head: int, config: MLPConfig) -> None:
    tokens = [token for token in memory.unfinished if token.paired]
    memory.unfinished = []
    if not tokens:
        return
    if config.write == "pooled":
        tokens = [_mean_token(tokens)]
    if config.rule.acts_per_token:
        _write_by_token(parameters, memory, tokens, head, config)
    else:
        _write_by_chunk(parameters, memory, tokens, head, config)


def _write_by_token(parameters: Parameters, memory: Memory, tokens: list[Token], head: int, config: MLPConfig) -> None:
    """S_t = eta_t S_(t-1) - theta_t g_t, W_t = (1 - alpha_t) W_(t-1) + S_t, token by token; all g_t at the same W."""
    rule, at = config.rule, memory.weights
    shares = _shares(tokens, config)
    scale = _clip(_sum(_gradients(parameters, at, tokens, head, config), shares), config)
    for token, share in zip(tokens, shares, strict=True):
        gradient = _gradients(parameters, at, [token], head, config)[0]
        eta = _gate(token, "momentum", rule.momentum if rule.has_momentum else 0.0)
        alpha = _gate(token, "forget_gate", rule.forget_gate)
        memory.momentum = [
            eta * s - theta * share * scale * g
            for s, theta, g in zip(memory.momentum, step_sizes(parameters, config), gradient, strict=True)
        ]
        memory.weights = [(1 - alpha) * w + s for w, s in zip(memory.weights, memory.momentum, strict=True)]


def _write_by_chunk(parameters: Parameters, memory: Memory, tokens: list[Token], head: int, config: MLPConfig) -> None:
    """K steps of the optimizer on the chunk's loss; gates from the mean of its tokens."""
    rule, mean = config.rule, _mean_token(tokens)
    eta = _gate(mean, "momentum", rule.momentum)
    shares, relative = _shares(tokens, config), torch.ones(())
    if rule.optimizer in ("adamw", "muon") and rule.token_step_size:
        relative = torch.stack([2 * torch.sigmoid(t.logits["step_size"]) for t in tokens]).mean()
        shares = [share / relative for share in shares]
    for k in range(config.inner_steps):
        total = _sum(_gradients(parameters, memory.weights, tokens, head, config), shares)
        clip = _clip(total, config)
        factor = (
            relative if rule.schedule == "constant" else relative * (1 + math.cos(math.pi * k / config.inner_steps)) / 2
        )
        keep = 1 - _gate(mean, "forget_gate", rule.forget_gate) if k == 0 else 1.0
        memory.steps += 1
        for level, theta in enumerate(step_sizes(parameters, config)):
            change = _change(memory, level, total[level] * clip, theta * factor, eta, config)
            memory.weights = list(memory.weights)
            memory.weights[level] = keep * memory.weights[level] + change


def _change(memory: Memory, level: int, g: Tensor, theta: Tensor, eta: Tensor, config: MLPConfig) -> Tensor:
    rule = config.rule
    if rule.optimizer == "sgd":
        return -theta * g
    if rule.optimizer == "momentum":
        memory.momentum[level] = eta * memory.momentum[level] - theta * g
        return memory.momentum[level]
    if rule.optimizer == "muon":
        memory.momentum[level] = eta * memory.momentum[level] + g
        return -theta * orthogonalized(memory.momentum[level], NEWTON_SCHULZ_STEPS)
    memory.momentum[level] = rule.momentum * memory.momentum[level] + (1 - rule.momentum) * g
    memory.second[level] = ADAM_BETA2 * memory.second[level] + (1 - ADAM_BETA2) * g**2
    first = memory.momentum[level] / (1 - math.pow(rule.momentum, memory.steps))
    second = memory.second[level] / (1 - math.pow(ADAM_BETA2, memory.steps))
    return -theta * first / (second.clamp(min=1e-30).sqrt() + 1e-8)


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """The quintic acts on singular values: U p(...p(sigma)) V^T, p(x) = a x + b x^3 + c x^5, by the odd powers of X."""
    x: Tensor = matrix / torch.linalg.matrix_norm(matrix)
    for _ in range(steps):
        cube = x @ x.T @ x
        x = 3.4445 * x - 4.7750 * cube + 2.0315 * (cube @ x.T @ x)
    return x


def _gradients(
    parameters: Parameters, weights: list[Tensor], tokens: list[Token], head: int, config: MLPConfig
) -> list[list[Tensor]]:
    def of(token: Token) -> list[Tensor]:
        return list(torch.func.grad(lambda w: _loss(parameters, w, token, head, config))(list(weights)))

    return [of(token) for token in tokens]


def step_sizes(parameters: Parameters, config: MLPConfig) -> list[Tensor]:
    """theta of every matrix."""
    if config.learn_step_size:
        return list(parameters["log_step_sizes"].exp())
    return [torch.tensor(theta, dtype=torch.float64) for theta in config.step_sizes]


def _shares(tokens: list[Token], config: MLPConfig) -> list[Tensor]:
    """Weight of each token's gradient: its share of the loss, times theta_t / theta."""
    share = 1 / len(tokens) if config.rule.reduction == "mean" else 1.0
    if not config.rule.token_step_size:
        return [torch.tensor(share, dtype=torch.float64)] * len(tokens)
    return [share * 2 * torch.sigmoid(token.logits["step_size"]) for token in tokens]


def _clip(total: list[Tensor], config: MLPConfig) -> Tensor:
    if config.rule.max_gradient_norm is None:
        return torch.ones((), dtype=torch.float64)
    norm: Tensor = (sum((g.square().sum() for g in total), torch.zeros(())) + 1e-12).sqrt()
    return torch.clamp(config.rule.max_gradient_norm / norm, max=1.0)


def _sum(gradients: list[list[Tensor]], shares: list[Tensor]) -> list[Tensor]:
    levels = range(len(gradients[0]))
    return [torch.stack([s * g[i] for g, s in zip(gradients, shares, strict=True)]).sum(dim=0) for i in levels]


def _gate(token: Token, name: str, constant: float) -> Tensor:
    return torch.sigmoid(token.logits[name]) if name in token.logits else torch.tensor(constant, dtype=torch.float64)


def _mean_token(tokens: list[Token]) -> Token:
    key, value, query = (torch.stack([getattr(t, n) for t in tokens]).mean(dim=0) for n in ("key", "value", "query"))
    logits = {n: torch.stack([t.logits[n] for t in tokens]).mean() for n in tokens[0].logits}
    return Token(key, value, query, logits, True)


def _unit(x: Tensor, config: MLPConfig) -> Tensor:
    return x / x.norm().clamp(min=1e-12) if config.features.normalize_keys else x


def _rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def _read_norm(reads_Td: Tensor, config: MLPConfig) -> Tensor:
    return _rms(reads_Td) if config.features.read_norm else reads_Td
