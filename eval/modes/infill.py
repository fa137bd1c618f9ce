"""Fill-in-the-middle: the right context is shown too, for models that have the tokens."""

from __future__ import annotations

from .memory import own_snippets
from .mode import Mode
from .prompted import retrieved_context

MODES = [
    Mode("vanilla_fim", "base model, fill-in-the-middle", "vanilla", infill=True),
    Mode("vanilla_fim_concat", "base model, FIM, context first", "vanilla", context=retrieved_context, infill=True),
    Mode("ablation_fim", "memory skipped, fill-in-the-middle", "ablation", infill=True),
    Mode("concat_fim", "memory skipped, FIM, context first", "ablation", context=retrieved_context, infill=True),
    Mode("memory_fim", "primed, fill-in-the-middle", "graft", priming=own_snippets, infill=True),
]
