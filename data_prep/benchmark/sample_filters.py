"""Which targets become samples: filters as upstream, and a choice that does not depend on their number.

Upstream drops prompts of fewer than 10 lines of code, targets of fewer than 3 or more than 30 tokens, and targets that
stand verbatim in another file. Here a target that stands verbatim earlier in its own prompt goes too, and one that
needs nothing after the name (the name alone and closing brackets).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..hashing import hash64
from .targets import Target

_TOKEN = re.compile(r"\w+|[^\w\s]")
_NO_CODE = re.compile(r"\s*(?:#|import\b|from\b.*\bimport\b|$)")


@dataclass(frozen=True)
class SampleLimits:
    """Lengths in lines of code, tokens (words and signs) and characters; counts a file and a repository."""

    min_prompt_lines: int = 10
    min_target_tokens: int = 3
    max_target_tokens: int = 30
    max_file_characters: int = 40_000
    max_per_file: int = 2
    max_per_repository: int = 12


def reason_against(target: Target, files: Mapping[str, str], limits: SampleLimits) -> str:
    """Return why a target makes no sample, "" where it does."""
    text = files[target.file]
    prompt, truth = text[: target.start], text[target.start : target.end]
    if len(text) > limits.max_file_characters:
        return "file_too_long"
    if sum(not _NO_CODE.match(line) for line in prompt.split("\n")[:-1]) < limits.min_prompt_lines:
        return "prompt_too_short"
    tokens = _TOKEN.findall(truth)
    if not limits.min_target_tokens <= len(tokens) <= limits.max_target_tokens:
        return "target_length"
    if not any(re.match(r"\w", token) for token in tokens[1:]):
        return "target_trivial"
    if truth in prompt:
        return "target_in_prompt"
    if any(truth in other for path, other in files.items() if path != target.file):
        return "target_in_other_file"
    return ""


def choose(
    targets: Iterable[Target], files: Mapping[str, str], limits: SampleLimits, repository: str, seed: int
) -> tuple[list[Target], Counter[str]]:
    """Return the repository's samples in the order of its files, and how many targets each filter dropped."""
    dropped: Counter[str] = Counter()
    fitting: list[Target] = []
    for target in targets:
        reason = reason_against(target, files, limits)
        if reason:
            dropped[reason] += 1
        else:
            fitting.append(target)
    chosen = _limited(fitting, files, limits, repository, seed)
    dropped["limit"] = len(fitting) - len(chosen)
    return chosen, dropped


def _limited(
    targets: Sequence[Target], files: Mapping[str, str], limits: SampleLimits, repository: str, seed: int
) -> list[Target]:
    ranked = _mixed(sorted(targets, key=lambda t: hash64(f"{repository}\0{t.file}\0{t.start}", f"sample{seed}")))
    per_file: Counter[str] = Counter()
    lines: set[tuple[str, int]] = set()
    truths: set[str] = set()
    chosen: list[Target] = []
    for target in ranked:
        text = files[target.file]
        line, truth = (target.file, text.count("\n", 0, target.start)), text[target.start : target.end]
        if per_file[target.file] == limits.max_per_file or line in lines or truth in truths:
            continue
        per_file[target.file] += 1
        lines.add(line)
        truths.add(truth)
        chosen.append(target)
    return sorted(chosen[: limits.max_per_repository], key=lambda target: (target.file, target.start))


def _mixed(targets: Sequence[Target]) -> list[Target]:
    """Return the targets so that the kinds take turns: imported names are many, members are what CrossCodeEval has."""
    turn: Counter[str] = Counter()
    turns = []
    for target in targets:
        turn[target.kind] += 1
        turns.append(turn[target.kind])
    return [target for _, target in sorted(zip(turns, targets, strict=True), key=lambda pair: pair[0])]
