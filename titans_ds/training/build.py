"""The model of a run: base, graft, what is trained, and how it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from titans_ds.errors import ConfigError, TitansError
from titans_ds.files import Kind, atomic_folder
from titans_ds.graft import lora, quantized
from titans_ds.graft.hub import Provenance
from titans_ds.graft.placement import dtype_of
from titans_ds.graft.titans_model import TitansModel
from titans_ds.reading import read_metrics
from titans_ds.training.data.segments import Separators
from titans_ds.training.engine import Engine
from titans_ds.training.module import PlainModel, TrainingModule
from titans_ds.training.settings import ModelSettings, TrainConfig
from titans_ds.training.speed.compiled import compile_parts
from titans_ds.training.speed.layer_graphs import graph_layers

MODEL = Kind("a base model", "config.json", rb'"model_type"')
_BASE = "model.base_model."  # what names of the base's parameters begin with in the training module
_SEPARATORS = ("<|repo_name|>", "<|file_sep|>")


def load_base(settings: ModelSettings, seed: int, vocab_size: int) -> nn.Module:
    """The base model: pretrained, or of random weights.

    Args:
        settings: section model.
        seed: of random weights.
        vocab_size: the corpus's; an architecture that names none takes it.

    Raises:
        ConfigError: it can't be loaded, or its architecture is not one of transformers'.
    """
    try:
        return _random(settings, seed, vocab_size) if settings.base is None else _pretrained(settings)
    except TitansError:
        raise
    except Exception as error:
        raise unloadable(settings, error) from error


def unloadable(settings: ModelSettings, error: Exception) -> ConfigError:
    """What to say where loading the base model, or its configuration, ended in this error."""
    base = settings.base
    # A hub id has one slash at most, and starts with a name; transformers would only say that this is none.
    is_path = base is not None and (base.startswith((".", "/", "~")) or base.count("/") > 1)
    missing = base is not None and is_path and not Path(base).exists()
    reason = "there is no such folder; give one, or a hub id" if missing else _first_line(error)
    return ConfigError(f"the base model {base or settings.architecture} can't be loaded: {reason}")


def _pretrained(settings: ModelSettings) -> nn.Module:
    from transformers import AutoModelForCausalLM

    form = quantized.settings_of(settings.quantization, settings.quantization_options or {}, settings.dtype)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        settings.base,
        **({} if form is None else {"quantization_config": form}),
        dtype=getattr(torch, settings.dtype),
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
        use_safetensors=None if settings.allow_pickle else True,
    )
    return model


def _random(settings: ModelSettings, seed: int, vocab_size: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{"vocab_size": vocab_size, **cast(dict[str, Any], settings.architecture)})
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=settings.attn_implementation)
    return model.to(getattr(torch, settings.dtype))


def vocabulary_of(base: nn.Module) -> int:
    """Rows of the embedding, as the model's configuration says."""
    return int(cast(Any, base.config).get_text_config().vocab_size)


def make_module(base: nn.Module, config: TrainConfig) -> TrainingModule:
    """Graft, freeze and wrap a base model as the configuration says.

    Raises:
        UnsupportedModelError, ConfigError: see TitansModel.
    """
    train_base = config.model.trainable == "all"
    torch.manual_seed(config.training.seed)
    model = _graft(base, config, train_base)
    compile_parts(base, config.training.compile)
    if config.training.layer_graphs:
        graph_layers(base)
    if config.training.checkpointing:
        enable_checkpointing(base)
    return TrainingModule(model, config.training.loss_chunk_tokens, config.training.loss_kernel).train()


def _graft(base: nn.Module, config: TrainConfig, train_base: bool) -> TitansModel | PlainModel:
    base.requires_grad_(train_base)
    if config.graft is None:
        return PlainModel(base)
    dtype = dtype_of(base)
    model = TitansModel(base, config.graft, freeze_base=not train_base, lora=config.lora)
    if config.training.order == "first":  # these would get no gradient, and optimizers and ZeRO expect one
        for _, parameter in model.write_only_parameters():
            parameter.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad and not train_base:
            parameter.data = parameter.data.to(dtype)  # as DeepSpeed casts the module; optimizer state stays fp32
    for module in model.grafted_modules().values():
        module.to(dtype)
    model.use_memory_graphs(config.training.memory_graphs)
    return model


