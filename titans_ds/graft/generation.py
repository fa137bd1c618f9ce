"""What transformers' generate() is asked for, as far as a memory has to know it."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from titans_ds.errors import ConfigError


def check_options(base_model: nn.Module, kwargs: dict[str, Any], follows: bool) -> None:
    """Refuse what a memory can't go along with.

    Args:
        base_model: whose generation config holds where a keyword is missing.
        kwargs: of generate().
        follows: a token's query sees the tokens before it, beside the memory.

    Raises:
        ConfigError: assistant_model (its own forward passes would have to read the memory too); beam search where
            queries are convolved (each hypothesis would need a tail of its own).
    """
    if kwargs.get("assistant_model") is not None:
        raise ConfigError("generate: assistant_model is not supported with a memory; leave it out")
    if follows and _option(base_model, kwargs, "num_beams") > 1:
        raise ConfigError(
            "generate: beam search can't follow queries that are convolved with the tokens before them; use greedy "
            "search or sampling, or train with memory.features.convolve_queries false"
        )


def num_hypotheses(base_model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How many rows generate() makes of each sample."""
    return max(_option(base_model, kwargs, name) for name in ("num_beams", "num_return_sequences"))


def _option(base_model: nn.Module, kwargs: dict[str, Any], name: str) -> int:
    """A number that generate() takes from its keywords or from the generation config; 1 where it is not set."""
    config = kwargs.get("generation_config") or base_model.generation_config
    return int(cast(int, kwargs.get(name, getattr(config, name, None)) or 1))
