"""Step size, momentum and forget gate of every token, and what they make of a chunk's gradients.

Titans' rule at every token t of a chunk, with all gradients g_t taken at the same weights:
    S_t = eta_t S_(t-1) - theta_t g_t        W_t = (1 - alpha_t) W_(t-1) + S_t
is linear in W_0, S_0 and g_1 … g_C, so that a chunk needs two weighted sums of gradients and three factors, and no
per-token weights (Titans, arXiv 2501.00663, section 3.2). Here they are, in log space.

Legend of shape suffixes: B batch, T tokens, H model width, N batch x heads, R chunks, C tokens of a chunk.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_ds.memory.mlp.config import MLPConfig, RuleConfig

_BLOCK = 256  # tokens whose pairwise decays [BLOCK, BLOCK] exist at a time


class Gates(nn.Module):
    """The learned gates: one linear map of the token each, per head. They start as the constants of the rule.

    Args:
        hidden_size: model width H.
        config: of the memory.
    """

    def __init__(self, hidden_size: int, config: MLPConfig) -> None:
        super().__init__()
        starts = {"step_size": 0.5, "momentum": config.rule.momentum, "forget_gate": config.rule.forget_gate}
        bias = [logit(starts[name]) for name in config.rule.token_gates for _ in range(config.heads)]
        self.weight = nn.Parameter(torch.zeros(len(bias), hidden_size))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Logits [B, T, gates * heads], at least fp32: step_size, momentum, forget_gate, those that are asked for."""
        logits = F.linear(x_BTH, self.weight.to(x_BTH.dtype))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(dtype) + self.bias.to(dtype)


