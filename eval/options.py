"""Every setting of a run, as one value: what the configuration's hash is taken over."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from .data.prompts import BOUNDARIES
from .errors import EvalError
from .generation.model import ModelSettings

STOPS = ("statement", "none")
DECODE_GRAPHS = ("auto", "on", "off")
COMPILE = ("auto", "mlp", "none")
# What changes no result, but for rounding: where and how fast it runs, and which rows and modes.
_NOT_HASHED = (
    *("device", "batch_size", "decode_graphs", "compile", "trust_remote_code"),
    *("limit", "subset", "modes", "boundary", "data"),
)


@dataclass(frozen=True)
class RunOptions:
    """Settings of `run`; see `python -m eval.crosscodeeval run --help` for each."""

    base: str
    data: str
    modes: str
    adapter: str | None = None
    language: str | None = None
    boundary: str = "heal"
    limit: int | None = None
    subset: str = "first"
    seed: int = 0
    batch_size: int = 8
    max_length: int = 2048
    context_tokens: int = 512
    right_tokens: int = 512
    max_new_tokens: int = 50
    stop: str = "statement"
    temperature: float = 0.0
    top_p: float = 1.0
    retrieval: str = "given"
    num_chunks: int | None = None
    embedder: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    decode_graphs: str = "auto"
    compile: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise EvalError(f"--batch-size is {self.batch_size}; expected at least 1.")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise EvalError("--temperature must be 0 (greedy) or more, --top-p above 0 and at most 1.")
        if self.stop not in STOPS:
            raise EvalError(f"Unknown --stop {self.stop!r}. Expected one of {', '.join(STOPS)}.")
        if self.decode_graphs not in DECODE_GRAPHS:
            known = ", ".join(DECODE_GRAPHS)
            raise EvalError(f"Unknown --decode-graphs {self.decode_graphs!r}. Expected one of {known}.")
        if self.compile not in COMPILE:
            raise EvalError(f"Unknown --compile {self.compile!r}. Expected one of {', '.join(COMPILE)}.")

    @property
    def boundaries(self) -> tuple[str, ...]:
        """The boundaries to run; EvalError for an unknown one."""
        names = BOUNDARIES if self.boundary == "both" else tuple(self.boundary.split(","))
        if not names or any(name not in BOUNDARIES for name in names) or len(set(names)) < len(names):
            raise EvalError(f"Unknown --boundary {self.boundary!r}. Expected heal, plain or both.")
        return names

    @property
    def model(self) -> ModelSettings:
        """What to load."""
        return ModelSettings(self.base, self.adapter, self.device, self.dtype, self.trust_remote_code, self.compile)

    def check_room(self) -> None:
        """Raise EvalError where a whole context would leave no token of the prompt."""
        if self.context_tokens + self.max_new_tokens >= self.max_length:
            raise EvalError(
                f"--context-tokens {self.context_tokens} leaves no room for the prompt within "
                f"--max-length {self.max_length} and {self.max_new_tokens} new tokens. "
                "Give less context, or more length."
            )

    def resolved(self) -> RunOptions:
        """Return the options with automatic choices made."""
        dtype = str(self.model.resolved_dtype()).removeprefix("torch.")
        device = self.model.resolved_device()
        automatic = "on" if device.type == "cuda" else "off"
        graphs = automatic if self.decode_graphs == "auto" else self.decode_graphs
        return replace(
            self, device=str(device), dtype=dtype, decode_graphs=graphs, compile=self.model.resolved_compile()
        )

    def hashed(self) -> dict[str, Any]:
        """Those of the options that can change a result."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_HASHED}

    def digest(self, identity: dict[str, Any]) -> str:
        """Return 12 hex digits over all that can change a result, with the digests of the data and adapter in
        `identity`.
        """
        text = json.dumps(self.hashed() | identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
