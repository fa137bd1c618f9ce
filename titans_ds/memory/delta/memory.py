"""DeltaMemory: one layer's matrices, written token by token with the (gated) delta rule.

With x the hidden states that the layer's mixer takes, per head, and x_(t-1) the last token written before x_t:

    k_t = normalize(P_k x_(t-1))    v_t = P_v x_t    q_t = normalize(P_k x_t)
    S_t = a_t S_(t-1) + b_t (v_t - a_t S_(t-1) k_t) k_t^T    o_t = S_t q_t    M_t = P_o (g * RMSNorm(o_t))

Without token shift k_t is made of x_t. A repository's first token has no token before it: it writes nothing.

A layer's state: `matrices` [B, N, D, D], fp32 or wider; `last_hidden` [B, H] and `has_last` [B], the hidden state of
the last token written, and 1 where there is one. So a text may be cut into calls anywhere.

Legend of shape suffixes: B batch, T tokens, H model width, N heads, D width of a head.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titans_ds.errors import ConfigError
from titans_ds.memory.delta import backends
from titans_ds.memory.delta.config import DeltaConfig
from titans_ds.memory.graphs import Answer, LayerMemory
from titans_ds.memory.interface import Controls, LayerTrace, Pass
from titans_ds.memory.positions import last_token, previous_positions, take
from titans_ds.memory.projection import Projection, unit_rows
from titans_ds.memory.state import LayerState, choose_rows

_SEED_STRIDE = 1_000_003  # seeds of layers and parts must not meet
_NORM_EPS = 1e-6  # of RMSNorm, beside the mean of squares
_UNIT_EPS = 1e-12  # of keys and queries, beside the sum of squares


@dataclass(frozen=True)
class Writes:
    """What the tokens of a call write: keys and values [B, T, N, D], b and log a [B, T, N] (None: a = 1)."""

    keys: Tensor
    values: Tensor
    step: Tensor
    log_keep: Tensor | None


class DeltaMemory(LayerMemory):
    """The delta memory of one layer.

    Args:
        hidden_size: model width H.
        config: with its `dim` resolved.
        layer_index: makes this layer's random numbers its own.
    """

    def __init__(self, hidden_size: int, config: DeltaConfig, layer_index: int) -> None:
        config = config.resolved(hidden_size)
        super().__init__(hidden_size, config.heads, config.heads * config.head_dim)
        self.config = config
        width, seed = self.width, (config.seed * _SEED_STRIDE + layer_index) * 8
        learned = config.projections == "learned"
        self.key_projection = Projection(hidden_size, width, learned=learned, seed=seed)
        self.value_projection = Projection(hidden_size, width, learned=learned, seed=seed + 1)
        if config.query_projection == "learned":
            self.query_projection = Projection(hidden_size, width, learned=True, seed=seed + 2)
        self.output_projection = Projection(width, hidden_size, learned=True, seed=seed)
        self.output_projection.weight.data.copy_(self.key_projection.weight.data.mT)
        self.read_norm = nn.Parameter(torch.ones(width))
        # Logits of b and of the share to forget: one number a head, plus a linear map of the token where asked for.
        if config.step_size == "constant":
            self.register_buffer("step_bias", _logits(config.initial_step_size, config.heads))
        else:
            self.step_bias = nn.Parameter(_logits(config.initial_step_size, config.heads))
        if config.step_size == "token":
            self.step_weight = nn.Parameter(torch.zeros(config.heads, hidden_size))
        if config.forget_gate:
            self.forget_bias = nn.Parameter(_logits(config.initial_forget, config.heads))
            self.forget_weight = nn.Parameter(torch.zeros(config.heads, hidden_size))

    def compute(
        self,
        hidden_BTH: Tensor,
        state: LayerState | None,
        mask_BT: Tensor | None,
        reset_B: Tensor | None,
        plan: Pass,
        queries_ND: Tensor | None,
        trace: LayerTrace | None,
    ) -> Answer:
        """See LayerMemory.forward."""
        state = self._start(hidden_BTH, state, reset_B, trace)
        # Writes see the hidden states without the graph that made them, unless asked to learn through the base model.
        source_BTH = hidden_BTH if plan.through_base else hidden_BTH.detach()
        queries, unshifted = self._queries(hidden_BTH, mask_BT, plan, queries_ND, trace)
        writes = None
        if plan.write:
            with plan.writing():
                writes = self.writes(source_BTH, state, mask_BT, plan, unshifted)
        if writes is None or queries_ND is not None:
            reads = _recall(state["matrices"], queries)
        if writes is None:
            return Answer(self._output(reads, queries, state, plan, trace), state, {})
        asked = writes.keys if queries_ND is not None else queries
        own, matrices = backends.delta_rule(
            self.config, asked, writes.keys, writes.values, writes.step, writes.log_keep, state["matrices"]
        )
        reads = reads if queries_ND is not None else own
        stats = _statistics(state["matrices"], matrices, writes) if plan.stats else {}
        new = {"matrices": matrices, **self._last_token(source_BTH, mask_BT, state)}
        return Answer(self._output(reads, queries, state, plan, trace), new, stats)

    def initial_state(self, batch_size: int, like_BTH: Tensor) -> LayerState:
        """An empty memory for every sample, on the device of `like_BTH`, at least fp32."""
        wide = torch.promote_types(like_BTH.dtype, torch.float32)
        size = self.width // self.heads
        return {
            "matrices": like_BTH.new_zeros(batch_size, self.heads, size, size, dtype=wide),
            "last_hidden": like_BTH.new_zeros(batch_size, like_BTH.shape[-1]),
            "has_last": like_BTH.new_zeros(batch_size, dtype=torch.float32),
        }

    def writes(
        self,
        hidden_BTH: Tensor,
        state: LayerState,
        mask_BT: Tensor | None,
        plan: Pass,
        unshifted_BTND: Tensor | None = None,
    ) -> Writes:
        """Keys, values, step sizes and log decays of a call's tokens; 0 steps where nothing is written.

        Args:
            hidden_BTH, state, mask_BT, plan: see LayerMemory.forward.
            unshifted_BTND: normalize(P_k x_t), where the queries have made it.
        """
        mask_BT = None if mask_BT is None else mask_BT.bool()
        if mask_BT is not None:  # padding may hold anything, NaN too, and 0 times NaN is NaN
            hidden_BTH = hidden_BTH.masked_fill(~mask_BT.unsqueeze(-1), 0)
        if unshifted_BTND is None:
            unshifted_BTND = self._unit(self.key_projection(hidden_BTH))
        keys, written_BT = unshifted_BTND, mask_BT
        if self.config.token_shift:
            carried = self._unit(self.key_projection(state["last_hidden"].unsqueeze(1).to(hidden_BTH.dtype)))
            has_last_B1 = (state["has_last"] > 0).unsqueeze(1)
            if mask_BT is None:
                keys = torch.cat([carried, keys[:, :-1]], dim=1)
                written_BT = F.pad(has_last_B1, (0, keys.shape[1] - 1), value=True)
            else:
                before_BT = previous_positions(mask_BT)  # -1: the token carried from the call before
                extended = torch.cat([carried, keys], dim=1)
                keys = take(extended.flatten(2), before_BT + 1).view_as(keys)
                written_BT = mask_BT & ((before_BT >= 0) | has_last_B1)
        values = torch.unflatten(self.value_projection(hidden_BTH), -1, (self.heads, -1))
        step, log_keep = self._gates(hidden_BTH, state["matrices"].dtype)
        if written_BT is not None:
            step = step.masked_fill(~written_BT.unsqueeze(-1), 0)
            log_keep = None if log_keep is None else log_keep.masked_fill(~written_BT.unsqueeze(-1), 0)
        return Writes(keys, values, _controlled(step, plan.controls), log_keep)

    def _gates(self, hidden_BTH: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """b and log a of every token, [B, T, N]."""
        step = self.step_bias.to(wide)
        if self.config.step_size == "token":
            step = step + F.linear(hidden_BTH, self.step_weight.to(hidden_BTH.dtype)).to(wide)
        step_BTN = torch.sigmoid(step).expand(*hidden_BTH.shape[:2], -1)
        if not self.config.forget_gate:
            return step_BTN, None
        forget = F.linear(hidden_BTH, self.forget_weight.to(hidden_BTH.dtype)).to(wide) + self.forget_bias.to(wide)
        return step_BTN, F.logsigmoid(-forget)

    def _start(
        self, hidden_BTH: Tensor, state: LayerState | None, reset_B: Tensor | None, trace: LayerTrace | None
    ) -> LayerState:
        """The state that the call starts from; cut off from what wrote it in the first phase of second order."""
        if state is None:
            return self.initial_state(hidden_BTH.shape[0], hidden_BTH[:, :1].detach())
        if reset_B is not None:
            state = {name: choose_rows(reset_B, torch.zeros_like(given), given) for name, given in state.items()}
        cut = trace is not None and not trace.again
        return {name: t.detach() if cut else t for name, t in state.items()}

    def _queries(
        self,
        hidden_BTH: Tensor,
        mask_BT: Tensor | None,
        plan: Pass,
        queries_ND: Tensor | None,
        trace: LayerTrace | None,
    ) -> tuple[Tensor, Tensor | None]:
        """q of every token [B, T, N, D], or MAC's own queries for every sample; and normalize(P_k x_t) for the keys.

        Where tokens' queries are made with the key projection, keys are the same rows: one product makes both, or with
        a mask one call of the projection. For ranks of ZeRO-3 must call modules alike, full segments or not.
        """
        if trace is not None and trace.again and trace.queries is not None:
            return trace.queries.to(hidden_BTH.device, non_blocking=True), None
        if queries_ND is not None:
            return self._unit(queries_ND.to(hidden_BTH.dtype)).expand(hidden_BTH.shape[0], -1, -1, -1), None
        if self.config.query_projection == "learned" and plan.controls.query == "trained":
            return self._unit(self.query_projection(hidden_BTH)), None
        if not plan.write:
            return self._unit(self.key_projection(hidden_BTH)), None
        if mask_BT is not None:
            asked, written = self.key_projection(hidden_BTH, functools.partial(_two_products, mask_BT, plan))
        elif plan.graph and not plan.through_base and hidden_BTH.requires_grad:
            asked, written = self.key_projection(hidden_BTH, _product_twice)
        else:
            queries = self._unit(self.key_projection(hidden_BTH))
            return queries, queries if plan.graph else queries.detach()
        return self._unit(asked), self._unit(written)

    def _unit(self, x: Tensor) -> Tensor:
        """[..., N D] -> [..., N, D] with rows of norm 1."""
        return unit_rows(torch.unflatten(x, -1, (self.heads, -1)), _UNIT_EPS)

    def _last_token(self, hidden_BTH: Tensor, mask_BT: Tensor | None, state: LayerState) -> LayerState:
        if mask_BT is not None:
            return last_token(hidden_BTH, mask_BT.bool(), state)
        last = hidden_BTH[:, -1].to(state["last_hidden"].dtype)
        return {"last_hidden": last, "has_last": torch.ones_like(state["has_last"])}

    def _output(
        self, reads_BTND: Tensor, queries: Tensor, state: LayerState, plan: Pass, trace: LayerTrace | None
    ) -> Tensor:
        """P_o of the normalised reads [B, T, H]; or what the two phases of second order make of the reads."""
        if trace is not None and trace.again:
            return trace.surrogate(reads_BTND)
        if trace is not None:
            zero = self._zero_of_writes(trace, state, plan).to(reads_BTND.dtype)
            reads_BTND = trace.trace_read(queries, reads_BTND) + zero
        size = reads_BTND.shape[-1]
        read: Tensor = self.output_projection(unit_rows(reads_BTND, size * _NORM_EPS).flatten(2), self._scaled_product)
        return read

    def _scaled_product(self, x: Tensor, weight_HW: Tensor) -> Tensor:
        """P_o (g * RMSNorm(o)) of the unit rows x = o / |o|: the scales change the matrix, not every token."""
        scale = self.read_norm * math.sqrt(self.width // self.heads)
        return F.linear(x, (weight_HW * scale).to(x.dtype))

    def _zero_of_writes(self, trace: LayerTrace, state: LayerState, plan: Pass) -> Tensor:
        """0, made of every parameter that writes alone use: so that it gets a gradient, 0, in the first phase too.

        ZeRO-3 adds a parameter's gradients to those of the step before, unless there is one in a step's first backward.
        """
        made = self.writes(trace.hidden[:, :1], state, None, plan)
        used = [made.keys, made.values, made.step, *([] if made.log_keep is None else [made.log_keep])]
        return torch.stack([0 * t.sum().to(made.step.dtype) for t in used]).sum()


class _ProductTwice(torch.autograd.Function):
    """x W^T, twice: the first for gradients in x and W, the second for one in W alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, narrow)
        product = F.linear(x, narrow)
        return product, product.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_first: Tensor, d_second: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        both = (d_first + d_second).flatten(0, -2)
        d_weight = both.mT @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return d_first @ weight if ctx.needs_input_grad[0] else None, d_weight


