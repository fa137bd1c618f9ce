"""The delta rule through flash-linear-attention's Triton kernels, on a GPU, for heads of up to 256.

fla keeps the transpose of S here, computes in bf16 or fp16 with fp32 accumulation, and returns fp32 states.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import cast

import torch
from torch import Tensor


@functools.cache
def installed() -> bool:
    """Whether flash-linear-attention is."""
    return importlib.util.find_spec("fla") is not None


def delta_rule(
    queries_BTND: Tensor,
    keys_BTND: Tensor,
    values_BTND: Tensor,
    step_BTN: Tensor,
    log_keep_BTN: Tensor | None,
    state_BNDD: Tensor,
) -> tuple[Tensor, Tensor]:
    """As titans_ds.memory.delta.naive.delta_rule. One token without a gradient takes the recurrent kernel."""
    from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    recurrent = queries_BTND.shape[1] == 1 and not torch.is_grad_enabled()
    narrow = (queries_BTND.contiguous(), keys_BTND.contiguous(), values_BTND.contiguous())
    options = {
        "beta": step_BTN.to(queries_BTND.dtype),
        "scale": 1.0,
        "initial_state": state_BNDD.float().mT.contiguous(),
        "output_final_state": True,
    }
    if log_keep_BTN is None:
        run = fused_recurrent_delta_rule if recurrent else chunk_delta_rule
        reads, state = run(*narrow, **options)
    else:
        run = fused_recurrent_gated_delta_rule if recurrent else chunk_gated_delta_rule
        reads, state = run(*narrow, g=log_keep_BTN.float(), **options)
    return cast(Tensor, reads), cast(Tensor, state).mT.to(state_BNDD.dtype)
