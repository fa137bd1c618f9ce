"""Trials as tasks of Slurm arrays, through submitit.

The sweep process only submits, as many tasks as there are trials to run. Every task is a sweep process of its own on
its node, for one trial: it claims one in the study's folder, beats for it, runs it and records its end. So nothing is
lost when the submitting process is killed, and a trial whose node dies is run again by another task.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from launch.sweeping import files
from launch.sweeping.claims import Claims
from launch.sweeping.errors import SweepError
from launch.sweeping.executors import RUNNER, TRAIN, visible_gpus, working_folder
from launch.sweeping.launch import Launch
from launch.sweeping.space import ROOT, read_value
from launch.sweeping.study import Study, Trial
from launch.sweeping.worker import STOPPED, Worker
from titans_ds.zero.ports import free_port

_OWN = ("job_name", "array_parallelism", "setup", "srun_args", "folder")
_LOOK = 5.0  # seconds between looks at the study and the queue


def run_on_slurm(
    study: Study, options: Sequence[str], slots: int, lease: float, grace: float, say: Callable[[str], None]
) -> int:
    """Submit tasks until every trial has ended. Returns 0; 143 after SIGTERM or Ctrl-C, which leaves the tasks alone.

    Args:
        study: to work on.
        options: NAME=VALUE, of submitit's Slurm executor: partition, time (minutes), gpus_per_node, ….
        slots: tasks that run at a time.
        lease: of the tasks' claims, in seconds.
        grace: seconds that a trial has to save itself at the end of the task's time.
        say: takes a line of progress.

    Raises:
        SweepError: no Slurm or no submitit here, an option that there is not, or tasks that end without a trial.
    """
    pool = _Pool(study, _executor(study, options, slots, grace), lease, grace, say)
    try:
        while not pool.round():
            time.sleep(_LOOK)
    except KeyboardInterrupt:
        say(f"the tasks of Slurm go on; `scancel --name {pool.name}` stops them")
        return STOPPED
    return 0


class _Pool:
    def __init__(self, study: Study, executor: Any, lease: float, grace: float, say: Callable[[str], None]) -> None:
        self._study, self._executor, self._lease, self._grace, self._say = study, executor, lease, grace, say
        self._claims: dict[int, Claims] = {}
        self._submitted_at: int | None = None  # how many attempts there had been
        self.name = job_name(study)

    def round(self) -> bool:
        """Submit what is missing; whether all trials have ended."""
        left, held, attempts = self._count()
        if left == 0:
            return True
        live = live_tasks(self.name)
        if live == 0 and self._submitted_at == attempts and held == 0:
            raise SweepError(
                f"the tasks that were submitted have ended without starting a trial; {self._study.path / 'slurm'} has "
                "what they printed"
            )
        missing = left - max(live, held)
        if missing > 0:
            self._submit(missing)
            self._submitted_at = attempts
        return False

    def _submit(self, count: int) -> None:
        arguments = [[str(self._study.path)] * count, [self._lease] * count, [self._grace] * count]
        jobs = self._executor.map_array(work, *arguments)
        self._say(f"submitted {count} task{'s' if count > 1 else ''} to Slurm: {jobs[0].job_id.split('_')[0]}")

    def _count(self) -> tuple[int, int, int]:
        """Trials that have not ended; those of them that somebody runs; attempts so far."""
        left, held, attempts = self._study.size, 0, 0
        for trial in self._study.trials():
            claims = self._claims.setdefault(trial.number, trial.claims)
            numbers = claims.numbers()
            attempts += len(numbers)
            if trial.result() is not None:
                left -= 1
            elif numbers and claims.ended(numbers[-1]) is None:
                claim = claims.read(numbers[-1])
                held += claim is not None and not claims.is_dead(claim)
        return left, held, attempts


def job_name(study: Study) -> str:
    """Of all tasks of a study."""
    return f"titans-{study.id}"


def live_tasks(name: str) -> int:
    """Tasks of this name that wait or run."""
    command = ["squeue", "--noheader", "--array", "--name", name, "--format", "%i"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SweepError(f"squeue failed: {done.stderr.strip()}")
    return len(done.stdout.split())


def _executor(study: Study, options: Sequence[str], slots: int, grace: float) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise SweepError("the executor slurm needs submitit: pip install 'titans-ds[sweep]'") from error
    if submitit.SlurmExecutor.affinity() < 0:
        raise SweepError("the executor slurm needs Slurm's commands (srun is not found); run it on a login node")
    executor = submitit.SlurmExecutor(study.path / "slurm", python=shlex.quote(sys.executable))
    own = {
        "job_name": job_name(study),
        "array_parallelism": slots,
        "setup": [f"export PYTHONPATH={shlex.quote(str(ROOT))}:${{PYTHONPATH:-}}"],
        "srun_args": ["--kill-on-bad-exit=1"],
        "signal_delay_s": int(grace) + 30,
    }
    try:
        executor.update_parameters(**{**own, **_options(options)})
    except (ValueError, TypeError, NameError) as error:
        raise SweepError(f"--slurm: {' '.join(str(error).split())[:400]}") from error
    return executor


def _options(options: Sequence[str]) -> dict[str, Any]:
    values = {}
    for option in options:
        name, joined, value = option.partition("=")
        if not joined or name in _OWN:
            why = "the sweep's own business" if name in _OWN else "not of the form NAME=VALUE"
            raise SweepError(f"--slurm {option} is {why}")
        values[name] = read_value(value)
    return values


def work(study: str, lease: float, grace: float) -> str:
    """One task on its node: run one trial. Several processes of a task are the ranks of that trial."""
    import submitit

    signal.signal(signal.SIGUSR2, _near_the_end)  # Slurm's, before the task's time is over
    signal.signal(signal.SIGCONT, signal.SIG_IGN)
    environment, found = submitit.JobEnvironment(), Study(Path(study))
    meeting = _Meeting(found, environment)
    if environment.global_rank > 0:
        return f"rank {environment.global_rank}: {meeting.follow()}"
    executor = _Task(found, meeting)
    code = Worker(found, executor, _print, lease, grace, limit=1, patience=1.5 * lease).run()
    return "stopped" if code == STOPPED else "done"


def _near_the_end(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)  # which the worker, when it runs, takes as a request to stop


def _print(line: str) -> None:
    print(line, flush=True)


class _Meeting:
    """Where the ranks of a task learn what their first one runs."""

    def __init__(self, study: Study, environment: Any) -> None:
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        self._place = study.path / "slurm" / f"{environment.job_id}.{restart}"
        self.study, self.environment = study, environment

    @property
    def several(self) -> bool:
        """Whether there is more than one rank."""
        return int(self.environment.num_tasks) > 1

    def rank_variables(self, address: str, port: int) -> dict[str, str]:
        """What torch.distributed wants to know."""
        task = self.environment
        values = {
            "RANK": task.global_rank,
            "WORLD_SIZE": task.num_tasks,
            "LOCAL_RANK": task.local_rank,
            "LOCAL_WORLD_SIZE": int(task.num_tasks) // int(task.num_nodes),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }
        return {name: str(value) for name, value in values.items()}

    def call(self, launch: Launch) -> None:
        """The first rank's: the others start the same."""
        place = {name: launch.environment[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
        files.replace(self._place.with_suffix(".start"), {"arguments": list(launch.arguments), **place})

    def leave(self) -> None:
        """The first rank's: it is over."""
        files.replace(self._place.with_suffix(".over"), {})

    def follow(self) -> str:
        """What the other ranks do."""
        start, over = self._place.with_suffix(".start"), self._place.with_suffix(".over")
        with contextlib.suppress(FileNotFoundError):
            while (values := files.read(start)) is None:
                if over.exists():
                    return "no trial"
                time.sleep(0.2)
        variables = self.rank_variables(values["MASTER_ADDR"], int(values["MASTER_PORT"]))
        program = (sys.executable, "-u", TRAIN)
        child = Launch(values["arguments"], program, working_folder(self.study), variables).start()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first rank stops all, through the training loop
        while (code := child.poll()) is None and not over.exists():
            time.sleep(0.2)
        return f"exit code {code}"


class _Task:
    """The slot of one task: what Slurm has given it.

    Args:
        study: gives the working folder.
        meeting: of its ranks.
    """

    slots: list[str]

    def __init__(self, study: Study, meeting: _Meeting) -> None:
        self._study, self._meeting = study, meeting
        self.slots = [f"slurm {meeting.environment.job_id}"]

    def launch(self, trial: Trial, slot: str) -> Launch:
        """A rank of several; or all ranks of a node, one per GPU; or plain Python."""
        gpus, cwd = visible_gpus(), working_folder(self._study)
        if self._meeting.several:
            variables = self._meeting.rank_variables(str(self._meeting.environment.hostname), free_port())
            return Launch(trial.arguments, (sys.executable, "-u", TRAIN), cwd, variables, slot=slot)
        if len(gpus) > 1:
            program = (*RUNNER, "--master_port", str(free_port()), TRAIN)
            return Launch(trial.arguments, program, cwd, {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}, slot=slot)
        return Launch(trial.arguments, (sys.executable, "-u", TRAIN), cwd, slot=slot)

    def started(self, launch: Launch) -> None:
        """Tell the other ranks."""
        if self._meeting.several:
            self._meeting.call(launch)

    def beat(self) -> None:
        """The slot is Slurm's."""

    def release(self) -> None:
        """Let the other ranks leave."""
        if self._meeting.several:
            self._meeting.leave()
