"""Model families: where the token mixers of a causal LM sit, and which of them are attention.

They are found by structure: the decoder's list of layers has as many entries as the configuration says, and of a
layer's children the mixer is the one whose class is named after attention, or after a recurrence or convolution in its
place. A model that is built otherwise is named with `register_family`.

The memory's call travels to the mixers as a keyword argument, so the model, its layers and its mixers must hand keyword
arguments through. Those that do not are refused, since their memory would be skipped without a word.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from titans_ds.errors import ConfigError, UnsupportedModelError

_LINEAR = ("deltanet", "mamba", "shortconv", "recurrent", "linearattention", "lightningattention", "ssm", "rwkv")


@dataclass(frozen=True)
class Mixer:
    """The token mixer of one layer: attention, or what stands in its place (DeltaNet, Mamba, a short convolution)."""

    index: int
    module: nn.Module
    is_attention: bool


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its mixers.

    Args:
        layers: path of the list of layers in the model, as `model.layers`.
        attention: attribute of a layer that is its attention.
        linear: attribute of a layer without attention that is its mixer; None where all layers have attention.
    """

    layers: str
    attention: str
    linear: str | None = None


_FAMILIES: dict[str, Family] = {}


def register_family(model_type: str, layers: str, attention: str, linear: str | None = None) -> None:
    """Say where a model type keeps its mixers, in place of what its structure shows: see Family."""
    _FAMILIES[model_type] = Family(layers, attention, linear)


def find_mixers(base_model: nn.Module) -> list[Mixer]:
    """Every layer's token mixer, in order.

    Raises:
        UnsupportedModelError: no list of layers or no mixer is found, no layer has attention, or keyword arguments do
            not reach the mixers; says what would help.
    """
    layers, family = layers_of(base_model), _FAMILIES.get(_model_type(base_model))
    mixers = [_mixer_of(index, layer, family, base_model) for index, layer in enumerate(layers)]
    if not any(mixer.is_attention for mixer in mixers):
        raise UnsupportedModelError(
            f"{_named(base_model)} has no attention layer: its mixers are {type(mixers[0].module).__name__}. A memory "
            "is grafted beside attention; take a model that has some"
        )
    parts = [part for mixer in mixers for part in mixer.module.modules()]
    decodes = getattr(getattr(base_model, "config", None), "is_decoder", None)
    if decodes is False and not all(getattr(part, "is_causal", True) for part in parts):
        raise UnsupportedModelError(
            f"{_named(base_model)} is an encoder as it was loaded: its tokens see those after them. Load it with "
            "is_decoder=True in its configuration, or take a causal model"
        )
    for module in (layers[mixers[0].index], *{type(m.module): m.module for m in mixers}.values()):
        kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            raise UnsupportedModelError(
                f"{_named(base_model)} can't be grafted: {type(module).__name__}.forward takes no further keyword "
                "arguments, by which a memory's call travels to the layers. A newer transformers may have changed that"
            )
    return mixers


def layers_of(base_model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a causal LM, in order. Raises UnsupportedModelError where they are not found."""
    family = _FAMILIES.get(_model_type(base_model))
    if family is not None:
        return list(cast(nn.ModuleList, base_model.get_submodule(family.layers)))
    config = _text_config(base_model)
    counts = [getattr(config, name, None) for name in ("decoder_layers", "num_hidden_layers", "n_layer")]
    count = next((number for number in counts if number), None)
    lists = [(n, m) for n, m in base_model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UnsupportedModelError(
            f"{_named(base_model)} is not supported: no list of {count} layers is found in it. Load the text model "
            "with AutoModelForCausalLM, or call titans_ds.register_family(model_type, layers=…, attention=…)"
        )
    # Lists inside a layer, of norms by head for example, may be as long: the decoder's is nearest to the root.
    return list(min(lists, key=lambda entry: entry[0].count("."))[1])


def _mixer_of(index: int, layer: nn.Module, family: Family | None, base_model: nn.Module) -> Mixer:
    if family is not None:
        has = hasattr(layer, family.attention)
        return Mixer(index, getattr(layer, family.attention if has else str(family.linear)), has)
    named = [(type(child).__name__.lower(), child) for child in layer.children()]
    # A mixer that is no attention may have its kind in its attribute's name alone: `mamba`, of class BambaMixer.
    both = [(f"{name} {type(child).__name__}".lower(), child) for name, child in layer.named_children()]
    linear = [child for name, child in both if any(word in name for word in _LINEAR) and "norm" not in name]
    others = [c for n, c in named if "attention" in n and "cross" not in n and not any(word in n for word in _LINEAR)]
    if others and not linear:
        return Mixer(index, others[0], True)
    if linear and not others:
        return Mixer(index, linear[0], False)
    if others:  # both side by side, as in Falcon-H1: the memory reads what the attention reads
        return Mixer(index, others[0], True)
    raise UnsupportedModelError(
        f"{_named(base_model)} is not supported: no child of layer {index} ({type(layer).__name__}) is a token mixer. "
        "Call titans_ds.register_family(model_type, layers=…, attention=…) to name it"
    )


def select_mixers(base_model: nn.Module, layers: list[int] | str) -> list[Mixer]:
    """The mixers to graft a memory on.

    Args:
        base_model: a causal LM.
        layers: "auto", "attention" or layer indices; see GraftConfig.

    Raises:
        UnsupportedModelError: see find_mixers.
        ConfigError: an index out of range; says the range and which layers are attention.
    """
    mixers = find_mixers(base_model)
    attention = [m.index for m in mixers if m.is_attention]
    wanted = (
        layers if isinstance(layers, list) else attention if layers == "attention" else _spread(attention, len(mixers))
    )
    wrong = [i for i in wanted if not 0 <= i < len(mixers)]
    if wrong:
        raise ConfigError(
            f"graft.layers names layer {wrong[0]}, but this model has layers 0 to {len(mixers) - 1} "
            f"(attention at {attention})"
        )
    return [mixers[i] for i in sorted(wanted)]


def _spread(attention: list[int], num_layers: int) -> list[int]:
    """Up to four attention layers: those nearest to 1/3, 1/2, 2/3 and 5/6 of the model's depth.

    None of the lowest third, where hidden states say little of what a text is about, unless there are no others.
    """
    upper = [index for index in attention if index >= num_layers / 3] or attention
    places = [num_layers * share for share in (1 / 3, 1 / 2, 2 / 3, 5 / 6)]
    return sorted({min(upper, key=lambda index: (abs(index - place), index)) for place in places}) if upper else []


def text_width(base_model: nn.Module) -> int:
    """The hidden size H that every layer reads and writes."""
    return int(_text_config(base_model).hidden_size)


def _text_config(base_model: nn.Module) -> Any:
    """The configuration of the text model, also where it is one part of several."""
    config: Any = getattr(base_model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _model_type(base_model: nn.Module) -> str:
    return str(getattr(getattr(base_model, "config", None), "model_type", type(base_model).__name__))


def _named(base_model: nn.Module) -> str:
    return f"model type {_model_type(base_model)!r}"
