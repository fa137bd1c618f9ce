"""Adapters on disk: titans_config.json, titans_memory.safetensors, a model card, and lora/ in PEFT's format.

The tensors are the graft's whole state, learned parameters and frozen projections alike, so that an adapter means the
same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typing_extensions import NotRequired, TypedDict

from titans_ds.config import GraftConfig
from titans_ds.errors import AdapterError, DataError, reason_of
from titans_ds.files import Kind, atomic_file, atomic_folder, write_json, write_text
from titans_ds.graft import families, hub, quantized
from titans_ds.graft import lora as lora_adapters
from titans_ds.graft.hub import Provenance
from titans_ds.graft.injection import GraftedMemory
from titans_ds.graft.prefix import PrefixMemory
from titans_ds.memory.prefix import PrefixConfig
from titans_ds.reading import read_json, strict_record
from titans_ds.validation import shown

if TYPE_CHECKING:
    from titans_ds.graft.titans_model import TitansModel

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "titans_config.json", "titans_memory.safetensors", "README.md"
ADAPTER = Kind("an adapter", CONFIG_FILE, rb'"library": "titans-ds"')
_OWN = (CONFIG_FILE, WEIGHTS_FILE, lora_adapters.FOLDER)
_FORMERLY = {"adapter_config.json": CONFIG_FILE, "adapter_model.safetensors": WEIGHTS_FILE}  # names that PEFT has, too
_FORMAT = 2
_SHAPE_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


@strict_record
class _Config(TypedDict):
    graft: dict[str, Any]
    base_model: dict[str, Any]
    provenance: NotRequired[Provenance]


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
    """Write the adapter folder, whole or not at all.

    Args:
        model: the grafted model.
        directory: absent, empty, or an adapter's, which is replaced. Other files that it holds stay in it, also a
            README.md that has no longer the card's last line.
        state_dict: whole tensors gathered from the ranks, in place of the model's own: the graft's by adapter name,
            LoRA's by name in the base model. May leave out what is not partitioned.

    Raises:
        OutputError: the directory holds something else, or can't be written; it is then as before.
    """
    own = (*_OWN, CARD_FILE) if hub.is_our_card(Path(directory) / CARD_FILE) else _OWN
    with atomic_folder(directory, ADAPTER, own) as folder:
        write(model, folder, state_dict)


def write(model: TitansModel, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the files of an adapter into a folder, one by one; see `save`. A card of somebody else's stays."""
    gathered = state_dict or {}
    if model.lora is not None:
        lora_adapters.save(model.base_model, model.lora, folder, {n: t for n, t in gathered.items() if ".lora_" in n})
    values = {**tensors(model), **{n: t for n, t in gathered.items() if ".lora_" not in n}}
    whole = {n: t.detach().cpu().contiguous().clone() for n, t in values.items()}
    with atomic_file(folder / WEIGHTS_FILE) as temporary:
        save_file(whole, temporary, metadata={"format": "pt"})
    base = _describe_base(model.base_model)
    config = {"format": _FORMAT, "library": "titans-ds", "base_model": base, "graft": _graft_settings(model)}
    if model.provenance:
        config["provenance"] = model.provenance
    if not (folder / CARD_FILE).exists() or hub.is_our_card(folder / CARD_FILE):
        write_text(folder / CARD_FILE, hub.card(model, base))
    write_json(folder / CONFIG_FILE, config)


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
    stored = lora_adapters.stored_shapes(folder / WEIGHTS_FILE)
    memory = settings["graft"].get("memory")
    depth = memory.get("depth") if isinstance(memory, dict) else None
    if isinstance(depth, int) and depth > len(stored):  # each matrix of f_W is a tensor of the file
        raise _misfit(folder, f"memory.depth is {depth}, with {len(stored)} tensors")
    config = GraftConfig.from_dict(settings["graft"], drop_unknown=True)
    _check_shapes(config, base_model, stored, folder)
    lora = lora_adapters.read_settings(folder)
    model = TitansModel(base_model, config, lora=lora)
    if lora is not None:
        lora_adapters.load_tensors(base_model, folder)
    _load_tensors(model, folder / WEIGHTS_FILE)
    model.provenance = settings.get("provenance", {})
    return model


def load_into(model: TitansModel, directory: str | Path) -> None:
    """Take over the tensors of a saved adapter, and its LoRA, into a model that has the same settings.

    Raises:
        AdapterError: a file is missing or damaged, or the adapter has other settings than the model.
    """
    folder = Path(directory)
    settings = _read_config(folder)
    _check_base(settings["base_model"], model.base_model, folder)
    stored = lora_adapters.stored_shapes(folder / WEIGHTS_FILE)
    own = {name: list(tensor.shape) for name, tensor in tensors(model).items()}
    if settings["graft"] != json.loads(json.dumps(_graft_settings(model))) or stored != own:
        raise AdapterError(
            f"the adapter in {folder} was made with other settings than this model's graft; attach with those under "
            f"`graft` in {folder / CONFIG_FILE}, or load it with TitansModel.from_pretrained"
        )
    if model.lora is not None:
        lora_adapters.load_tensors(model.base_model, folder)
    _load_tensors(model, folder / WEIGHTS_FILE)


