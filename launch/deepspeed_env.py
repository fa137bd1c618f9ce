"""Write .deepspeed_env: the variables that DeepSpeed's launcher takes to the other nodes.

    python launch/deepspeed_env.py [--out .deepspeed_env] [--set NAME=VALUE …]

A variable set in your shell reaches the ranks of this node, but those of other nodes only through this file, which the
launcher reads in the folder that it is started from (or in your home). It gets every variable of the present
environment that changes how training runs, and those given with --set. Names that look like a secret are left out:
log in on the nodes instead. Slurm and torchrun started by srun pass the environment on by themselves.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only its own folder is on the path

from titans_ds.errors import ConfigError
from titans_ds.files import check_file, write_text
from titans_ds.program import program

# DeepSpeed passes on by itself what starts with PYTHON, NCCL, UCX, LD_LIBRARY_PATH, PATH.
_PREFIXES = ("DS_", "GLOO_", "HF_", "NCCL_", "OMP_", "TITANS_", "TORCH_", "TORCHINDUCTOR_", "TRANSFORMERS_", "TRITON_")
_NAMES = ("CUDA_HOME", "TMPDIR", "TOKENIZERS_PARALLELISM", "XDG_CACHE_HOME")
_SECRET = re.compile(r"TOKEN($|_(?!IZER))|KEY|SECRET|PASSWORD|CREDENTIAL")
_UNSAFE = re.compile(r"[\"'`$\\\n]")  # DeepSpeed puts values into a shell's command line, at most within double quotes


@program("run the same command again")
def main(argv: list[str]) -> None:
    """Run the program; returns its exit code, 2 for an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="launch/deepspeed_env.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".deepspeed_env"), help="file to write (%(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="more variables, or other values")
    options = parser.parse_args(argv)
    values = {**chosen(os.environ), **given(options.set)}
    write(options.out, values)
    for name in sorted(n for n in os.environ if _wanted(n) and _SECRET.search(n)):
        print(f"left out, since it looks like a secret: {name}")
    print(f"{options.out}: {', '.join(sorted(values)) or 'no variables'}")


def chosen(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that change how training runs, without secrets."""
    return {name: value for name, value in environment.items() if _wanted(name) and not _SECRET.search(name)}


def given(assignments: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE by name. Raises ConfigError where one is not of that form."""
    for text in assignments:
        if not re.match(r"[A-Za-z_]\w*=", text):
            raise ConfigError(f"--set {text}: expected NAME=VALUE")
    return dict(text.split("=", 1) for text in assignments)


def write(path: Path, values: Mapping[str, str]) -> None:
    """Write the file.

    Raises ConfigError where DeepSpeed could not pass a value on unchanged, OutputError where something else is there.
    """
    check_file(path, rb"\A(\w+=[^\n]*\n)+\Z")
    for name, value in values.items():
        if _UNSAFE.search(value) or not value:
            raise ConfigError(
                f"{name} is {value!r}: DeepSpeed can't pass on a value that is empty or holds a quote, $, `, \\ or a "
                f"line break. Unset it, or give another: --set {name}=VALUE"
            )
    write_text(path, "".join(f"{name}={value}\n" for name, value in sorted(values.items())))


def _wanted(name: str) -> bool:
    return name.startswith(_PREFIXES) or name in _NAMES


if __name__ == "__main__":
    sys.exit(main())
