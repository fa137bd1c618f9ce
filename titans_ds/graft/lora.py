"""Low-rank adapters on the base model, through PEFT, beside the memory.

PEFT's modules are put into the base model in place; they rename what PEFT renames (`q_proj.weight` becomes
`q_proj.base_layer.weight`). On disk they are an ordinary PEFT folder, which PEFT loads without this project.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from titans_ds.config import LoraSettings
from titans_ds.errors import AdapterError, ConfigError, DataError
from titans_ds.files import atomic_file, write_text
from titans_ds.reading import read_json, strict_record

FOLDER = "lora"
MARK = ".lora_"  # in the name of every one of its parameters
ALL_LINEAR = "all-linear"  # PEFT's word for every linear module but the output head
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what PEFT's own folders carry before the base model's names
REMEDY = "Expected a folder that TitansModel.save_pretrained wrote; save the adapter again."


@strict_record
class _Config(TypedDict):
    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str]


def adopt(base_model: nn.Module) -> tuple[nn.Module, LoraSettings | None]:
    """The transformers model inside a PEFT model, or the model itself; and the settings of LoRA that it has already.

    Raises:
        ConfigError: adapters that can't be written down beside a memory; says to merge them.
    """
    inner: nn.Module = base_model.get_base_model() if hasattr(base_model, "get_base_model") else base_model  # type: ignore[operator]
    found: dict[str, Any] = dict(getattr(base_model, "peft_config", None) or {})
    if not found:
        return inner, None
    config: Any = found.get("default")
    kind = str(getattr(getattr(config, "peft_type", None), "value", "none"))
    plain = kind == "LORA" and len(found) == 1
    unlike = [name for name in ("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "bias")
              if getattr(config, name, None) not in (None, False, {}, "none")]  # fmt: skip
    if not plain or unlike:
        what = f"LoRA with {unlike[0]}" if plain else f"adapters {', '.join(found)} of kind {kind}"
        raise ConfigError(
            f"the base model has {what}, which can't be saved beside a memory; expected one LoRA adapter named "
            "'default'. Merge it first: base.merge_and_unload()"
        )
    names = sorted({name.split(MARK)[0].rsplit(".", 1)[-1] for name, _ in parameters(inner)})
    return inner, LoraSettings(config.r, float(config.lora_alpha), float(config.lora_dropout), names)


def inject(base_model: nn.Module, settings: LoraSettings) -> LoraSettings:
    """Put LoRA modules into `base_model`; everything but them is frozen. Returns the settings with all targets named.

    Raises:
        ConfigError: a target matches no linear module; lists the names there are.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = sorted({n.rsplit(".", 1)[-1] for n, m in base_model.named_modules() if isinstance(m, nn.Linear)})
    if list(settings.targets) == [ALL_LINEAR]:
        head = base_model.get_output_embeddings()  # type: ignore[operator]
        heads = {n.rsplit(".", 1)[-1] for n, m in base_model.named_modules() if m is head}
        settings = replace(settings, targets=[name for name in names if name not in heads])
    missing = [t for t in settings.targets if t not in names]
    if missing:
        raise ConfigError(
            f"lora.targets names {missing[0]!r}, which matches no linear module of this model; "
            f"its linear modules are {', '.join(names)}"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, base_model)
    return settings


def parameters(base_model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """LoRA's parameters by their name in the base model."""
    for name, parameter in base_model.named_parameters():
        if MARK in name:
            yield name, parameter


@contextlib.contextmanager
def disabled(base_model: nn.Module) -> Iterator[None]:
    """Inside, the base model computes as if LoRA were not there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in base_model.modules() if isinstance(m, BaseTunerLayer)]
    trainable = [p for _, p in parameters(base_model) if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in trainable:  # enable_adapters(False) froze them
            parameter.requires_grad_(True)


def save(base_model: nn.Module, settings: LoraSettings, directory: Path, state_dict: dict[str, Tensor] | None) -> None:
    """Write a PEFT folder; `state_dict` has whole tensors by name in the base model, gathered from the ranks."""
    from peft import LoraConfig

    folder = directory / FOLDER
    values = {n: p.detach() for n, p in parameters(base_model)} | (state_dict or {})
    # PEFT's files leave the adapter's name out of the parameter names.
    named = {_PREFIX + n.replace(".default.", "."): t.detach().cpu().contiguous().clone() for n, t in values.items()}
    with atomic_file(folder / _WEIGHTS) as temporary:
        save_file(named, temporary, metadata={"format": "pt"})
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(getattr(base_model.config, "_name_or_path", "")),
    ).to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    write_text(folder / _CONFIG, json.dumps(plain, indent=2, default=str) + "\n")


def read_settings(directory: Path) -> LoraSettings | None:
    """The settings of a saved LoRA; None where the adapter folder has none."""
    path = directory / FOLDER / _CONFIG
    if not path.exists():
        return None
    try:
        values = read_json(path, _Config, REMEDY)
        settings = LoraSettings(
            values["r"], values["lora_alpha"], values["lora_dropout"], sorted(values["target_modules"])
        )
    except (DataError, ConfigError) as error:
        raise AdapterError(str(error) if isinstance(error, DataError) else f"{path}: {error}. {REMEDY}") from None
    # Before modules of that rank take memory.
    stored = stored_shapes(path.with_name(_WEIGHTS))
    ranks = {shape[0] for name, shape in stored.items() if ".lora_A." in name and shape}
    if ranks != {settings.rank}:
        raise AdapterError(
            f"{path} says that its rank is {settings.rank}, the tensors beside it have {sorted(ranks)}; save the "
            "adapter again"
        )
    return settings


def stored_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of a safetensors file's tensors, from its header. Raises AdapterError where it can't be read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing; expected a folder written by TitansModel.save_pretrained") from None
    except Exception as error:  # safetensors' own, and those of the system
        raise AdapterError(f"{path} is damaged ({error}); save the adapter again") from error


def load_tensors(base_model: nn.Module, directory: Path) -> None:
    """Fill injected LoRA modules from a saved folder. Raises AdapterError where file and model do not fit."""
    path = directory / FOLDER / _WEIGHTS
    values = load_file(path)
    own = {_PREFIX + n.replace(".default.", "."): p for n, p in parameters(base_model)}
    wrong = [n for n in own.keys() ^ values.keys() or {n for n in own if own[n].shape != values[n].shape}]
    if wrong:
        raise AdapterError(f"{path} does not fit this base model: see {sorted(wrong)[0]}; load the base model it names")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])