def enable_checkpointing(base: nn.Module) -> None:
    """Recompute each layer's activations in backward, non-reentrant."""
    newer = getattr(base, "activation_checkpointing_enable", None)  # its name in newer transformers
    (newer or cast(Any, base).gradient_checkpointing_enable)({"use_reentrant": False})


def load_tokenizer(settings: ModelSettings) -> Any | None:
    """The model's tokenizer, or None where the settings name none. Raises ConfigError where it can't be loaded."""
    name = settings.tokenizer or settings.base
    if name is None:
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if Path(name).suffix == ".json":
            return PreTrainedTokenizerFast(tokenizer_file=name)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
    except Exception as error:
        if settings.tokenizer is None:
            return None  # a base without tokenizer files: a packed corpus does without
        raise ConfigError(f"the tokenizer {name} can't be loaded: {_first_line(error)}") from error


def separators_of(tokenizer: Any | None) -> Separators:
    """The tokens that lead a repository and a file, where the tokenizer has them."""
    if tokenizer is None:
        return Separators()
    vocabulary = tokenizer.get_vocab()
    repo, file = (vocabulary.get(token) for token in _SEPARATORS)
    return Separators(repo, file)


def trainable_names(module: nn.Module) -> list[str]:
    """Names of the parameters that train, in order; the same on every rank."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def gate_names(module: TrainingModule) -> dict[str, str]:
    """Layer index -> name of its gate's parameter in the module."""
    if not isinstance(module.model, TitansModel):
        return {}
    wanted = {id(gate): str(layer) for layer, gate in module.model.gate_parameters().items()}
    return {wanted[id(p)]: name for name, p in module.named_parameters() if id(p) in wanted}


def save_trained(engine: Engine, folder: Path, config: TrainConfig, tokenizer: Any | None, writes: bool) -> None:
    """Write adapter/ (the graft) and, where the base was trained, model/. A collective; `writes` on rank 0.

    Raises OutputError on the rank that writes, once no other rank waits for it any more.
    """
    model = engine.module.model
    adapter: dict[str, str] = {}
    if isinstance(model, TitansModel):
        names = {id(p): n for n, p in engine.module.named_parameters()}
        adapter = {own: names[id(p)] for own, p in model.titans_parameters()}
        adapter |= {own: names[id(p)] for own, p in lora.parameters(model.base_model)}
    base = []
    if config.model.trainable == "all":
        base = [n for n, _ in engine.module.named_parameters() if n.startswith(_BASE) and ".titans." not in n]
    # All collectives come before the first file: a rank that can't write must not leave the others waiting.
    grafted, trained = (engine.parameters(names) if names else {} for names in (list(adapter.values()), base))
    if writes and isinstance(model, TitansModel):
        model.provenance = _provenance(config, folder)
        model.save_pretrained(folder / "adapter", {own: grafted[name] for own, name in adapter.items()})
    if writes and base:
        _save_base(model, trained, folder / "model", getattr(torch, config.model.dtype), tokenizer)


def _provenance(config: TrainConfig, run: Path) -> Provenance:
    """What the adapter of a run says of its training: data, steps, and the last evaluation, where there was one."""
    told = Provenance(data=Path(config.data.corpus).name, split=config.data.train_split, steps=config.training.steps)
    lines = read_metrics(run) if (run / "metrics.jsonl").is_file() else []  # an exported adapter has none
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    if evaluations:
        last = evaluations[-1]
        told["repositories"] = last["repositories"]
        told["losses"], told["minus_memory"] = last["losses"], last["minus_memory"]
    return told


def _save_base(
    model: TitansModel | PlainModel, whole: dict[str, Tensor], folder: Path, dtype: torch.dtype, tokenizer: Any | None
) -> None:
    base = cast(Any, model.base_model)
    buffers = {n: b.detach().cpu() for n, b in base.named_buffers() if n in _persistent(base) and ".titans." not in n}
    state: dict[str, Tensor] = {n.removeprefix(_BASE): t.to(dtype) for n, t in whole.items()}
    with atomic_folder(folder, MODEL) as temporary:
        base.save_pretrained(temporary, state_dict={**state, **buffers})
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def _persistent(module: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, child in module.named_modules()
        for name in child._buffers
        if name not in child._non_persistent_buffers_set
    }


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
