"""Forward Alignment Network: a learned stand-in for the backward pass through f_W, from forward activations alone.

With z_l = W_l x_l, x_(l+1) = h a(z_l), e = dl/dz_n = f_W(k) - v and factors delta_l, the write's gradient is
G_l = sum_t c_t delta_lt x_lt^T. The inputs x_l and the last factor delta_n = e come out of the forward pass; only the
factors before it need a backward pass, delta_l = a'(z_l) * h W_(l+1)^T delta_(l+1), which goes through the fast weights
one matrix after the other. The network predicts those, all levels at once, without looking at the fast weights:

    delta_l ~ |e| a'(z_l) * (B_l e^ + U_l silu(V_l [k^; e^; x^_(l+1)]))        x^ = x / |x|

So the gradient keeps its form (a sum of outer products, of rank up to the number of tokens), that of the last matrix is
exact, and the prediction scales with the error as the exact one does. B_l is a feedback matrix (feedback alignment has
random ones; here it starts as h W_(l+1)^T … W_n^T of the initial weights, and is learned: what all memories share of
it); the second part sees where f_W is.
Trained (titans_ds.training.alignment) to point where the exact gradient points, and to be as long.

It needs depth 2 or more (the gradient of a linear memory has no backward pass), and chunks written one after the other.
At depth 2 the exact factor is one product with W_2, which this is not cheaper than; it takes the products of all levels
off each other's path.

Legend of shape suffixes: N batch x heads, C tokens of a chunk, D width of a head, U units of a hidden layer, M width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_ds.memory.mlp import network
from titans_ds.memory.mlp.network import Form, Terms, Weights

_EPS = 1e-6


@dataclass
class Lesson:
    """What writes tell a network that learns.

    Args:
        follow: which gradient is written meanwhile: the network's own, or the exact one.
        losses: of each write, to be minimised; scalars with a graph into the network.
        cosines: of predicted with exact gradient, by write and hidden matrix, of the rows that wrote something.
        total: the same over all matrices, the exact last one included.
    """

    follow: bool
    losses: list[Tensor] = field(default_factory=list)
    cosines: list[Tensor] = field(default_factory=list)
    total: list[Tensor] = field(default_factory=list)


class ForwardAlignment(nn.Module):
    """The network of one memory; heads share it. Frozen, but for its own training.

    Args:
        widths: of f_W, from input to output.
        width: M, units of its hidden layer.
        seed: of its random numbers.
    """

    def __init__(self, widths: tuple[int, ...], width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        first, *hidden, last = widths

        def normal(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(
                torch.randn(rows, columns, generator=generator) / math.sqrt(columns), requires_grad=False
            )

        self.feedback = nn.ParameterList(normal(units, last) for units in hidden)
        self.inner = nn.ParameterList(normal(width, first + last + units) for units in hidden)
        self.outer = nn.ParameterList(nn.Parameter(torch.zeros(units, width), requires_grad=False) for units in hidden)
        self.lesson: Lesson | None = None
        self.bypassed = False

    @torch.no_grad()
    def start_from(self, initial: Sequence[Tensor], form: Form) -> None:
        """Feedback through the initial weights, B_l = h W_(l+1)^T … h W_n^T: exact for a memory of two matrices that
        nothing was written to.

        Args:
            initial: W_0 of every matrix, [O, I], or [heads, O, I], whose mean is taken.
            form: of f_W.
        """
        back = torch.eye(initial[-1].shape[-2], device=initial[-1].device)
        for level in range(len(initial) - 1, 0, -1):
            matrix = initial[level].float()
            back = network.scaled((matrix if matrix.dim() == 2 else matrix.mean(dim=0)).mT @ back, form)
            self.feedback[level - 1].copy_(back)

    def forward(
        self, weights: Weights, keys_NCD: Tensor, values_NCD: Tensor, form: Form, shares_NC: Tensor
    ) -> tuple[Weights, Weights]:
        """Inputs and factors of every matrix's gradient, as in `network.terms`.

        Args:
            weights: fast weights [N, O, I].
            keys_NCD, values_NCD: what to store.
            form: of f_W and its loss.
            shares_NC: each token's share of the loss; what is learned counts it so.
        """
        if self.bypassed:
            exact = network.terms(weights, keys_NCD, values_NCD, form)
            return exact.inputs, exact.deltas
        outputs, inputs = network.trace(tuple(w.to(keys_NCD.dtype) for w in weights), keys_NCD, form)
        error_NCD = network.finish(outputs[-1], keys_NCD, form) - values_NCD
        parts = inputs, outputs, error_NCD
        if self.lesson is None:
            return tuple(inputs), self._deltas(*parts, form)
        return self._learn(self.lesson, weights, parts, (keys_NCD, values_NCD), form, shares_NC)

    def _deltas(self, inputs: list[Tensor], outputs: list[Tensor], error_NCD: Tensor, form: Form) -> Weights:
        size_NC1 = error_NCD.norm(dim=-1, keepdim=True)
        error, key = error_NCD / (size_NC1 + _EPS), F.normalize(inputs[0], dim=-1, eps=_EPS)
        deltas = []
        for level, (B, V, U) in enumerate(zip(self.feedback, self.inner, self.outer, strict=True)):
            seen = torch.cat([key, error, F.normalize(inputs[level + 1], dim=-1, eps=_EPS)], dim=-1)
            back = error @ B.to(error.dtype).mT + F.silu(seen @ V.to(error.dtype).mT) @ U.to(error.dtype).mT
            deltas.append(size_NC1 * network.activation_derivative(outputs[level], form) * back)
        return (*deltas, error_NCD)

    def _learn(
        self,
        lesson: Lesson,
        weights: Weights,
        parts: tuple[list[Tensor], list[Tensor], Tensor],
        pairs: tuple[Tensor, Tensor],
        form: Form,
        shares_NC: Tensor,
    ) -> tuple[Weights, Weights]:
        """Note how the prediction compares with the exact gradient; what is written carries no graph of it."""
        with torch.no_grad():
            exact = network.terms(weights, pairs[0], pairs[1], form)
            written = self._deltas(*parts, form) if lesson.follow else exact.deltas
            rows = _teaching(network.gradient(exact, shares_NC))
        if rows.numel():
            inputs, outputs = ([x.detach()[rows] for x in part] for part in parts[:2])
            with torch.enable_grad():
                predicted = Terms(tuple(inputs), self._deltas(inputs, outputs, parts[2].detach()[rows], form))
                right = Terms(tuple(inputs), tuple(d[rows] for d in exact.deltas))
                compare(lesson, predicted, right, shares_NC[rows])
        return tuple(x.detach() for x in parts[0]), written


def _teaching(exact: Weights) -> Tensor:
    """Rows whose gradient is one: finite, and of something written."""
    norms = torch.stack([g.float().flatten(1).norm(dim=1) for g in exact])
    return (torch.isfinite(norms) & (norms > _EPS)).all(dim=0).nonzero().squeeze(-1)


def compare(lesson: Lesson, predicted: Terms, exact: Terms, shares_NC: Tensor) -> None:
    """Add 1 - cos + (log |predicted| / |exact|)^2 / 10 of every hidden matrix to the lesson, and the cosines."""
    ours, theirs = (network.gradient(terms, shares_NC) for terms in (predicted, exact))
    ours, theirs = (tuple(g.flatten(1).float() for g in gradients) for gradients in (ours, theirs))
    terms = []
    for mine, right in zip(ours[:-1], theirs[:-1], strict=True):
        cosine_N = F.cosine_similarity(mine, right, dim=1)
        ratio_N = torch.log((mine.norm(dim=1) + _EPS) / (right.norm(dim=1) + _EPS))
        terms.append((1 - cosine_N + 0.1 * ratio_N.square()).mean())
        lesson.cosines.append(cosine_N.detach())
    lesson.losses.append(torch.stack(terms).mean())
    lesson.total.append(F.cosine_similarity(torch.cat(ours, dim=1), torch.cat(theirs, dim=1), dim=1).detach())
