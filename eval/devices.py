"""The device that an option names."""

from __future__ import annotations

import torch

from .errors import EvalError


def device_named(name: str) -> torch.device:
    """Return the device; `auto` is the GPU where there is one. EvalError for one that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index not in (None, 0)):
        raise EvalError(f"--device {name[:40]!r}: expected cpu, cuda or cuda:N (N from 0).")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EvalError(
            f"--device {name[:40]!r}: this torch sees {torch.cuda.device_count()} CUDA devices; give another, or cpu."
        )
    return device
