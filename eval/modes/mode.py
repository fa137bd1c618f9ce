"""What a mode is: which path through the model, what stands before the prompt, what the memory was primed with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..data.retrieval import Retriever

if TYPE_CHECKING:
    from data_prep.crosscodeeval import CrossCodeEvalRow


@dataclass(frozen=True)
class ModeInputs:
    """What a mode may use to make its input: all rows of the benchmark file, the retriever, the seed."""

    rows: Mapping[str, CrossCodeEvalRow]
    retriever: Retriever
    seed: int

    @cached_property
    def snippet_lengths(self) -> dict[str, int]:
        """Characters of each row's snippets, by task id."""
        return {task: sum(map(len, self.retriever.snippets(row))) for task, row in self.rows.items()}


@dataclass(frozen=True)
class Priming:
    """Texts to read into the memory, in order; `source` is the task they come from where that is another one."""

    texts: tuple[str, ...]
    source: str | None = None


def no_context(row: CrossCodeEvalRow, inputs: ModeInputs) -> str:
    """Nothing stands before the prompt."""
    return ""


def no_priming(row: CrossCodeEvalRow, inputs: ModeInputs) -> Priming:
    """The memory is left unwritten."""
    return Priming(())


@dataclass(frozen=True)
class Mode:
    """One way to run the benchmark.

    Args:
        name: as given to --modes.
        description: one line, for the report.
        path: graft (memory read), ablation (memory skipped, LoRA kept) or vanilla (base model alone).
        context: text put before the prompt.
        priming: texts read into the memory.
        controls: of TitansModel.controls: sign, inner_steps, query.
        infill: fill-in-the-middle, with the row's right context.
    """

    name: str
    description: str
    path: str
    context: Callable[[CrossCodeEvalRow, ModeInputs], str] = no_context
    priming: Callable[[CrossCodeEvalRow, ModeInputs], Priming] = no_priming
    controls: Mapping[str, Any] = field(default_factory=dict)
    infill: bool = False
