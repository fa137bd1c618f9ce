"""For all tests: a test that was tried again says why, and what a run in a test leaves in the environment goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from _pytest.terminal import TerminalReporter
from hypothesis import HealthCheck, settings

LINES = 30  # of a failed attempt: what went wrong stands at its end

# Tests start hundreds of processes, which would each compile 2,600 files anew where no bytecode is kept.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How long an example takes says nothing on a busy machine.
settings.register_profile(
    "patient", parent=settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """A run of launch/train.py in the test's own process sets the variables of a rank: not for the tests after it."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) | set(before):
        if name != "PYTEST_CURRENT_TEST" and os.environ.get(name) != before.get(name):
            _set(name, before.get(name))


def _set(name: str, value: str | None) -> None:
    if value is None:
        del os.environ[name]
    else:
        os.environ[name] = value


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """The end of every failed attempt at a test that was tried again, which the log would not show otherwise."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"attempt {report.rerun + 1} at {report.nodeid} failed ({report.when})")
        for line in last_lines(report.longreprtext):
            terminalreporter.write_line(line)
        for title, text in dict(report.sections).items():  # those of the attempts before come first
            terminalreporter.write_line(f"--- {title}")
            for line in last_lines(text):
                terminalreporter.write_line(line)


def last_lines(text: str) -> list[str]:
    """At most LINES of them."""
    return text.rstrip().splitlines()[-LINES:]
