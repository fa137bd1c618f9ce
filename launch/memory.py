"""Before a base model is loaded onto a GPU: will the run fit?"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from titans_ds.graft.quantized import FORMS, bytes_per_weight, describe
from titans_ds.training import ranks
from titans_ds.training.build import unloadable
from titans_ds.training.settings import TrainConfig
from titans_ds.zero.config import zero_stage
from titans_ds.zero.footprint import Model, Setup, check_fits


def check_memory(config: TrainConfig, settings: dict[str, Any], device: torch.device) -> None:
    """Raise ConfigError, naming what would fit, where the estimate is above the GPU's memory; free on other devices."""
    if device.type == "cuda" and config.run.check_memory:
        model, setup = footprint(config, settings, ranks.world_size())
        check_fits(model, setup, torch.cuda.get_device_properties(device).total_memory)


def footprint(config: TrainConfig, settings: dict[str, Any], world_size: int) -> tuple[Model, Setup]:
    """What the run's settings say about its size. Only the base model's configuration is read.

    Args:
        config: of the run.
        settings: DeepSpeed's configuration; empty for plain torch.
        world_size: number of ranks.
    """
    whole = base_config(config)
    base = whole.get_text_config()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(base)
    parameters, zero = sum(p.numel() for p in model.parameters()), settings.get("zero_optimization", {})
    trained = parameters if config.model.trainable == "all" else _graft_size(config, base)
    frozen = config.model.trainable == "memory"
    sizes = Model(
        parameters=parameters,
        trained=trained,
        small=0,
        layers=base.num_hidden_layers,
        hidden=base.hidden_size,
        vocab=base.vocab_size,
        linear=linear_size(model) if frozen else 0,
    )
    stored = FORMS[config.model.quantization][2] if config.model.quantization != "none" else describe(whole)
    setup = Setup(
        stage=zero_stage(settings),
        ranks=world_size,
        value_bytes=2 if config.model.dtype == "bfloat16" else 4,
        lanes=max(config.data.num_lanes // world_size, 1),
        segment_tokens=config.segment_tokens,
        checkpointing=config.training.checkpointing,
        loss_chunk_tokens=config.training.loss_chunk_tokens,
        segments_in_graph=config.training.segments_in_graph,
        layer_graphs=config.training.layer_graphs,
        offload_activations=config.training.offload_activations,
        offload_optimizer=_offloaded(zero, "offload_optimizer"),
        offload_parameters=_offloaded(zero, "offload_param"),
        linear_bytes=0.0 if stored is None else bytes_per_weight(stored),
    )
    return sizes, setup


def linear_size(model: torch.nn.Module) -> int:
    """Weights of a causal LM's linear maps, without its head: what quantisation stores in fewer bits."""
    head = model.get_output_embeddings()
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)


def base_config(config: TrainConfig) -> Any:
    """The base model's configuration, as transformers has it. Raises ConfigError where it can't be read."""
    if config.model.architecture is not None:
        return transformers.AutoConfig.for_model(**config.model.architecture)
    trust = config.model.trust_remote_code
    try:
        return transformers.AutoConfig.from_pretrained(config.model.base, trust_remote_code=trust)
    except Exception as error:
        raise unloadable(config.model, error) from error


def _graft_size(config: TrainConfig, base: Any) -> int:
    """At most: trained key, value, query and output maps on every layer that may have a memory, and two matrices."""
    if config.graft is None:
        return 0
    graft = config.graft.resolved([0], base.hidden_size)
    if graft.is_prefix:
        return int(graft.memory.tokens * base.hidden_size)
    layers, dim = config.graft.layers, graft.memory.dim
    most = {"auto": 4, "attention": base.num_hidden_layers}
    number = len(layers) if isinstance(layers, list) else min(most[layers], base.num_hidden_layers)
    return int(number * (4 * base.hidden_size * dim + 2 * dim * dim))


def _offloaded(zero: dict[str, Any], name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") != "none"
