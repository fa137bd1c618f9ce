"""The exact delta rule of a linear memory, parallel over the tokens of a chunk.

W_t = (1 - alpha_t) W_(t-1) - theta_t (W_(t-1) k_t - v_t) k_t^T, one token after the other. With g_t the product of
(1 - alpha) up to t, W_t = g_t W_0 + sum_(s <= t) (g_t / g_s) u_s k_s^T, where the u solve a triangular system (the UT
transform of DeltaNet, arXiv 2406.06484, with the gate of arXiv 2412.06464):
    u_t + theta_t sum_(s < t) (g_(t-1) / g_s) <k_s, k_t> u_s = theta_t (v_t - g_(t-1) W_0 k_t).

Legend of shape suffixes: N batch x heads, C tokens, D memory dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_rule(
    weight_NDD: Tensor, keys_NCD: Tensor, values_NCD: Tensor, step_NC: Tensor, log_keep_NC: Tensor
) -> Tensor:
    """The weights after all tokens of a chunk, [N, D, D], in their own dtype.

    Args:
        weight_NDD: W_0.
        keys_NCD, values_NCD: finite everywhere.
        step_NC: theta_t; 0 where nothing is stored.
        log_keep_NC: log(1 - alpha_t); 0 where nothing is stored.
    """
    dtype = weight_NDD.dtype
    total = log_keep_NC.cumsum(dim=-1)
    before = total - log_keep_NC  # log g_(t-1)
    strictly = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).tril(-1)
    decay = torch.exp((before.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~strictly, -torch.inf))
    system = step_NC.unsqueeze(-1) * decay * (keys_NCD @ keys_NCD.mT).to(dtype)
    recalled = (keys_NCD @ weight_NDD.to(keys_NCD.dtype).mT).to(dtype) * torch.exp(before).unsqueeze(-1)
    target = step_NC.unsqueeze(-1) * (values_NCD.to(dtype) - recalled)
    u_NCD: Tensor = torch.linalg.solve_triangular(_plus_identity(system), target, upper=False, unitriangular=True)
    u_NCD = u_NCD * torch.exp(total[..., -1:] - total).unsqueeze(-1)
    gained = u_NCD.to(keys_NCD.dtype).mT @ keys_NCD
    return weight_NDD * torch.exp(total[..., -1]).view(-1, 1, 1) + gained.to(dtype)


def _plus_identity(system_NCC: Tensor) -> Tensor:
    return system_NCC + torch.eye(system_NCC.shape[-1], dtype=system_NCC.dtype, device=system_NCC.device)
