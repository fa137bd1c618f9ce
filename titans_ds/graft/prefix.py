"""GradMem-style memory: N prefix vectors, written by gradient steps on the base model's own loss (arXiv 2603.13875).

The memory of a sample is P [N, H]: embeddings of N tokens in front of its text. With p(. | P) the frozen base model,

    write   l(P) = mean_t -log p(x_t | P, x_<t) over a segment;  P <- P - theta_k grad l(P), K times
    read    p(. | P, text)

The prefix goes through the decoder by itself, at positions -N to -1. What its keys and values become in each grafted
attention layer, rotary embedding included, is prepended there to those of the text, after the KV cache has been
updated: on a model of attention layers alone, all of them grafted, that is exactly the prefix in front of the text.
A DeltaNet layer carries the prefix's own tokens, but hands nothing of them on to the text.

Orders: without `graph` the state is a value, and nothing is learned through the write. With it, the loss of later
segments differentiates through the write: into P_0 and theta with grad l taken as given (first-order MAML), and with
`through_base` through grad l as well, and so into whatever of the base model is trained (GradMem's training).

Legend of shape suffixes: B batch, N prefix tokens, T text tokens, H model width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from titans_ds.errors import ConfigError
from titans_ds.graft import families
from titans_ds.graft.call import KEYWORD, Call
from titans_ds.graft.injection import IN_FLIGHT, Flight, Ready
from titans_ds.graft.placement import device_of, dtype_of
from titans_ds.graft.reconstruction import losses_and_derivative, mean_losses
from titans_ds.memory import Controls, LayerState, MemoryState, Pass
from titans_ds.memory.positions import Positions
from titans_ds.memory.prefix import PrefixConfig
from titans_ds.memory.state import choose_rows

if TYPE_CHECKING:
    from titans_ds.graft.titans_model import TitansModel

LAYER = 0  # the prefix enters below the first layer; its state is filed there
_ENTRY = "prefix"


class PrefixMemory(nn.Module):
    """What is learned of a prefix memory: the prefix that a new repository starts from, and the step sizes.

    Args:
        hidden_size: model width H.
        config: see PrefixConfig.
    """

    initial: Tensor
    log_step_sizes: Tensor

    def __init__(self, hidden_size: int, config: PrefixConfig) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        initial = torch.randn(config.tokens, hidden_size, generator=generator) * config.initial_std
        sizes = torch.full((config.inner_steps,), config.step_size).log()
        for name, tensor, learned in (
            ("initial", initial, config.learn_initial),
            ("log_step_sizes", sizes, config.learn_step_size),
        ):
            if learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self) -> tuple[Tensor, Tensor]:
        """P_0 [N, H] and theta [K], at least fp32; through `__call__`, so that ZeRO-3 has them here."""
        wide = torch.promote_types(self.initial.dtype, torch.float32)
        return self.initial.to(wide) * 1, self.log_step_sizes.to(wide).exp()


@dataclass
class PrefixCall(Call):
    """One forward pass of the base model with a prefix.

    Args:
        columns: keys and values [B, key-value heads, N, head dim] by layer, in front of the text's.
        recorded: takes those of this pass, which is the prefix's own; None for a text's pass.
    """

    columns: dict[int, Ready] = field(default_factory=dict)
    recorded: dict[int, Ready] | None = None

    def flight(self, index: int) -> Flight:
        """What layer `index` does in this pass."""
        columns = (self.columns[index],) if index in self.columns else ()
        nothing = torch.empty(0)
        return Flight(
            nothing, nothing, columns, None if self.recorded is None else functools.partial(self._take, index)
        )

    def rows(self) -> int | None:
        """See titans_ds.graft.call.Call."""
        return next((len(columns.key) for columns in self.columns.values()), None)

    def repeated(self, times: int) -> PrefixCall:
        """See titans_ds.graft.call.Call."""
        columns = {
            index: Ready(ready.key.repeat_interleave(times, 0), ready.value.repeat_interleave(times, 0))
            for index, ready in self.columns.items()
        }
        return replace(self, columns=columns)

    def _take(self, index: int, key: Tensor, value: Tensor) -> None:
        if self.recorded is not None:
            self.recorded[index] = Ready(key, value)


def install(
    base_model: nn.Module, config: PrefixConfig, layers: list[int]
) -> tuple[PrefixMemory, list[RemovableHandle]]:
    """A prefix memory for a base model, and the hooks of all its mixers; `layers` see the prefix."""
    device, memory = device_of(base_model), PrefixMemory(families.text_width(base_model), config)
    handles: list[RemovableHandle] = []
    for mixer in families.find_mixers(base_model):
        handles += hook(mixer.module, mixer.index, mixer.index in layers)
    return (memory if device.type == "meta" else memory.to(device)), handles


def hook(mixer: nn.Module, index: int, grafted: bool) -> list[RemovableHandle]:
    """Install the hooks of one mixer; those that don't see the prefix only drop the keyword."""
    before = functools.partial(_before_mixer, index if grafted else None)
    return [mixer.register_forward_pre_hook(before, with_kwargs=True), mixer.register_forward_hook(_after_mixer)]


