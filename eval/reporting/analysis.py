"""Every sample where modes differ: what each wrote, which identifier it missed, and where that identifier stands.

An identifier of the target that a prediction lacks can stand in the prompt, in the context put before some mode's
prompt, in the text some mode's memory was primed with, or nowhere. Counting these says whether a memory failed to
hold what it was given.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..run_folder import RunFolder
from ..scoring.arms import Arm
from ..scoring.metrics import identifiers

PLACES = ("prompt", "context", "memory", "nowhere")
_WORD = re.compile(r"\w+")
_TAIL_LINES = 4


def differing_samples(run: RunFolder, arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """Return the samples on which post-processed predictions differ between arms: those where EM differs first, then
    by ES spread.
    """
    tasks = [task for task in run.rows if all(task in arm.samples for arm in arms.values())]
    found = [
        _describe(task, run, arms)
        for task in tasks
        if len({arm.samples[task].prediction.strip() for arm in arms.values()}) > 1
    ]
    return sorted(found, key=lambda sample: (-sample["em_differs"], -sample["es_spread"]))


def missed_identifiers(run: RunFolder, arms: Mapping[str, Arm]) -> dict[str, dict[str, int]]:
    """Return {arm: {"missed": n, "prompt": n, "context": n, "memory": n, "nowhere": n}} over all samples.

    Places overlap: an identifier in the context and in the priming text counts in both.
    """
    counts: dict[str, Counter[str]] = {name: Counter(missed=0, **dict.fromkeys(PLACES, 0)) for name in arms}
    for task in run.rows:
        words = _words_by_place(task, run, arms)
        for name, arm in arms.items():
            if task in arm.samples:
                for identifier in _missed(arm, task, run.rows[task].language):
                    counts[name].update(["missed", *_places(identifier, words)])
    return {name: dict(counter) for name, counter in counts.items()}


def _describe(task: str, run: RunFolder, arms: Mapping[str, Arm]) -> dict[str, Any]:
    row, words = run.rows[task], _words_by_place(task, run, arms)
    outcomes = {name: _outcome(arm, task, row.language, words) for name, arm in arms.items()}
    similarities = [outcome["es"] for outcome in outcomes.values()]
    return {
        "task_id": task,
        "repository": row.repository,
        "file": row.file,
        "prompt_tail": "\n".join(row.prompt.split("\n")[-_TAIL_LINES:]),
        "target": row.groundtruth,
        "em_differs": len({outcome["em"] for outcome in outcomes.values()}) > 1,
        "es_spread": max(similarities) - min(similarities),
        "arms": outcomes,
    }


def _outcome(arm: Arm, task: str, language: str, words: Mapping[str, set[str]]) -> dict[str, Any]:
    sample = arm.samples[task]
    missed = [{"identifier": i, "places": _places(i, words)} for i in _missed(arm, task, language)]
    return {"prediction": sample.prediction, "em": sample.em, "es": sample.es, "missed": missed}


def _missed(arm: Arm, task: str, language: str) -> list[str]:
    sample = arm.samples[task]
    predicted = set(identifiers(sample.prediction, language))
    return [name for name in dict.fromkeys(identifiers(sample.target, language)) if name not in predicted]


def _words_by_place(task: str, run: RunFolder, arms: Mapping[str, Arm]) -> dict[str, set[str]]:
    records = [arm.records[task] for arm in arms.values() if task in arm.records]
    contexts = {digest for record in records if (digest := record.get("context"))}
    primed = {digest for record in records if not record.get("primed_from") for digest in record.get("memory") or ()}
    return {
        "prompt": _words([run.rows[task].prompt]),
        "context": _words(run.texts.get(digest, "") for digest in contexts),
        "memory": _words(run.texts.get(digest, "") for digest in primed),
    }


def _words(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in _WORD.findall(text)}


def _places(identifier: str, words: Mapping[str, set[str]]) -> list[str]:
    return [place for place in PLACES[:3] if identifier in words[place]] or ["nowhere"]
