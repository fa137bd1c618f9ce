"""The writes of `chunk` for two matrices of any width: Triton kernels, each a product and what follows it.

    z = k W_1^T    x = h act(z)    e = loss'(x W_2^T - v)    t = e W_2    u = t h act'(z)
    G_1 = sum_c a_c u_c k_c^T      G_2 = sum_c a_c e_c x_c^T      and the same with b, where G^m is another sum
    W' = keep W + carry S + G^w    S' = eta S + G^m

Forward, chunk after chunk, four launches: z and x; e; u; both matrices' sums and their states, in fp32 in place, and
rounded for the next chunk. Backward: z, x, e and t of all chunks at once, then from the last chunk to the first, four
launches: to t; to e, the values and y; to x and z; to the keys, and to both matrices' states.

A limit on the gradient's norm is one launch more each way: |G|^2 is a sum over pairs of tokens, so that no matrix has
to be there for it, and what it is in u, k, e and x is known for all chunks before the walk back, but for a factor.
chunk_torch.py says all this in PyTorch.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from titans_ds.memory.kernels.chunk_torch import slope_of
from titans_ds.memory.kernels.launch import LOSSES, four, padded
from titans_ds.memory.kernels.products import wide_product
from titans_ds.memory.kernels.writes import Inputs
from titans_ds.memory.network import Form
from titans_ds.memory.optimizers import NORM_EPS

_LONG = 512  # tokens of a chunk from which on there are enough tiles to fill a GPU with larger ones


class Walk:
    """The chunks of a call: what their kernels are launched with."""

    def __init__(
        self, keys_NRCD: Tensor, hidden: int, form: Form, momentum: bool = False, separate: bool = False
    ) -> None:
        self.separate, self.momentum, self.hidden = separate, momentum, hidden
        self.num_rows, self.num_chunks, self.chunk, self.dim = keys_NRCD.shape
        long = self.chunk >= _LONG
        most = (128, 64, 64) if long else (64, 32, 128)
        sizes = (self.chunk, max(self.dim, hidden), max(self.dim, hidden))
        self.tile = [min(m, padded(s)) for m, s in zip(most, sizes, strict=True)]  # tokens, columns, depth
        self.warps = 8 if long else 4
        self.side = min(64, padded(max(self.dim, hidden)))  # of a state's tile
        self.numbers = {
            "scale": form.hidden_scale, "huber_delta": form.huber_delta,
            "C": self.chunk, "D": self.dim, "H": hidden, "SILU": form.activation == "silu", "LOSS": LOSSES[form.loss],
            "MOMENTUM": momentum, "SEPARATE": separate, "BT": self.tile[0],
            "PRECISION": "ieee" if keys_NRCD.dtype == torch.float32 else "tf32",
        }  # fmt: skip

    def tiles(self, width: int) -> int:
        """Of a chunk's tokens."""
        return _tiles(self.chunk, self.tile[0]) * _tiles(width, self.tile[1])

    @property
    def level(self) -> int:
        """Entries of one matrix's token weights."""
        return self.num_rows * self.num_chunks * self.chunk

    @property
    def state_tiles(self) -> int:
        """Of one matrix."""
        return _tiles(self.dim, self.side) * _tiles(self.hidden, self.side)

    @property
    def key_tiles(self) -> int:
        """Of a chunk's keys, where they stand beside states."""
        return _tiles(self.chunk, self.tile[0]) * _tiles(self.dim, self.side)

    def tokens(self, kernel: Any, width: int, *tensors: object, r: int | None = None, **more: object) -> None:
        """A program for every tile [C, width] of chunk r, or of all chunks."""
        self.programs(kernel, self.tiles(width), *tensors, r=r, **more)

    def programs(self, kernel: Any, tiles: int, *tensors: object, r: int | None = None, **more: object) -> None:
        """So many for every row of chunk r, or of all chunks."""
        count = self.num_rows * (self.num_chunks if r is None else 1)
        step, r = (1, 0) if r is None else (self.num_chunks, r)
        shape = {"BX": self.tile[1], "BK": self.tile[2], "num_warps": self.warps, "num_stages": 3}
        kernel[(count * tiles,)](*tensors, step=step, r=r, **(self.numbers | shape | more))

    @property
    def token_tiles(self) -> int:
        """Of both hidden layer and width, for a chunk's tokens."""
        return self.tiles(self.hidden) + self.tiles(self.dim)

    @property
    def pairs(self) -> dict[str, int]:
        """How to hold all pairs of a chunk's tokens in one tile."""
        side = padded(self.chunk)
        return {"BT": side, "BK": min(64, self.tile[2]), "num_warps": 4 if side <= 64 else 8}

    def states(self, kernel: Any, programs: int, *tensors: object, r: int, **more: object) -> None:
        """The same for what has tiles of both matrices."""
        kernel[(self.num_rows * programs,)](
            *tensors, level=self.level, step=self.num_chunks, r=r, **self.numbers, BX=self.side, BK=self.side,
            num_warps=8, num_stages=3, **more,
        )  # fmt: skip


