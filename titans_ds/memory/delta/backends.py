"""Which code computes the delta rule: one function chooses, and says why another can't."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_ds.errors import ConfigError
from titans_ds.memory.delta import chunkwise, fla_backend, naive
from titans_ds.memory.delta.config import DeltaConfig

MAX_FLA_WIDTH = 256  # of a head: what fla's kernels hold on chip


def delta_rule(
    config: DeltaConfig,
    queries_BTND: Tensor,
    keys_BTND: Tensor,
    values_BTND: Tensor,
    step_BTN: Tensor,
    log_keep_BTN: Tensor | None,
    state_BNDD: Tensor,
) -> tuple[Tensor, Tensor]:
    """Reads and the next state, by the backend that the settings ask for; see naive.delta_rule for the tensors.

    Raises:
        ConfigError: `backend: fla` cannot do this; says why, and which would.
    """
    name = choose(config, queries_BTND)
    given = (queries_BTND, keys_BTND, values_BTND, step_BTN, log_keep_BTN, state_BNDD)
    if name == "naive":
        return naive.delta_rule(*given)
    if name == "fla":
        return fla_backend.delta_rule(*given)
    return chunkwise.delta_rule(*given)


def choose(config: DeltaConfig, queries_BTND: Tensor) -> str:
    """`naive`, `chunkwise` or `fla`. Raises ConfigError where `fla` is asked for and can't do it."""
    if config.backend in ("naive", "chunkwise"):
        return config.backend
    reason = _why_not_fla(queries_BTND.shape[-1], queries_BTND.dtype, queries_BTND.device)
    if config.backend == "fla" and reason is not None:
        raise ConfigError(
            f"memory.backend is 'fla', but {reason}. Set memory.backend to 'chunkwise', which takes every width, dtype "
            "and device, or to 'auto'"
        )
    return "chunkwise" if reason is not None else "fla"


def _why_not_fla(width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why flash-linear-attention's kernels can't compute this; None where they can."""
    if width > MAX_FLA_WIDTH:
        return f"its kernels take heads of up to {MAX_FLA_WIDTH}, and these are {width} wide"
    if device.type != "cuda":
        return f"its kernels need a GPU, and this memory is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels compute in bf16 or fp16, and this memory is in {str(dtype).removeprefix('torch.')}"
    if not fla_backend.installed():
        return "flash-linear-attention is not installed (pip install 'titans-ds[deltanet]')"
    return None
