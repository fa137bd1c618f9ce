"""DeepSpeed's part of a checkpoint: saved without frozen parameters, loaded, and read without an engine."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_ds.errors import CheckpointError
from titans_ds.zero.engine import import_deepspeed
from titans_ds.zero.universal import mended_loading


def save(engine: Any, folder: Path) -> None:
    """Write a DeepSpeed engine's trained parameters and optimizer. A collective.

    Args:
        engine: DeepSpeed's.
        folder: its name is DeepSpeed's tag.

    Raises:
        CheckpointError: this rank can't write its files; the other ranks are not held up.
    """
    recorder = _recorder(engine.checkpoint_engine)
    before = engine.checkpoint_engine, engine._copy_recovery_script
    engine.checkpoint_engine, engine._copy_recovery_script = recorder, lambda path: None
    try:
        engine.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=_has_frozen(engine.module)
        )
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = before
    if recorder.problem:
        raise CheckpointError(recorder.problem)


def load(engine: Any, folder: Path, universal: bool) -> None:
    """The inverse of `save`, on an engine that was just made. A collective. Files are pickles.

    Args:
        engine: DeepSpeed's.
        folder: as written by `save`, or by titans_ds.zero.universal.make_universal.
        universal: which of the two.

    Raises:
        CheckpointError: there is nothing to load.
    """
    with mended_loading(engine) if universal else contextlib.nullcontext():
        path, _ = engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=False, load_lr_scheduler_states=False
        )
    if path is None:
        raise CheckpointError(f"DeepSpeed finds no checkpoint in {folder}")


def trained_parameters(folder: Path, universal: bool) -> dict[str, Tensor]:
    """Whole trained parameters by name, fp32 on the CPU, without an engine. Reads pickles.

    Args:
        folder: as written by `save`, or by titans_ds.zero.universal.make_universal.
        universal: which of the two.
    """
    if universal:
        parts = sorted((folder / "zero").rglob("fp32.pt"))
        return {p.parent.relative_to(folder / "zero").as_posix(): _universal_tensor(p) for p in parts}
    if not list(folder.glob("*optim_states.pt")):  # ZeRO 0: everything is in one file
        module: dict[str, Tensor] = _read(folder / "mp_rank_00_model_states.pt")["module"]
        return {name: tensor.float() for name, tensor in module.items()}
    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        whole = get_fp32_state_dict_from_zero_checkpoint(
            str(folder.parent), tag=folder.name, exclude_frozen_parameters=True
        )
    return {name: tensor.float() for name, tensor in whole.items()}


def _universal_tensor(path: Path) -> Tensor:
    content = _read(path)
    tensor: Tensor = content["param"] if isinstance(content, dict) else content
    return tensor.float()


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


def _has_frozen(module: torch.nn.Module) -> bool:
    return not all(p.requires_grad for p in module.parameters())


def _recorder(inner: Any) -> Any:
    """DeepSpeed's own writer, which notes a failure in place of raising it in the midst of a collective."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class Recorder(TorchCheckpointEngine):  # type: ignore[misc]
        """See titans_ds.zero.checkpoint.save."""

        problem: str | None = None

        def save(self, state_dict: Any, path: str) -> None:
            """Write, or note why not."""
            try:
                torch.save(state_dict, path)
            except (OSError, RuntimeError) as error:
                self.problem = self.problem or f"{type(error).__name__}: {error}"

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            """Make a folder, or note why not."""
            try:
                os.makedirs(path, exist_ok=exist_ok)
            except OSError as error:
                self.problem = self.problem or f"{type(error).__name__}: {error}"

    return Recorder()
