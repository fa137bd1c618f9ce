"""A window of files, slowly: memories by titans_ds.memory.mlp.naive inside a base model, gradients by torch.func.

One token at a time, inner gradients by torch.func.grad, the outer ones by torch.func.grad over the whole window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_ds.graft.titans_model import TitansModel
from titans_ds.memory import Answer
from titans_ds.memory.mlp import MLPConfig, MLPMemory, naive
from titans_ds.training.data.segments import IGNORED, Batch

Texts = list[list[Tensor]]  # by sample, hidden states [T, H] of the files so far


def gradients(model: TitansModel, batches: Sequence[Batch], through_base: bool) -> dict[str, Tensor]:
    """Of the mean loss over the window's targets, in every trained parameter."""
    window = Window(model, batches)
    trained = {n: p.detach() for n, p in window.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(window, parameters, ())

    with mock.patch.object(MLPMemory, "forward", _forward_attached if through_base else _forward_detached):
        return torch.func.grad(loss)(trained)


class Window(nn.Module):
    """A model over a window of batches; its forward is the loss."""

    def __init__(self, model: TitansModel, batches: Sequence[Batch]) -> None:
        super().__init__()
        self.model, self.batches = model, batches

    def forward(self) -> Tensor:
        """The mean loss of all target tokens."""
        losses, state = [], None
        for batch in self.batches:
            ids, labels, mask, reset = (
                torch.from_numpy(a) for a in (batch.input_ids, batch.labels, batch.mask, batch.reset)
            )
            output = self.model.read_write(ids, state=state, reset=reset, write_mask=mask)
            logits = self.model.logits(output.last_hidden).flatten(0, 1)
            losses.append(F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum"))
            state = output.state
        return torch.stack(losses).sum() / sum(batch.num_targets for batch in self.batches)


def _forward_detached(self: MLPMemory, hidden: Tensor, *inputs: Any) -> Any:
    return _forward(self, hidden, hidden.detach(), *inputs)


def _forward_attached(self: MLPMemory, hidden: Tensor, *inputs: Any) -> Any:
    return _forward(self, hidden, hidden, *inputs)


def _forward(
    self: MLPMemory,
    hidden: Tensor,
    source: Tensor,
    state: Any,
    mask: Tensor,
    reset: Tensor,
    plan: Any,
    queries: Tensor | None,
    trace: None,
) -> Any:
    """As MLPMemory.forward, with the files so far as the state."""
    parameters = {**dict(self.named_parameters()), **dict(self.named_buffers())}
    texts: Texts = [[] for _ in hidden] if state is None else state["texts"]
    texts = [[] if bool(reset[row]) else text for row, text in enumerate(texts)]
    reads = []
    for row, text in enumerate(texts):
        length = int(mask[row].sum())
        if queries is None:
            read = _read_tokens(parameters, text, hidden[row, :length], source[row, :length], self.config)
            read = F.pad(read, (0, 0, 0, hidden.shape[1] - length))
        else:
            read = _read_queries(parameters, text, queries, self.config)
        reads.append(read)
    after = [[*text, source[row, : int(mask[row].sum())]] for row, text in enumerate(texts)]
    return Answer(torch.stack(reads), {"texts": after}, {})


def _read_tokens(
    parameters: dict[str, Tensor], before: list[Tensor], hidden: Tensor, source: Tensor, config: MLPConfig
) -> Tensor:
    """Every token of the last file, read with what was written before: [T, H]."""
    written = naive.features(parameters, torch.cat([*before, source]), config)
    asked = naive.features(parameters, torch.cat([*before, hidden]), config)
    tokens = [
        [dataclasses.replace(w, query=a.query) for w, a in zip(*heads, strict=True)]
        for heads in zip(written, asked, strict=True)
    ]
    lengths = [len(h) for h in (*before, hidden)]
    reads = [
        naive._run_head(parameters, head, number, config, lengths)[0][-len(hidden) :]
        for number, head in enumerate(zip(*tokens, strict=True))
    ]
    return _output(parameters, reads, config)


def _read_queries(parameters: dict[str, Tensor], before: list[Tensor], queries: Tensor, config: MLPConfig) -> Tensor:
    """MAC's queries [N, D], read with what was written in the files before: [N, H]."""
    reads = []
    tokens = naive.features(parameters, torch.cat(before), config) if before else []
    for head, asked in enumerate(queries.split(config.head_dim, dim=1)):
        weights = [parameters[f"initial_w{level}"] for level in range(config.depth)]
        if before:
            own = [token[head] for token in tokens]
            weights = naive._run_head(parameters, own, head, config, [len(h) for h in before])[1].weights
        elif config.heads > 1:
            weights = [w[head] for w in weights]
        units = [naive._unit(q, config) for q in asked]
        reads.append(torch.stack([naive.network(parameters, weights, q, head, config) for q in units]))
    return _output(parameters, reads, config)


def _output(parameters: dict[str, Tensor], reads: list[Tensor], config: MLPConfig) -> Tensor:
    together = torch.cat([naive._read_norm(r, config) for r in reads], dim=1)
    if config.features.read_norm:
        together = together * parameters["read_norm"]
    return together @ parameters.get("output_projection.weight", parameters["key_projection.weight"].T).T
