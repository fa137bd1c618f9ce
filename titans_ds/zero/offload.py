"""Offload to CPU and NVMe: what a shipped configuration leaves to this machine."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from titans_ds.errors import ConfigError

NVME_DIR = "TITANS_NVME_DIR"


def place_nvme(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every `"nvme_path": "auto"` replaced by the folder that TITANS_NVME_DIR names.

    Raises:
        ConfigError: it is not set, or a path is no folder that can be written to.
    """
    placed = copy.deepcopy(config)
    for name in ("offload_optimizer", "offload_param"):
        section = placed.get("zero_optimization", {}).get(name) or {}
        if section.get("device") == "nvme":
            section["nvme_path"] = _folder(section.get("nvme_path", "auto"), name)
    return placed


def check_checkpointable(config: dict[str, Any], interval: int, resume: str) -> None:
    """Raise ConfigError where the optimizer is on NVMe, and a checkpoint is to be written or to be gone on from.

    DeepSpeed 0.19 neither saves nor restores its state there.
    """
    section = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if section.get("device") == "nvme" and (interval or resume != "none"):
        raise ConfigError(
            "DeepSpeed does not restore an optimizer that is offloaded to NVMe: a resumed run would go wrong. Offload "
            "the optimizer to cpu (ds_configs/zero3_offload_nvme_params.json keeps the parameters on NVMe), or set "
            "checkpoint.interval to 0 and run.resume to none"
        )


def _folder(path: str, section: str) -> str:
    chosen = os.environ.get(NVME_DIR, "") if path == "auto" else path
    if not chosen:
        raise ConfigError(f"offload to NVMe needs a folder on the drive; set the environment variable {NVME_DIR} to it")
    if not (Path(chosen).is_dir() and os.access(chosen, os.W_OK)):
        raise ConfigError(f"zero_optimization.{section}: {chosen} is no folder that can be written to; make it first")
    return chosen
