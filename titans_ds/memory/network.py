"""f_W, the memory network, and the exact gradient of its write loss as batched matrix products.

Legend of shape suffixes: B batch, T tokens, D memory dim, O/I a matrix's output/input width.

Fast weights are a tuple of matrices W_l [B, O, I], one set per sample; f_W(x) = W_n act(... act(W_1 x)). No autograd is
needed for the inner gradient, and torch can differentiate through it once more (second-order meta-learning).
`reference.py` states the same through torch autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "linear"]
Weights = tuple[Tensor, ...]


def _identity(z: Tensor) -> Tensor:
    return z


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, _silu_derivative),
    "linear": (_identity, torch.ones_like),
}


def forward(weights: Weights, x_BTI: Tensor, activation: Activation) -> Tensor:
    """f_W(x): [B, T, I] -> [B, T, D], each sample through its own weights, products in the dtype of x."""
    return _trace(weights, x_BTI, activation)[0][-1]


def loss_and_gradient(
    weights: Weights, keys_BTD: Tensor, values_BTD: Tensor, token_weights_BT: Tensor, activation: Activation
) -> tuple[Tensor, Weights]:
    """The write loss l(W) = sum_t m_t |f_W(k_t) - v_t|^2 / 2 and its gradient in every fast weight.

    Args:
        weights: W_l [B, O, I].
        keys_BTD, values_BTD: what to store; finite also where the token weight is 0.
        token_weights_BT: m_t, the share of each token in the loss; 0 for padding.
        activation: between the matrices.

    Returns:
        loss [B], gradients [B, O, I] in the dtype of the keys.
    """
    outputs, inputs_of = _trace(weights, keys_BTD, activation)
    _, derivative = _ACTIVATIONS[activation]
    error_BTD = outputs[-1] - values_BTD
    delta_BTO = error_BTD * token_weights_BT.unsqueeze(-1)
    loss_B = 0.5 * (error_BTD * delta_BTO).sum(dim=(1, 2))
    gradients: list[Tensor] = []
    for level in range(len(weights) - 1, -1, -1):
        gradients.append(delta_BTO.mT @ inputs_of[level])  # (B, O, I)
        if level > 0:
            delta_BTO = (delta_BTO @ weights[level].to(delta_BTO.dtype)) * derivative(outputs[level - 1])
    return loss_B, tuple(reversed(gradients))


def loss(
    weights: Weights, keys_BTD: Tensor, values_BTD: Tensor, token_weights_BT: Tensor, activation: Activation
) -> Tensor:
    """The write loss alone, [B]."""
    error_BTD = forward(weights, keys_BTD, activation) - values_BTD
    return 0.5 * (error_BTD.square().sum(dim=-1) * token_weights_BT).sum(dim=-1)


def _trace(weights: Weights, x_BTI: Tensor, activation: Activation) -> tuple[list[Tensor], list[Tensor]]:
    """Every matrix's output before the activation, and every matrix's input."""
    activate, _ = _ACTIVATIONS[activation]
    outputs: list[Tensor] = []
    inputs: list[Tensor] = [x_BTI]
    for level, weight_BOI in enumerate(weights):
        outputs.append(inputs[-1] @ weight_BOI.to(x_BTI.dtype).mT)
        if level < len(weights) - 1:
            inputs.append(activate(outputs[-1]))
    return outputs, inputs
