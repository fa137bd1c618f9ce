"""A study: a folder that all machines see, and one Optuna study in a database.

STUDY/
  study.json, space.yaml    what is searched, the base configuration, the database: never changed
  study.db                  SQLite, unless another database was given
  trials/0007/              of the seventh point, whoever runs it and however often
    config.yaml             the whole configuration
    attempt-001.log         what an attempt printed
    run/                    run folder of launch/train.py: status, metrics, checkpoints, adapter

All trials are enqueued when the study is made, so that the database gives each to one process. A trial that was lost or
stopped fails there, and another is enqueued for its point, which goes on in the same folder. Who is to enqueue it
may be killed just before, and two processes may enqueue one each: so all look for points without a trial (`requeue`),
and of several that live the one with the lowest number counts (`is_duplicate`). Optuna's own callback for stale trials
would lose the point in the first case.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
import sqlalchemy
import yaml
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from launch.sweeping.parameters import SweepError
from launch.sweeping.space import Space, base_config, parse_space, read_space
from titans_ds import reading
from titans_ds.errors import DataError
from titans_ds.files import write_json, write_text
from titans_ds.training.run_folder import git_commit

FORMAT = 2
TIMED = ("psycopg2", "psycopg", "pymysql", "mysqldb")  # drivers whose connections take `connect_timeout`
_META = "study.json"

optuna.logging.set_verbosity(optuna.logging.CRITICAL)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class Row:
    """How one point of the study stands.

    Args:
        index: its number, and its folder's.
        state: `waiting`, `running`, `complete`, `pruned`, `out_of_memory`, `diverged`, `invalid` or `failed`.
        value: of the metric, where it is complete.
        params: parameter -> value, as far as chosen.
        step: training steps done.
        attempts: how many there were.
        place: where the last one ran.
        reason: why it is not complete.
        folder: its own.
    """

    index: int
    state: str
    value: float | None
    params: dict[str, Any]
    step: int
    attempts: int
    place: str
    reason: str
    folder: Path


class Study:
    """A study that is there.

    Args:
        path: its folder.
        url: of its database; None for the one that it was made with.
        lease: seconds without a heartbeat after which a trial on another machine is lost.

    Raises:
        SweepError: no study, one of another version, or a database that does not answer.
    """

    def __init__(self, path: Path, url: str | None = None, lease: int = 120) -> None:
        self.path, self.lease = path.resolve(), lease
        if not (path / _META).exists():
            raise SweepError(f"{path} is no study; start one with launch/sweep.py --space FILE --study {path}")
        meta: dict[str, Any] = reading.read_json(path / _META, dict[str, Any], "Restore it, or choose another folder.")
        if meta.get("format") != FORMAT:
            raise SweepError(f"{path / _META} is not of a study that this version made; choose another folder")
        self.meta = meta
        self.space: Space = parse_space(meta["space"], str(path / "space.yaml"))
        self.url = url or meta["storage"] or _sqlite(self.path)
        self.storage = connect(self.url, lease)
        with answering(self.url):
            try:
                self.optuna = optuna.load_study(study_name=meta["id"], storage=self.storage)
            except KeyError:
                raise SweepError(
                    f"the database {shown(self.url)} does not hold the study of {path}; give the one that it was made "
                    "with (--storage), restore study.db, or choose another folder"
                ) from None
        self._unowned: dict[int, float] = {}

    def folder(self, index: int) -> Path:
        """Of a point."""
        return self.path / "trials" / f"{index:04d}"

    def trials(self) -> list[FrozenTrial]:
        """Optuna's trials of the points, as the database has them now."""
        with answering(self.url):
            found = self.optuna.get_trials(deepcopy=False)
        return [t for t in found if "index" in t.user_attrs and not t.user_attrs.get("duplicate")]

    def chains(self) -> dict[int, list[FrozenTrial]]:
        """Point -> its trials, by number."""
        found: dict[int, list[FrozenTrial]] = {}
        for trial in self.trials():
            found.setdefault(trial.user_attrs["index"], []).append(trial)
        return found

    def rows(self) -> list[Row]:
        """Every point as it stands now, by number."""
        return [self._row(index, chain) for index, chain in sorted(self.chains().items())]

    def _row(self, index: int, chain: list[FrozenTrial]) -> Row:
        trial = next((t for t in chain if t.state != TrialState.FAIL), chain[-1])
        attrs, folder = trial.user_attrs, self.folder(index)
        state = {TrialState.RUNNING: "running", TrialState.COMPLETE: "complete"}.get(trial.state, "waiting")
        if trial.state == TrialState.PRUNED or "outcome" in attrs:
            state = attrs.get("outcome", "pruned")
        status = read_json(folder / "run" / "status.json")
        params = trial.params or next((t.params for t in reversed(chain) if t.params), fixed_params(trial))
        return Row(
            index, state, trial.value if state == "complete" else None, params, int(status.get("step", 0)),
            len(list(folder.glob("attempt-*.log"))), str(attrs.get("place", "")), str(attrs.get("reason", "")), folder,
        )  # fmt: skip

    def is_duplicate(self, trial: FrozenTrial) -> bool:
        """Whether another trial of the point, of a lower number, lives or has a result. All are in the database."""
        before = [t for t in self.chains()[trial.user_attrs["index"]] if t.number < trial.number]
        return any(t.state != TrialState.FAIL for t in before)

    def requeue(self, failed: bool = False) -> None:
        """Enqueue a trial for every point whose trials were all lost or stopped.

        Args:
            failed: for those that ended with an error, too.
        """
        for index, chain in self.chains().items():
            lost = failed or "outcome" not in chain[-1].user_attrs
            if lost and all(t.state == TrialState.FAIL for t in chain):
                params = next((t.params for t in reversed(chain) if t.params), {})
                with answering(self.url):
                    self.optuna.enqueue_trial({**fixed_params(chain[-1]), **params}, user_attrs={"index": index})

    def fail_lost(self) -> None:
        """Fail the running trials whose process is gone: at once where it was on this machine, by Optuna's heartbeats
        elsewhere. One that was taken and has no owner after a lease was lost before its first heartbeat."""
        fail_stale_trials(self.optuna)
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            machine = trial.user_attrs.get("machine")
            if machine is None:
                first = self._unowned.setdefault(trial.number, time.monotonic())
                lost = time.monotonic() - first > self.lease
            else:
                lost = machine == this_machine() and not self._is_locked(trial)
            if lost:
                with contextlib.suppress(UpdateFinishedTrialError):
                    self.storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)

    def lock(self, index: int, number: int) -> IO[str]:
        """This process's lock on a trial, which ends with it: how others on this machine see that it lives."""
        path = self.folder(index) / f"trial-{number}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file

    def _is_locked(self, trial: FrozenTrial) -> bool:
        with contextlib.suppress(OSError):
            self.lock(trial.user_attrs["index"], trial.number).close()
            return False
        return True


