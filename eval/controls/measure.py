"""What a trained model answers, with its memory and with everything that should not help.

arm           the questions are answered with
memory        the context, written in segments
ablation      the memory skipped: the base model alone
wrong         the memory of another episode
unwritten     the initial memory
permuted      a context whose values were dealt to other keys; scored against the true values
full_context  no memory; context and questions in one window (another model, trained for that)
"""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from titans_ds.graft.titans_model import TitansModel
from titans_ds.memory import MemoryState
from titans_ds.training.data.segments import IGNORED
from titans_ds.training.engine import TorchEngine
from titans_ds.training.module import PlainModel

from .episodes import Episode, Integers, Task, whole

ARMS = ("memory", "ablation", "wrong", "unwritten", "permuted")
_GROUP = 64  # episodes in a forward pass


@dataclass(frozen=True)
class Answers:
    """Of every question [B, M]: whether all of its tokens are right, and its loss in nats per token."""

    right: npt.NDArray[np.bool_]
    nll: npt.NDArray[np.float64]

    @property
    def em(self) -> float:
        """Percent of questions answered right."""
        return 100.0 * float(self.right.mean())

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return float(self.nll.mean())


def measure(engine: TorchEngine, task: Task, level: int, episodes: int, seed: int) -> dict[str, Answers]:
    """Every arm's answers on the same fresh episodes, never trained on but by chance; needs two or more of them."""
    rng = np.random.default_rng([zlib.crc32(b"measure"), seed, level])
    sizes = [len(part) for part in np.array_split(np.arange(episodes), max(1, episodes // _GROUP))]
    parts = [_arms(engine, task.episode(rng, level, size)) for size in sizes]
    return {arm: _join([part[arm] for part in parts]) for arm in parts[0]}


def check(engine: TorchEngine, episode: Episode) -> Answers:
    """One arm: the memory, or the full context of a model without one."""
    arm = "full_context" if isinstance(engine.module.model, PlainModel) else "memory"
    return _arms(engine, episode, only=arm)[arm]


@torch.no_grad()
def _arms(engine: TorchEngine, episode: Episode, only: str | None = None) -> dict[str, Answers]:
    engine.set_training(False)
    try:
        if isinstance(engine.module.model, PlainModel):
            return {"full_context": _full_context(engine, episode)}
        arms = [a for a in ARMS if only in (None, a) and (a != "permuted" or episode.permuted_BT is not None)]
        return {arm: _arm(engine.module.model, episode, arm) for arm in arms}
    finally:
        engine.set_training(True)


def _arm(model: TitansModel, episode: Episode, arm: str) -> Answers:
    state = model.init_state(episode.batch_size)
    if arm in ("memory", "wrong", "permuted"):
        context = episode.permuted_BT if arm == "permuted" and episode.permuted_BT is not None else episode.context_BT
        state = _primed(model, context)
    if arm == "wrong":
        state = state.select(torch.arange(episode.batch_size).roll(1))
    ids = torch.from_numpy(episode.question_BQ).to(model.device)
    with model.disable_memory() if arm == "ablation" else contextlib.nullcontext():
        logits = model(ids, memory=state, use_cache=False).logits
    return score(logits, episode.labels_BQ, episode.answer_length)


def _primed(model: TitansModel, context_BT: Integers) -> MemoryState:
    with model.memory_session(len(context_BT)) as memory:
        model.prime(torch.from_numpy(context_BT), memory)
    return memory.state


def _full_context(engine: TorchEngine, episode: Episode) -> Answers:
    batch, model = whole(episode), engine.module.model
    hidden = model.read_write(torch.from_numpy(batch.input_ids).to(engine.device)).last_hidden
    return score(model.logits(hidden), batch.labels, episode.answer_length)


def score(logits_BQV: Tensor, labels_BQ: Integers, answer_length: int) -> Answers:
    """Greedy answers, each token after the true ones before it: all of them right is what greedy decoding gives."""
    labels = torch.from_numpy(labels_BQ).to(logits_BQV.device)
    asked = labels != IGNORED
    logits, targets = logits_BQV[asked].float(), labels[asked]
    right = (logits.argmax(dim=-1) == targets).view(len(labels), -1, answer_length).all(dim=-1)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    nll = nll.view(len(labels), -1, answer_length).double().mean(dim=-1)
    return Answers(right.cpu().numpy(), nll.cpu().numpy())


def _join(parts: list[Answers]) -> Answers:
    return Answers(np.concatenate([p.right for p in parts]), np.concatenate([p.nll for p in parts]))
