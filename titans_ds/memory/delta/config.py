"""Settings of the delta memory, and its presets `delta` and `gated_delta`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from titans_ds.validation import check_choices, require

Backend = Literal["auto", "naive", "chunkwise", "fla"]
MAX_DEFAULT_DIM = 1024


@dataclass(frozen=True)
class DeltaConfig:
    """A memory of one matrix a head, written token by token with the (gated) delta rule.

    DeltaNet (arXiv 2406.06484) and Gated DeltaNet (arXiv 2412.06464) define the rule; docs/memories.md has the
    equations as they are used here.

    Args:
        dim: width of keys, values and queries, all heads together. None: `attach` takes the base model's width, at
            most 1,024, and saves the number.
        heads: number of matrices; each is [dim / heads, dim / heads].
        token_shift: the key is made of the token before, the value of the token itself, so that the memory learns what
            follows what. Without it, key and value are of the same token.
        query_projection: `tied` makes queries with the key projection; `learned` gives them one of their own.
        projections: keys and values through `learned` projections, or `orthogonal` ones that stay as they start.
        step_size: of a write. One `constant` number; one `learned` number a head; or one a head from each `token`.
        initial_step_size: where it starts, between 0 and 1. 1 replaces what a key held, 0 writes nothing.
        forget_gate: each token lets every head forget a share of its matrix before it writes.
        initial_forget: where that share starts, between 0 and 1.
        backend: which code computes the recurrence. `auto` takes flash-linear-attention's kernels on a GPU where they
            can do it, else chunkwise products; `naive` goes token by token.
        seed: of the projections; each layer draws its own from it.
    """

    dim: int | None = None
    heads: int = 1
    token_shift: bool = True
    query_projection: Literal["tied", "learned"] = "tied"
    projections: Literal["learned", "orthogonal"] = "learned"
    step_size: Literal["constant", "learned", "token"] = "learned"
    initial_step_size: float = 0.5
    forget_gate: bool = False
    initial_forget: float = 0.001
    backend: Backend = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        require(self.heads >= 1, f"memory.heads is {self.heads}; it must be 1 or more")
        require(self.dim is None or self.dim >= 1, f"memory.dim is {self.dim}; it must be 1 or more")
        require(
            self.dim is None or self.dim % self.heads == 0,
            f"memory.dim {self.dim} is not divisible by memory.heads {self.heads}",
        )
        for name in ("initial_step_size", "initial_forget"):
            value = getattr(self, name)
            require(0 < value < 1, f"memory.{name} is {value}; it must be between 0 and 1")
        require(
            self.forget_gate or self.initial_forget == type(self).initial_forget,
            "memory.initial_forget is set, but memory.forget_gate is false; set memory.forget_gate to true, or leave "
            "initial_forget out",
        )

    @property
    def head_dim(self) -> int:
        """Width of one head; `dim` must be resolved."""
        assert self.dim is not None
        return self.dim // self.heads

    def resolved(self, hidden_size: int) -> DeltaConfig:
        """The settings with a `dim` that suits a base model of this width.

        With several heads the width is rounded down to a multiple of them.
        """
        if self.dim is not None:
            return self
        width = min(hidden_size, MAX_DEFAULT_DIM)
        require(width >= self.heads, f"memory.heads is {self.heads}, more than the width {width}; set memory.dim")
        return replace(self, dim=width // self.heads * self.heads)

    def write_only(self) -> dict[str, str]:
        """Parameters, by what their names begin with, that act through writes alone, each with the reason.

        First-order training gives them no gradient.
        """
        reasons = {}
        if self.projections == "learned":
            reasons["value_projection"] = "the value projection acts only through the write"
        if self.projections == "learned" and self.query_projection == "learned":
            reasons["key_projection"] = "the key projection acts only through the write"
        if self.step_size != "constant":
            reasons["step_"] = "the step size acts only through later reads"
        if self.forget_gate:
            reasons["forget_"] = "the forget gate acts only through later reads"
        return reasons


PRESETS: dict[str, dict[str, Any]] = {
    "delta": {},
    "gated_delta": {"step_size": "token", "forget_gate": True},
}
