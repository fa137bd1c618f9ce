"""How a memory enters a layer: the gate, and the hooks around the layer's token mixer.

With M = P_o f_W(q) and the gate s = floor(sigmoid(g)), g of shape [1]:
    additive  Attn(h) + s M
    mag       Attn(h) + s (SiLU(RMSNorm(M)) * Attn(h))
    mal       Attn(h + s M)
    mac       Attn over N extra keys and values, made of f_W(q_1) … f_W(q_N): see titans_ds.graft.mac
With persistent tokens, learned and the same for every input, the attention has these as extra keys and values as well.
The mixer's own code and parameter names stay as they are; the graft is one child module, `titans`, and two hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from titans_ds.config import GraftConfig
from titans_ds.graft.call import KEYWORD, Call
from titans_ds.memory import Answer, LayerState, LayerTrace, Pass
from titans_ds.memory.registry import make_memory

CHILD = "titans"
IN_FLIGHT = "_titans_in_flight"


@dataclass(frozen=True)
class Columns:
    """Extra keys and values of an attention layer: tokens [B or 1, N, H], log s [1] is added to their logits."""

    tokens: Tensor
    s: Tensor


@dataclass(frozen=True)
class Ready:
    """Extra keys and values as the layer has them already, [B, key-value heads, N, head dim]."""

    key: Tensor
    value: Tensor


class PersistentTokens(nn.Module):
    """Learned tokens, the same for every input (Titans, arXiv 2501.00663, section 3.3), with a gate of their own.

    Args:
        hidden_size: model width H.
        config: of the graft.
        layer_index: makes this layer's random numbers its own.
    """

    def __init__(self, hidden_size: int, config: GraftConfig, layer_index: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.memory.seed * 8191 + layer_index + 4099)
        # As large as a normalised hidden state, which is what the layer's projections are made for.
        self.tokens = nn.Parameter(torch.randn(config.persistent_tokens, hidden_size, generator=generator))
        self.gate = nn.Parameter(torch.full((1,), float(config.gate_init)))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Tokens [1, N, H] and s = sigmoid(g) [1]; a copy, since ZeRO-3 takes parameters away after a forward."""
        s = torch.sigmoid(self.gate.to(torch.promote_types(self.gate.dtype, torch.float32)))
        return self.tokens.unsqueeze(0).clone(), s


