"""From a row and a mode to the tokens that the model reads.

Without fill-in-the-middle: context (cut on the right to its budget) + newline + prompt (cut on the left), as
upstream's vLLM script puts them together. With it: prefix token, context and prompt, suffix token, right context (cut
on the right), middle token. Only whole tokens are cut, and every cut is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import EvalError
from ..generation.healing import HealedPrompt, heal
from ..generation.token_bytes import TokenBytes

if TYPE_CHECKING:
    from data_prep.crosscodeeval import CrossCodeEvalRow

BOUNDARIES = ("heal", "plain")
_INFILL_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
)


@dataclass(frozen=True)
class Budget:
    """Limits in tokens: the whole input, the context within it, the right context within it, and room for new
    tokens.
    """

    max_length: int
    context_tokens: int
    right_tokens: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        least = self.max_new_tokens + 16
        if min(self.max_length, self.max_new_tokens) < 1 or min(self.context_tokens, self.right_tokens) < 0:
            raise EvalError("--max-length and --max-new-tokens must be at least 1, the other limits at least 0.")
        if self.max_length < least:
            raise EvalError(f"--max-length is {self.max_length}; with the new tokens at least {least} are needed.")

    def fitted_to(self, max_positions: int | None) -> Budget:
        """Return the budget with max_length cut to what the model allows."""
        if max_positions is None or max_positions >= self.max_length:
            return self
        return Budget(max_positions, self.context_tokens, self.right_tokens, self.max_new_tokens)


@dataclass(frozen=True)
class BuiltPrompt:
    """Tokens before the prompt, the prompt healed, tokens after it (fill-in-the-middle), the context as far as it is
    shown, and what was cut."""

    head: list[int]
    healed: HealedPrompt
    tail: list[int]
    context: str
    num_context_tokens: int
    num_prompt_tokens: int
    num_cut_prompt_tokens: int
    num_cut_context_tokens: int

    @property
    def prefix(self) -> list[int]:
        """What the model reads first under healing (all that it reads, in fill-in-the-middle)."""
        return self.head + self.healed.kept + self.tail

    @property
    def plain_prefix(self) -> list[int]:
        """What the model reads without healing."""
        return self.head + self.healed.kept + self.healed.removed + self.tail


class PromptBuilder:
    """Builds prompts for one tokenizer and one budget."""

    def __init__(self, tokenizer: Any, vocabulary: TokenBytes, budget: Budget) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._budget = budget
        first = tokenizer("a").input_ids[:1]
        self._start = first if first and first[0] == tokenizer.bos_token_id else []

    def build(self, row: CrossCodeEvalRow, context: str, infill: bool) -> BuiltPrompt:
        """Return the tokens of one row; EvalError where the model lacks the tokens for fill-in-the-middle."""
        marks = infill_tokens(self._tokenizer) if infill else None
        num_cut, context_ids = self._context(context)
        right = self._encode(row.right_context)[: self._budget.right_tokens] if marks else []
        before = [*self._start, *marks[:1], *context_ids] if marks else [*self._start, *context_ids]
        after = [marks[1], *right, marks[2]] if marks else []
        prompt = self._encode(row.prompt)
        room = self._budget.max_length - self._budget.max_new_tokens - len(before) - len(after)
        if room < 1:
            raise EvalError(
                f"--context-tokens {self._budget.context_tokens} leaves no room for the prompt within "
                f"--max-length {self._budget.max_length} and {self._budget.max_new_tokens} new tokens. "
                "Give less context, or more length."
            )
        kept = prompt[-room:] if prompt else self._empty_prompt(before)
        return BuiltPrompt(
            head=before,
            healed=heal(kept, self._vocabulary),
            tail=after,
            context=self._vocabulary.text(context_ids),
            num_context_tokens=len(context_ids),
            num_prompt_tokens=len(kept),
            num_cut_prompt_tokens=len(prompt) - len(kept),
            num_cut_context_tokens=num_cut,
        )

    def _context(self, context: str) -> tuple[int, list[int]]:
        """Return how many tokens were cut, and context + newline."""
        if not context or not self._budget.context_tokens:
            return 0, []
        tokens = self._encode(context)
        kept = tokens[: self._budget.context_tokens]
        return len(tokens) - len(kept), kept + self._encode("\n")

    def _empty_prompt(self, before: list[int]) -> list[int]:
        """A model must read something: the end-of-text token where there is nothing at all."""
        return [] if before else [self._tokenizer.eos_token_id]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def infill_tokens(tokenizer: Any) -> tuple[int, int, int]:
    """Return the ids of the prefix, suffix and middle tokens.

    EvalError where the tokenizer has none of the known sets.
    """
    for names in _INFILL_TOKENS:
        ids = tokenizer.convert_tokens_to_ids(list(names))
        if all(i is not None and i != tokenizer.unk_token_id for i in ids):
            return tuple(ids)
    raise EvalError(
        "This tokenizer has no fill-in-the-middle tokens (looked for those of Qwen, StarCoder, SantaCoder, DeepSeek, "
        "CodeLlama). Use a model that has them, or leave out the modes with fim."
    )
