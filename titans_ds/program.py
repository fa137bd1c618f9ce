"""What every command-line program of this project shares: how it ends, and the ranges of its numbers.

Beside __main__.py this is the one module of the library that prints. Loads no torch: data_prep uses it, too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from titans_ds.errors import TitansError

STOPPED = 130  # 128 + SIGINT, as a shell reports it


def program(go_on: str) -> Callable[[Callable[[list[str]], int | None]], Callable[[Sequence[str] | None], int]]:
    """Make a program's `main` out of a function of its arguments; `main(None)` takes the command line's.

    What a user can mend (TitansError, a file that can't be read, too little memory) is printed in one message, without
    a traceback, and gives exit code 2, as argparse's own errors do; Ctrl-C gives 130 and the sentence `go_on`. With
    --debug among the arguments, or TITANS_DS_DEBUG=1 in the environment, the traceback is printed before.
    """

    def decorate(run: Callable[[list[str]], int | None]) -> Callable[[Sequence[str] | None], int]:
        @functools.wraps(run)
        def main(arguments: Sequence[str] | None = None) -> int:
            given = list(sys.argv[1:] if arguments is None else arguments)
            debug = "--debug" in given or os.environ.get("TITANS_DS_DEBUG", "0") not in ("", "0")
            try:
                return run([argument for argument in given if argument != "--debug"]) or 0
            except (TitansError, OSError) as error:
                # An OSError without a file is none of the user's paths: a defect here, whose traceback is wanted.
                if isinstance(error, OSError) and error.filename is None:
                    raise
                if debug:
                    traceback.print_exc()
                text = str(error) if isinstance(error, TitansError) else f"{error.filename}: {error.strerror}"
                print(f"error: {text}", file=sys.stderr, flush=True)
                return 2
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if debug:
                    traceback.print_exc()
                text = f"out of memory ({' '.join(str(error).split())[:200]}); make what is computed at once smaller"
                print(f"error: {text}", file=sys.stderr, flush=True)
                return 2
            except SystemExit as error:  # argparse's own, after its message
                return error.code if isinstance(error.code, int) else int(bool(error.code))
            except KeyboardInterrupt:
                if debug:
                    traceback.print_exc()
                print(f"stopped: {go_on}", file=sys.stderr, flush=True)
                return STOPPED

        return main

    return decorate


def missing_extra(module: str) -> str | None:
    """What to say where a module can't be imported: the extra of this package that brings it; None where none does."""
    wanted = canonicalize_name(module.partition(".")[0])
    extra = next((extra for name, extra in _extras() if name == wanted), None)
    return extra and f"{module} is not installed; it comes with `pip install 'titans-ds[{extra}]'`"


def need_extra(extra: str) -> None:
    """End this process with one message and exit code 2, unless all that an extra of this package brings is here."""
    for name, group in _extras():
        module = name.replace("-", "_")
        if group == extra and importlib.util.find_spec(module) is None:
            print(f"error: {missing_extra(module)}", file=sys.stderr, flush=True)
            raise SystemExit(2)


def _extras() -> Iterator[tuple[str, str]]:
    """Every distribution that an extra brings, and the extra; none where this package is merely on the path."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for text in importlib.metadata.requires("titans-ds") or []:
            requirement = Requirement(text)
            extra = re.search(r'extra == "([\w-]+)"', str(requirement.marker))
            if extra:
                yield canonicalize_name(requirement.name), extra[1]


def _out_of_memory(error: Exception) -> bool:
    """Whether Python, numpy, or torch on its host or GPU could not have the memory that they asked for."""
    torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or torchs


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return argparse's `type` of an option: a whole number from `least` to `most`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}; expected a whole number from {least} to {most}")
        return value

    return convert


def real_number(least: float, most: float, above: bool = False) -> Callable[[str], float]:
    """Return argparse's `type` of an option: a finite number from `least` (or above it) to `most`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or not value <= most:
            bounds = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r}; expected a number {bounds}")
        return value

    return convert


def some_text(text: str) -> str:
    """Argparse's `type` of an option that an unset variable of a shell must not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty; is a variable of your shell unset?")
    return text


def plain_console(**options: Any) -> Any:
    """Return rich's Console that prints text as it is: a path may hold `[`."""
    from rich.console import Console

    return Console(markup=False, highlight=False, **options)