def forward(
    given: Inputs, form: Form, max_norm: float | None, separate: bool, ends: list[Tensor], states: list[Tensor]
) -> None:
    """What `chunk_torch.forward` does."""
    from titans_ds.memory.kernels import wide_kernels

    walk = Walk(given.keys, ends[0].shape[1], form, len(ends) == 4, separate)
    for state, end in zip(states, ends, strict=False):
        state[:, 0] = end
    z, x, e = _scratch(given.keys, walk.hidden, walk.hidden, walk.dim)
    factors = (given.a, given.b, given.keep, given.eta, given.carry)
    square = None if max_norm is None else given.c.new_empty(walk.num_rows, 2)
    for r in range(walk.num_chunks):
        walk.tokens(wide_kernels.hidden, walk.hidden, given.keys, states[0], z, x, r=r)
        walk.tokens(wide_kernels.errors, walk.dim, x, states[1], given.values, e, r=r)
        walk.tokens(wide_kernels.slopes, walk.hidden, e, states[1], z, r=r)
        if square is not None:
            walk.programs(wide_kernels.squares, 2, given.keys, x, z, e, given.c, square, r=r, **walk.pairs)
        walk.states(
            wide_kernels.step_forward, 2 * walk.state_tiles, given.keys, x, z, e, *factors, *four(ends), *four(states),
            square, max_norm or 0.0, r=r, LIMIT=square is not None, SAVE_MOMENTUM=len(states) == 4,
        )  # fmt: skip


def backward(
    given: Inputs,
    form: Form,
    max_norm: float | None,
    separate: bool,
    states: list[Tensor],
    d_states: list[Tensor],
    found: Inputs,
    d_ends: list[Tensor],
    walked: int,
) -> None:
    """What `chunk_torch.backward` does."""
    walk = Walk(given.keys, states[0].shape[2], form, len(d_ends) == 4, separate)
    back = _Backward(walk, given, form, max_norm, states, d_states, found, d_ends)
    for r in reversed(range(walked)):
        back.chunk(r)
    back.add_shares(walked)


