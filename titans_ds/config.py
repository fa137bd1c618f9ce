"""Settings of a grafted memory: typed, validated when made, and stored as adapter_config.json.

The defaults of `MemoryConfig` and `GraftConfig` are the write rule and the injection of the paper that this project
rebuilds ("Parametric Memory Cannot Replace Retrieval"); where it is silent, docs/architecture.md says what was chosen.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from titans_ds.errors import ConfigError

Projection = Literal["orthogonal", "learned"]
QueryProjection = Literal["orthogonal", "learned", "tied"]
Order = Literal["first", "second"]


@dataclass(frozen=True)
class MemoryConfig:
    """One neural memory: the network f_W, its projections, and the rule that writes it.

    Args:
        dim: width d of keys, values and queries.
        depth: number of weight matrices of f_W. Depth 1 is the linear memory of the delta rule.
        hidden_dim: width of the hidden layers of f_W; dim where not given. No meaning at depth 1.
        activation: between the matrices of f_W.
        write: `pooled` writes the mean key and mean value of a segment (a gradient of rank 1 per matrix); `token`
            writes all of its tokens (a gradient of rank up to min(tokens, dim)).
        token_shift: pair the key of token t - 1 with the value of token t, so that a key can ask for what follows it.
        inner_steps: gradient steps K on each segment.
        step_size: theta, the inner learning rate.
        learn_step_size: one learned step size per matrix and layer (kept positive), starting from step_size.
        key_projection: frozen with orthonormal rows, or learned.
        value_projection: frozen with orthonormal rows (a seed of its own), or learned.
        query_projection: frozen orthonormal (another seed), learned, or the key projection itself (`tied`).
        tie_query_at_inference: in evaluation mode read with the key projection, whatever was trained ("projection
            unification").
        output_projection: transpose of the key projection as it was initialised (frozen), or learned.
        learn_initial_weights: train W_0, the fast weights that a new repository starts from.
        initial_scale: standard deviation of W_0, times 1 / sqrt(fan in).
        seed: of the projections and of W_0; each layer draws its own from it.
    """

    dim: int = 512
    depth: int = 2
    hidden_dim: int | None = None
    activation: Literal["silu", "linear"] = "silu"
    write: Literal["pooled", "token"] = "pooled"
    token_shift: bool = False
    inner_steps: int = 1
    step_size: float = 0.01
    learn_step_size: bool = False
    key_projection: Projection = "orthogonal"
    value_projection: Projection = "orthogonal"
    query_projection: QueryProjection = "learned"
    tie_query_at_inference: bool = False
    output_projection: Projection = "orthogonal"
    learn_initial_weights: bool = False
    initial_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("dim", "depth", "inner_steps"):
            _require(getattr(self, name) >= 1, f"memory.{name} is {getattr(self, name)}; it must be 1 or more")
        _require(
            self.hidden_dim is None or self.hidden_dim >= 1,
            f"memory.hidden_dim is {self.hidden_dim}; it must be 1 or more",
        )
        _require(self.step_size > 0, f"memory.step_size is {self.step_size}; it must be above 0")
        _require(self.initial_scale >= 0, f"memory.initial_scale is {self.initial_scale}; it must not be negative")
        _require(
            self.initial_scale > 0 or self.depth == 1,
            f"memory.initial_scale is 0 at depth {self.depth}: every inner gradient would be 0. Use a scale above 0",
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Layer widths of f_W from input to output: `depth` + 1 numbers."""
        return (self.dim, *([self.hidden_dim or self.dim] * (self.depth - 1)), self.dim)


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the base model, trained beside the memory (through PEFT).

    Args:
        rank: r of every adapter.
        alpha: scale; the update is alpha / rank times B A.
        dropout: on the input of each adapter.
        targets: names of the linear modules to adapt; one that matches nothing is an error.
    """

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    def __post_init__(self) -> None:
        check_choices(self)
        _require(self.rank >= 1, f"lora.rank is {self.rank}; it must be 1 or more")
        _require(0.0 <= self.dropout < 1.0, f"lora.dropout is {self.dropout}; it must be in [0, 1)")
        _require(len(self.targets) > 0, "lora.targets is empty; name the linear modules to adapt, as q_proj")


@dataclass(frozen=True)
class GraftConfig:
    """Where memories sit in the base model and how their reads enter it.

    Args:
        layers: `attention` (every full-attention layer), or a list of layer indices (DeltaNet layers too).
        injection: with M = P_o f_W(q): `additive` Attn(h) + s M; `mag` Attn(h) + s (SiLU(RMSNorm(M)) * Attn(h)); `mal`
            Attn(h + s M); `mac` memory_tokens reads f_W(q_1) … f_W(q_N) as extra keys and values of the attention, with
            log s added to their attention logits.
        memory_tokens: N, for `mac`: read with N learned queries.
        gate_init: g at the start; the gate is s = floor(sigmoid(g)), 0.5 at g = 0.
        gate_floor: f in [0, 1), the least value of s.
        gate_floor_mode: `clamp` max(f, sigmoid(g)), without gradient below the floor (the paper); `affine`
            f + (1 - f) sigmoid(g).
        segment_tokens: a file is read and written in segments of this many tokens.
        memory: the memory of each of these layers.
    """

    layers: list[int] | Literal["attention"] = "attention"
    injection: Literal["additive", "mac", "mag", "mal"] = "additive"
    memory_tokens: int = 8
    gate_init: float = 0.0
    gate_floor: float = 0.0
    gate_floor_mode: Literal["clamp", "affine"] = "affine"
    segment_tokens: int = 2048
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        _require(0.0 <= self.gate_floor < 1.0, f"gate_floor is {self.gate_floor}; it must be in [0, 1)")
        _require(self.memory_tokens >= 1, f"memory_tokens is {self.memory_tokens}; it must be 1 or more")
        _require(self.segment_tokens >= 1, f"segment_tokens is {self.segment_tokens}; it must be 1 or more")
        if isinstance(self.layers, list):
            _require(len(self.layers) > 0, "layers is an empty list; name at least one layer, or use 'attention'")
            _require(len(set(self.layers)) == len(self.layers), f"layers {self.layers} names a layer twice")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in adapter_config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], drop_unknown: bool = False) -> GraftConfig:
        """The inverse of `to_dict`.

        Args:
            values: plain values, nested.
            drop_unknown: warn of unknown keys and leave them out, as for an adapter of a newer version.

        Raises:
            ConfigError: for an unknown key, naming the nearest known one.
        """
        return typing.cast(GraftConfig, _build(cls, values, "", drop_unknown))


# What makes gradients flow: a setting, the least order at which its parameters get one, and the reason.
_NEEDS_SECOND_ORDER = {
    "learn_step_size": "the step size acts only through later reads",
    "value_projection": "the value projection acts only through the write",
    "key_projection": "the key projection acts only through the write",
}


def check_trainable(config: GraftConfig, order: Order) -> None:
    """Refuse a learned part that can get no gradient at this order.

    Raises:
        ConfigError: naming the setting and the one that would give it a gradient.
    """
    if order == "second":
        return
    memory = config.memory
    asked = {
        "learn_step_size": memory.learn_step_size,
        "value_projection": memory.value_projection == "learned",
    }
    # A tied query projection is read with, so the key projection gets its gradient from there.
    asked["key_projection"] = memory.key_projection == "learned" and memory.query_projection != "tied"
    for name, wanted in asked.items():
        _require(
            not wanted,
            f"memory.{name} is learned, but first-order training gives it no gradient ({_NEEDS_SECOND_ORDER[name]}, "
            "and states are detached between segments). "
            f"Set training.order to 'second', or leave memory.{name} frozen.",
        )


def check_choices(config: Any) -> None:
    """Raise ConfigError where a field of type Literal has a value outside it, or a field has the wrong plain type."""
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        if not _fits(value, hint):
            _require(False, f"{item.name} is {value!r}; expected {_describe(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
    if origin in (dict, tuple):
        return isinstance(value, origin)
    if origin is not None:  # a union
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list of {typing.get_args(hint)[0].__name__}"
    if typing.get_origin(hint) is not None:
        return " or ".join(_describe(choice) for choice in typing.get_args(hint))
    return "nothing" if hint is type(None) else str(getattr(hint, "__name__", hint))


def _build(cls: Any, values: dict[str, Any], path: str, drop_unknown: bool) -> Any:
    hints, known = typing.get_type_hints(cls), {f.name for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
            if not drop_unknown:
                raise ConfigError(f"unknown setting {path + key!r}{hint}")
            warnings.warn(f"unknown setting {path + key!r} is left out{hint}", stacklevel=3)
            continue
        nested = dataclasses.is_dataclass(hints[key]) and isinstance(value, dict)
        arguments[key] = _build(hints[key], value, f"{path}{key}.", drop_unknown) if nested else value
    return cls(**arguments)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
