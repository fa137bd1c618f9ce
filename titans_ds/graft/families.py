"""Model families: where the token mixers of a causal LM sit, and which of them are attention.

A new family is one entry in `_MIXERS`, if its attention takes the hidden states first (or as `hidden_states`) and hands
keyword arguments through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from titans_ds.errors import ConfigError, UnsupportedModelError

# model_type of the text model -> (path to the list of layers, attribute of attention, attribute of linear attention)
_MIXERS: dict[str, tuple[str, str, str | None]] = {
    "qwen3_5_text": ("model.layers", "self_attn", "linear_attn"),
    "qwen2": ("model.layers", "self_attn", None),
    "qwen3": ("model.layers", "self_attn", None),
    "llama": ("model.layers", "self_attn", None),
    "gpt_neox": ("gpt_neox.layers", "attention", None),
}


@dataclass(frozen=True)
class Mixer:
    """The token mixer of one layer: full attention or DeltaNet."""

    index: int
    module: nn.Module
    is_attention: bool


def supported_model_types() -> list[str]:
    """The values of config.model_type that can be grafted."""
    return sorted(_MIXERS)


def find_mixers(base_model: nn.Module) -> list[Mixer]:
    """Every layer's token mixer, in order.

    Raises:
        UnsupportedModelError: the model's type has no entry; lists those that have.
    """
    model_type = str(getattr(getattr(base_model, "config", None), "model_type", type(base_model).__name__))
    if model_type not in _MIXERS:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported; expected a causal LM of type "
            f"{', '.join(supported_model_types())}. Load the text model with AutoModelForCausalLM, "
            "or add an entry to titans_ds/graft/families.py"
        )
    _, attention, linear = _MIXERS[model_type]
    return [_mixer_of(index, layer, attention, linear) for index, layer in enumerate(layers_of(base_model))]


def layers_of(base_model: nn.Module) -> list[nn.Module]:
    """The layers of a model that `find_mixers` supports."""
    path, *_ = _MIXERS[str(cast(Any, base_model).config.model_type)]
    return list(cast(nn.ModuleList, base_model.get_submodule(path)))


def _mixer_of(index: int, layer: nn.Module, attention: str, linear: str | None) -> Mixer:
    if hasattr(layer, attention):
        return Mixer(index, getattr(layer, attention), True)
    return Mixer(index, getattr(layer, str(linear)), False)


def select_mixers(base_model: nn.Module, layers: list[int] | str) -> list[Mixer]:
    """The mixers to graft a memory on.

    Args:
        base_model: a causal LM of a supported type.
        layers: "attention" or layer indices.

    Raises:
        ConfigError: an index out of range; says the range and which layers are attention.
    """
    mixers = find_mixers(base_model)
    attention = [m.index for m in mixers if m.is_attention]
    wanted = attention if isinstance(layers, str) else layers
    wrong = [i for i in wanted if not 0 <= i < len(mixers)]
    if wrong:
        raise ConfigError(
            f"graft.layers names layer {wrong[0]}, but this model has layers 0 to {len(mixers) - 1} "
            f"(attention at {attention})"
        )
    return [mixers[i] for i in sorted(wanted)]


def text_width(base_model: nn.Module) -> int:
    """The hidden size H that every layer reads and writes."""
    return int(base_model.config.hidden_size)  # type: ignore[union-attr, arg-type]