class _Backward:
    """From the last chunk to the first."""

    def __init__(
        self,
        walk: Walk,
        given: Inputs,
        form: Form,
        max_norm: float | None,
        states: list[Tensor],
        d_states: list[Tensor],
        found: Inputs,
        d_ends: list[Tensor],
    ) -> None:
        self.walk, self.given, self.found = walk, given, found
        self.states, self.d_states, self.d_ends = states, d_states, d_ends
        self.d_t, self.d_z, self.d_y = _scratch(given.keys, walk.hidden, walk.hidden, walk.dim)
        self.directions = _directions(d_ends, walk, given.keys.dtype)
        self.next = [torch.empty_like(d) for d in self.directions]
        self._trace()
        self.limit = None
        if max_norm is not None:
            u = slope_of(self.t, self.z, form)
            self.limit = _Limit.of(walk, given, (u, given.keys), (self.e, self.x), max_norm)
            self.given = self.limit.scaled(given)
        self._make_shares()

    def _trace(self) -> None:
        """z, x, e and t of all chunks."""
        from titans_ds.memory.kernels import wide_kernels

        walk, given, (w1, w2) = self.walk, self.given, self.states[:2]
        self.z, self.x = (given.keys.new_empty(*given.keys.shape[:3], walk.hidden) for _ in range(2))
        self.e = torch.empty_like(given.keys)
        walk.tokens(wide_kernels.hidden, walk.hidden, given.keys, w1, self.z, self.x)
        walk.tokens(wide_kernels.errors, walk.dim, self.x, w2, given.values, self.e)
        self.t = self.e @ w2

    def _make_shares(self) -> None:
        """Each tile's in the derivatives of token weights [tiles, N, R, C], and of factors [3, tiles, N, R]."""
        walk, a = self.walk, self.given.a
        counts = [_tiles(width, walk.tile[1]) for width in (walk.hidden, walk.dim)]
        self.d_weights = [[a.new_empty(n, *a.shape[1:]) for n in counts] for _ in range(1 + walk.separate)]
        self.d_factors = a.new_empty(3, 2 * walk.state_tiles, *a.shape[1:3])

    def chunk(self, r: int) -> None:
        """The derivatives before chunk r, from those after it."""
        from titans_ds.memory.kernels import wide_backward_kernels as kernels

        walk, given, found, w2 = self.walk, self.given, self.found, self.states[1]
        p1, p2, q1, q2 = four(self.directions)
        if self.limit is not None:
            sums = (given.keys, self.x, self.limit.u, self.e, p1, p2, q1, q2, given.a, given.b)
            walk.programs(kernels.moved, walk.token_tiles, *sums, self.limit.shares, walk.level, r=r)
        to_u, to_k, to_e, to_x, *factor = (None,) * 6 if self.limit is None else self.limit.places
        more = {"LIMIT": self.limit is not None, "TILES": walk.token_tiles, "SHARES": padded(walk.token_tiles)}
        (da1, da2), (db1, db2) = self.d_weights[0], self.d_weights[-1]
        ab, level = (given.a, given.b), walk.level
        walk.tokens(
            kernels.slopes_backward, walk.hidden, given.keys, p1, q1, *ab, self.t, self.z, self.d_t, self.d_z, da1, db1,
            to_u, *factor, level, r=r, **more,
        )  # fmt: skip
        walk.tokens(
            kernels.errors_backward, walk.dim, self.x, p2, q2, *ab, self.e, self.d_t, w2, self.d_y, found.values,
            da2, db2, to_e, *factor, level, r=r, **more,
        )  # fmt: skip
        walk.tokens(
            kernels.hidden_backward, walk.hidden, self.e, p2, q2, *ab, self.d_y, w2, self.z, self.d_z, to_x, *factor,
            level, r=r, **more,
        )  # fmt: skip
        walk.states(
            kernels.step_backward, 2 * walk.state_tiles + walk.key_tiles, given.keys, self.x, self.t, self.e, *ab,
            given.keep, given.eta, given.carry, self.d_t, self.d_y, self.d_z, *four(self.states), *self.d_states,
            p1, q1, *four(self.d_ends), *four(self.next), found.keys, self.d_factors,
            to_k, *factor, r=r, **more,
        )  # fmt: skip
        self.directions, self.next = self.next, self.directions

    def add_shares(self, walked: int) -> None:
        """Of the chunks that were walked over, in the same order every time."""
        found = self.found
        for d, shares in zip((found.a, found.b), self.d_weights, strict=False):
            for level in range(2):
                torch.sum(shares[level][:, :, :walked], dim=0, out=d[level, :, :walked])
            if self.limit is not None:
                d[:, :, :walked] *= self.limit.limit[:, :walked, None]
        if self.limit is not None:
            found.c[:, :walked] = self.limit.to_weights(walked)
        factors = (found.keep, found.eta, found.carry)[: 3 if self.walk.momentum else 1]
        for d, share in zip(factors, self.d_factors, strict=False):
            torch.sum(share[:, :, :walked], dim=0, out=d[:, :walked])


