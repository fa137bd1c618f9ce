"""Settings of the prefix memory (GradMem, arXiv 2603.13875), which belongs to no layer: see titans_ds.graft.prefix."""

from __future__ import annotations

from dataclasses import dataclass

from titans_ds.validation import check_choices, require


@dataclass(frozen=True)
class PrefixConfig:
    """Prefix vectors written through the base model by gradient steps on its own loss.

    Args:
        tokens: N vectors of the model's width, the memory of a sample.
        inner_steps: gradient steps K on each segment.
        step_size: theta.
        learn_step_size: one learned step size per inner step (kept positive), starting from step_size.
        learn_initial: train the prefix that a new repository starts from.
        initial_std: standard deviation of that prefix; about that of the base model's embeddings.
        seed: of the initial prefix.
    """

    tokens: int = 8
    inner_steps: int = 2
    step_size: float = 1.0
    learn_step_size: bool = False
    learn_initial: bool = True
    initial_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("tokens", "inner_steps"):
            require(getattr(self, name) >= 1, f"memory.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("step_size", "initial_std"):
            require(getattr(self, name) > 0, f"memory.{name} is {getattr(self, name)}; it must be above 0")
