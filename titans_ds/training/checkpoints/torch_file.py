"""The plain engine's part of a checkpoint: one safetensors file, no pickles."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from titans_ds.errors import CheckpointError

_FILE = "engine.safetensors"


def save(folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Write parameters, as the optimizer holds them, and its moments.

    Args:
        folder: exists.
        parameters: by name, those that the optimizer updates.
        optimizer: Adam's.
    """
    tensors = {f"parameter.{name}": p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, folder / _FILE)


def load(folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """The inverse of `save`. Raises CheckpointError where parameters differ."""
    tensors = load_file(folder / _FILE)
    names = {n.removeprefix("parameter.") for n in tensors if n.startswith("parameter.")}
    if names != set(parameters):
        raise CheckpointError(
            f"{folder} holds other parameters: {', '.join(sorted(names ^ set(parameters))[:4])} differ"
        )
    for name, parameter in parameters.items():
        for key in ("parameter", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"{key}.{name}", parameter)
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{key}.{name} in {folder} has shape {list(value.shape)} instead of {list(parameter.shape)}"
                )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            state = _moments(tensors, name, parameter.device)
            if state:
                optimizer.state[parameter] = state


def trained_parameters(folder: Path) -> dict[str, Tensor]:
    """The parameters alone, by name, as the optimizer held them."""
    tensors = load_file(folder / _FILE)
    return {n.removeprefix("parameter."): t for n, t in tensors.items() if n.startswith("parameter.")}


def _moments(tensors: dict[str, Tensor], name: str, device: torch.device) -> dict[str, Tensor]:
    """Adam's: the step count stays on the CPU."""
    keys = ("step", "exp_avg", "exp_avg_sq")
    found = {key: tensors[f"{key}.{name}"] for key in keys if f"{key}.{name}" in tensors}
    return {key: value if key == "step" else value.to(device) for key, value in found.items()}