@dataclass(frozen=True)
class _Limit:
    """The factor that brings a chunk's gradient down to a norm, min(max / |G|, 1), and where its derivative leads.

    Args:
        limit: [N, R].
        gain: what makes of `shares`, added up, the derivative in |G|^2 / 2; [N, R].
        shares: takes, by tile, what limited sums are along their directions; [tiles, N, R].
        u: the first matrix's deltas; for all of these [N, R, C, …].
        to_u, to_k, to_e, to_x: the derivatives of |G|^2 / 2.
        to_c: the same, in the weights c [N, R, C].
    """

    limit: Tensor
    gain: Tensor
    shares: Tensor
    u: Tensor
    to_u: Tensor
    to_k: Tensor
    to_e: Tensor
    to_x: Tensor
    to_c: Tensor

    @classmethod
    def of(
        cls, walk: Walk, given: Inputs, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], max_norm: float
    ) -> _Limit:
        """From the deltas and inputs of both matrices, all chunks at once."""
        c, pairs = given.c, given.c.unsqueeze(-1) * given.c.unsqueeze(-2)
        both, found = torch.zeros((), device=c.device), []
        for delta, x in (first, second):
            deltas, inputs = _gram(delta, c.dtype), _gram(x, c.dtype)
            both = both + deltas * inputs
            found.append(((pairs * inputs).to(x.dtype) @ delta, (pairs * deltas).to(x.dtype) @ x))
        (to_u, to_k), (to_e, to_x) = found
        to_c = (both * c.unsqueeze(-2)).sum(dim=-1)
        square = (to_c * c).sum(dim=-1) + NORM_EPS
        limit = (max_norm / square.sqrt()).clamp(max=1.0)
        gain = torch.where(limit < 1, -1 / square, 0.0)
        shares = c.new_empty(walk.token_tiles, *limit.shape)
        return cls(limit, gain, shares, first[0], to_u, to_k, to_e, to_x, to_c)

    @property
    def places(self) -> tuple[Tensor, ...]:
        """To u, k, e and x; and of what the factor before them is made."""
        return self.to_u, self.to_k, self.to_e, self.to_x, self.shares, self.gain

    def scaled(self, given: Inputs) -> Inputs:
        """With the limit in the weights of the tokens."""
        limit = self.limit.unsqueeze(-1)
        return replace(given, a=given.a * limit, b=given.b * limit)

    def to_weights(self, walked: int) -> Tensor:
        """The derivative in c of the chunks that were walked over."""
        back = self.gain[:, :walked] * self.shares[:, :, :walked].sum(dim=0)
        return back.unsqueeze(-1) * self.to_c[:, :walked]


def _gram(x_NRCD: Tensor, dtype: torch.dtype) -> Tensor:
    """x x^T of every chunk, [N, R, C, C]."""
    flat = x_NRCD.flatten(0, 1)
    return torch.unflatten(wide_product(flat, flat.mT, dtype), 0, x_NRCD.shape[:2])


def _directions(d_ends: list[Tensor], walk: Walk, dtype: torch.dtype) -> list[Tensor]:
    """Of the two matrices' sums for W, and of those for S where they are others; in the dtype of the keys."""
    if walk.momentum and not walk.separate:
        return [(w + s).to(dtype) for w, s in zip(d_ends[:2], d_ends[2:], strict=True)]
    return [d.to(dtype, copy=True) for d in d_ends]


def _scratch(keys_NRCD: Tensor, *widths: int) -> list[Tensor]:
    """Of one chunk's tokens, [N, C, width]."""
    return [keys_NRCD.new_empty(keys_NRCD.shape[0], keys_NRCD.shape[2], width) for width in widths]


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)
