"""Frozen bases in 4 or 8 bits: made by name, and what a memory needs of any base that is quantised.

A memory is grafted onto a quantised base as onto another: its own parameters are as wide as ever, and gradients pass
through the base's linear maps without reaching them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import logging
from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from titans_ds.errors import ConfigError
from titans_ds.validation import nearest
from titans_ds.zero.footprint import FOUR_BITS

# By name: the package, the extra of this project that installs it, the value that transformers' settings start from.
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bnb-4bit": ("bitsandbytes", "quantization", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bnb-8bit": ("bitsandbytes", "quantization", {"load_in_8bit": True}),
    "torchao-int8": ("torchao", "torchao", {}),
}


def check_name(name: str) -> None:
    """Raise ConfigError, naming the nearest, where model.quantization is no name that there is."""
    if name != "none" and name not in FORMS:
        raise ConfigError(f"model.quantization is {name!r}, which is unknown{nearest(name, ['none', *FORMS])}")


def check_installed(name: str) -> None:
    """Raise ConfigError, naming the extra, where model.quantization needs a package that is not installed."""
    if name != "none" and importlib.util.find_spec(FORMS[name][0]) is None:
        package, extra, _ = FORMS[name]
        raise ConfigError(
            f"model.quantization is {name!r}, which needs {package}; install it: pip install 'titans-ds[{extra}]'"
        )


def settings_of(name: str, options: dict[str, Any], dtype: str) -> Any | None:
    """What transformers' from_pretrained takes as quantization_config; None for `none`.

    Args:
        name: of FORMS, or `none`.
        options: fields of transformers' BitsAndBytesConfig, or of torchao's Int8WeightOnlyConfig.
        dtype: of the products, where `options` name none.

    Raises:
        ConfigError: an unknown option (names the nearest), or a package that is missing.
    """
    check_installed(name)
    if name == "none":
        return None
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        _check_options(options, [field.name for field in dataclasses.fields(Int8WeightOnlyConfig)])
        return TorchAoConfig(Int8WeightOnlyConfig(**options))
    if name == "bnb-8bit":  # it tells at every product that activations are cast
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    _check_options(options, list(inspect.signature(BitsAndBytesConfig).parameters))
    return BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": dtype, **FORMS[name][2], **options})


def _check_options(options: dict[str, Any], known: Iterable[str]) -> None:
    for key in options:
        if key not in known:
            raise ConfigError(f"model.quantization_options has {key!r}, which is unknown{nearest(key, known)}")


def describe(config: Any) -> dict[str, Any] | None:
    """The quantisation in a base's configuration, in plain values, as transformers has it; None where there is none."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, dict) else settings.to_dict()
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def bytes_per_weight(settings: dict[str, Any]) -> float:
    """What a weight of a linear map takes, of a description as `describe` gives it.

    Four bits come with an fp32 scale for every 64 weights; the scales of 8 bits are one a row.
    """
    four, eight = settings.get("load_in_4bit"), settings.get("load_in_8bit")
    bits = 4 if four else 8 if eight else int(settings.get("bits") or 8)
    return FOUR_BITS if bits == 4 else bits / 8


def keep_gradients(base_model: nn.Module) -> None:
    """Keep weights of bitsandbytes in the form that has a backward pass.

    On a CPU with AVX512-BF16, a 4-bit layer in evaluation mode rearranges its weights for good, for a product that
    autograd knows nothing of: every gradient through it, in all later training, would be silently lost.
    """
    for module in base_model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as undo

                weight: Any = module.weight
                weight.data, weight.quant_state = undo(weight.data, state)
                if weight.quant_state.absmax.dim() == 2:  # bitsandbytes 0.50 leaves the scales turned
                    weight.quant_state.absmax = weight.quant_state.absmax.T.reshape(-1).float()
                cast(Any, module).quant_state = weight.quant_state
