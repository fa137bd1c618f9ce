"""Modes without a written memory: the references that a memory is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.retrieval import Retriever
from .mode import Mode, ModeInputs

if TYPE_CHECKING:
    from data_prep.crosscodeeval import CrossCodeEvalRow


def retrieved_context(row: CrossCodeEvalRow, inputs: ModeInputs) -> str:
    """The cross-file context of the run's retrieval."""
    return inputs.retriever.text(row)


def oracle_context(row: CrossCodeEvalRow, inputs: ModeInputs) -> str:
    """The row's chunks ordered by a query that holds the target."""
    return Retriever("oracle").text(row)


MODES = [
    Mode("none", "graft on, memory unwritten", "graft"),
    Mode("ablation", "memory skipped, LoRA kept", "ablation"),
    Mode("concat", "memory skipped, context before the prompt", "ablation", context=retrieved_context),
    Mode("vanilla", "base model, neither graft nor LoRA", "vanilla"),
    Mode("vanilla_concat", "base model, context before the prompt", "vanilla", context=retrieved_context),
    Mode("concat_oracle", "memory skipped, oracle context", "ablation", context=oracle_context),
    Mode("vanilla_concat_oracle", "base model, oracle context", "vanilla", context=oracle_context),
]
