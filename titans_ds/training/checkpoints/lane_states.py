"""Lane states on disk, by global lane number: any number of ranks can take them up again."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from titans_ds.memory import MemoryState
from titans_ds.training.step import Carried


def save_lane_states(folder: Path, carried: Carried, owned: slice) -> Path | None:
    """Write the states of this rank's lanes [owned.start, owned.stop); None where the model has no memory."""
    if not carried.state:
        return None
    path = folder / f"lanes_{owned.start:05d}-{owned.stop - 1:05d}.safetensors"
    restart = [] if carried.restart is None else [int(flag) for flag in carried.restart.tolist()]
    header = {"first": str(owned.start), "stop": str(owned.stop), "restart": json.dumps(restart)}
    MemoryState(carried.state).save(path, header)
    return path


def load_lane_states(folder: Path, owned: slice, device: torch.device) -> Carried:
    """The states of the lanes that this rank owns now, out of the files of all ranks that wrote them."""
    parts: list[MemoryState] = []
    flags: list[torch.Tensor] = []
    for path in sorted(folder.glob("lanes_*.safetensors")):
        state, header = MemoryState.load(path)
        first, stop = int(header["first"]), int(header["stop"])
        wanted = range(max(first, owned.start), min(stop, owned.stop))
        if wanted:
            rows = torch.tensor(wanted) - first
            restart = torch.tensor(json.loads(header["restart"]) or [0] * (stop - first), dtype=torch.bool)
            parts.append(state.select(rows))
            flags.append(restart[rows])
    if not parts:
        return Carried()
    together = torch.cat(flags)
    state = MemoryState.concatenate(parts).to(device)
    return Carried(state.layers, together.to(device) if bool(together.any()) else None)
