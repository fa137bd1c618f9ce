"""What transformers' generate() is asked for, as far as a memory has to know it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from titans_ds.errors import ConfigError, DataError

# Passes of these look ahead of the text and take tokens back, or carry the text on in several versions.
_NOT_IN_ONE_LINE = {
    "assistant_model": None,
    "assistant_early_exit": None,
    "dola_layers": None,
    "guidance_scale": 1,
    "num_beams": 1,
    "past_key_values": None,
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "use_mtp": False,
}


def check_options(base_model: nn.Module, kwargs: dict[str, Any], follows: bool, write_prompt: bool) -> None:
    """Refuse what a memory can't go along with. A memory that is only read, token by token, goes along with everything.

    Args:
        base_model: whose generation config holds where a keyword is missing.
        kwargs: of generate().
        follows: a token's query sees the tokens before it, beside the memory.
        write_prompt: the prompt is written into the memory first.

    Raises:
        ConfigError: names the option, and what would do.
    """
    config = kwargs.get("generation_config") or base_model.generation_config
    for name, neutral in _NOT_IN_ONE_LINE.items():
        value = kwargs.get(name, getattr(config, name, None))
        if follows and value is not None and value is not False and value != neutral:
            shown = f"{name}={value}" if isinstance(value, (int, float, str)) else name
            raise ConfigError(
                f"generate: {shown} can't follow queries that are convolved with the tokens before them; use greedy "
                "search or sampling, or train with memory.features.convolve_queries false"
            )
    if write_prompt and kwargs.get("past_key_values") is not None:
        raise ConfigError(
            "generate: write_prompt would write the tokens in past_key_values a second time; prime the new ones by "
            "themselves with TitansModel.prime, and leave write_prompt out"
        )


def prompt_mask(base_model: nn.Module, ids: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """Which tokens of a prompt are text, as generate() sees it: without a mask, padding tokens show where it is padded.

    Args:
        ids: [B, T].
        kwargs: of generate().
    """
    given: Tensor | None = kwargs.get("attention_mask")
    config: Any = kwargs.get("generation_config") or base_model.generation_config
    padding = kwargs.get("pad_token_id", config.pad_token_id)
    ends = kwargs.get("eos_token_id", config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    if given is not None or padding is None or padding in ends:
        return given
    return torch.as_tensor(ids != padding)


def check_padding(mask: Tensor | None) -> None:
    """Raise DataError where a prompt ends in padding: what follows would be read from there, and not from its end.

    Args:
        mask: [B, T], as of `prompt_mask`.
    """
    if mask is not None and mask.dim() == 2 and mask.shape[1] and not bool(mask[:, -1].all()):
        raise DataError(
            "generate: a prompt is padded on the right, so that its text would go on from padding; pad on the left: "
            "tokenizer.padding_side = 'left'"
        )


class PrimedLookup:
    """transformers' prompt lookup, in files that were primed and then in the prompt.

    What it proposes is verified by the model's own passes, so that the text is the same; a good guess saves passes.

    Args:
        lookup: transformers' PromptLookupCandidateGenerator, for a prompt of one text.
        primed: token ids of the files, [1, F].
    """

    def __init__(self, lookup: Any, primed: Tensor) -> None:
        self.lookup, self.primed, self.max_length = lookup, primed, lookup.max_length
        lookup.max_length += primed.shape[1]  # of files and text together, which it is given as one prompt

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """The text [1, T] and what may follow it, [1, T + up to prompt_lookup_num_tokens]; no scores."""
        files = self.primed.to(input_ids.device)
        found, _ = self.lookup.get_candidates(torch.cat([files, input_ids], dim=1), **kwargs)
        # The model adds a token of its own to those that it accepts.
        return found[:, files.shape[1] : files.shape[1] + max(self.max_length - 1, input_ids.shape[1])], None

    def __getattr__(self, name: str) -> Any:
        """Whatever else transformers asks a generator of candidates for."""
        return getattr(self.lookup, name)


@contextlib.contextmanager
def looking_up(base_model: Any, primed: Tensor) -> Iterator[None]:
    """Inside, `base_model.generate` with prompt_lookup_num_tokens looks in `primed` [1, F], too."""
    make = base_model._get_candidate_generator

    def wrapped(*args: Any, **kwargs: Any) -> PrimedLookup:
        return PrimedLookup(make(*args, **kwargs), primed)

    base_model._get_candidate_generator = wrapped
    try:
        yield
    finally:
        del base_model._get_candidate_generator
