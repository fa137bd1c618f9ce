"""Random states of a rank, without pickles: torch, its accelerator, numpy and Python."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save_random_state(path: Path) -> None:
    """Write the states of this process to a safetensors file."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numpy_state = [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)]
    save_file(tensors, path, metadata={"python": json.dumps(random.getstate()), "numpy": json.dumps(numpy_state)})


def load_random_state(path: Path) -> None:
    """The inverse of `save_random_state`."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        torch.set_rng_state(file.get_tensor("torch"))
        if torch.cuda.is_available() and "cuda" in file.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor("cuda"))
    version, internal, gauss = json.loads(metadata["python"])
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = json.loads(metadata["numpy"])
    state: Any = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    np.random.set_state(state)
