"""Everything that the page of `titans-ds inspect` shows of one memory and one text."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from launch.inspection.repository import TokenFile
from titans_ds import TitansModel
from titans_ds.graft.compare import primed, token_losses
from titans_ds.memory.delta.memory import DeltaMemory
from titans_ds.memory.delta.recall import WriteLog, recorded

RECALLED = 8  # terms of a read that are kept, the largest


@torch.no_grad()
def inspect_memory(
    model: TitansModel, tokenizer: Any, read: list[TokenFile], other: list[TokenFile], text: TokenFile
) -> dict[str, Any]:
    """Read the files, predict the text, and keep what was written, what is left of it, and what was recalled.

    Args:
        model: in eval mode.
        tokenizer: of the model.
        read: files that the memory reads, in order.
        other: as many tokens of something else, for the wrong memory.
        text: to predict, two tokens or more.

    Returns:
        what launch/inspection/memory.html takes, as JSON's types. Losses are in nats; the first token has none.
    """
    taken_apart = {} if model.graft.injection == "mac" else model.memories
    logs = {index: WriteLog() for index, grafted in taken_apart.items() if isinstance(grafted.memory, DeltaMemory)}
    measured = {}
    with contextlib.ExitStack() as recording:
        for index, log in logs.items():
            recording.enter_context(recorded(model.memories[index].memory, log))
        with primed(model, [file.ids for file in read]) as memory:
            measured["own"] = token_losses(model, text.ids, 1, memory)
    for name, files in (("wrong", other), ("empty", [])):
        with primed(model, [file.ids for file in files]) as memory:
            measured[name] = token_losses(model, text.ids, 1, memory)
    with model.disable_memory():
        measured["ablated"] = token_losses(model, text.ids, 1, None)
    losses = {name: [round(loss, 4) for loss in found.tolist()] for name, found in measured.items()}
    return {
        "summary": model.memory_summary(),
        "losses": losses,
        "means": {name: sum(values) / len(values) for name, values in losses.items()},
        "text": {"name": text.name, "tokens": [tokenizer.decode([i]) for i in text.ids]},
        "read": [{"name": file.name, "tokens": [tokenizer.decode([i]) for i in file.ids]} for file in read],
        "layers": [{"index": index, **of_layer(log)} for index, log in logs.items()],
    }


def of_layer(log: WriteLog) -> dict[str, Any]:
    """One layer's part. `recalled` has a list for every token that was predicted: [token that was read, its share]."""
    if not log.keys:
        return {"written": [], "held": [], "norms": [], "ranks": [], "stride": log.stride, "recalled": []}
    shares = log.shares()[:-1]  # the read at a token helps to predict the next; nothing follows the last
    largest = shares.abs().topk(min(RECALLED, shares.shape[1]), dim=1).indices
    recalled = [
        [[place, round(float(row[place]), 4)] for place in places]
        for row, places in zip(shares, largest.tolist(), strict=True)
    ]
    return {
        "written": [round(x, 4) for x in log.written().tolist()],
        "held": [round(x, 4) for x in log.still_there().tolist()],
        "norms": [round(x, 4) for x in log.norms],
        "ranks": [round(x, 3) for x in log.ranks],
        "stride": log.stride,
        "recalled": recalled,
    }
