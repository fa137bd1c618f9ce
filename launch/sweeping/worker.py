"""The loop of one sweep process: a thread for each slot, which takes one trial after the other."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import IO

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from launch.sweeping.parameters import SweepError
from launch.sweeping.study import Study, answering, this_machine
from launch.sweeping.trial import FailedError, Slot, StoppedError, TrialRun, make_pruner
from titans_ds.errors import OutputError
from titans_ds.files import locked

STOPPED = 143  # exit code
_LOOK = 1.0  # seconds between looks at what others run
_FAILURES = 3  # trials in a row


class Worker:
    """One sweep process.

    Args:
        study: shared with others.
        slots: for one trial at a time each.
        grace: seconds that a trial has to save itself when the sweep is stopped.
        say: takes a line of progress.
        wait: stay while others run trials, which may have to be run again; else leave when no trial waits.
    """

    def __init__(
        self, study: Study, slots: list[Slot], grace: float, say: Callable[[str], None], wait: bool = True
    ) -> None:
        self.study, self.slots, self.grace, self.say, self.wait = study, slots, grace, say, wait
        self.stop = threading.Event()
        self._failures = 0

    def run(self) -> int:
        """Work until every trial has ended.

        Returns:
            the exit code: 0; 143 after SIGTERM, SIGINT, SIGHUP (a closed terminal) or SIGUSR2 (Slurm's, before its time
            is over): its trials save themselves, and go on when a sweep process comes back. At a second signal they are
            killed.

        Raises:
            SweepError: the database does not answer, or several trials in a row have failed.
        """
        if not Path(self.study.meta["cwd"]).is_dir():
            raise SweepError(f"the study was started in {self.study.meta['cwd']}, which is not here; mount it")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(number, self._on_signal)
        threading.excepthook = lambda what: None  # a heartbeat that can't be written; the loop itself finds out, too
        with ThreadPoolExecutor(len(self.slots)) as pool:
            futures = [pool.submit(self._serve, slot) for slot in self.slots]
        for future in futures:
            future.result()
        return STOPPED if self.stop.is_set() else 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop.set()
        signal.signal(number, signal.SIG_DFL)  # a second one ends this process, and the guards end its trials

    def _serve(self, slot: Slot) -> None:
        """One slot, to the end of the study. What goes wrong here ends the other slots, too."""
        try:
            with answering(self.study.url):
                own = optuna.load_study(
                    study_name=self.study.meta["id"], storage=self.study.storage, pruner=make_pruner(self.study)
                )
                while not self.stop.is_set():
                    self.study.fail_lost()
                    self.study.requeue()
                    states = {trial.state for trial in self.study.trials()}
                    if TrialState.WAITING in states:
                        self._run_one(own, slot)
                    elif TrialState.RUNNING in states and self.wait:
                        self.stop.wait(_LOOK)
                    else:
                        return
        except BaseException:
            self.stop.set()
            raise

    def _run_one(self, own: optuna.Study, slot: Slot) -> None:
        """A waiting trial, if no other process takes it first."""
        locks: list[IO[str]] = []

        def objective(trial: optuna.Trial) -> float:
            if "index" not in trial.user_attrs:  # Optuna makes a trial up where another process took the last one
                raise StoppedError("no trial of the study")
            frozen = self.study.storage.get_trial(trial._trial_id)
            if self.study.is_duplicate(frozen):
                trial.set_user_attr("duplicate", True)
                raise StoppedError("its point has another trial")
            # The lock comes first: a trial of this machine without one is lost. It is held until the end is told.
            locks.append(self.study.lock(trial.user_attrs["index"], trial.number))
            trial.set_user_attr("machine", this_machine())
            trial.set_user_attr("place", f"{os.uname().nodename} {slot.name}")
            return TrialRun(self, trial, slot).objective()

        try:
            own.optimize(objective, n_trials=1, catch=(FailedError, StoppedError), callbacks=[self._record])
        except (UpdateFinishedTrialError, ValueError) as error:
            # Optuna can't tell the end of a trial that others have failed meanwhile; ValueError is how it says so.
            if isinstance(error, ValueError) and not str(error).startswith("Cannot tell"):
                raise
            self.say("a trial was taken over by another process, which had no sign of life from this one")
        except UnboundLocalError as error:  # a slip of Optuna's, where the database goes away while it tells an end
            slip = error.__context__ or error
            raise slip from slip.__cause__
        finally:
            for lock in locks:
                lock.close()
        self.study.requeue()
        if self._failures >= _FAILURES:
            raise SweepError(
                f"{self._failures} trials in a row have failed here (their reasons stand above). This process stops, "
                "so that a broken machine does not fail the whole study; mend it, and give the same command again: it "
                "tries failed trials again"
            )

    def _record(self, own: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        attrs = trial.user_attrs
        if "index" not in attrs or attrs.get("duplicate"):
            return
        failed = attrs.get("outcome") == "failed"
        self._failures = self._failures + 1 if failed else 0
        if trial.state == TrialState.COMPLETE:
            self.say(f"trial {attrs['index']}: complete {trial.value:.6g}")
        else:
            self.say(
                f"trial {attrs['index']}: {attrs.get('outcome', 'stopped')} ({attrs.get('reason', 'goes on later')})"
            )


def local_slots(count: int | None, ranks: int, launcher: list[str] | None, lock: bool = True) -> list[Slot]:
    """Slots on this machine, on GPUs of their own where there are any.

    Args:
        count: how many; None for one, or as many as the GPUs allow.
        ranks: processes of each trial, on a GPU each.
        launcher: what runs launch/train.py; None for plain Python, or the deepspeed launcher for several ranks.
        lock: keep the GPUs from other sweeps. Not where Slurm shares them out: its tasks may all call theirs 0.

    Raises:
        SweepError: no slot.
    """
    gpus = visible_gpus()
    words = launcher or [sys.executable, "-u"]
    if launcher is None and ranks > 1:
        number = [] if gpus else ["--num_accelerators", str(ranks)]  # with GPUs it takes the visible ones
        words = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", "{port}", *number]
    if not gpus:
        # Trials side by side on a CPU slow one another down many times over if each takes all cores.
        cores = max(len(os.sched_getaffinity(0)) // ((count or 1) * ranks), 1)
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(cores)}
        return [Slot(f"cpu{n}", words, threads) for n in range(count or 1)]
    wanted = count or max(len(gpus) // ranks, 1)
    free: list[str] = []
    for gpu in gpus:
        if len(free) < wanted * ranks and (not lock or _lock_gpu(gpu)):
            free.append(gpu)
    groups = [free[n : n + ranks] for n in range(0, len(free) - ranks + 1, ranks)]
    if len(groups) < (count or 1):
        raise SweepError(
            f"no slot: {wanted} with {ranks} GPU(s) each asked for, {len(gpus)} GPU(s) here, {len(free)} of them "
            "not in use by other sweeps. Ask for fewer with --slots or --ranks, or wait"
        )
    return [Slot("gpu" + "+".join(g), words, {"CUDA_VISIBLE_DEVICES": ",".join(g)}) for g in groups]


def visible_gpus() -> list[str]:
    """Indices of the GPUs that this process may use, or what CUDA_VISIBLE_DEVICES calls them."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name and name != "-1"]
    return [str(n) for n in range(torch.cuda.device_count())]


_gpu_locks = contextlib.ExitStack()  # held until this process ends


def _lock_gpu(gpu: str) -> bool:
    """Keep a GPU from all other sweeps on this machine, of this user's; whether it was free."""
    try:
        _gpu_locks.enter_context(locked(Path(tempfile.gettempdir()) / f"titans_ds_gpu-{os.getuid()}-{gpu}", "in use"))
    except OutputError:
        return False
    return True
