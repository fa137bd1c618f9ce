"""Sweep processes on other machines: tasks of Slurm arrays, through submitit, and hosts of a hostfile, through pdsh.

Each is a sweep process like any other, which takes trials from the database. What is started here only starts them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy

from launch.sweeping import guard
from launch.sweeping.parameters import SweepError
from launch.sweeping.space import ROOT
from launch.sweeping.study import Study
from launch.sweeping.worker import STOPPED, Worker, local_slots, visible_gpus
from titans_ds.yaml_files import option_value

STORAGE = "OPTUNA_STORAGE"  # variable with a database's URL, as Optuna's own command takes it
_OWN = ("job_name", "array_parallelism", "setup", "srun_args", "folder", "signal_delay_s", "tasks_per_node")
_LOOK = 5.0  # seconds between looks at the study and the queue
_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*")


def check_storage(url: str | None, study_url: str | None) -> None:
    """Refuse the database in the study's folder, which only processes of one machine can share."""
    if (url or study_url) is None:
        raise SweepError(
            "sweep processes on other machines can't share SQLite over a network file system; give a database that "
            "they reach, when the study is made: --storage postgresql+psycopg://USER@HOST/NAME"
        )


def run_on_slurm(study: Study, options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Submit tasks until every trial has ended. Returns 0; 143 after SIGTERM or Ctrl-C, which leaves the tasks alone.

    Args:
        study: to work on.
        options: of launch/sweep.py. `slurm` are those of submitit's Slurm executor, `slots` tasks run at a time.
        say: takes a line of progress.

    Raises:
        SweepError: no Slurm here, an option that there is not, or tasks that end without a trial.
    """
    name = f"titans-{study.meta['id'].rsplit('-', 1)[-1]}"
    slots = options.slots or 4
    executor = _executor(study, name, options.slurm or [], slots, options.grace)
    os.environ[STORAGE] = study.url  # not among the arguments, which others on the machine can read
    asked = _on_signals()
    submitted_at = None  # how far the study had come
    while not asked.is_set():
        study.fail_lost()
        study.requeue()
        rows = study.rows()
        left = [row.state for row in rows if row.state in ("waiting", "running")]
        if not left:
            break
        so_far, live = (len(left), sum(row.attempts for row in rows)), _live_tasks(name)
        if live == 0 and submitted_at == so_far:
            raise SweepError(f"the tasks have ended without a trial; {study.path / 'slurm'} has what they printed")
        count = min(left.count("waiting"), slots) - live
        if count > 0:
            values = (study.path, study.lease, options.ranks, options.launcher, options.grace)
            jobs = executor.map_array(work, *([value] * count for value in values))
            say(f"submitted {count} task(s) to Slurm: {jobs[0].job_id.split('_')[0]}")
            submitted_at = so_far
        asked.wait(_LOOK)
    if asked.is_set():
        say(f"the tasks of Slurm go on; `scancel --name {name}` stops them")
    return STOPPED if asked.is_set() else 0


def _on_signals() -> threading.Event:
    """Set by SIGTERM or Ctrl-C, from now on."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    return asked


def work(path: Path, lease: int, ranks: int | None, launcher: list[str] | None, grace: float) -> str:
    """One task on its node: trials, one after the other, until none waits or the task's time is over."""
    import submitit

    signal.signal(signal.SIGCONT, signal.SIG_IGN)  # Slurm's, together with SIGTERM
    environment = submitit.JobEnvironment()
    if environment.global_rank > 0:
        return "the first task of several runs the launcher"
    slots = local_slots(1, ranks or max(len(visible_gpus()), 1), launcher, lock=False)
    study = Study(path, os.environ[STORAGE], lease)
    code = Worker(study, slots, grace, lambda line: print(line, flush=True), wait=False).run()
    return "stopped" if code == STOPPED else "done"


def _executor(study: Study, name: str, options: Sequence[str], slots: int, grace: float) -> Any:
    import submitit

    if submitit.SlurmExecutor.affinity() < 0:
        raise SweepError("--executor slurm needs Slurm's commands (srun is not found); run it on a login node")
    own: dict[str, Any] = {
        "job_name": name,
        "array_parallelism": slots,
        "setup": [f"export PYTHONPATH={shlex.quote(str(ROOT))}:${{PYTHONPATH:-}}"],
        "signal_delay_s": int(grace) + 30,
    }
    for option in options:
        key, joined, value = option.partition("=")
        if not joined or key in _OWN:
            why = "the sweep's own business" if key in _OWN else "not of the form NAME=VALUE"
            raise SweepError(f"--slurm {option} is {why}; expected such as partition=gpu time=600 gpus_per_node=1")
        own[key] = option_value(value)
    executor = submitit.SlurmExecutor(study.path / "slurm", python=shlex.quote(sys.executable))
    try:
        executor.update_parameters(**own)
    except (ValueError, TypeError, NameError) as error:
        raise SweepError(f"--slurm: {' '.join(str(error).split())[:400]}") from error
    return executor


def _live_tasks(name: str) -> int:
    """Tasks of this name that wait or run."""
    command = ["squeue", "--noheader", "--array", "--name", name, "--format", "%i"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SweepError(
            f"squeue failed: {done.stderr.strip()}; look whether Slurm runs, and give the same command again"
        )
    return len(done.stdout.split())


def read_hosts(path: Path | None) -> list[str]:
    """The hosts of a hostfile, `node1 slots=8` a line, as DeepSpeed takes it.

    Raises:
        SweepError: no file, no hosts, or what is no host's name: pdsh and ssh would take it for an option.
    """
    if path is None:
        raise SweepError("--executor ssh needs --hostfile FILE, a host a line")
    try:
        lines = [line.split("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise SweepError(f"the hostfile {path} can't be read: {error}") from error
    hosts = [words[0] for words in lines if words]
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise SweepError(f"{path}: {host!r} is no host's name; expected letters, digits, `.`, `-` and `_`")
    if not hosts:
        raise SweepError(f"the hostfile {path} has no hosts; expected a line for each, such as: node1 slots=8")
    return list(dict.fromkeys(hosts))


def remote_command(study: Study, options: Sequence[str]) -> str:
    """What a host's shell is given: every word quoted for it, and `%`, which pdsh replaces, doubled."""
    words = [sys.executable, str(ROOT / "launch" / "sweep.py"), "run", "--study", str(study.path), *options]
    return f"cd {shlex.quote(study.meta['cwd'])} && exec {shlex.join(words)}".replace("%", "%%")


def run_over_ssh(study: Study, hosts: list[str], options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """A sweep process on each host, with its local slots. Returns the greatest exit code; 143 after SIGTERM or Ctrl-C.

    Args:
        study: to work on.
        hosts: names that ssh knows.
        options: of launch/sweep.py; each of them gets those that concern its own slots.
        say: takes a line of progress.

    Raises:
        SweepError: no pdsh here, or a password in the database's URL.
    """
    if shutil.which("pdsh") is None:
        raise SweepError("--executor ssh needs pdsh: apt-get install pdsh openssh-client")
    if sqlalchemy.make_url(study.url).password:
        raise SweepError(
            "the database's password would be seen in the command lines of the hosts; leave it out of --storage, and "
            "put it on the hosts: ~/.pgpass, ~/.my.cnf"
        )
    given = [(f"--{name}", getattr(options, name)) for name in ("slots", "ranks", "lease", "grace")]
    words = [word for name, value in given if value is not None for word in (name, str(value))]
    words += ["--launcher", shlex.join(options.launcher)] if options.launcher else []
    # With a terminal of its own (-tt) each of them gets SIGHUP when the connection ends, and saves its trials. The
    # guard sees to that, also where this process is killed.
    ssh = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} -tt -o BatchMode=yes -o ConnectTimeout=10"
    pdsh = ["pdsh", "-S", "-R", "ssh", "-f", "1024", "-w", ",".join(hosts), remote_command(study, words)]
    process = subprocess.Popen(
        [sys.executable, guard.__file__, f"{study.path} {os.getpid()}", "60", *pdsh],
        stdin=subprocess.PIPE, env={**os.environ, "PDSH_SSH_ARGS_APPEND": ssh}, start_new_session=True, bufsize=0,
    )  # fmt: skip
    assert process.stdin is not None
    asked = _on_signals()
    say(f"sweep processes on {', '.join(hosts)}")
    try:
        while process.poll() is None and not asked.wait(1.0):
            process.stdin.write(b".")
    except BrokenPipeError:  # it has ended just now
        pass
    finally:
        process.stdin.close()
        code = process.wait()
    return STOPPED if asked.is_set() else code
