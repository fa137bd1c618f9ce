"""What a training run shows on the terminal: a progress bar, and the table of an evaluation."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from titans_ds.graft.hub import MODE_NAMES
from titans_ds.training.evaluation import Estimate, Evaluation

_NAMES = {"base": "loss", **MODE_NAMES}


class TerminalReporter:
    """Progress on rank 0; where the output is no terminal, a plain line now and then.

    Args:
        steps: of the run.
    """

    def __init__(self, steps: int) -> None:
        self.console = Console()
        self._every = max(steps // 20, 1)
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self.console, disable=not sys.stdout.isatty())
        self._task = self._bar.add_task("", total=steps)
        self._steps = steps

    def __enter__(self) -> TerminalReporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Move the bar on."""
        gates = list(values.get("gate", {}).values())
        gate = f"  gate {sum(gates) / len(gates):.3f}" if gates else ""
        text = f"loss {values['loss']:.4f}{gate}  {values['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, description=text)
        if self._bar.disable and (step % self._every == 0 or step == self._steps):
            self.console.print(f"step {step}/{self._steps}  {text}", highlight=False)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """One line."""
        parts = [f"{name} {e.mean:.4f}" for name, e in evaluation.losses.items()]
        self.console.print(f"held-out loss after step {step}: {', '.join(parts)}", highlight=False)


def print_comparison(console: Console, evaluation: Evaluation) -> None:
    """The table at the end of a run."""
    tokens, number = sum(r.tokens for r in evaluation.repositories), len(evaluation.repositories)
    table = Table(title=f"Held-out loss, nats a token: mean over {number} repositories ({tokens:,} tokens)")
    table.add_column("", no_wrap=True)
    table.add_column("loss ± SE", justify="right")
    table.add_column("perplexity", justify="right")
    table.add_column("minus own memory ± SE (paired)", justify="right")
    for mode, loss in evaluation.losses.items():
        difference = evaluation.differences.get(mode)
        table.add_row(_NAMES[mode], _text(loss), f"{loss.perplexity:.3f}", _text(difference))
    console.print(table)
    if evaluation.forgetting is not None:
        text = f"forgetting, loss without memory minus loss before training: {_text(evaluation.forgetting)} (paired)"
        console.print(text, highlight=False, soft_wrap=True)


def _text(value: Estimate | None) -> str:
    return "" if value is None else f"{value.mean:.4f} ± {value.standard_error:.4f}"
