"""Settings of a positive control: what launch/configs/controls/*.yaml hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from titans_ds.config import GraftConfig, Order, check_choices
from titans_ds.errors import ConfigError
from titans_ds.training.settings import ONE_GRAPH, OptimizerSettings, SecondOrder
from titans_ds.validation import build
from titans_ds.yaml_files import read_yaml

from ..errors import EvalError

TaskName = Literal["kv_recall", "mqar", "needle", "style", "induction"]
CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "configs" / "controls"


@dataclass(frozen=True)
class CurriculumSettings:
    """How hard the training episodes are, and how many there are.

    Args:
        levels: of difficulty, as the task counts it (pairs, distance in tokens); the next one begins at promote_at.
        promote_at: exact match on fresh episodes, in percent. None: all levels from the start, drawn at random.
        batch: episodes in a step.
        check_every: steps between these measurements.
        check_episodes: that they are taken on.
    """

    levels: list[int]
    promote_at: float | None = 90.0
    batch: int = 32
    check_every: int = 20
    check_episodes: int = 32


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured after training.

    Args:
        levels: of difficulty, those that were not trained on too.
        episodes: at every level, the same ones for every arm.
    """

    levels: list[int]
    episodes: int = 64


@dataclass(frozen=True)
class ControlConfig:
    """One positive control.

    Args:
        task: what is asked.
        architecture: keys of a transformers configuration with its model_type, random weights; all of it is trained.
        graft: the memory in it. A text is written in segments of graft.segment_tokens, as `prime` does it.
        curriculum: training episodes.
        measure: the table.
        optimizer: AdamW; its cosine ends with the budget.
        order: of the memory's training. At first order W_0, step sizes, gates, value projection and the convolution of
            keys and values get no gradient, and stay as they start.
        second_order: how its gradient is made, see TrainingSettings.
        first_order_parts: leave them so at second order as well: both orders then train the same parameters.
        task_options: of the task, such as its number of questions.
        convolution_std: where the memory has a convolution, its taps on keys and queries start as this times a
            standard normal, the same for both. The identity that a graft on a pretrained base starts from makes a key
            of one token alone; the layers below, which could bring in others, get no gradient from the write.
        full_context: changes to `architecture` for the model that has the whole context in its window, no memory.
        minutes: training budget of each model and seed; None where `steps` is given.
        steps: the same in optimizer steps.
    """

    task: TaskName
    architecture: dict[str, Any]
    graft: GraftConfig
    curriculum: CurriculumSettings
    measure: MeasureSettings
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    order: Order = "second"
    second_order: SecondOrder = "window"
    first_order_parts: bool = False
    task_options: dict[str, Any] = field(default_factory=dict)
    convolution_std: float | None = None
    full_context: dict[str, Any] = field(default_factory=dict)
    minutes: float | None = 8.0
    steps: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if (self.minutes is None) == (self.steps is None):
            raise ConfigError("set either minutes or steps, the one not used to null")
        if self.graft.is_prefix and self.order == "second" and self.second_order not in ONE_GRAPH:
            raise ConfigError(
                f"second_order is {self.second_order!r}, but a prefix memory is written through the base model: use "
                "through_base, or window, which takes the inner gradient as given"
            )


def load_control(
    task: str,
    changes: dict[str, Any],
    path: Path | None = None,
) -> ControlConfig:
    """The settings of a control.

    A file may say `extends: FILE` (beside it); what else it says then are changes, by dotted name.

    Args:
        task: its name, which is that of its file, too.
        changes: dotted name -> value, put in place of what the file says.
        path: another file.

    Raises:
        EvalError, ConfigError: a file is missing, or no YAML mapping, or a setting is wrong.
    """
    values = _read(path or CONFIGS / f"{task}.yaml")
    if values.get("task") != task:
        raise EvalError(
            f"{path} is a control of task {values.get('task')!r}, not {task!r}; give a --config of this task."
        )
    for name, value in changes.items():
        _set(values, name, value)
    if "betas" in values.get("optimizer", {}):
        values["optimizer"]["betas"] = tuple(values["optimizer"]["betas"])
    config: ControlConfig = build(ControlConfig, values, "", False)
    return config


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's values. One that says `extends: FILE` has that file's, with its own in place of them by dotted name."""
    values = read_yaml(path, f"settings by name, as those in {CONFIGS} do")
    if "extends" not in values:
        return values
    other = path.parent / str(values.pop("extends"))
    if other in above or other == path:
        raise EvalError(f"{path} extends {other}, which extends it; take one of the two out.")
    base = _read(other, (*above, path))
    for name, value in values.items():
        _set(base, name, value)
    return base


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *groups, last = str(name).split(".")
    for group in groups:
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            raise EvalError(f"{name} is set, but {group} is {str(values)[:60]}; expected a mapping of settings.")
    values[last] = value
