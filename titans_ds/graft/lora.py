"""Low-rank adapters on the base model, through PEFT, beside the memory.

PEFT's modules are put into the base model in place; they rename what PEFT renames (`q_proj.weight` becomes
`q_proj.base_layer.weight`). On disk they are an ordinary PEFT folder, which PEFT loads without this project.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from titans_ds.config import LoraSettings
from titans_ds.errors import AdapterError, ConfigError

FOLDER = "lora"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what PEFT's own folders carry before the base model's names


def inject(base_model: nn.Module, settings: LoraSettings) -> None:
    """Put LoRA modules into `base_model`; everything but them is frozen.

    Raises:
        ConfigError: a target matches no linear module; lists the names there are.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = sorted({n.rsplit(".", 1)[-1] for n, m in base_model.named_modules() if isinstance(m, nn.Linear)})
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


def parameters(base_model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """LoRA's parameters by their name in the base model."""
    for name, parameter in base_model.named_parameters():
        if ".lora_" in name:
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
    folder.mkdir(parents=True, exist_ok=True)
    values = {n: p.detach() for n, p in parameters(base_model)} | (state_dict or {})
    # PEFT's files leave the adapter's name out of the parameter names.
    named = {_PREFIX + n.replace(".default.", "."): t.detach().cpu().contiguous().clone() for n, t in values.items()}
    save_file(named, folder / (_WEIGHTS + ".part"), metadata={"format": "pt"})
    os.replace(folder / (_WEIGHTS + ".part"), folder / _WEIGHTS)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(getattr(base_model.config, "_name_or_path", "")),
    ).to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    (folder / (_CONFIG + ".part")).write_text(json.dumps(plain, indent=2, default=str) + "\n")
    os.replace(folder / (_CONFIG + ".part"), folder / _CONFIG)


def read_settings(directory: Path) -> LoraSettings | None:
    """The settings of a saved LoRA; None where the adapter folder has none."""
    path = directory / FOLDER / _CONFIG
    if not path.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        return LoraSettings(
            rank=values["r"],
            alpha=float(values["lora_alpha"]),
            dropout=float(values["lora_dropout"]),
            targets=sorted(values["target_modules"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} is not a LoRA configuration of PEFT ({error!r}); save the adapter again") from error


def load_tensors(base_model: nn.Module, directory: Path) -> None:
    """Fill injected LoRA modules from a saved folder. Raises AdapterError where file and model do not fit."""
    path = directory / FOLDER / _WEIGHTS
    try:
        values = load_file(path)
    except Exception as error:
        raise AdapterError(f"{path} is missing or damaged ({error}); save the adapter again") from error
    own = {_PREFIX + n.replace(".default.", "."): p for n, p in parameters(base_model)}
    wrong = [n for n in own.keys() ^ values.keys() or {n for n in own if own[n].shape != values[n].shape}]
    if wrong:
        raise AdapterError(f"{path} does not fit this base model: see {sorted(wrong)[0]}; load the base model it names")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])
