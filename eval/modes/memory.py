"""Modes that prime the memory with the cross-file snippets, and the controls that say what such a result means."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

from ..data.retrieval import Retriever
from ..errors import EvalError
from .mode import Mode, ModeInputs, Priming
from .prompted import retrieved_context

if TYPE_CHECKING:
    from data_prep.crosscodeeval import CrossCodeEvalRow

_NEAREST = 5


def own_snippets(row: CrossCodeEvalRow, inputs: ModeInputs) -> Priming:
    """The row's own snippets."""
    return Priming(inputs.retriever.snippets(row))


def oracle_snippets(row: CrossCodeEvalRow, inputs: ModeInputs) -> Priming:
    """The row's own snippets, ordered by a query that holds the target."""
    return Priming(Retriever("oracle").snippets(row))


def wrong_snippets(row: CrossCodeEvalRow, inputs: ModeInputs) -> Priming:
    """Snippets of another repository: same language, one of the five nearest in length, chosen by the seed.

    The choice depends on the seed and the task alone, not on the rows that a --limit leaves.
    """
    own = inputs.snippet_lengths[row.task_id]
    others = [o for o in inputs.rows.values() if o.repository != row.repository and o.language == row.language]
    others = [other for other in others if other.crossfile_list]
    if not others:
        raise EvalError(
            f"memory_wrong needs rows of another {row.language} repository than {row.repository!r} with cross-file "
            "chunks; the data has none. Give a file with more repositories, or leave the mode out."
        )
    lengths = inputs.snippet_lengths
    nearest = sorted(others, key=lambda other: (abs(lengths[other.task_id] - own), other.task_id))[:_NEAREST]
    digest = hashlib.sha256(f"{inputs.seed} {row.task_id}".encode()).digest()
    chosen = random.Random(int.from_bytes(digest[:8], "big")).choice(nearest)
    return Priming(inputs.retriever.snippets(chosen), chosen.task_id)


def memory_steps(value: str) -> Mode:
    """Primed with k inner steps on each segment in place of the trained number."""
    if not value.isdecimal() or int(value) < 1:
        raise EvalError(f"memory_steps={value}: expected a number of inner steps, 1 or more, as in memory_steps=4.")
    description = f"primed with {value} inner steps a segment"
    controls = {"inner_steps": int(value)}
    return Mode(f"memory_steps={value}", description, "graft", priming=own_snippets, controls=controls)


MODES = [
    Mode("memory", "primed with the cross-file snippets, prompt alone", "graft", priming=own_snippets),
    Mode("memory_wrong", "primed on another repository, length-matched", "graft", priming=wrong_snippets),
    Mode("memory_signflip", "gradient ascent", "graft", priming=own_snippets, controls={"sign": -1.0}),
    Mode("memory_query_key", "read with the key projection", "graft", priming=own_snippets, controls={"query": "key"}),
    Mode("memory_plus_concat", "primed, and context too", "graft", context=retrieved_context, priming=own_snippets),
    Mode("memory_oracle", "primed with the oracle's order of snippets", "graft", priming=oracle_snippets),
]
FAMILIES = {"memory_steps": memory_steps}
