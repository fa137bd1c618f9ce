"""DeepSpeed's JSON configuration: read, checked, and completed from the run's own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from titans_ds.errors import ConfigError

# What the run's settings decide; in the file these may only be absent, "auto", or the same.
_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
)
_REFUSED = {
    "optimizer": "AdamW comes from the section optimizer",
    "scheduler": "warm-up and cosine come from the section optimizer",
    "fp16": "precision comes from model.dtype (float32 or bfloat16)",
    "bf16": "precision comes from model.dtype (float32 or bfloat16)",
    "amp": "precision comes from model.dtype (float32 or bfloat16)",
    "activation_checkpointing": "checkpointing comes from training.checkpointing",
}


def read_config(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed configuration file.

    Raises:
        ConfigError: it is missing, not JSON, or sets what the run's own settings decide.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"the DeepSpeed configuration {file} does not exist; try ds_configs/zero2.json")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"the DeepSpeed configuration {file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"the DeepSpeed configuration {file} must be a JSON object")
    for key, reason in _REFUSED.items():
        if key in config:
            raise ConfigError(f"{file} sets {key!r}, but {reason}; take it out of the file")
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage, 0 to 3. Raises ConfigError for any other value."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    return int(stage)


def complete_config(
    config: dict[str, Any],
    rows: int,
    backwards_per_step: int,
    world_size: int,
    clip: float,
    bf16: bool,
    recomputed: bool = False,
) -> dict[str, Any]:
    """The configuration that goes to deepspeed.initialize.

    Args:
        config: as read.
        rows: lanes of one rank.
        backwards_per_step: backward passes in an optimizer step.
        world_size: number of ranks.
        clip: greatest gradient norm; 0 for none.
        bf16: parameters in bfloat16, optimizer in fp32.
        recomputed: activations are. At stage 3 linear maps may then be PyTorch's own, which hold their gathered weights
            until they go back; DeepSpeed's hold none, and cost a quarter of what stage 3 costs the host.

    Raises:
        ConfigError: the file sets a batch size, accumulation or clipping that differs from the run's settings.
    """
    ours: dict[str, Any] = {
        "train_batch_size": rows * backwards_per_step * world_size,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": backwards_per_step,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
    }
    for key in _OWNED:
        if config.get(key, "auto") not in ("auto", ours[key]):
            raise ConfigError(
                f"the DeepSpeed configuration sets {key} to {config[key]}, the run's settings make it {ours[key]}; "
                'take it out, or write "auto"'
            )
    defaults = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
    }
    if recomputed and zero_stage(config) == 3:
        config = {**config, "zero_optimization": {"memory_efficient_linear": False} | config["zero_optimization"]}
    return {**defaults, **config, **ours, "bf16": {"enabled": bf16}}