def fixed_params(trial: FrozenTrial) -> dict[str, Any]:
    """The values that a trial was enqueued with."""
    return dict(trial.system_attrs.get("fixed_params", {}))


def this_machine() -> str:
    """Of this boot of it, and of the processes that can be seen and killed from here."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where there is none, or none that can be read now."""
    with contextlib.suppress(DataError):
        return dict(reading.read_json(path, dict[str, Any]))
    return {}


def _sqlite(folder: Path) -> str:
    return sqlalchemy.URL.create("sqlite", database=str(folder / "study.db")).render_as_string()


def shown(url: str) -> str:
    """A database's URL for people, without its password."""
    return sqlalchemy.make_url(url).render_as_string(hide_password=True)


@contextlib.contextmanager
def answering(url: str) -> Iterator[None]:
    """SweepError where the database does not answer, or is none."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        below = error.__cause__ or error
        cause = str(getattr(below, "orig", None) or below).splitlines()[0]
        raise SweepError(
            f"the database {shown(url)} does not answer as it should: {cause}. Look whether it runs, and may be "
            "written; the same command then goes on"
        ) from error


def connect(url: str, lease: int) -> RDBStorage:
    """Open a database.

    Raises:
        SweepError: not a database's URL, no driver for it, or no answer.
    """
    try:
        made = sqlalchemy.make_url(url)
        driver = made.get_dialect().driver
    except (sqlalchemy.exc.ArgumentError, ImportError, ValueError) as error:
        expected = "expected such as postgresql+psycopg://USER@HOST/NAME"
        raise SweepError(f"--storage is no URL of a database; {expected}") from error
    if driver == "pysqlite" and not os.path.isabs(made.database or ""):
        raise SweepError(f"--storage {shown(url)}: the file needs a whole path, as in sqlite:////home/me/study.db")
    wait = {"timeout": 30} if driver == "pysqlite" else {"connect_timeout": 10} if driver in TIMED else {}
    options = {"connect_args": wait, "pool_pre_ping": True}
    with answering(url):
        try:
            storage = RDBStorage(url, engine_kwargs=options, heartbeat_interval=max(lease // 4, 1), grace_period=lease)
        except (RuntimeError, ImportError) as error:  # tables of another version of Optuna, or no driver
            raise SweepError(f"the database {shown(url)}: {error} (its driver: pip install {driver})") from error
    if driver == "pysqlite":
        # Its transactions begin at the first write: two processes would read one trial as waiting, and both take it.
        @sqlalchemy.event.listens_for(storage.engine, "connect")
        def leave_transactions_to_us(connection: Any, record: Any) -> None:
            connection.isolation_level = None

        @sqlalchemy.event.listens_for(storage.engine, "begin")
        def lock_from_the_start(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        storage.engine.dispose()
    return storage


def open_study(
    folder: Path, space_file: Path | None, settings: Mapping[str, Any], url: str | None, lease: int
) -> Study:
    """The study of a folder: made, if there is none, and joined, if it is the same.

    Args:
        folder: the study's.
        space_file: what to search; None joins the study that is there.
        settings: dotted name -> value, the same in every trial, beside those of the space.
        url: of the database; None for SQLite in the folder, or for the one that the study was made with.
        lease: seconds without a heartbeat after which a trial on another machine is lost.

    Raises:
        SweepError: the folder holds a study of another space, or something else; or the database does not answer.
    """
    if space_file is None:
        if settings:
            raise SweepError("settings are part of the study from its start; give --space, too, or leave them out")
        return Study(folder, url, lease)
    content = read_space(space_file)
    own = content.get("settings") or {}
    content["settings"] = {**own, **settings} if isinstance(own, dict) else own
    content = json.loads(json.dumps(content, default=str))  # as it is read back, where keys are text
    space = parse_space(content, str(space_file))
    base = json.loads(json.dumps(base_config(space.config, space_file), default=str))
    if not (folder / _META).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SweepError(f"{folder} exists and is no study; choose another folder")
        if space.search.method == "grid":
            space.check_grid(base, str(space_file))
        _create(folder.absolute(), {"space": content, "base": base}, space, url, lease)
    study = Study(folder, url, lease)
    for name, now in (("space", content), ("base", base)):
        changed = _differences(study.meta[name], now, "")
        if changed:
            what = "base configuration" if name == "base" else name
            raise SweepError(
                f"{study.path} is a study of another {what}: {'; '.join(changed[:3])}. A study never changes: use the "
                f"one it was started with ({study.path / 'space.yaml'}), or another folder"
            )
    return study


def _create(folder: Path, meta: dict[str, Any], space: Space, url: str | None, lease: int) -> None:
    """Make the study under another name, whole, and give it its own: of many processes one succeeds."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
    (partial / "trials").mkdir(parents=True)
    own = {"format": FORMAT, "id": f"{folder.name}-{uuid.uuid4().hex[:12]}", "cwd": os.getcwd()}
    try:
        storage = connect(url or _sqlite(partial), lease)
        kept = None if url is None else sqlalchemy.make_url(url)._replace(password=None).render_as_string()
        write_json(partial / _META, {**own, "git_commit": git_commit(), "storage": kept, **meta})
        write_text(partial / "space.yaml", yaml.safe_dump(meta["space"], sort_keys=False))
        with answering(url or _sqlite(partial)):
            made = optuna.create_study(storage=storage, study_name=str(own["id"]), direction=space.metric.direction)
            points = space.grid() if space.search.method == "grid" else [{}] * int(space.search.trials or 0)
            for index, point in enumerate(points):
                made.enqueue_trial(point, user_attrs={"index": index})
        storage.engine.dispose()
        try:
            os.rename(partial, folder)
        except OSError:  # another process was first: its study is looked at next
            optuna.delete_study(study_name=str(own["id"]), storage=storage)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _differences(there: Any, here: Any, path: str) -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted({*there, *here})
        return [d for key in keys for d in _differences(there.get(key), here.get(key), f"{path}.{key}".strip("."))]
    return [] if there == here else [f"{path} is {there!r} there, {here!r} here"]
