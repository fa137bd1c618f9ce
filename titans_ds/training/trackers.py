"""Where the metrics of a run also go: TensorBoard, W&B, MLflow, trackio, and the other trackers that accelerate has.

accelerate's tracker classes are used without its PartialState, which would choose devices and may start a process group
of its own, beside DeepSpeed's. Rank 0 alone makes them. What a run logged after the step that it goes on from is purged
in TensorBoard. Other trackers can't take steps back: there the run goes on under a name of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titans_ds.errors import ConfigError, reason_of
from titans_ds.validation import nearest, require

# Of accelerate's trackers, those that take a name for the run beside the project's, and by which argument.
TRACKERS: dict[str, str | None] = {
    "aim": None,
    "clearml": None,
    "comet_ml": None,
    "dvclive": None,
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "tensorboard": None,
    "trackio": "name",
    "wandb": "name",
}


def check_names(names: list[str]) -> None:
    """Raise ConfigError for a tracker that accelerate doesn't have."""
    for name in names:
        require(name in TRACKERS, f"run.trackers names {name!r}, which is no tracker{nearest(name, TRACKERS)}")


def check_installed(names: list[str]) -> None:
    """Raise ConfigError for a tracker whose package is missing, with the command that installs it."""
    for name in names:
        require(
            importlib.util.find_spec(name) is not None,
            f"run.trackers names {name}, whose package is not installed: pip install {name.replace('_', '-')}; or "
            "leave it out (run.trackers [] for metrics.jsonl alone)",
        )


class Trackers:
    """The trackers of one run, started.

    Args:
        names: which; see `TRACKERS`.
        project: that the run belongs to, where a tracker has projects.
        folder: of the run. Its name is the run's; TensorBoard's events go into its folder `tensorboard`.
        resumed: the step that the run goes on from.

    Raises:
        ConfigError: one of them can't start (nobody is logged in, a server is not there).
    """

    def __init__(self, names: list[str], project: str, folder: Path, resumed: int | None = None) -> None:
        self._trackers = []
        for name in names:
            tracker = _make(name, project, folder, resumed)
            tracker.main_process_only = False  # else it asks a PartialState whether this is the main process
            try:
                with _own_logger():
                    tracker.start()
            except Exception as error:
                raise ConfigError(
                    f"the tracker {name} can't start ({reason_of(error)}); log in to its server, or take it out of "
                    "run.trackers"
                ) from error
            self._trackers.append(tracker)

    def log(self, values: dict[str, float], step: int) -> None:
        """Record values of a step."""
        for tracker in self._trackers:
            with _own_logger():
                tracker.log(values, step=step)

    def close(self) -> None:
        """Write what is still in buffers, and close the tracker."""
        for tracker in self._trackers:
            with _own_logger():
                tracker.finish()


def _make(name: str, project: str, folder: Path, resumed: int | None) -> Any:
    from accelerate import tracking

    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":  # accelerate joins the two to the folder of the events
        return kind("tensorboard", folder, purge_step=None if resumed is None else resumed + 1)
    title, keyword = folder.name if resumed is None else f"{folder.name}-from-{resumed}", TRACKERS[name]
    named = {} if keyword is None else {keyword: title}
    return kind(project, folder, **named) if kind.requires_logging_directory else kind(project, **named)


class _Logger(logging.LoggerAdapter):  # type: ignore[type-arg]
    def warning_once(self, message: str) -> None:
        """As accelerate's own logger has it."""
        self.warning(message)


@contextlib.contextmanager
def _own_logger() -> Iterator[None]:
    """Inside, accelerate's trackers log through a plain logger: theirs fails where there is no PartialState."""
    from accelerate import tracking

    before, tracking.logger = tracking.logger, _Logger(logging.getLogger(tracking.__name__), {})
    try:
        yield
    finally:
        tracking.logger = before
