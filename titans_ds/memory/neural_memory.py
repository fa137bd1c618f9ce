"""NeuralMemory: one layer's memory. Reads with the state it is given, and returns the state that it would write.

Legend of shape suffixes: B batch, T tokens, H model width, D memory dim.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from titans_ds.config import MemoryConfig
from titans_ds.memory import network, rule
from titans_ds.memory.network import Weights
from titans_ds.memory.projection import Projection
from titans_ds.memory.rule import Controls
from titans_ds.memory.state import LayerState, choose_rows

_SEED_STRIDE = 1_000_003  # seeds of layers and parts must not meet


@dataclass(frozen=True)
class Access:
    """What one call does beside the read.

    Args:
        write: compute the state after this segment.
        graph: keep the autograd graph of the write (second order).
        stats: report inner losses and the write's norm.
        controls: changes for control experiments.
    """

    write: bool = False
    graph: bool = False
    stats: bool = False
    controls: Controls = field(default_factory=Controls)


class NeuralMemory(nn.Module):
    """The memory of one layer: projections, initial fast weights, read and write.

    Args:
        hidden_size: model width H.
        config: see MemoryConfig.
        layer_index: makes this layer's random numbers its own.
    """

    def __init__(self, hidden_size: int, config: MemoryConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        seed = (config.seed * _SEED_STRIDE + layer_index) * 8
        d = config.dim
        self.key_projection = Projection(hidden_size, d, learned=config.key_projection == "learned", seed=seed)
        self.value_projection = Projection(hidden_size, d, learned=config.value_projection == "learned", seed=seed + 1)
        if config.query_projection != "tied":
            learned = config.query_projection == "learned"
            self.query_projection = Projection(hidden_size, d, learned=learned, seed=seed + 2)
        if config.output_projection == "learned" or config.key_projection == "learned":
            # Starts as the transpose of the key projection; a frozen key projection is transposed on the fly instead.
            self.output_projection = Projection(
                d, hidden_size, learned=config.output_projection == "learned", seed=seed
            )
            self.output_projection.weight.data.copy_(self.key_projection.weight.data.mT)
        self._make_initial_weights(seed + 3)
        if config.learn_step_size:
            self.log_step_sizes = nn.Parameter(torch.full((config.depth,), math.log(config.step_size)))

    def _make_initial_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for level, (fan_in, fan_out) in enumerate(itertools.pairwise(self.config.widths)):
            weight = torch.randn(fan_out, fan_in, generator=generator) * self.config.initial_scale / math.sqrt(fan_in)
            if self.config.learn_initial_weights:
                self.register_parameter(f"initial_w{level}", nn.Parameter(weight))
            else:
                self.register_buffer(f"initial_w{level}", weight)

    def forward(
        self,
        hidden_BTH: Tensor,
        state: LayerState | None,
        mask_BT: Tensor | None = None,
        reset_B: Tensor | None = None,
        access: Access = Access(),
        queries_ND: Tensor | None = None,
    ) -> tuple[Tensor, LayerState, LayerState]:
        """Read every token with the given state; write the segment, if asked.

        Args:
            hidden_BTH: input of the layer that this memory is grafted on.
            state: see titans_ds.memory.state; None starts every sample from W_0.
            mask_BT: true (1) where a token may be written; all of them if None.
            reset_B: true where a sample starts from W_0 whatever the state says.
            access: see Access.
            queries_ND: read these N queries instead of the tokens', with the weights from before this segment (MAC).

        Returns:
            read [B, T, H] (or [B, N, H]); the state after the write (or the given one); stats, each [B]: inner_loss_before,
            inner_loss_after, write_norm.
        """
        state = self._start(hidden_BTH, state, reset_B)
        weights = self._weights(state)
        if queries_ND is None:
            read_BTH = self._read(hidden_BTH, weights, access.controls)
        else:
            read_BTH = self._recall(queries_ND.to(hidden_BTH.dtype).expand(hidden_BTH.shape[0], -1, -1), weights)
        if not access.write:
            return read_BTH, state, {}
        with contextlib.nullcontext() if access.graph else torch.no_grad():
            new_state, stats = self._write(hidden_BTH.detach(), state, mask_BT, access)
        return read_BTH, new_state, stats

    def initial_state(self, batch_size: int, like_BTH: Tensor) -> LayerState:
        """W_0 for every sample, fp32 (fp64 where it is), and no last token."""
        state: LayerState = {}
        for level in range(self.config.depth):
            weight: Tensor = getattr(self, f"initial_w{level}")
            state[f"w{level}"] = _at_least_fp32(weight).expand(batch_size, -1, -1)
        if self.config.token_shift:
            state["last_hidden"] = like_BTH.new_zeros(batch_size, self.key_projection.weight.shape[1])
            state["has_last"] = torch.zeros(batch_size, device=like_BTH.device)
        return state

    def _start(self, hidden_BTH: Tensor, state: LayerState | None, reset_B: Tensor | None) -> LayerState:
        if state is not None and reset_B is None:
            return dict(state)
        initial = self.initial_state(hidden_BTH.shape[0], hidden_BTH[:, :1].detach())
        if state is None or reset_B is None:
            return initial
        if "last_hidden" in initial:
            initial["last_hidden"] = initial["last_hidden"].to(state["last_hidden"].dtype)
        return {name: choose_rows(reset_B, initial[name], given) for name, given in state.items()}

    def _weights(self, state: LayerState) -> Weights:
        return tuple(state[f"w{level}"] for level in range(self.config.depth))

    def _read(self, hidden_BTH: Tensor, weights: Weights, controls: Controls) -> Tensor:
        """M = P_o f_W(P_q h)."""
        reads_with_key = (
            controls.query == "key"
            or self.config.query_projection == "tied"
            or (self.config.tie_query_at_inference and not self.training)
        )
        project = self.key_projection if reads_with_key else self.query_projection
        return self._recall(project(hidden_BTH), weights)

    def _recall(self, queries_BTD: Tensor, weights: Weights) -> Tensor:
        """P_o f_W(q)."""
        y_BTD = network.forward(weights, queries_BTD, self.config.activation)
        if hasattr(self, "output_projection"):
            return self.output_projection(y_BTD)  # type: ignore[no-any-return]
        return self.key_projection.transposed(y_BTD)

    def _write(
        self, hidden_BTH: Tensor, state: LayerState, mask_BT: Tensor | None, access: Access
    ) -> tuple[LayerState, LayerState]:
        mask_BT = hidden_BTH.new_ones(hidden_BTH.shape[:2], dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        keys, values, shares = self._pairs(hidden_BTH, state, mask_BT)
        weights = self._weights(state)
        controls, config = access.controls, self.config
        steps = config.inner_steps if controls.inner_steps is None else controls.inner_steps
        step_sizes = self._step_sizes(weights[0]) * controls.sign
        written = rule.descend(weights, keys, values, shares, step_sizes, steps, config.activation)
        new_state = {f"w{level}": w for level, w in enumerate(written)}
        if config.token_shift:
            new_state |= _last_token(hidden_BTH, mask_BT, state)
        if not access.stats:
            return new_state, {}
        with torch.no_grad():
            return new_state, _write_stats(weights, written, keys, values, shares, config)

    def _pairs(self, hidden_BTH: Tensor, state: LayerState, mask_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values to store, [B, T, D] or pooled [B, 1, D], and each one's share of the loss."""
        source_BTH = hidden_BTH
        if self.config.token_shift:
            source_BTH, has_previous_BT = _previous_tokens(hidden_BTH, state, mask_BT)
            mask_BT = mask_BT & has_previous_BT
        # A padding position may hold anything, NaN too: 0 times it would not be 0.
        keys = self.key_projection(source_BTH.masked_fill(~mask_BT.unsqueeze(-1), 0))
        values = self.value_projection(hidden_BTH.masked_fill(~mask_BT.unsqueeze(-1), 0))
        shares_BT = mask_BT.to(keys.dtype) / mask_BT.sum(dim=1, keepdim=True).clamp(min=1).to(keys.dtype)
        return rule.pool(keys, values, shares_BT) if self.config.write == "pooled" else (keys, values, shares_BT)

    def _step_sizes(self, like: Tensor) -> Tensor:
        if self.config.learn_step_size:
            return self.log_step_sizes.to(like.dtype).exp()
        return torch.full((self.config.depth,), self.config.step_size, dtype=like.dtype, device=like.device)


