"""The (gated) delta rule, one token after the other: the specification that every other path is compared with.

Legend of shape suffixes: B batch, T tokens, N heads, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_rule(
    queries_BTND: Tensor,
    keys_BTND: Tensor,
    values_BTND: Tensor,
    step_BTN: Tensor,
    log_keep_BTN: Tensor | None,
    state_BNDD: Tensor,
) -> tuple[Tensor, Tensor]:
    """What each token reads after its own write, and the state after the last one.

        S_t = a_t S_(t-1) + b_t (v_t - a_t S_(t-1) k_t) k_t^T        o_t = S_t q_t

    (DeltaNet, arXiv 2406.06484, equation 4; with the gate a_t of Gated DeltaNet, arXiv 2412.06464, equation 10.)

    Args:
        queries_BTND, keys_BTND: q_t and k_t, of norm 1.
        values_BTND: v_t; finite everywhere.
        step_BTN: b_t; 0 where nothing is written.
        log_keep_BTN: log a_t, 0 where nothing is written; None for a = 1.
        state_BNDD: S_0, its rows values, its columns keys.

    Returns:
        o [B, T, N, D] in the dtype of the queries; S_T in that of the state.
    """
    state, reads = state_BNDD, []
    for t in range(queries_BTND.shape[1]):
        key, value, query = (x[:, t].to(state.dtype).unsqueeze(-1) for x in (keys_BTND, values_BTND, queries_BTND))
        if log_keep_BTN is not None:
            state = state * log_keep_BTN[:, t].to(state.dtype).exp()[..., None, None]
        error = value - state @ key
        state = state + step_BTN[:, t].to(state.dtype)[..., None, None] * error @ key.mT
        reads.append((state @ query).squeeze(-1))
    if not reads:
        return torch.zeros_like(values_BTND), state
    return torch.stack(reads, dim=1).to(queries_BTND.dtype), state
