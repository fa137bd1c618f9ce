"""DeepSpeed's JSON configuration: read, checked, and completed from the run's own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from titans_ds.errors import ConfigError
from titans_ds.reading import read_settings
from titans_ds.validation import nearest, shown
from titans_ds.zero.engine import import_deepspeed

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
_KNOWN = (
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op",
    "disable_allgather", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "log_level",
)  # fmt: skip
# Sections and their keys; of those without any here DeepSpeed checks the keys itself.
_SECTIONS: dict[str, tuple[str, ...]] = {
    "zero_optimization": (),
    "timers": (),
    "compile": (),
    "aio": (
        "block_size", "queue_depth", "intra_op_parallelism", "thread_count", "single_submit", "overlap_events",
        "use_gds",
    ),
    "checkpoint": ("tag_validation", "load_universal", "use_node_local_storage", "parallel_write", "writer"),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "comms_logger": ("enabled", "verbose", "prof_all", "debug", "prof_ops"),
    "flops_profiler": (
        "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file",
    ),
}  # fmt: skip


def read_config(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed configuration file.

    Raises:
        DataError: it is missing, or no JSON object, or has a key twice.
        ConfigError: it has an unknown key, or sets what the run's own settings decide.
    """
    file = Path(path)
    config = read_settings(file, "A DeepSpeed configuration is a JSON object, as those in ds_configs are.")
    for key, value in config.items():
        if key in _REFUSED:
            raise ConfigError(f"{file} sets {key!r}, but {_REFUSED[key]}; take it out of the file")
        if key not in (*_OWNED, *_KNOWN, *_SECTIONS):
            near = nearest(key, (*_KNOWN, *_SECTIONS))
            raise ConfigError(f"{file} sets {shown(key)}, which is nothing that a run takes from this file{near}")
        if value is None or (key in _SECTIONS and not isinstance(value, dict)):
            expected = "an object of settings" if key in _SECTIONS else "a value"
            raise ConfigError(
                f"{file} sets {key!r} to {json.dumps(value)[:60]}; expected {expected}. Leave it out for "
                "DeepSpeed's default"
            )
        for name in _SECTIONS.get(key, ()) and value:
            if name not in _SECTIONS[key]:
                raise ConfigError(f"{file} sets {key}.{name}, which is unknown{nearest(name, _SECTIONS[key])}")
    _check_zero(config.get("zero_optimization", {}), file)
    return config


def _check_zero(section: dict[str, Any], file: Path) -> None:
    """Let DeepSpeed check the section that it knows, and put its first complaint into one line."""
    import_deepspeed()
    from deepspeed.runtime.zero import config as deepspeed_config
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        (): deepspeed_config.DeepSpeedZeroConfig,
        ("offload_optimizer",): DeepSpeedZeroOffloadOptimizerConfig,
        ("offload_param",): DeepSpeedZeroOffloadParamConfig,
    }
    try:
        models[()](**section)
    except ValueError as error:
        complaints: list[dict[str, Any]] = getattr(error, "errors", list)()  # pydantic's
        if not complaints:
            raise ConfigError(f"{file}: zero_optimization can't be used: {str(error)[:300]}") from error
        first = complaints[0]
        name = ".".join(map(str, ("zero_optimization", *first["loc"])))
        if first["type"] != "extra_forbidden":
            raise ConfigError(f"{file} sets {name} to {json.dumps(first['input'])[:60]}: {first['msg']}") from error
        fields = models[tuple(first["loc"][:-1])].model_fields
        near = nearest(first["loc"][-1], [field.alias or own for own, field in fields.items()])
        raise ConfigError(f"{file} sets {name}, which DeepSpeed does not know{near}") from error


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage, 0 to 3. Raises ConfigError for any other value."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage is {shown(stage)}; it must be 0, 1, 2 or 3")
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
                f"the DeepSpeed configuration sets {key} to {shown(config[key])}, the run's settings make "
                f'it {ours[key]}; take it out, or write "auto"'
            )
    defaults = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
    }
    if recomputed and zero_stage(config) == 3:
        config = {**config, "zero_optimization": {"memory_efficient_linear": False} | config["zero_optimization"]}
    return {**defaults, **config, **ours, "bf16": {"enabled": bf16}}