def _at_least_fp32(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _previous_tokens(hidden_BTH: Tensor, state: LayerState, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """For every position the last real token before it (in this call or the one before), and whether there is one."""
    latest_BT = _latest_real(mask_BT)
    before_BT = torch.cat([torch.full_like(latest_BT[:, :1], -1), latest_BT[:, :-1]], dim=1)  # -1: the carried token
    carried = torch.cat([state["last_hidden"].unsqueeze(1).to(hidden_BTH.dtype), hidden_BTH], dim=1)
    previous = carried.gather(1, (before_BT + 1).unsqueeze(-1).expand(-1, -1, hidden_BTH.shape[-1]))
    return previous, (before_BT >= 0) | (state["has_last"] > 0).unsqueeze(1)


def _last_token(hidden_BTH: Tensor, mask_BT: Tensor, state: LayerState) -> LayerState:
    last_B = _latest_real(mask_BT)[:, -1]
    rows = torch.arange(hidden_BTH.shape[0], device=hidden_BTH.device)
    last_BH = hidden_BTH[rows, last_B.clamp(min=0)].to(state["last_hidden"].dtype)
    return {
        "last_hidden": choose_rows(last_B >= 0, last_BH, state["last_hidden"]),
        "has_last": torch.maximum(state["has_last"], (last_B >= 0).to(state["has_last"].dtype)),
    }


def _latest_real(mask_BT: Tensor) -> Tensor:
    """[B, T]: the index of the last real token up to each position, -1 before the first."""
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return torch.where(mask_BT, positions, -1).cummax(dim=1).values


def _write_stats(
    before: Weights, after: Weights, keys: Tensor, values: Tensor, shares: Tensor, config: MemoryConfig
) -> LayerState:
    change = torch.stack([(b - a).flatten(1).square().sum(dim=1) for a, b in zip(before, after, strict=True)])
    return {
        "inner_loss_before": network.loss(before, keys, values, shares, config.activation),
        "inner_loss_after": network.loss(after, keys, values, shares, config.activation),
        "write_norm": change.sum(dim=0).sqrt(),
    }
