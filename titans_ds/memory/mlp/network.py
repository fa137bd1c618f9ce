"""f_W, the memory network, and the exact gradient of its write loss as batched matrix products.

Legend of shape suffixes: B samples (or samples x heads), T tokens, D memory dim, O/I a matrix's output/input width.

Fast weights are a tuple of matrices W_l [B, O, I], one set per sample; f_W(x) = W_n act(... act(W_1 x)). No autograd is
needed for the inner gradient, and torch can differentiate through it once more (second-order meta-learning).
`reference.py` states the same through torch autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "linear"]
Weights = tuple[Tensor, ...]
LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Form:
    """What f_W is, beside the fast weights.

    Args:
        activation: between the matrices.
        hidden_scale: factor on every hidden layer after its activation.
        norm: scale and bias [B or 1, 1, D]: f_W(x) = x + scale LayerNorm(mlp_W(x)) + bias. None: f_W is the plain MLP.
    """

    activation: Activation = "silu"
    hidden_scale: float = 1.0
    norm: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Terms:
    """Of each matrix, its input and the loss's derivative in its output, token by token: [B, T, I] and [B, T, O]."""

    inputs: Weights
    deltas: Weights


def _identity(z: Tensor) -> Tensor:
    return z


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _silu_curvature(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


# Each with its first and second derivative.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, _silu_derivative, _silu_curvature),
    "linear": (_identity, torch.ones_like, torch.zeros_like),
}


def forward(weights: Weights, x_BTI: Tensor, form: Form) -> Tensor:
    """f_W(x): [B, T, I] -> [B, T, D], each sample through its own weights, products in the dtype of x."""
    outputs, _ = trace(_cast(weights, x_BTI), x_BTI, form)
    return finish(outputs[-1], x_BTI, form)


def terms(
    weights: Weights, keys_BTD: Tensor, values_BTD: Tensor, form: Form, token_weights_BT: Tensor | None = None
) -> Terms:
    """What the gradient of the write loss is made of, each token's derivative times its weight where one is given."""
    weights = _cast(weights, keys_BTD)
    outputs, inputs = trace(weights, keys_BTD, form)
    delta_BTO = finish(outputs[-1], keys_BTD, form) - values_BTD
    if token_weights_BT is not None:
        delta_BTO = delta_BTO * token_weights_BT.unsqueeze(-1).to(delta_BTO.dtype)
    if form.norm is not None:
        delta_BTO = _norm_backward(delta_BTO * form.norm[0].to(delta_BTO.dtype), outputs[-1])
    deltas = [delta_BTO]
    for level in range(len(weights) - 1, 0, -1):
        delta_BTO = scaled(delta_BTO @ weights[level], form) * activation_derivative(outputs[level - 1], form)
        deltas.insert(0, delta_BTO)
    return Terms(tuple(inputs), tuple(deltas))


def gradient(parts: Terms, token_weights_BT: Tensor | None = None) -> Weights:
    """sum_t m_t delta_t x_t^T of every matrix, [B, O, I] in the dtype of the keys; m = 1 where not given."""
    deltas: Sequence[Tensor] = parts.deltas
    if token_weights_BT is not None:
        deltas = [delta * token_weights_BT.unsqueeze(-1).to(delta.dtype) for delta in deltas]
    return tuple(delta.mT @ x for delta, x in zip(deltas, parts.inputs, strict=True))


def loss_and_gradient(
    weights: Weights, keys_BTD: Tensor, values_BTD: Tensor, token_weights_BT: Tensor, form: Form
) -> tuple[Tensor, Weights]:
    """The write loss l(W) = sum_t m_t l_t(W), l_t = |f_W(k_t) - v_t|^2 / 2, and its gradient in W.

    Args:
        weights: W_l [B, O, I].
        keys_BTD, values_BTD: what to store; finite also where the token weight is 0.
        token_weights_BT: m_t, the share of each token in the loss; 0 for padding.
        form: of f_W.

    Returns:
        loss [B], gradients [B, O, I] in the dtype of the keys.
    """
    total_B = loss(weights, keys_BTD, values_BTD, token_weights_BT, form)
    return total_B, gradient(terms(weights, keys_BTD, values_BTD, form, token_weights_BT))


def loss(weights: Weights, keys_BTD: Tensor, values_BTD: Tensor, token_weights_BT: Tensor, form: Form) -> Tensor:
    """The write loss alone, [B]."""
    y_BTD = forward(weights, keys_BTD, form)
    loss_BTD = 0.5 * (y_BTD - values_BTD).square()
    return (loss_BTD.sum(dim=-1) * token_weights_BT.to(loss_BTD.dtype)).sum(dim=-1)


def activation_derivative(z: Tensor, form: Form) -> Tensor:
    """a'(z), coordinate by coordinate."""
    return _ACTIVATIONS[form.activation][1](z)


def activation_curvature(z: Tensor, form: Form) -> Tensor:
    """a''(z), coordinate by coordinate."""
    return _ACTIVATIONS[form.activation][2](z)


def _cast(weights: Weights, like: Tensor) -> Weights:
    return tuple(weight.to(like.dtype) for weight in weights)


def trace(weights: Weights, x_BTI: Tensor, form: Form) -> tuple[list[Tensor], list[Tensor]]:
    """Every matrix's output before the activation, and every matrix's input."""
    activate = _ACTIVATIONS[form.activation][0]
    outputs: list[Tensor] = []
    inputs: list[Tensor] = [x_BTI]
    for level, weight_BOI in enumerate(weights):
        outputs.append(inputs[-1] @ weight_BOI.mT)
        if level < len(weights) - 1:
            inputs.append(scaled(activate(outputs[-1]), form))
    return outputs, inputs


def scaled(x: Tensor, form: Form) -> Tensor:
    """x, times hidden_scale."""
    return x if form.hidden_scale == 1.0 else x * form.hidden_scale


def finish(z_BTD: Tensor, x_BTD: Tensor, form: Form) -> Tensor:
    """f_W(x) from the last matrix's output z: both [B, T, D]."""
    if form.norm is None:
        return z_BTD
    scale, bias = (t.to(z_BTD.dtype) for t in form.norm)
    return x_BTD + scale * F.layer_norm(z_BTD, z_BTD.shape[-1:], eps=LAYER_NORM_EPS) + bias


def _norm_backward(delta_BTD: Tensor, z_BTD: Tensor) -> Tensor:
    """The derivative in z of <delta, LayerNorm(z)>; at least in fp32, as the norm's own derivative is."""
    dtype = delta_BTD.dtype
    delta_BTD, z_BTD = (t.to(torch.promote_types(dtype, torch.float32)) for t in (delta_BTD, z_BTD))
    centred = z_BTD - z_BTD.mean(dim=-1, keepdim=True)
    inverse_std = (centred.square().mean(dim=-1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
    normed = centred * inverse_std
    along = (delta_BTD * normed).mean(dim=-1, keepdim=True)
    return (inverse_std * (delta_BTD - delta_BTD.mean(dim=-1, keepdim=True) - normed * along)).to(dtype)