class GraftedMemory(nn.Module):
    """A memory and the gate of its layer.

    Args:
        hidden_size: model width H.
        config: of the graft.
        layer_index: the layer it is grafted on.
    """

    def __init__(self, hidden_size: int, config: GraftConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.injection = config.injection
        self.floor, self.floor_mode = config.gate_floor, config.gate_floor_mode
        self.memory = make_memory(hidden_size, config.memory, layer_index)
        self.gate = nn.Parameter(torch.full((1,), float(config.gate_init)))  # g; [1]: ZeRO breaks on 0-dim parameters
        if config.injection == "mag":
            self.read_norm = nn.Parameter(torch.ones(hidden_size))
        if config.injection == "mac":
            generator = torch.Generator().manual_seed(config.memory.seed * 8191 + layer_index)
            self.queries = nn.Parameter(torch.randn(config.memory_tokens, self.memory.width, generator=generator))
        if config.persistent_tokens:
            self.persistent = PersistentTokens(hidden_size, config, layer_index)

    def gate_value(self) -> Tensor:
        """s in [floor, 1], shape [1], at least fp32."""
        s = torch.sigmoid(self.gate.to(torch.promote_types(self.gate.dtype, torch.float32)))
        return s.clamp(min=self.floor) if self.floor_mode == "clamp" else self.floor + (1 - self.floor) * s

    def forward(
        self,
        hidden_BTH: Tensor,
        state: LayerState | None,
        mask_BT: Tensor | None,
        reset_B: Tensor | None,
        plan: Pass,
        trace: LayerTrace | None = None,
    ) -> tuple[Answer, Tensor]:
        """What the memory says to this segment.

        Returns:
            the memory's answer, with M as its read, or SiLU(RMSNorm(M)) for `mag`; s [1].
        """
        queries_ND = self.queries if self.injection == "mac" else None
        answer: Answer = self.memory(hidden_BTH, state, mask_BT, reset_B, plan, queries_ND, trace)
        signal, stats = answer.read, answer.stats
        if trace is not None and trace.again:  # the gate gives it a graph where nothing is learned through the writes
            return answer._replace(read=signal + 0 * self.gate.to(signal.dtype)), self.gate_value()
        if self.injection == "mag":
            weight = self.read_norm.to(signal.dtype)
            signal = F.silu(F.rms_norm(signal, (signal.shape[-1],), weight, eps=1e-6))
        s = self.gate_value()
        if plan.stats:
            stats = {**stats, "gate": s.detach().expand(hidden_BTH.shape[0])}
        return Answer(signal, answer.state, stats), s


@dataclass(frozen=True)
class Flight:
    """What the mixer's forward hook (and its attention) need of the pre-hook of the same call.

    Args:
        signal, s: what the memory says, and its gate.
        columns: extra keys and values, the first in front.
        record: takes the layer's own keys and values.
    """

    signal: Tensor
    s: Tensor
    columns: tuple[Columns | Ready, ...] = ()
    record: Callable[[Tensor, Tensor], None] | None = None


def before_mixer(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of every token mixer: keep the call from the mixer's kernels, and let the memory read and write.

    What the mixer's forward needs waits on the module until its forward hook; a recomputation passes here again.
    """
    kwargs = dict(kwargs)
    call: Call | None = kwargs.pop(KEYWORD, None)
    object.__setattr__(mixer, IN_FLIGHT, None)
    if call is None or not hasattr(mixer, CHILD):
        return args, kwargs
    grafted: GraftedMemory = getattr(mixer, CHILD)
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    flight = _consult(grafted, hidden, call)
    object.__setattr__(mixer, IN_FLIGHT, flight)
    if grafted.injection == "mal":
        moved = hidden + (flight.s * flight.signal).to(hidden.dtype)
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = moved
        else:
            args = (moved, *args[1:])
    return args, kwargs


def _consult(grafted: GraftedMemory, hidden: Tensor, call: Call) -> Flight:
    index = grafted.layer_index
    going_on = call.follows and not call.plan.write and index in call.new
    given = call.new if going_on else call.given
    state = None if given is None else dict(given[index])  # a dict of its own: ZeRO-3 changes those it meets, in place
    trace = None if call.trace is None else call.trace.new_layer(index, hidden)
    answer, s = grafted(hidden, state, call.mask, call.reset, call.plan, trace)
    if call.plan.write or call.follows:
        call.new[index] = answer.state
    call.stats[index] = answer.stats
    columns = [Columns(*grafted.persistent())] if hasattr(grafted, "persistent") else []
    if grafted.injection == "mac":
        columns.append(Columns(answer.read, s))
    return Flight(answer.read, s, tuple(columns))


def in_flight(mixer: nn.Module) -> Flight | None:
    """The memory's word to the forward call that this mixer is in; None where memory is skipped."""
    return getattr(mixer, IN_FLIGHT, None)


def after_mixer(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a grafted token mixer: add what `additive` and `mag` add to its output."""
    flight = in_flight(mixer)
    object.__setattr__(mixer, IN_FLIGHT, None)
    injection = getattr(mixer, CHILD).injection
    if flight is None or injection not in ("additive", "mag"):
        return output
    mixed = output[0] if isinstance(output, tuple) else output
    signal = flight.signal if injection == "additive" else flight.signal * mixed
    mixed = mixed + (flight.s * signal).to(mixed.dtype)
    return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def hook(mixer: nn.Module, grafted: bool) -> list[RemovableHandle]:
    """Install the hooks of one mixer; those without a memory only drop the keyword."""
    handles = [mixer.register_forward_pre_hook(before_mixer, with_kwargs=True)]
    if grafted:
        handles.append(mixer.register_forward_hook(after_mixer, with_kwargs=True))
    return handles
