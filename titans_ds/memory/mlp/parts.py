"""The learned and frozen parts of a memory, what they make of hidden states (keys, values, gates, queries, reads), and
the state that they start from.

Legend of shape suffixes: B batch, T tokens, H model width, D memory dim, N batch x heads, d width of a head, K tokens
that the convolution looks back.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_ds.memory.graphs import LayerMemory
from titans_ds.memory.mlp import features
from titans_ds.memory.mlp.config import MLPConfig
from titans_ds.memory.mlp.fan import ForwardAlignment
from titans_ds.memory.mlp.gates import Gates
from titans_ds.memory.mlp.network import Form
from titans_ds.memory.mlp.optimizers import Fast
from titans_ds.memory.positions import Positions, previous_tokens
from titans_ds.memory.projection import Projection, merge_heads, rms_norm
from titans_ds.memory.state import LayerState

# E[silu(z)^2] and E[z^2] of a standard normal z
_SECOND_MOMENTS = {"silu": 0.355753, "linear": 1.0}
_FAST = {"weights": "w", "momentum": "s", "second": "v"}  # fields of Fast, and their letters in a state
_SEED_STRIDE = 1_000_003  # seeds of layers and parts must not meet


@dataclass(frozen=True)
class Written:
    """What a call has to write, by position.

    Args:
        keys, values: [B, T, heads, d] (by slot [B, S, D] too); finite everywhere.
        logits: of the gates, [B, T, gates * heads]; no gates, no width.
        paired: true where there is a pair to store, [B, T]; a token shift's very first token has none.
            None: everywhere.
    """

    keys: Tensor
    values: Tensor
    logits: Tensor
    paired: Tensor | None


class MemoryParts(LayerMemory):
    """Projections, features, gates and initial fast weights of one layer.

    Args:
        hidden_size: model width H.
        config: see MLPConfig.
        layer_index: makes this layer's random numbers its own.
    """

    def __init__(self, hidden_size: int, config: MLPConfig, layer_index: int) -> None:
        super().__init__(hidden_size, config.heads, config.dim)
        self.config = config
        seed = (config.seed * _SEED_STRIDE + layer_index) * 8
        self._make_projections(hidden_size, seed)
        for level, weight in enumerate(initial_weights(config, seed + 3)):
            if config.learn_initial_weights:
                self.register_parameter(f"initial_w{level}", nn.Parameter(weight))
            else:
                self.register_buffer(f"initial_w{level}", weight)
        if config.learn_step_size:
            self.log_step_sizes = nn.Parameter(log_step_sizes(config))
        if config.rule.token_gates:
            self.gates = Gates(hidden_size, config)
        self.fan: ForwardAlignment | None = None
        if config.rule.gradient == "fan":
            self.fan = ForwardAlignment(config.widths, config.rule.fan_width, seed + 7)
        self._make_features(hidden_size)

    def _make_projections(self, hidden_size: int, seed: int) -> None:
        config, d = self.config, self.config.dim
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

    def _make_features(self, hidden_size: int) -> None:
        wanted, d = self.config.features, self.config.dim
        if wanted.convolution:
            self.key_convolution = features.Convolution(d, wanted.convolution_kernel)
            self.value_convolution = features.Convolution(d, wanted.convolution_kernel)
            if wanted.convolve_queries:
                self.query_convolution = features.Convolution(d, wanted.convolution_kernel)
        if wanted.pre_norm:
            self.pre_norm = nn.Parameter(torch.ones(hidden_size))
        if wanted.read_norm:
            self.read_norm = nn.Parameter(torch.ones(d))
        if self.config.residual_norm:
            self.residual_scale = nn.Parameter(torch.ones(d))
            self.residual_bias = nn.Parameter(torch.zeros(d))

    @property
    def tail_length(self) -> int:
        """Written tokens that the convolutions need from before a call; one more under token shift."""
        wanted = self.config.features
        return wanted.convolution_kernel - 1 + int(self.config.token_shift) if wanted.convolution else 0

    def written(self, hidden_BTH: Tensor, state: LayerState, positions: Positions) -> Written:
        """Keys, values and gates of a call's tokens."""
        paired_BT = None if positions.all_written else positions.mask_BT
        if self.config.token_shift:
            source_BTH, has_previous_BT = previous_tokens(hidden_BTH, state, positions.mask_BT)
            paired_BT = positions.mask_BT & has_previous_BT
            source_BTH = source_BTH.masked_fill(~paired_BT.unsqueeze(-1), 0)
        if not positions.all_written:
            # A padding position may hold anything, NaN too: 0 times it would not be 0.
            hidden_BTH = hidden_BTH.masked_fill(~positions.mask_BT.unsqueeze(-1), 0)
        hidden = self._normed(hidden_BTH)
        source = self._normed(source_BTH) if self.config.token_shift else hidden
        keys, values = self.key_projection(source), self.value_projection(hidden)
        if self.tail_length:
            reach = self.config.features.convolution_kernel - 1
            tail = self._normed(state["tail_hidden"].to(hidden.dtype))
            keys = self.key_convolution(keys, self.key_projection(tail[:, :reach]), positions)
            values = self.value_convolution(values, self.value_projection(tail[:, -reach:]), positions)
        keys, values = self._by_head(keys, norm=True), self._by_head(values, norm=False)
        logits = self.gates(hidden) if self.config.rule.token_gates else keys.new_zeros(*keys.shape[:2], 0)
        return Written(keys, values, logits, paired_BT)

    def queries(self, hidden_BTH: Tensor, state: LayerState, positions: Positions, with_key: bool) -> Tensor:
        """What each token asks, [B, T, heads, d]; with the key projection where asked for."""
        tied = (
            with_key
            or self.config.query_projection == "tied"
            or (self.config.tie_query_at_inference and not self.training)
        )
        project = self.key_projection if tied else self.query_projection
        hidden_BTH = self._normed(hidden_BTH)
        asked = project(hidden_BTH)
        if self.tail_length and self.config.features.convolve_queries:
            reach = self.config.features.convolution_kernel - 1
            tail = project(self._normed(state["tail_hidden"][:, -reach:].to(hidden_BTH.dtype)))
            asked = self.query_convolution(asked, tail, positions)
        return self._by_head(asked, norm=True)

    def _by_head(self, x_BTD: Tensor, norm: bool) -> Tensor:
        return features.by_head(x_BTD, self.config.heads, self.config.features, norm)

    def output(self, read_NTd: Tensor) -> Tensor:
        """P_o of what f_W returned, all heads together: [B, T, H]."""
        if self.config.features.read_norm:
            read_NTd = rms_norm(read_NTd)
        read_BTD = merge_heads(read_NTd, self.config.heads)
        if self.config.features.read_norm:
            read_BTD = read_BTD * self.read_norm.to(read_BTD.dtype)
        if hasattr(self, "output_projection"):
            return self.output_projection(read_BTD)  # type: ignore[no-any-return]
        return self.key_projection.transposed(read_BTD)

    def form(self, batch_size: int) -> Form:
        """f_W, beside the fast weights."""
        config, norm = self.config, None
        if config.residual_norm:
            scale, bias = (
                p.view(1, config.heads, 1, -1).expand(batch_size, -1, -1, -1).flatten(0, 1)
                for p in (self.residual_scale, self.residual_bias)
            )
            norm = (scale, bias)
        return Form(config.activation, hidden_scale(config), norm)

    def step_sizes(self, like: Tensor) -> Tensor:
        """theta of each matrix, [depth], as `like`."""
        if self.config.learn_step_size:
            return self.log_step_sizes.to(like.dtype).exp()
        sizes = self.config.step_sizes  # filled in on the device: a copy from the host would wait for it
        if len(set(sizes)) == 1:
            return like.new_full((len(sizes),), sizes[0])
        return torch.cat([like.new_full((1,), theta) for theta in sizes])

    def _normed(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.pre_norm) if self.config.features.pre_norm else hidden


