"""The lm-evaluation-harness model `titans`: any of its tasks on a grafted model.

    python -m eval.harness run --model titans --tasks hellaswag \\
        --model_args pretrained=BASE,adapter=DIR,path=graft,prime=notes.txt

The harness is imported when the class is asked for; it needs the extra: pip install titans-ds[harness].
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import EvalError
from .generation.model import ModelSettings, Subject

_PATHS = ("graft", "ablation")


class _WithMemory:
    """Stands in for the base model where the harness calls it: every forward pass reads one memory."""

    def __init__(self, subject: Subject, path: str, texts: tuple[str, ...]) -> None:
        self._subject, self._path = subject, path
        self._grafted = subject.grafted
        with subject.on_path(path):
            self._state = subject.memory_for([texts])

    def _rows(self, count: int) -> Any:
        if self._state is None:
            return None
        return self._state.select(torch.zeros(count, dtype=torch.long))

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any:
        with self._subject.on_path(self._path):
            return self._grafted(input_ids, memory=self._rows(input_ids.shape[0]), **kwargs)

    def generate(self, input_ids: Tensor, **kwargs: Any) -> Any:
        with self._subject.on_path(self._path), self._grafted.memory_session(input_ids.shape[0]) as session:
            if (state := self._rows(input_ids.shape[0])) is not None:
                session.state = state
            return self._grafted.generate(input_ids, memory=session, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject.base_model, name)


@cache
def titans_lm() -> type:
    """Return the class `TitansLM`, registered as `titans`; EvalError where the harness is not installed."""
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise EvalError(
            f"lm-evaluation-harness cannot be imported ({error}). Install it with: pip install titans-ds[harness]."
        ) from error

    @register_model("titans")
    class TitansLM(HFLM):
        """A base model with an adapter.

        Args:
            pretrained: base model, folder or hub id.
            adapter: adapter folder.
            path: graft (the memory is read) or ablation (it is skipped).
            prime: a text file that the memory reads first; every request then reads the same memory.
            device, dtype: as in `python -m eval.crosscodeeval run`.
            kwargs: of HFLM: batch_size, max_length, add_bos_token, …
        """

        def __init__(
            self,
            pretrained: str,
            adapter: str,
            path: str = "graft",
            prime: str | None = None,
            device: str | None = None,
            dtype: str = "auto",
            trust_remote_code: bool = False,
            **kwargs: Any,
        ) -> None:
            if path not in _PATHS:
                raise EvalError(f"Unknown path {path!r}. Expected one of {', '.join(_PATHS)}.")
            settings = ModelSettings(pretrained, adapter, device or "auto", dtype, trust_remote_code)
            subject = Subject.load(settings, vanilla=False)
            self._with_memory: _WithMemory | None = None
            super().__init__(pretrained=subject.base_model, tokenizer=subject.tokenizer, backend="causal", **kwargs)
            texts = (_read(prime),) if prime else ()
            self._with_memory = _WithMemory(subject, path, texts)

        @property
        def model(self) -> Any:
            """What the harness calls."""
            return self._with_memory or super().model

    return TitansLM


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"Cannot read {path} to prime the memory: {error}. Expected a UTF-8 text file.") from error
