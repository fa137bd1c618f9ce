"""How likely a model finds the target: the measure that still has power where exact match is 1%.

Teacher-forced negative log-likelihood, in nats, of the whole target, of its identifiers, and of its first identifier
that the prompt does not hold (the one that only cross-file knowledge can give). Under healing the target is tokenised
together with the text that was taken off, and each token that still spells that text is renormalised over the tokens
that could spell it: the probability of the target given the prompt's text, as constrained decoding sees it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import grammars
from ..scoring.metrics import WORD, is_identifier, replace_strings
from .healing import HealedPrompt, still_missing
from .token_bytes import TokenBytes


@dataclass(frozen=True)
class ScoredTarget:
    """The tokens to score and the bytes, `healed_text`, that they must write before the target begins."""

    tokens: list[int]
    healed_text: bytes


def plain_target(tokenizer: Any, target: str) -> ScoredTarget:
    """Tokenise the target by itself: what follows a prompt that was not healed."""
    return ScoredTarget(tokenizer.encode(target, add_special_tokens=False), b"")


def healed_target(
    tokenizer: Any, vocabulary: TokenBytes, prompt: str, target: str, healed: HealedPrompt
) -> ScoredTarget:
    """Tokenise prompt and target as one text, and return what follows the kept tokens.

    Where the joint tokens begin otherwise than the kept ones, or write other bytes, the removed tokens and the target
    by itself are taken: still the right text, in less usual tokens.
    """
    joint = tokenizer.encode(prompt + target, add_special_tokens=False)
    wanted = healed.text + target.encode("utf-8")
    start = len(tokenizer.encode(prompt, add_special_tokens=False)) - len(healed.removed)
    if vocabulary.join(joint[start:]) == wanted:
        return ScoredTarget(joint[start:], healed.text)
    return ScoredTarget(healed.removed + tokenizer.encode(target, add_special_tokens=False), healed.text)


def token_nats(logits: Tensor, target: ScoredTarget, vocabulary: TokenBytes) -> list[float]:
    """Return each target token's negative log-likelihood; logits [at least n, V], row i predicts token i."""
    count = len(target.tokens)
    log_probabilities = torch.log_softmax(logits[:count].float(), dim=-1)
    tokens = torch.tensor(target.tokens, device=logits.device)
    nats = (-log_probabilities.gather(1, tokens[:, None])[:, 0]).tolist()
    missing, index = target.healed_text, 0
    while missing and index < count:
        allowed = torch.tensor(vocabulary.spelling(missing), device=logits.device)
        nats[index] += float(torch.logsumexp(log_probabilities[index, allowed], dim=0))
        missing = still_missing(missing, target.tokens[index], vocabulary)
        index += 1
    return nats


def summarise_likelihood(
    target: str, prompt: str, language: str, scored: ScoredTarget, nats: Sequence[float], vocabulary: TokenBytes
) -> dict[str, Any]:
    """Return nats, tokens and bytes of the target, of its identifiers, of its first identifier that the prompt lacks.

    A token counts for an identifier where they share a byte. Divide by bytes: the two boundaries have other tokens.
    """
    spans = _token_spans(scored, vocabulary)
    names = _identifier_spans(target, language)
    known = set(WORD.findall(prompt))
    missing = next(((name, span) for name, span in names if name not in known), None)
    found: dict[str, Any] = {"target_bytes": len(target.encode("utf-8"))}
    found["identifiers_bytes"] = sum(end - start for _, (start, end) in names)
    found |= _total("target", nats, range(len(nats)))
    found |= _total("identifiers", nats, _overlapping(spans, [span for _, span in names]))
    found |= _total("missing", nats, _overlapping(spans, [missing[1]] if missing else []))
    return found | {"missing_identifier": missing[0] if missing else None}


def _total(part: str, nats: Sequence[float], indices: Sequence[int] | range) -> dict[str, Any]:
    return {f"{part}_nats": sum(nats[i] for i in indices), f"{part}_tokens": len(indices)}


def _token_spans(scored: ScoredTarget, vocabulary: TokenBytes) -> list[tuple[int, int]]:
    """Byte spans of the tokens, counted from the target's start."""
    spans, position = [], -len(scored.healed_text)
    for token in scored.tokens:
        end = position + len(vocabulary.of(token) or b"")
        spans.append((position, end))
        position = end
    return spans


def _identifier_spans(target: str, language: str) -> list[tuple[str, tuple[int, int]]]:
    """Identifiers outside strings, with their byte spans."""
    blanked = replace_strings(target, lambda string: re.sub(r"\w", " ", string))
    return [
        (match.group(), (len(target[: match.start()].encode("utf-8")), len(target[: match.end()].encode("utf-8"))))
        for match in WORD.finditer(blanked)
        if is_identifier(match.group(), grammars.check_language(language))
    ]


def _overlapping(spans: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]]) -> list[int]:
    return [
        index for index, (start, end) in enumerate(spans) if any(start < last and first < end for first, last in wanted)
    ]
