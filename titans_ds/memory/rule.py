"""The write rule: gradient descent on the fast weights, K steps over the tokens of one segment.

W <- W - theta grad l(W). With one step, a constant theta and a pooled key and value this is the rule of "Parametric
Memory Cannot Replace Retrieval"; with all tokens it is the gradient step of TTT (Sun et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from titans_ds.errors import ConfigError
from titans_ds.memory import network
from titans_ds.memory.network import Activation, Weights


@dataclass(frozen=True)
class Controls:
    """Changes to the rule at inference, for control experiments.

    Args:
        sign: 1 descends, -1 ascends (the `sign flip` control), 0 writes nothing.
        inner_steps: gradient steps instead of the configured number.
        query: `key` reads with the key projection instead of the query's.
    """

    sign: float = 1.0
    inner_steps: int | None = None
    query: Literal["trained", "key"] = "trained"

    def __post_init__(self) -> None:
        if self.inner_steps is not None and self.inner_steps < 0:
            raise ConfigError(f"controls: inner_steps is {self.inner_steps}; it must be 0 or more")
        if self.query not in ("trained", "key"):
            raise ConfigError(f"controls: query is {self.query!r}; expected 'trained' or 'key'")


def pool(keys_BTD: Tensor, values_BTD: Tensor, token_weights_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean key and the mean value, as a segment of one token: a write of rank 1 per matrix and step.

    Returns:
        keys [B, 1, D], values [B, 1, D], token weights [B, 1] (1 where the sample has a token, else 0).
    """
    weights_B1T = token_weights_BT.unsqueeze(1)
    return weights_B1T @ keys_BTD, weights_B1T @ values_BTD, token_weights_BT.sum(dim=1, keepdim=True)


def descend(
    weights: Weights,
    keys_BTD: Tensor,
    values_BTD: Tensor,
    token_weights_BT: Tensor,
    step_sizes: Tensor,
    inner_steps: int,
    activation: Activation,
) -> Weights:
    """`inner_steps` steps of W_l <- W_l - theta_l grad_l; step_sizes [depth], in the dtype of the fast weights."""
    for _ in range(inner_steps):
        _, gradients = network.loss_and_gradient(weights, keys_BTD, values_BTD, token_weights_BT, activation)
        weights = tuple(
            w - step_sizes[level] * g.to(w.dtype) for level, (w, g) in enumerate(zip(weights, gradients, strict=True))
        )
    return weights
