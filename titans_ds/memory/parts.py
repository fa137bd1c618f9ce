"""The learned and frozen parts of a memory, and what they make of hidden states: keys, values, gates, queries, reads.

Legend of shape suffixes: B batch, T tokens, H model width, D memory dim, N batch x heads, d width of a head, K tokens
that the convolution looks back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_ds.config import MemoryConfig
from titans_ds.memory import features
from titans_ds.memory.fan import ForwardAlignment
from titans_ds.memory.gates import Gates
from titans_ds.memory.initial import hidden_scale, initial_weights, log_step_sizes
from titans_ds.memory.network import Form
from titans_ds.memory.positions import Positions, previous_tokens
from titans_ds.memory.projection import Projection
from titans_ds.memory.state import LayerState

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


class MemoryParts(nn.Module):
    """Projections, features, gates and initial fast weights of one layer.

    Args:
        hidden_size: model width H.
        config: see MemoryConfig.
        layer_index: makes this layer's random numbers its own.
    """

    def __init__(self, hidden_size: int, config: MemoryConfig, layer_index: int) -> None:
        super().__init__()
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
        split_keys, split_values = self._split(norm=True), self._split(norm=False)
        if not self.tail_length:
            keys, values = self.key_projection(source, split_keys), self.value_projection(hidden, split_values)
        else:
            keys, values = self.key_projection(source), self.value_projection(hidden)
            reach = self.config.features.convolution_kernel - 1
            tail = self._normed(state["tail_hidden"].to(hidden.dtype))
            keys = self.key_convolution(keys, self.key_projection(tail[:, :reach]), positions)
            values = self.value_convolution(values, self.value_projection(tail[:, -reach:]), positions)
            keys, values = split_keys(keys), split_values(values)
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
        hidden_BTH, split = self._normed(hidden_BTH), self._split(norm=True)
        if not (self.tail_length and self.config.features.convolve_queries):
            return project(hidden_BTH, split)  # type: ignore[no-any-return]
        reach = self.config.features.convolution_kernel - 1
        tail = project(self._normed(state["tail_hidden"][:, -reach:].to(hidden_BTH.dtype)))
        return split(self.query_convolution(project(hidden_BTH), tail, positions))

    def _split(self, norm: bool) -> features.Split:
        return features.Split(self.config.heads, self.config.features, norm)

    def output(self, read_NTd: Tensor) -> Tensor:
        """P_o of what f_W returned, all heads together: [B, T, H]."""
        if self.config.features.read_norm:
            read_NTd = features.rms_norm(read_NTd)
        read_BTD = features.merge_heads(read_NTd, self.config.heads)
        if self.config.features.read_norm:
            read_BTD = read_BTD * self.read_norm.to(read_BTD.dtype)
        if hasattr(self, "output_projection"):
            return self.output_projection(read_BTD)  # type: ignore[no-any-return]
        return self.key_projection.transposed(read_BTD)

    def form(self, batch_size: int) -> Form:
        """f_W and its loss, beside the fast weights."""
        config, norm = self.config, None
        if config.residual_norm:
            scale, bias = (
                p.view(1, config.heads, 1, -1).expand(batch_size, -1, -1, -1).flatten(0, 1)
                for p in (self.residual_scale, self.residual_bias)
            )
            norm = (scale, bias)
        return Form(config.activation, hidden_scale(config), norm, config.rule.loss, config.rule.huber_delta)

    def step_sizes(self, like: Tensor) -> Tensor:
        """theta of each matrix, [depth], as `like`."""
        if self.config.learn_step_size:
            return self.log_step_sizes.to(like.dtype).exp()
        sizes = self.config.step_sizes  # filled in on the device: a copy from the host would wait for it
        if len(set(sizes)) == 1:
            return like.new_full((len(sizes),), sizes[0])
        return torch.cat([like.new_full((1,), theta) for theta in sizes])

    def _normed(self, hidden: Tensor) -> Tensor:
        return features.rms_norm(hidden, self.pre_norm) if self.config.features.pre_norm else hidden