def initial_weights(config: MLPConfig, seed: int) -> list[Tensor]:
    """W_0 of every matrix, fp32 [O, I] ([heads, O, I] with several heads), drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    heads = () if config.heads == 1 else (config.heads,)
    weights = []
    for level, (fan_in, fan_out) in enumerate(itertools.pairwise(config.widths)):
        normal = torch.randn(*heads, fan_out, fan_in, generator=generator)
        if config.initial_stds is None:
            weights.append(normal * config.initial_scale / math.sqrt(fan_in))
        else:
            weights.append(normal * config.initial_stds[level])
    return weights


def log_step_sizes(config: MLPConfig) -> Tensor:
    """log theta of every matrix, [depth]."""
    return torch.tensor([math.log(theta) for theta in config.step_sizes])


def hidden_scale(config: MLPConfig) -> float:
    """The factor on hidden layers; `unit`: 1 / sqrt(hidden width E[act(z)^2])."""
    if config.hidden_scale == "unit":
        return 1.0 / math.sqrt(config.widths[1] * _SECOND_MOMENTS[config.activation])
    return float(config.hidden_scale)


def first_state(
    initial_weights: list[Tensor], batch_size: int, like_BTH: Tensor, config: MLPConfig, tail_length: int
) -> LayerState:
    """The state of an unwritten memory: a dict of tensors, fp32 unless said (fp64 where the weights are).

        w0, w1, …      fast weights [B, O, I]; [B, heads, O, I] with several heads
        s0, s1, …      with momentum: S of each, the same shapes
        v0, v1, …      under adamw: second moments; inner_step [B]: its steps so far
        last_hidden    under token shift: the hidden state of the last token written, [B, H], its dtype
        has_last       under token shift: 1 where there is such a token, [B]
        tail_hidden    with convolutions: the hidden states of the last tokens written, [B, K, H], their dtype
        pending_keys, pending_values    in chunks of C: the unfinished chunk's, [B, C - 1, D], as hidden states
        pending_gates  in chunks: its gates' logits, [B, C - 1, gates * heads]
        pending_paired in chunks: 1 where there is a pair to store, [B, C - 1, 1]
        pending_count  in chunks: its tokens so far, [B]

    Args:
        initial_weights: W_0 of each matrix.
        batch_size: number of samples.
        like_BTH: hidden states, for device, dtype and width.
        config: of the memory.
        tail_length: written tokens that the convolutions look back.
    """
    state: LayerState = {}
    for level, weight in enumerate(initial_weights):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        state[f"w{level}"] = wide.expand(batch_size, *wide.shape)
        for letter in ("s" * config.rule.has_momentum, "v" * (config.rule.optimizer == "adamw")):
            if letter:
                own = batch_size if config.heads > 1 else 1  # with several heads `unpack` would copy them anyway
                state[f"{letter}{level}"] = wide.new_zeros(own, *wide.shape).expand(batch_size, *wide.shape)
    numbers = torch.zeros(batch_size, dtype=state["w0"].dtype, device=like_BTH.device)
    if config.rule.optimizer == "adamw":
        state["inner_step"] = numbers
    width = like_BTH.shape[-1]
    if config.token_shift:
        state["last_hidden"] = like_BTH.new_zeros(batch_size, width)
        state["has_last"] = torch.zeros(batch_size, device=like_BTH.device)
    if tail_length:
        state["tail_hidden"] = like_BTH.new_zeros(batch_size, tail_length, width)
    if config.rule.chunk_size is not None:
        state |= _no_pending(batch_size, like_BTH, config, numbers)
    return state


def _no_pending(batch_size: int, like_BTH: Tensor, config: MLPConfig, numbers: Tensor) -> LayerState:
    held = (config.rule.chunk_size or 1) - 1
    gates = len(config.rule.token_gates) * config.heads
    return {
        "pending_keys": like_BTH.new_zeros(batch_size, held, config.dim),
        "pending_values": like_BTH.new_zeros(batch_size, held, config.dim),
        "pending_gates": numbers.new_zeros(batch_size, held, gates),
        "pending_paired": numbers.new_zeros(batch_size, held, 1),
        "pending_count": numbers,
    }


def unpack(state: LayerState, config: MLPConfig) -> Fast:
    """The part of a state that writes change, heads beside the batch."""

    def group(letter: str) -> tuple[Tensor, ...]:
        tensors = [state[f"{letter}{level}"] for level in range(config.depth) if f"{letter}{level}" in state]
        return tuple(t if config.heads == 1 else t.flatten(0, 1) for t in tensors)

    steps = state.get("inner_step")
    if steps is not None:
        steps = steps.repeat_interleave(config.heads)
    return Fast(group("w"), group("s"), group("v"), steps)


def pack(fast: Fast, config: MLPConfig) -> LayerState:
    """The inverse of `unpack`."""
    state: LayerState = {}
    for name, letter in _FAST.items():
        for level, tensor in enumerate(getattr(fast, name)):
            state[f"{letter}{level}"] = tensor if config.heads == 1 else torch.unflatten(tensor, 0, (-1, config.heads))
    if fast.steps is not None:
        state["inner_step"] = fast.steps[:: config.heads]
    return state
