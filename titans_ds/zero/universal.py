"""DeepSpeed's universal checkpoints: written from a saved engine, loaded by any number of ranks of the same stage.

DeepSpeed 0.19 needs help with loading where parameters are in several groups, as weight decay makes them:
    stage 3     gives all groups the first one's settings, and all states one and the same step counter, which then
                counts every group
    stage 1, 2  fails on a rank whose share of a group is padding alone
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from titans_ds.zero.engine import import_deepspeed


def make_universal(folder: Path, out: Path) -> None:
    """Write the universal form, for any number of ranks, of a saved ZeRO 1, 2 or 3 engine.

    Args:
        folder: as written by titans_ds.zero.checkpoint.save. Its files are pickles.
        out: made; must not exist.
    """
    import_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(out),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # stages 1 and 2 expect notes of Megatron's; there are none
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)


@contextlib.contextmanager
def mended_loading(engine: Any) -> Iterator[None]:
    """Inside, a DeepSpeed engine may load a universal checkpoint; afterwards groups and step counters are right."""
    zero = engine.optimizer
    groups = zero.optimizer.param_groups
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    load = zero.load_hp_checkpoint_state_from_checkpoint_dir

    def load_filled(groups_name: str, folder: str) -> None:
        with _filled_groups(zero, getattr(zero, groups_name)):
            load(groups_name, folder)

    zero.load_hp_checkpoint_state_from_checkpoint_dir = load_filled
    try:
        yield
    finally:
        del zero.load_hp_checkpoint_state_from_checkpoint_dir
    for group, own in zip(groups, settings, strict=True):
        group.update(own)
    for state in zero.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


@contextlib.contextmanager
def _filled_groups(zero: Any, groups: list[list[Any]]) -> Iterator[None]:
    """Inside, a group of which this rank holds padding alone has a stand-in to load nothing into."""
    empty = [group for group in groups if all(p._hp_mapping is None for p in group)]
    stand_in = _StandIn()
    for group in empty:
        group.append(stand_in)
    zero.param_names[stand_in] = "nothing"
    try:
        yield
    finally:
        del zero.param_names[stand_in]
        for group in empty:
            group.remove(stand_in)


class _StandIn:
    """Takes the place of a parameter in DeepSpeed's loading of a universal checkpoint."""

    def __init__(self) -> None:
        self._hp_mapping = self

    def get_optim_state_keys(self) -> list[str]:
        """No state."""
        return []

    def load_hp_checkpoint_state(self, *_: Any, **__: Any) -> None:
        """No step."""
