"""Extra keys and values of an attention layer: memory as context (Titans, MAC), and persistent tokens.

MAC's tokens are f_W(q_1) … f_W(q_N), mapped to the model's width and then through the layer's own key and value
projections, without rotary embedding (they have no position). Every query sees them, with log s added to their logits.
Persistent tokens are learned instead, the same for every input, and stand in front of MAC's. All of them are prepended
after the KV cache has been updated, so the cache never holds them.

The base model's attention function is replaced by one that does nothing of this where no memory is in flight.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from titans_ds.errors import ConfigError
from titans_ds.graft.families import Mixer
from titans_ds.graft.injection import Columns, Ready, in_flight

_SUPPORTED = ("sdpa", "eager")


def install(base_model: nn.Module, mixers: list[Mixer]) -> str:
    """Let the attention of `base_model` see extra columns; returns the implementation it had, for `uninstall`.

    Raises:
        ConfigError: a layer is not attention, or the attention implementation takes no mask with a bias.
    """
    linear = [m.index for m in mixers if not m.is_attention]
    if linear:
        raise ConfigError(
            f"injection 'mac' and persistent tokens add keys and values to attention, but layer {linear[0]} is a "
            "DeltaNet layer; choose attention layers, or injection 'additive', 'mag' or 'mal' without persistent_tokens"
        )
    before = str(base_model.config._attn_implementation)  # type: ignore[union-attr]
    if before not in _SUPPORTED:
        raise ConfigError(
            f"injection 'mac' and persistent tokens work with attn_implementation 'sdpa' or 'eager', not {before!r} "
            "(they need a bias on the extra columns); load the base model with attn_implementation='sdpa'"
        )
    _register(before, type(mixers[0].module).__module__)
    base_model.set_attn_implementation(_name(before))  # type: ignore[operator]
    return before


def uninstall(base_model: nn.Module, before: str) -> None:
    """The inverse of `install`."""
    base_model.set_attn_implementation(before)  # type: ignore[operator]


def _name(implementation: str) -> str:
    return f"titans_{implementation}"


def _register(implementation: str, modeling_module: str) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    if implementation == "eager":
        attend = functools.partial(_eager_of_the_family, fallback=modeling_module)
    else:
        attend = AttentionInterface._global_mapping[implementation]
    AttentionInterface.register(_name(implementation), functools.partial(attend_with_memory, attend))
    AttentionMaskInterface.register(_name(implementation), ALL_MASK_ATTENTION_FUNCTIONS[implementation])


def _eager_of_the_family(module: nn.Module, *args: Any, fallback: str, **kwargs: Any) -> Any:
    """Every modeling file has its own eager attention."""
    modeling = sys.modules.get(type(module).__module__) or sys.modules[fallback]
    return modeling.eager_attention_forward(module, *args, **kwargs)


def attend_with_memory(
    attend: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """An attention function of transformers: `attend`, over the extra columns too where some are in flight.

    Args:
        attend: the function to hand on to.
        module: the attention module.
        query: [B, heads, T, head dim].
        key, value: [B, key-value heads, S, head dim], the cache included.
        attention_mask: bool or additive [B or 1, 1, T, S], or None for plain causal attention.
        kwargs: handed on.
    """
    flight = in_flight(module)
    if flight is not None and flight.record is not None:
        flight.record(key, value)
    if flight is None or not flight.columns:
        return attend(module, query, key, value, attention_mask, **kwargs)
    extra = [_keys_and_values(module, columns, query) for columns in flight.columns]
    bias = _bias(flight.columns, attention_mask, query, key)
    key = torch.cat([*(k for k, _ in extra), key], dim=2)
    value = torch.cat([*(v for _, v in extra), value], dim=2)
    kwargs.pop("is_causal", None)
    return attend(module, query, key, value, bias, **kwargs)


def _keys_and_values(module: Any, columns: Columns | Ready, query: Tensor) -> tuple[Tensor, Tensor]:
    """Extra keys and values, [B, key-value heads, N, head dim]; tokens become what the layer would make of them."""
    if isinstance(columns, Ready):
        return columns.key, columns.value
    key, value = _layer_projections(module, columns.tokens.to(query.dtype), query.shape[-1])
    return key.expand(query.shape[0], -1, -1, -1), value.expand(query.shape[0], -1, -1, -1)


def _layer_projections(module: Any, tokens_BNH: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    shape = (*tokens_BNH.shape[:2], -1, head_dim)
    if hasattr(module, "query_key_value"):  # GPT-NeoX
        fused = module.query_key_value(tokens_BNH).view(*tokens_BNH.shape[:2], -1, 3 * head_dim).transpose(1, 2)
        _, key, value = fused.chunk(3, dim=-1)
        return key, value
    key = module.k_proj(tokens_BNH).view(shape)
    if hasattr(module, "k_norm"):
        key = module.k_norm(key)
    return key.transpose(1, 2), module.v_proj(tokens_BNH).view(shape).transpose(1, 2)


def _bias(columns: tuple[Columns | Ready, ...], mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Additive mask [B or 1, 1, T, N + S]: log s on the extra columns, the given mask (or causality) on the others."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        ones = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = ones.tril(diagonal=num_keys - num_queries)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    mask = mask[..., :num_keys].to(query.dtype)
    return torch.cat([*(_log_s(c, mask) for c in columns), mask], dim=-1)


def _log_s(columns: Columns | Ready, mask: Tensor) -> Tensor:
    if isinstance(columns, Ready):
        return mask.new_zeros(*mask.shape[:-1], columns.key.shape[2])
    return columns.s.log().to(mask.dtype).expand(*mask.shape[:-1], columns.tokens.shape[1])
