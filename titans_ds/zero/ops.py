"""DeepSpeed's compiled ops: built once, by one process, into a folder of this project's own.

torch marks a build by a lock file, which a killed build leaves behind, and for which every later one waits for ever.
Here whoever builds or loads holds a lock of the operating system beside it, which goes with its process; so a lock file
that is found while holding that is stale, and is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from titans_ds.errors import ConfigError
from titans_ds.zero.engine import import_deepspeed

logger = logging.getLogger("titans_ds")

_BUILDERS = {"async_io": "AsyncIOBuilder", "cpu_adam": "CPUAdamBuilder"}
_REMEDIES = {
    "async_io": "NVMe offload needs libaio (Debian: apt-get install libaio-dev) and a C++ compiler",
    "cpu_adam": "it needs a C++ compiler (Debian: apt-get install g++)",
}


def extensions_dir() -> Path:
    """Where ops are built: TORCH_EXTENSIONS_DIR, or a folder of this project's own, one for each environment.

    A build names the files of torch and DeepSpeed that it is made from: in a folder that two environments share, each
    would build again, for minutes, what the other has built, under the feet of its runs.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")))
    parts = (torch.__file__, torch.__version__, metadata.version("deepspeed"), sys.version)
    key = f"torch{torch.__version__}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "titans_ds" / "torch_extensions" / key)))


def needed_ops(config: dict[str, Any]) -> list[str]:
    """The ops that a DeepSpeed configuration compiles: async_io for NVMe, cpu_adam where it is forced."""
    zero = config.get("zero_optimization", {})
    sections = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    ops = ["async_io"] if any(s.get("device") == "nvme" for s in sections) else []
    offloaded = sections[0].get("device", "none") != "none"
    return ops + (["cpu_adam"] if offloaded and config.get("zero_force_ds_cpu_optimizer") else [])


def prepare_ops(names: list[str]) -> None:
    """Load ops into this process, building those that are not there yet; one process at a time.

    Every rank calls it: the first one builds, which takes minutes, and the others wait for it.

    Raises:
        ConfigError: an op can't be built here.
    """
    if not names:
        return
    folder = extensions_dir()
    folder.mkdir(parents=True, exist_ok=True)
    _find_ninja()
    import_deepspeed()
    from deepspeed.ops import op_builder

    with exclusive(folder):
        for name in names:
            _load(name, getattr(op_builder, _BUILDERS[name])(), folder)


def is_built(name: str) -> bool:
    """Whether an op needs no building any more."""
    return (extensions_dir() / name / f"{name}.so").is_file()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Inside, no other process of this user builds or loads here; torch's lock files that dead ones left are gone."""
    with (folder / ".titans_ds.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for lock in folder.glob("*/lock"):
            logger.warning("removing %s, which a killed build left behind", lock)
            lock.unlink()
        yield


def _load(name: str, builder: Any, folder: Path) -> None:
    if not is_built(name):
        logger.warning("building DeepSpeed's %s into %s; this takes minutes, once", name, folder)
    try:
        builder.load(verbose=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"DeepSpeed's op {name} can't be built ({reason}); {_REMEDIES[name]}") from error


def _find_ninja() -> None:
    """torch looks for ninja on the path, where a virtual environment's programs are only once it is activated."""
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