def load_base(name: str | Path, **kwargs: Any) -> nn.Module:
    """A causal LM from a path or hub id: safetensors only, no remote code, unless `kwargs` say otherwise.

    Raises AdapterError where it can't be loaded.
    """
    from transformers import AutoModelForCausalLM

    defaults = {"trust_remote_code": False, "use_safetensors": True}
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(str(name), **(defaults | kwargs))
    except Exception as error:  # cut or garbled weights, a configuration of another kind: errors of any class
        raise AdapterError(
            f"the base model {name} can't be loaded ({reason_of(error)}); give a causal LM's folder or id"
        ) from error
    return model


def _graft_settings(model: TitansModel) -> dict[str, Any]:
    """The configuration with its layers and sizes spelt out."""
    return model.graft.to_dict()


def _describe_base(base_model: nn.Module) -> dict[str, Any]:
    config: Any = base_model.config
    known = {key: getattr(config, key, None) for key in _SHAPE_KEYS}
    # Nothing of the memory depends on how the base's weights are stored: said, and not compared.
    return {
        "name_or_path": str(getattr(config, "_name_or_path", "")),
        **known,
        "quantization": quantized.describe(config),
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    earlier = folder / "adapter_config.json"
    if not path.exists() and earlier.is_file():
        if ADAPTER.pattern in earlier.read_bytes()[: 1 << 16]:
            names = " and ".join(f"{old} to {new}" for old, new in _FORMERLY.items())
            raise AdapterError(f"{folder} is an adapter with file names of an earlier version; rename {names}")
        raise AdapterError(
            f"{folder} is an adapter of PEFT, with no memory; load it by peft.PeftModel.from_pretrained, and graft a "
            "memory on that by titans_ds.attach"
        )
    try:
        settings = dict(read_json(path, _Config, lora_adapters.REMEDY))
    except DataError as error:
        raise AdapterError(str(error)) from None
    if settings.get("format") != _FORMAT:
        raise AdapterError(
            f"{path} has format {shown(settings.get('format'))}; this version reads format {_FORMAT}, whose memories "
            "read and are set otherwise. Train it again: launch/train.py with the settings that the file names under "
            "`graft`, which now stand under graft.memory with a `preset`"
        )
    return settings


def _check_base(expected: dict[str, Any], base_model: nn.Module, folder: Path) -> None:
    actual = _describe_base(base_model)
    differs = [key for key in _SHAPE_KEYS if actual[key] != expected.get(key)]
    if differs == ["vocab_size"]:  # no tensor of an adapter depends on it; with another tokenizer it makes no sense
        sizes = f"{shown(expected.get('vocab_size'))} tokens, this one has {actual['vocab_size']}"
        warnings.warn(f"the adapter in {folder} was made on a vocabulary of {sizes}; is it resized?", stacklevel=4)
        differs = []
    wrong = [f"{key} {actual[key]} instead of {shown(expected.get(key))}" for key in differs]
    name = str(expected.get("name_or_path") or "unnamed")[:200]
    if wrong:
        raise AdapterError(
            f"the adapter in {folder} was made for another base model ({name}): "
            f"this one has {', '.join(wrong)}. Load the base model that it names"
        )


def _check_shapes(config: GraftConfig, base_model: nn.Module, stored: dict[str, list[int]], folder: Path) -> None:
    """Compare the header of the weights with what the configuration asks for, before any of it takes memory."""
    width = families.text_width(base_model)
    layers = [mixer.index for mixer in families.select_mixers(base_model, config.layers)]
    try:
        with FakeTensorMode():  # shapes alone: no memory, no arithmetic
            if isinstance(config.memory, PrefixConfig):
                wanted = _shapes("prefix", PrefixMemory(width, config.memory))
            else:
                one = GraftedMemory(width, config, layers[0])
                wanted = {name: shape for index in layers for name, shape in _shapes(f"layers.{index}", one).items()}
    except RuntimeError as error:  # more elements than an integer counts
        raise _misfit(folder, str(error)) from error
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} is unknown" for name in stored if name not in wanted]
    problems += [
        f"{name} has shape {stored[name]} instead of {shape}"
        for name, shape in wanted.items()
        if stored.get(name, shape) != shape
    ]
    if problems:
        raise _misfit(folder, "; ".join(problems[:3]))


def _misfit(folder: Path, problem: str) -> AdapterError:
    return AdapterError(
        f"{folder / WEIGHTS_FILE} does not fit its own configuration: {problem}; save the adapter again"
    )


def _shapes(start: str, module: nn.Module) -> dict[str, list[int]]:
    return {f"{start}.{name}": list(tensor.shape) for name, tensor in module.state_dict().items()}


def _load_tensors(model: TitansModel, path: Path) -> None:
    values = load_file(path)
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            tensor.copy_(values[name])
