"""What the facts of all ranks mean, for launch/preflight.py."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Facts = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Args:
        name: what was looked at.
        verdict: `note` is no failure.
        found: on the nodes.
    """

    name: str
    verdict: Literal["ok", "note", "FAILED"]
    found: str


def judge(facts: list[Facts], limits: argparse.Namespace) -> list[Check]:
    """All checks.

    Args:
        facts: of every rank.
        limits: min_bandwidth GB/s, max_skew s, min_free GiB, min_accelerator share, mib.
    """
    return [
        _placement(facts),
        _packages(facts),
        _commit(facts),
        _same("environment", facts, lambda f: json.dumps(f["variables"]), "the same NCCL, GLOO and TITANS variables"),
        _same("configuration", facts, lambda f: f["config"]),
        _same("DeepSpeed configuration", facts, lambda f: f.get("deepspeed")),
        _same("corpus readable", facts, lambda f: f.get("corpus")),
        _same("base model", facts, lambda f: f.get("base")),
        _accelerators(facts, limits.min_accelerator),
        _all_reduce(facts, limits),
        _clocks(facts, limits.max_skew),
        _shared(facts),
        _disk(facts, limits.min_free),
    ]


def _placement(facts: list[Facts]) -> Check:
    counts = {host: len(ranks) for host, ranks in _by_host(facts).items()}
    text = ", ".join(f"{host}: {n}" for host, n in counts.items())
    return Check("ranks by node", "ok" if len(set(counts.values())) == 1 else "note", text)


def _packages(facts: list[Facts]) -> Check:
    names = sorted({name for f in facts for name in f["packages"]})
    parts = [f"{n}: {text}" for n in names if (text := _differing(facts, lambda f, n=n: f["packages"].get(n)))]
    if parts:
        return Check("package versions", "FAILED", "; ".join(parts))
    shown = ", ".join(f"{n} {v}" for n, v in facts[0]["packages"].items() if v is not None)
    return Check("package versions", "ok", shown)


def _commit(facts: list[Facts]) -> Check:
    differing = _differing(facts, lambda f: f["commit"])
    if differing:
        return Check("code", "FAILED", differing)
    commit = facts[0]["commit"]
    if commit is None:
        return Check("code", "ok", "installed package (no git checkout)")
    changed = "changed" in commit  # the same commit does not say the same changes
    return Check("code", "note" if changed else "ok", commit)


def _same(name: str, facts: list[Facts], key: Any, same: str = "") -> Check:
    """Whether a fact is there, and the same everywhere."""
    errors = [f for f in facts if isinstance(key(f), dict)]
    if errors:
        return Check(name, "FAILED", _lines((f["host"], key(f)["error"]) for f in errors))
    missing = [f["host"] for f in facts if key(f) is None]
    if missing:
        return Check(name, "FAILED", f"not looked at on {', '.join(dict.fromkeys(missing))}: the settings don't parse")
    differing = _differing(facts, key)
    return Check(name, "FAILED" if differing else "ok", differing or same or str(key(facts[0])))


def _accelerators(facts: list[Facts], least: float) -> Check:
    names = _differing(facts, lambda f: f["accelerator"]["name"])
    busy = [
        (f["host"], f"rank {f['rank']}: {f['accelerator']['free']:.0%} of the memory is free")
        for f in facts
        if f["accelerator"]["free"] < least
    ]
    if busy:
        return Check("accelerators free", "FAILED", _lines(busy))
    return Check("accelerators free", "note" if names else "ok", names or facts[0]["accelerator"]["name"])


def _all_reduce(facts: list[Facts], limits: argparse.Namespace) -> Check:
    wrong = [str(f["rank"]) for f in facts if not f["all_reduce"]["right"]]
    if wrong:
        return Check("all-reduce", "FAILED", f"the sum is wrong on rank {', '.join(wrong)}")
    if len(facts) == 1:
        return Check("all-reduce", "ok", "one rank")
    slowest = min(f["all_reduce"]["gb_s"] for f in facts)
    text = f"right; {slowest:.2f} GB/s a rank ({limits.mib} MiB)"
    if slowest < limits.min_bandwidth:
        return Check("all-reduce", "FAILED", f"{text}, below --min_bandwidth {limits.min_bandwidth:g}")
    return Check("all-reduce", "ok", text)


def _clocks(facts: list[Facts], most: float) -> Check:
    ahead = {host: min((f["skew"] for f in ranks), key=abs) for host, ranks in _by_host(facts).items()}
    spread = max(ahead.values()) - min(ahead.values())
    text = ", ".join(f"{host} {seconds:+.3f} s" for host, seconds in ahead.items())
    return Check("clocks", "ok" if spread <= most else "FAILED", text)


def _shared(facts: list[Facts]) -> Check:
    name = "run folder shared"
    if facts[0]["probe"] is None:
        return Check(name, "FAILED", f"not looked at: the settings don't parse on {facts[0]['host']}")
    broken = [(f["host"], f["probe"]["error"]) for f in facts if isinstance(f["probe"], dict)]
    unseen = [(f["host"], "does not see the file that rank 0 wrote") for f in facts if f["probe"] is False]
    return (
        Check(name, "FAILED", _lines(broken + unseen)) if broken or unseen else Check(name, "ok", facts[0]["run_dir"])
    )


def _disk(facts: list[Facts], least_gib: float) -> Check:
    """Rank 0's view: the run folder is one place."""
    name, free, needed = "disk space", facts[0].get("disk"), facts[0].get("checkpoints")
    for value in (free, needed):
        if not isinstance(value, int):
            return Check(name, "FAILED", value["error"] if isinstance(value, dict) else "the settings don't parse")
    text = f"{_gib(free)} free, checkpoints take about {_gib(needed)}"
    return Check(name, "ok" if free >= needed + least_gib * 2**30 else "FAILED", text)


def _by_host(facts: list[Facts]) -> dict[str, list[Facts]]:
    hosts = defaultdict(list)
    for f in facts:
        hosts[f["host"]].append(f)
    return dict(hosts)


def _differing(facts: list[Facts], key: Any) -> str:
    """Which hosts have which value, or nothing where all have the same."""
    hosts: dict[str, list[str]] = defaultdict(list)
    for f in facts:
        hosts[str(key(f))].append(f["host"])
    if len(hosts) == 1:
        return ""
    return "; ".join(f"{', '.join(dict.fromkeys(names))}: {value}" for value, names in hosts.items())


def _lines(entries: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    return "\n".join(dict.fromkeys(f"{host}: {text}" for host, text in entries))


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