def _before_mixer(
    index: int | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    kwargs = dict(kwargs)
    call = kwargs.pop(KEYWORD, None)
    object.__setattr__(module, IN_FLIGHT, None if index is None or call is None else call.flight(index))
    return args, kwargs


def _after_mixer(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    object.__setattr__(module, IN_FLIGHT, None)


def initial_state(initial_NH: Tensor, batch_size: int) -> dict[int, LayerState]:
    """P_0 for every sample, [B, N, H]."""
    return {LAYER: {_ENTRY: initial_NH.expand(batch_size, -1, -1)}}


def start(initial_NH: Tensor, state: dict[int, LayerState] | None, reset_B: Tensor | None, batch_size: int) -> Tensor:
    """The prefix that a call starts from, [B, N, H]: the state's, or P_0 where a sample starts anew."""
    initial = initial_state(initial_NH, batch_size)[LAYER][_ENTRY]
    if state is None:
        return initial
    given = state[LAYER][_ENTRY]
    return given if reset_B is None else choose_rows(reset_B, initial.to(given.dtype), given)


@dataclass(frozen=True)
class Segment:
    """What `read_write` is given: see TitansModel.read_write."""

    ids: Tensor
    attention_mask: Tensor | None
    mask: Tensor | None
    state: dict[int, LayerState] | None
    reset: Tensor | None


def read_write(
    model: TitansModel, memory: PrefixMemory, segment: Segment, plan: Pass
) -> tuple[Tensor, dict[int, LayerState], dict[int, LayerState]]:
    """One segment read behind the prefix, then written: hidden states [B, T, H], the state after it, stats."""
    initial_NH, sizes_K = memory()
    prefix_BNH = start(initial_NH, segment.state, segment.reset, len(segment.ids))
    call, _ = encode(model, prefix_BNH)
    output = model.decoder(
        input_ids=segment.ids, attention_mask=segment.attention_mask, use_cache=False, **{KEYWORD: call}
    )
    if not plan.write or (_alone() and segment.mask is not None and not segment.mask.any()):
        return output.last_hidden_state, {LAYER: {_ENTRY: prefix_BNH}}, {}
    new_BNH, before_B = write(
        model, segment.ids, segment.mask, prefix_BNH, sizes_K, plan.controls, plan.graph, plan.through_base
    )
    stats: dict[int, LayerState] = {}
    if plan.stats:
        stats = {LAYER: _stats(model, segment, (prefix_BNH.detach(), new_BNH.detach()), before_B)}
    return output.last_hidden_state, {LAYER: {_ENTRY: new_BNH}}, stats


def _alone() -> bool:
    """Whether no other rank could wait for this one's passes: ZeRO-3 needs as many on each, whatever their data."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def _stats(model: TitansModel, segment: Segment, change: tuple[Tensor, Tensor], before_B: Tensor) -> LayerState:
    with torch.no_grad():
        ids_BT, there_BT = _compact(segment.ids, segment.mask)
        after_B = mean_losses(model.logits, _predicting(model, ids_BT, change[1]), ids_BT, there_BT)
    norm_B = (change[1] - change[0]).flatten(1).norm(dim=1)
    return {
        "inner_loss_before": before_B,
        "inner_loss_after": after_B,
        "write_norm": norm_B,
        "gate": torch.ones_like(norm_B),
    }


def prime(
    model: TitansModel, ids_BT: Tensor, mask_BT: Tensor, state: dict[int, LayerState], controls: Controls
) -> dict[int, LayerState]:
    """The state after one segment, without reading it."""
    if model.prefix is None:
        return state
    _, sizes_K = model.prefix()
    new_BNH, _ = write(model, ids_BT, mask_BT, state[LAYER][_ENTRY], sizes_K, controls)
    return {LAYER: {_ENTRY: new_BNH}}


def reading(model: TitansModel, state: MemoryState) -> PrefixCall:
    """The call for passes that only read: a whole generation shares the prefix's keys and values."""
    return encode(model, state.layers[LAYER][_ENTRY])[0]


def encode(model: TitansModel, prefix_BNH: Tensor) -> tuple[PrefixCall, Tensor]:
    """The prefix's own pass through the decoder.

    Returns:
        the call for passes of texts behind it; its last hidden state [B, H], which predicts a text's first token.
    """
    recorded: dict[int, Ready] = {}
    batch, length = prefix_BNH.shape[:2]
    positions = torch.arange(-length, 0, device=prefix_BNH.device).expand(batch, -1)
    output = model.decoder(
        inputs_embeds=prefix_BNH.to(dtype_of(model.base_model)),
        position_ids=positions,
        use_cache=False,
        **{KEYWORD: PrefixCall(recorded=recorded)},
    )
    return PrefixCall(columns=recorded), output.last_hidden_state[:, -1]


def write(
    model: TitansModel,
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    prefix_BNH: Tensor,
    sizes_K: Tensor,
    controls: Controls,
    graph: bool = False,
    through_base: bool = False,
) -> tuple[Tensor, Tensor]:
    """K gradient steps on one segment.

    Args:
        model: grafted with a prefix.
        ids_BT: token ids; only those that are written exist for the write, wherever padding stands.
        mask_BT: true where a token is written; all of them where None.
        prefix_BNH: before the write.
        sizes_K: theta of each step.
        controls: a sign, or another number of steps (more than K take the last step size).
        graph: keep the graph of the write.
        through_base: with `graph`, that of the inner gradient as well.

    Returns:
        the prefix after it, and the loss before it [B].
    """
    ids_BT, there_BT = _compact(ids_BT, mask_BT)
    through = graph and through_base
    if through:
        _check_whole(model.base_model)
    steps = len(sizes_K) if controls.inner_steps is None else controls.inner_steps
    current, first = prefix_BNH if graph else prefix_BNH.detach(), prefix_BNH.new_zeros(len(prefix_BNH))
    with torch.enable_grad(), _twice_differentiable(model.base_model) if through else contextlib.nullcontext():
        for k in range(steps):
            leaf = current if through and current.requires_grad else current.detach().requires_grad_()
            loss_B, gradient = _gradient(model, ids_BT, there_BT, leaf, through)
            current = current - controls.sign * sizes_K[min(k, len(sizes_K) - 1)].to(leaf.dtype) * gradient
            first = loss_B.detach() if k == 0 else first
    return current if graph else current.detach(), first


def _gradient(
    model: TitansModel, ids_BT: Tensor, there_BT: Tensor, prefix_BNH: Tensor, through: bool
) -> tuple[Tensor, Tensor]:
    """l(P) of every sample [B], and grad l(P) [B, N, H]; with its graph if it is to be differentiated `through`."""
    hidden_BTH = _predicting(model, ids_BT, prefix_BNH)
    if through:
        loss_B = mean_losses(model.logits, hidden_BTH, ids_BT, there_BT)
        return loss_B, torch.autograd.grad(loss_B.sum(), prefix_BNH, create_graph=True)[0]
    loss_B, derivative_BTH = losses_and_derivative(model.logits, hidden_BTH, ids_BT, there_BT)
    return loss_B, torch.autograd.grad(hidden_BTH, prefix_BNH, derivative_BTH)[0]


def _predicting(model: TitansModel, ids_BT: Tensor, prefix_BNH: Tensor) -> Tensor:
    """The hidden state that predicts each token, [B, T, H]. Tokens stand in front, padding behind them."""
    call, last_BH = encode(model, prefix_BNH)
    output = model.decoder(input_ids=ids_BT, use_cache=False, **{KEYWORD: call})
    return torch.cat([last_BH.unsqueeze(1), output.last_hidden_state[:, :-1]], dim=1)


def _compact(ids_BT: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Written tokens to the front, and where they are."""
    positions = Positions(mask_BT, ids_BT.shape[0], ids_BT.shape[1], ids_BT.device)
    ids = positions.compact(ids_BT.unsqueeze(-1)).squeeze(-1)
    return ids, torch.arange(ids.shape[1], device=ids.device) < positions.count_B.unsqueeze(1)


def _check_whole(base_model: nn.Module) -> None:
    """A second derivative meets weights that ZeRO-3 has taken away again."""
    if any(hasattr(parameter, "ds_id") for parameter in base_model.parameters()):
        raise ConfigError(
            "training.second_order 'through_base' differentiates twice through the base model, which ZeRO-3 has in "
            "parts; use ds_configs/zero2.json, or training.second_order 'window'"
        )


@contextlib.contextmanager
def _twice_differentiable(base_model: nn.Module) -> Iterator[None]:
    """Attention as plain products (fused kernels have no second derivative), and nothing recomputed in backward."""
    training = [module for module in base_model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module in training:
            module.training = True
