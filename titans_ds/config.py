"""Settings of a graft: typed, validated when made, and stored as adapter_config.json.

The defaults of `MemoryConfig` (titans_ds.memory_config) and `GraftConfig` are the write rule and the injection of the
paper that this project rebuilds ("Parametric Memory Cannot Replace Retrieval"); where it is silent,
docs/architecture.md says what was chosen.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from titans_ds.memory_config import FeatureConfig, MemoryConfig, RuleConfig, needs_second_order
from titans_ds.validation import build, check_choices, require

__all__ = [
    "FeatureConfig",
    "GraftConfig",
    "LoraSettings",
    "MemoryConfig",
    "Order",
    "PrefixConfig",
    "RuleConfig",
    "check_choices",
    "check_trainable",
]

Order = Literal["first", "second"]


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
        require(self.rank >= 1, f"lora.rank is {self.rank}; it must be 1 or more")
        require(0.0 <= self.dropout < 1.0, f"lora.dropout is {self.dropout}; it must be in [0, 1)")
        require(len(self.targets) > 0, "lora.targets is empty; name the linear modules to adapt, as q_proj")


@dataclass(frozen=True)
class PrefixConfig:
    """A GradMem-style memory: prefix vectors written through the base model (titans_ds.graft.prefix).

    Args:
        tokens: N vectors of the model's width, the memory of a sample.
        inner_steps: gradient steps K on each segment.
        step_size: theta.
        learn_step_size: one learned step size per inner step (kept positive), starting from step_size.
        learn_initial: train the prefix that a new repository starts from.
        initial_std: standard deviation of that prefix; about that of the base model's embeddings.
        seed: of the initial prefix.
    """

    tokens: int = 8
    inner_steps: int = 2
    step_size: float = 1.0
    learn_step_size: bool = False
    learn_initial: bool = True
    initial_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("tokens", "inner_steps"):
            require(getattr(self, name) >= 1, f"prefix.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("step_size", "initial_std"):
            require(getattr(self, name) > 0, f"prefix.{name} is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True)
class GraftConfig:
    """Where memories sit in the base model and how their reads enter it.

    Args:
        layers: `attention` (every full-attention layer), or a list of layer indices (DeltaNet layers too).
        injection: with M = P_o f_W(q): `additive` Attn(h) + s M; `mag` Attn(h) + s (SiLU(RMSNorm(M)) * Attn(h)); `mal`
            Attn(h + s M); `mac` memory_tokens reads f_W(q_1) … f_W(q_N) as extra keys and values of the attention, with
            log s added to their attention logits; `prefix` no f_W at all, but `prefix.tokens` vectors in front of the
            text, written through the base model: `memory`, gates and tokens below do not apply.
        memory_tokens: N, for `mac`: read with N learned queries.
        persistent_tokens: learned tokens that do not depend on the input, as extra keys and values of each grafted
            attention layer (Titans, arXiv 2501.00663, section 3.3), beside any injection; 0 for none.
        gate_init: g at the start; the gate is s = floor(sigmoid(g)), 0.5 at g = 0.
        gate_floor: f in [0, 1), the least value of s.
        gate_floor_mode: `clamp` max(f, sigmoid(g)), without gradient below the floor (the paper); `affine`
            f + (1 - f) sigmoid(g).
        segment_tokens: a file is read and written in segments of this many tokens.
        memory: the memory of each of these layers.
        prefix: for `prefix`; seen by the attention layers that `layers` names.
    """

    layers: list[int] | Literal["attention"] = "attention"
    injection: Literal["additive", "mac", "mag", "mal", "prefix"] = "additive"
    memory_tokens: int = 8
    persistent_tokens: int = 0
    gate_init: float = 0.0
    gate_floor: float = 0.0
    gate_floor_mode: Literal["clamp", "affine"] = "affine"
    segment_tokens: int = 2048
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        require(0.0 <= self.gate_floor < 1.0, f"gate_floor is {self.gate_floor}; it must be in [0, 1)")
        require(self.memory_tokens >= 1, f"memory_tokens is {self.memory_tokens}; it must be 1 or more")
        require(self.persistent_tokens >= 0, f"persistent_tokens is {self.persistent_tokens}; it must not be negative")
        require(self.segment_tokens >= 1, f"segment_tokens is {self.segment_tokens}; it must be 1 or more")
        require(
            self.injection != "prefix" or self.persistent_tokens == 0,
            "injection 'prefix' has no persistent_tokens (its initial prefix is learned); set persistent_tokens to 0",
        )
        if isinstance(self.layers, list):
            require(len(self.layers) > 0, "layers is an empty list; name at least one layer, or use 'attention'")
            require(len(set(self.layers)) == len(self.layers), f"layers {self.layers} names a layer twice")

    @property
    def extends_attention(self) -> bool:
        """Whether attention layers get keys and values beside the text's."""
        return self.injection in ("mac", "prefix") or self.persistent_tokens > 0

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
        return typing.cast(GraftConfig, build(cls, values, "", drop_unknown))


def check_trainable(config: GraftConfig, order: Order) -> None:
    """Refuse a learned part that can get no gradient at this order.

    Raises:
        ConfigError: naming the setting and the one that would give it a gradient.
    """
    if order == "second":
        return
    asked = {f"memory.{name}": reason for name, reason in needs_second_order(config.memory).items()}
    if config.injection == "prefix":
        sizes = {"prefix.learn_step_size": "the step size acts only through later reads"}
        asked = sizes if config.prefix.learn_step_size else {}
    for name, reason in asked.items():
        require(
            False,
            f"{name} is learned, but first-order training gives it no gradient ({reason}, "
            "and states are detached between segments). "
            f"Set training.order to 'second', or leave {name} frozen.",
        )
