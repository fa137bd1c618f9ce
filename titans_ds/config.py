"""Settings of a graft: typed, validated when made, and stored as titans_config.json."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from titans_ds.memory.delta import DeltaConfig
from titans_ds.memory.mlp import MLPConfig
from titans_ds.memory.prefix import PrefixConfig
from titans_ds.memory.registry import DEFAULT, MemoryConfig, memory_config, to_plain
from titans_ds.validation import build, check_choices, require, shown

__all__ = ["GraftConfig", "LoraSettings", "Order", "check_choices"]

Order = Literal["first", "second"]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the base model, trained beside the memory (through PEFT).

    Args:
        rank: r of every adapter.
        alpha: scale; the update is alpha / rank times B A.
        dropout: on the input of each adapter.
        targets: names of the linear modules to adapt; one that matches nothing is an error. `[all-linear]` takes all
            but the output head.
    """

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    def __post_init__(self) -> None:
        check_choices(self)
        require(1 <= self.rank <= 65_536, f"lora.rank is {self.rank}; it must be from 1 to 65536")
        require(0.0 <= self.dropout < 1.0, f"lora.dropout is {self.dropout}; it must be in [0, 1)")
        require(len(self.targets) > 0, "lora.targets is empty; name the linear modules to adapt, as q_proj")


@dataclass(frozen=True)
class GraftConfig:
    """Where memories sit in the base model and how their reads enter it.

    Args:
        layers: `auto` takes up to four attention layers, spread over the middle and upper half of the model;
            `attention` takes every full-attention layer; a list names layers by index (DeltaNet layers too).
        injection: with M the memory's read: `additive` Attn(h) + s M; `mag` Attn(h) + s (SiLU(RMSNorm(M)) * Attn(h));
            `mal` Attn(h + s M); `mac` memory_tokens reads with learned queries as extra keys and values of the
            attention, with log s added to their attention logits. The prefix memory stands in front of the text: for
            it neither this nor gates and tokens below apply.
        memory_tokens: N, for `mac`: read with N learned queries.
        persistent_tokens: learned tokens that do not depend on the input, as extra keys and values of each grafted
            attention layer (Titans, arXiv 2501.00663, section 3.3), beside any injection; 0 for none.
        gate_init: g at the start; the gate is s = floor(sigmoid(g)), 0.12 at g = -2.
        gate_floor: f in [0, 1), the least value of s.
        gate_floor_mode: `clamp` max(f, sigmoid(g)), without gradient below the floor (the paper); `affine`
            f + (1 - f) sigmoid(g).
        segment_tokens: a file is read and written in segments of this many tokens.
        memory: the memory of each of these layers: settings of its kind, or plain values with the name of a `preset`
            (titans_ds.memory.registry). The default is the preset `delta`.
    """

    layers: list[int] | Literal["auto", "attention"] = "auto"
    injection: Literal["additive", "mac", "mag", "mal"] = "additive"
    memory_tokens: int = 8
    persistent_tokens: int = 0
    gate_init: float = -2.0
    gate_floor: float = 0.0
    gate_floor_mode: Literal["clamp", "affine"] = "affine"
    segment_tokens: int = 1024
    memory: Any = field(default_factory=lambda: {"preset": DEFAULT})  # a MemoryConfig, once made

    def __post_init__(self) -> None:
        if isinstance(self.memory, dict):  # command lines and files give plain values, whose names depend on the preset
            object.__setattr__(self, "memory", memory_config(self.memory))
        require(
            isinstance(self.memory, MemoryConfig),
            f"graft.memory is {shown(self.memory)}; expected settings of a memory, such as {{preset: delta}}",
        )
        check_choices(self)
        require(0.0 <= self.gate_floor < 1.0, f"gate_floor is {self.gate_floor}; it must be in [0, 1)")
        require(self.memory_tokens >= 1, f"memory_tokens is {self.memory_tokens}; it must be 1 or more")
        require(self.persistent_tokens >= 0, f"persistent_tokens is {self.persistent_tokens}; it must not be negative")
        require(
            1 <= self.segment_tokens <= 2**24,
            f"segment_tokens is {self.segment_tokens}; it must be from 1 to 16,777,216",
        )
        if isinstance(self.layers, list):
            require(len(self.layers) > 0, "layers is an empty list; name at least one layer, or use 'auto'")
            require(len(set(self.layers)) == len(self.layers), f"layers {self.layers} names a layer twice")
        self._refuse_ignored()

    def _refuse_ignored(self) -> None:
        """A setting that the memory or the injection would never look at is a mistake."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        if self.is_prefix:
            for name in (
                "injection",
                "memory_tokens",
                "persistent_tokens",
                "gate_init",
                "gate_floor",
                "gate_floor_mode",
            ):
                require(
                    getattr(self, name) == defaults[name],
                    f"graft.{name} is set, but a prefix memory (preset 'gradmem') has no use for it; leave it out",
                )
        require(
            self.injection == "mac" or self.memory_tokens == defaults["memory_tokens"],
            f"graft.memory_tokens is set, but only injection 'mac' reads with queries of its own, and it is "
            f"{self.injection!r}; leave memory_tokens out, or set injection to 'mac'",
        )
        if self.injection == "mac":
            require(
                getattr(self.memory, "query_projection", "tied") == "tied",
                "graft.injection 'mac' reads with queries of its own, so that memory.query_projection would never be "
                "used; set memory.query_projection to 'tied'",
            )
            require(
                not self.queries_see_past,
                "graft.injection 'mac' reads with queries of its own, which no convolution sees; set "
                "memory.features.convolve_queries to false",
            )

    @property
    def is_prefix(self) -> bool:
        """Whether the memory is a prefix of the text, which belongs to no layer."""
        return isinstance(self.memory, PrefixConfig)

    @property
    def convolves(self) -> bool:
        """Whether keys and values see the tokens before them by a convolution."""
        return isinstance(self.memory, MLPConfig) and self.memory.features.convolution

    @property
    def queries_see_past(self) -> bool:
        """Whether a token's query sees the tokens before it, beside the memory."""
        return self.convolves and self.memory.features.convolve_queries

    @property
    def extends_attention(self) -> bool:
        """Whether attention layers get keys and values beside the text's."""
        return self.injection == "mac" or self.is_prefix or self.persistent_tokens > 0

    def resolved(self, layers: list[int], hidden_size: int) -> GraftConfig:
        """The settings for a base model: its layers by index, and sizes that were left open chosen from its width."""
        memory = self.memory.resolved(hidden_size) if isinstance(self.memory, DeltaConfig) else self.memory
        return dataclasses.replace(self, layers=layers, memory=memory)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in titans_config.json."""
        return {**dataclasses.asdict(self), "memory": to_plain(self.memory)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], drop_unknown: bool = False) -> GraftConfig:
        """The inverse of `to_dict`.

        Args:
            values: plain values, nested.
            drop_unknown: warn of unknown keys and leave them out, as for an adapter of a newer version.

        Raises:
            ConfigError: for an unknown key, naming the nearest known one.
        """
        given = dict(values)
        if isinstance(given.get("memory"), dict):
            given["memory"] = memory_config(given["memory"], drop_unknown)
        return typing.cast(GraftConfig, build(cls, given, "", drop_unknown))