@dataclass(frozen=True)
class Coefficients:
    """What a chunk's update is made of; every tensor [N, R] or, by token, [N, R, C].

    Args:
        surprise: weight of each token's gradient: its share of the loss times theta_t / theta.
        to_weights, to_momentum: weight of each token's gradient in W and S; `surprise` where None.
        keep: factor of W, None for 1.
        momentum_keep: factor of S in S; None without momentum.
        carry: factor of S in W, beside `to_weights`; None where W takes S as it becomes.
        step: mean theta_t / theta, for optimizers whose step does not scale with the gradient; None for 1.
    """

    surprise: Tensor
    to_weights: Tensor | None = None
    to_momentum: Tensor | None = None
    keep: Tensor | None = None
    momentum_keep: Tensor | None = None
    carry: Tensor | None = None
    step: Tensor | None = None

    def chunk(self, index: int) -> Coefficients:
        """Those of one chunk: [N], and by token [N, C]."""
        return Coefficients(*(None if t is None else t[:, index] for t in vars(self).values()))  # type: ignore[arg-type]

    def block(self, chunks: slice) -> Coefficients:
        """Those of some chunks: [N, R], and by token [N, R, C]."""
        return Coefficients(*(None if t is None else t[:, chunks] for t in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class GateValues:
    """Logits [N, R, C] of the gates that depend on the token, None for the others.

    `active`: where there is a pair; None: everywhere.
    """

    active: Tensor | None
    step_size: Tensor | None = None
    momentum: Tensor | None = None
    forget_gate: Tensor | None = None


def coefficients(values: GateValues, rule: RuleConfig, like_NRC: Tensor) -> Coefficients:
    """Those of all chunks at once: gates don't depend on the fast weights.

    Args:
        values: of the gates.
        rule: see RuleConfig.
        like_NRC: of this shape, dtype (that of the fast weights) and device.
    """
    surprise = _shares(values, rule, like_NRC)
    relative = None if values.step_size is None else 2 * torch.sigmoid(values.step_size)
    step = None
    if relative is not None and rule.optimizer in ("adamw", "muon"):
        step = _Mean(values.active)(relative)
        relative = relative / step.unsqueeze(-1).clamp(min=1e-6)
    if relative is not None:
        surprise = relative if surprise is None else surprise * relative
    elif surprise is None:
        surprise = torch.ones_like(like_NRC)
    if rule.acts_per_token:
        return _by_token(surprise, values, rule)
    return _by_chunk(surprise, step, values, rule)


def _shares(values: GateValues, rule: RuleConfig, like_NRC: Tensor) -> Tensor | None:
    """Of each token in its chunk's loss; None for 1."""
    if values.active is None:
        return torch.full_like(like_NRC, 1 / like_NRC.shape[-1]) if rule.reduction == "mean" else None
    if rule.reduction == "sum" or values.active.shape[-1] == 1:  # one token is its mean
        return values.active.to(like_NRC.dtype)
    return shares(values.active, like_NRC.dtype)


def shares(active: Tensor, dtype: torch.dtype) -> Tensor:
    """Of every token in the mean over the active ones, [..., C]; 0 where there is none."""
    weights = active.to(dtype)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)


def _by_chunk(surprise: Tensor, step: Tensor | None, values: GateValues, rule: RuleConfig) -> Coefficients:
    keep = momentum = None
    mean = _Mean(values.active)
    if values.forget_gate is not None:
        keep = torch.sigmoid(-mean(values.forget_gate))
    elif rule.forget_gate > 0:
        keep = torch.full_like(surprise[..., 0], 1 - rule.forget_gate)
    if values.momentum is not None:
        momentum = torch.sigmoid(mean(values.momentum))
    elif rule.has_momentum:
        momentum = torch.full_like(surprise[..., 0], rule.momentum)
    return Coefficients(surprise, keep=keep, momentum_keep=momentum, step=step)


def _by_token(surprise: Tensor, values: GateValues, rule: RuleConfig) -> Coefficients:
    forget_logits = None if values.forget_gate is None else -values.forget_gate
    # log(1 - alpha_t), 0 where nothing is stored.
    log_keep = _log_sigmoid(forget_logits, math.log1p(-rule.forget_gate), values.active, surprise)
    total = log_keep.sum(dim=-1, keepdim=True)
    after = torch.exp(total - log_keep.cumsum(dim=-1))  # of W, over the tokens after t
    keep = torch.exp(total.squeeze(-1)) if rule.forget_gate > 0 else None
    if rule.optimizer == "sgd":
        return Coefficients(surprise, to_weights=surprise * after, keep=keep)
    log_eta = _log_sigmoid(values.momentum, math.log(rule.momentum), values.active, surprise)
    sums, carry = _momentum_into_weights(after if values.active is None else after * values.active, log_eta)
    total_eta = log_eta.sum(dim=-1, keepdim=True)
    to_momentum = surprise * torch.exp(total_eta - log_eta.cumsum(dim=-1))
    return Coefficients(surprise, surprise * sums, to_momentum, keep, torch.exp(total_eta.squeeze(-1)), carry)


def _log_sigmoid(logits: Tensor | None, constant: float, active: Tensor | None, like: Tensor) -> Tensor:
    values = torch.full_like(like, constant) if logits is None else F.logsigmoid(logits)
    return values if active is None else values.masked_fill(~active, 0)


def _momentum_into_weights(after: Tensor, log_eta: Tensor) -> tuple[Tensor, Tensor]:
    """c_s = sum_(t >= s) after_t prod_(s < r <= t) eta_r, and the same for S_0: [..., C] and [...].

    Backwards, block by block: what comes later enters a block as one number per row.
    """
    future = torch.zeros_like(after[..., 0])
    sums: list[Tensor] = []
    blocks = zip(torch.split(after, _BLOCK, dim=-1), torch.split(log_eta, _BLOCK, dim=-1), strict=True)
    for a, log in reversed(list(blocks)):
        L = log.cumsum(dim=-1)
        pairs = L.unsqueeze(-1) - L.unsqueeze(-2)  # [t, s]
        earlier = torch.ones(pairs.shape[-2:], dtype=torch.bool, device=a.device).tril()
        decay = torch.exp(pairs.masked_fill(~earlier, -math.inf))
        to_end = torch.exp(L[..., -1:] - L)
        sums.insert(0, (a.unsqueeze(-2) @ decay).squeeze(-2) + to_end * future.unsqueeze(-1))
        future = (a * torch.exp(L)).sum(dim=-1) + torch.exp(L[..., -1]) * future
    return torch.cat(sums, dim=-1), future


class _Mean:
    """Of a chunk's active tokens (None: all), [..., C] -> [...]; 0 where there is none."""

    def __init__(self, active: Tensor | None) -> None:
        self._active = active

    def __call__(self, x: Tensor) -> Tensor:
        if self._parts is None:
            return x.mean(dim=-1)
        idle, count = self._parts
        return x.masked_fill(idle, 0).sum(dim=-1) / count

    @functools.cached_property
    def _parts(self) -> tuple[Tensor, Tensor] | None:
        """Where there is none, and how many there are; made once, and only if a mean is asked for."""
        return None if self._active is None else (~self._active, self._active.sum(dim=-1).clamp(min=1))


def logit(p: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(p) - math.log1p(-p)
