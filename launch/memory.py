"""Before a base model is loaded onto a GPU: will the run fit?"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from titans_ds.training import ranks
from titans_ds.training.build import unloadable
from titans_ds.training.fits import Footprint, check_fits
from titans_ds.training.settings import TrainConfig
from titans_ds.zero.config import zero_stage


def check_memory(config: TrainConfig, settings: dict[str, Any], device: torch.device) -> None:
    """Raise ConfigError, naming what would fit, where the estimate is above the GPU's memory; free on other devices."""
    if device.type == "cuda" and config.run.check_memory:
        check_fits(
            footprint(config, settings, ranks.world_size()), torch.cuda.get_device_properties(device).total_memory
        )


def footprint(config: TrainConfig, settings: dict[str, Any], world_size: int) -> Footprint:
    """What the run's settings say about its size. Only the base model's configuration is read.

    Args:
        config: of the run.
        settings: DeepSpeed's configuration; empty for plain torch.
        world_size: number of ranks.
    """
    base = _base_config(config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(base)
    parameters, zero = sum(p.numel() for p in model.parameters()), settings.get("zero_optimization", {})
    trained = parameters if config.model.trainable == "all" else _graft_size(config, base)
    return Footprint(
        parameters=parameters,
        trained=trained,
        layers=base.num_hidden_layers,
        hidden=base.hidden_size,
        vocab=base.vocab_size,
        rows=max(config.data.num_lanes // world_size, 1),
        segment_tokens=config.segment_tokens,
        segments_in_graph=config.training.segments_in_graph,
        loss_chunk_tokens=config.training.loss_chunk_tokens,
        bytes_per_value=2 if config.model.dtype == "bfloat16" else 4,
        checkpointing=config.training.checkpointing,
        offload_activations=config.training.offload_activations,
        stage=zero_stage(settings),
        ranks=world_size,
        offload_optimizer=_offloaded(zero, "offload_optimizer"),
        offload_parameters=_offloaded(zero, "offload_param"),
        layer_graphs=config.training.layer_graphs,
    )


def _base_config(config: TrainConfig) -> Any:
    if config.model.architecture is not None:
        return transformers.AutoConfig.for_model(**config.model.architecture).get_text_config()
    trust = config.model.trust_remote_code
    try:
        return transformers.AutoConfig.from_pretrained(config.model.base, trust_remote_code=trust).get_text_config()
    except Exception as error:
        raise unloadable(config.model, error) from error


def _graft_size(config: TrainConfig, base: Any) -> int:
    """Trained parameters of memories on every layer: key, value, query and output maps, and two fast matrices."""
    if config.graft is None:
        return 0
    if config.graft.injection == "prefix":
        return int(config.graft.prefix.tokens * base.hidden_size)
    dim = config.graft.memory.dim
    return int(base.num_hidden_layers * (4 * base.hidden_size * dim + 2 * dim * dim))


def _offloaded(zero: dict[str, Any], name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") != "none"
