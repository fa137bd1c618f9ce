"""Adapters on disk: adapter_config.json, adapter_model.safetensors, and a model card.

The tensors are the graft's whole state, learned parameters and frozen projections alike, so that an adapter means the
same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from titans_ds.config import GraftConfig
from titans_ds.errors import AdapterError
from titans_ds.graft import lora as lora_adapters
from titans_ds.zero.gathering import whole_numel

if TYPE_CHECKING:
    from titans_ds.graft.titans_model import TitansModel

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
_FORMAT = 1
_SHAPE_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


def tensors(model: TitansModel) -> dict[str, Tensor]:
    """The graft's state by adapter name: `layers.<index>.<name>`, or `prefix.<name>`."""
    return {
        f"{start}.{name}": tensor.detach()
        for start, module in model.grafted_modules().items()
        for name, tensor in module.state_dict().items()
    }


def fingerprint(model: TitansModel) -> str:
    """16 hex digits of configuration and tensors: states written by one adapter are noise to another."""
    digest = hashlib.sha256(json.dumps(_graft_settings(model), sort_keys=True).encode())
    for name, tensor in sorted(tensors(model).items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save(model: TitansModel, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the adapter folder, each file under a temporary name first.

    Args:
        model: the grafted model.
        directory: made where it is missing.
        state_dict: whole tensors gathered from the ranks, in place of the model's own: the graft's by adapter name,
            LoRA's by name in the base model. May leave out what is not partitioned.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    gathered = state_dict or {}
    if model.lora is not None:
        lora_adapters.save(model.base_model, model.lora, folder, {n: t for n, t in gathered.items() if ".lora_" in n})
    values = {**tensors(model), **{n: t for n, t in gathered.items() if ".lora_" not in n}}
    weights = folder / (WEIGHTS_FILE + ".part")
    save_file({n: t.detach().cpu().contiguous().clone() for n, t in values.items()}, weights, metadata={"format": "pt"})
    os.replace(weights, folder / WEIGHTS_FILE)
    base = _describe_base(model.base_model)
    config = {"format": _FORMAT, "library": "titans-ds", "base_model": base, "graft": _graft_settings(model)}
    _write_text(folder / CARD_FILE, _card(model, base))
    _write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def load(base: nn.Module | str | Path, directory: str | Path, **kwargs: Any) -> TitansModel:
    """Graft a saved adapter.

    Args:
        base: the model, or its path or hub id.
        directory: the adapter folder.
        kwargs: for AutoModelForCausalLM.from_pretrained, where `base` is a path or id.

    Raises:
        AdapterError: a file is missing or damaged, or the adapter was made for another base model.
    """
    from titans_ds.graft.titans_model import TitansModel

    folder = Path(directory)
    settings = _read_config(folder)
    base_model = base if isinstance(base, nn.Module) else load_base(base, **kwargs)
    _check_base(settings["base_model"], base_model, folder)
    lora = lora_adapters.read_settings(folder)
    model = TitansModel(base_model, GraftConfig.from_dict(settings["graft"], drop_unknown=True), lora=lora)
    if lora is not None:
        lora_adapters.load_tensors(base_model, folder)
    _load_tensors(model, folder / WEIGHTS_FILE)
    return model


def load_base(name: str | Path, **kwargs: Any) -> nn.Module:
    """A causal LM from a path or hub id: safetensors only, no remote code, unless `kwargs` say otherwise."""
    from transformers import AutoModelForCausalLM

    defaults = {"trust_remote_code": False, "use_safetensors": True}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(str(name), **(defaults | kwargs))
    return model


def _graft_settings(model: TitansModel) -> dict[str, Any]:
    """The configuration with its layers spelt out."""
    return {**model.config.to_dict(), "layers": model.layer_indices}


def _describe_base(base_model: nn.Module) -> dict[str, Any]:
    config: Any = base_model.config
    known = {key: getattr(config, key, None) for key in _SHAPE_KEYS}
    return {"name_or_path": str(getattr(config, "_name_or_path", "")), **known}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing; expected a folder written by TitansModel.save_pretrained") from None
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON ({error}); save the adapter again") from error
    if "graft" not in settings or "base_model" not in settings:
        found = ", ".join(sorted(settings))
        raise AdapterError(f"{path} is not a titans-ds adapter: expected the keys graft and base_model, found {found}")
    if settings.get("format") != _FORMAT:
        raise AdapterError(f"{path} has format {settings.get('format')}; this version reads format {_FORMAT}")
    return settings


def _check_base(expected: dict[str, Any], base_model: nn.Module, folder: Path) -> None:
    actual = _describe_base(base_model)
    wrong = [f"{k} {actual[k]} instead of {expected.get(k)}" for k in _SHAPE_KEYS if actual[k] != expected.get(k)]
    if wrong:
        raise AdapterError(
            f"the adapter in {folder} was made for another base model ({expected.get('name_or_path') or 'unnamed'}): "
            f"this one has {', '.join(wrong)}. Load the base model that it names"
        )


def _load_tensors(model: TitansModel, path: Path) -> None:
    try:
        values = load_file(path)
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing; expected a folder written by TitansModel.save_pretrained") from None
    except Exception as error:
        raise AdapterError(f"{path} is damaged ({error}); save the adapter again") from error
    own = tensors(model)
    problems = [f"{n} is missing" for n in own if n not in values]
    problems += [f"{n} is unknown" for n in values if n not in own]
    problems += [
        f"{n} has shape {list(values[n].shape)} instead of {list(t.shape)}"
        for n, t in own.items()
        if n in values and values[n].shape != t.shape
    ]
    if problems:
        raise AdapterError(
            f"{path} does not fit its own configuration: {'; '.join(problems[:3])}; save the adapter again"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(values[name])


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    os.replace(partial, path)


def _card(model: TitansModel, base: dict[str, Any]) -> str:
    graft = model.config
    learned = sum(whole_numel(p) for _, p in model.titans_parameters())
    name = base["name_or_path"] or "PATH_OF_THE_BASE_MODEL"
    return f"""---
library_name: titans-ds
tags: [titans, test-time-training, memory]
---
# Test-time memory for {base["name_or_path"] or "a " + str(base["model_type"]) + " model"}

A neural memory (Titans, TTT) grafted onto layers {model.layer_indices} of a {base["model_type"]} model with
{base["num_hidden_layers"]} layers of width {base["hidden_size"]}. Injection: {graft.injection}; gate floor
{graft.gate_floor} ({graft.gate_floor_mode}). {_describe_memory(graft)} Learned parameters: {learned:,}.

```python
import titans_ds

model = titans_ds.TitansModel.from_pretrained("{name}", "PATH_OF_THIS_FOLDER")
with model.memory_session(batch_size=1) as memory:
    model.prime(snippet_ids, memory)
    model.generate(prompt_ids, memory=memory)
```

Compare every result with `model.disable_memory()` and with a memory primed on another repository before you believe it.
"""


def _describe_memory(graft: GraftConfig) -> str:
    if graft.injection == "prefix":
        p = graft.prefix
        return f"Memory: {p.tokens} prefix vectors, {p.inner_steps} inner step(s) of size {p.step_size}."
    memory = graft.memory
    return (
        f"Memory: dim {memory.dim}, depth {memory.depth}, {memory.write} writes,\n"
        f"{memory.inner_steps} inner step(s) of size {memory.step_size}."
    )