def _two_products(mask_BT: Tensor, plan: Pass, x_BTH: Tensor, weight: Tensor) -> Any:
    """x W^T for queries; and for keys, where padding, which may hold a NaN, has no part in any gradient."""
    source = (x_BTH if plan.through_base else x_BTH.detach()).masked_fill(~mask_BT.bool().unsqueeze(-1), 0)
    narrow = weight.to(x_BTH.dtype)
    with plan.writing():
        written = F.linear(source, narrow)
    return F.linear(x_BTH, narrow), written


def _product_twice(x: Tensor, weight: Tensor) -> Any:
    return _ProductTwice.apply(x, weight)  # type: ignore[no-untyped-call]


def _controlled(step_BTN: Tensor, controls: Controls) -> Tensor:
    """The step sizes of a control experiment: turned round by `sign`, or 0."""
    if controls.inner_steps not in (None, 0, 1):
        raise ConfigError(
            f"controls: inner_steps is {controls.inner_steps}, but the delta rule steps once a token; use 0 or 1"
        )
    return step_BTN * (0 if controls.inner_steps == 0 else controls.sign)


def _recall(state_BNDD: Tensor, queries_BTND: Tensor) -> Tensor:
    """S q of a state that nothing writes, [B, T, N, D] in the dtype of the queries."""
    return torch.einsum("bnvk,btnk->btnv", state_BNDD.to(queries_BTND.dtype), queries_BTND)


@torch.no_grad()
def _statistics(before_BNDD: Tensor, after_BNDD: Tensor, writes: Writes) -> LayerState:
    """Mean of |S k - v|^2 / 2 over the pairs written, before and after, and how far S moved; sums over heads, [B]."""
    stored_BTN = (writes.step != 0).to(before_BNDD.dtype)
    share = stored_BTN / stored_BTN.sum(dim=1, keepdim=True).clamp(min=1)

    def loss(state_BNDD: Tensor) -> Tensor:
        error = _recall(state_BNDD, writes.keys) - writes.values
        return (error.to(share.dtype).square().sum(-1) * share).sum(dim=(1, 2)) / 2

    moved = (after_BNDD - before_BNDD).flatten(1).norm(dim=1)
    return {"inner_loss_before": loss(before_BNDD), "inner_loss_after": loss(after_BNDD), "write_norm": moved}


def _logits(share: float, heads: int) -> Tensor:
    return torch.full((heads,), math.log(share) - math.log1p(-share))
