"""Training of Forward Alignment Networks (titans_ds.memory.mlp.fan) beside a memory that is trained already."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from titans_ds.errors import ConfigError, TrainingError
from titans_ds.graft import adapter
from titans_ds.graft.titans_model import TitansModel
from titans_ds.memory import MemoryState
from titans_ds.memory.mlp import MLPConfig, MLPMemory
from titans_ds.memory.mlp.fan import ForwardAlignment, Lesson
from titans_ds.training.data.lanes import Lanes
from titans_ds.training.data.segments import Batch
from titans_ds.training.module import States
from titans_ds.training.optimizer import lr_at
from titans_ds.training.settings import OptimizerSettings

Follow = Literal["exact", "fan", "alternate"]


def with_networks(base: nn.Module, folder: Path, width: int) -> TitansModel:
    """A saved adapter, its writes predicted by untrained networks: feedback through the initial weights.

    Args:
        base: the model that the adapter was made for.
        folder: of the adapter, which stays as it is.
        width: units of each network's hidden layer.

    Raises:
        AdapterError: see TitansModel.from_pretrained.
        ConfigError: the adapter's memory has no backward pass to predict.
    """
    exact = TitansModel.from_pretrained(base, folder)
    if not isinstance(exact.graft.memory, MLPConfig):
        raise ConfigError("only memories whose f_W has hidden layers (kind 'mlp') have gradients to predict")
    tensors, lora = adapter.tensors(exact), exact.lora
    memory = exact.graft.memory
    rule = dataclasses.replace(memory.rule, gradient="fan", fan_width=width)
    config = dataclasses.replace(exact.graft, memory=dataclasses.replace(memory, rule=rule))
    model = TitansModel(exact.detach(), config)
    model.lora = lora  # its modules are in the base model already
    with torch.no_grad():
        for name, tensor in adapter.tensors(model).items():
            if ".fan." not in name:
                tensor.copy_(tensors[name])
    for index, fan in networks(model).items():
        memory_ = cast(MLPMemory, model.memories[index].memory)
        fan.start_from([getattr(memory_, f"initial_w{level}") for level in range(memory.depth)], memory_.form(1))
    return model.requires_grad_(False)


def networks(model: TitansModel) -> dict[int, ForwardAlignment]:
    """The forward alignment network of every layer that has one."""
    found = {index: cast(MLPMemory, grafted.memory).fan for index, grafted in model.memories.items()}
    return {index: fan for index, fan in found.items() if fan is not None}


@dataclass(frozen=True)
class Alignment:
    """How well predictions point: mean cosine of hidden matrices by layer, and of whole gradients over all layers."""

    by_layer: dict[int, float]
    whole: float

    @property
    def mean(self) -> float:
        """The mean cosine over all layers."""
        return sum(self.by_layer.values()) / len(self.by_layer)


class AlignmentTrainer:
    """Streams lanes of segments, writes memories, and trains the networks on every write.

    Args:
        model: of `with_networks`.
        lanes: of the training split.
        settings: of AdamW.
        steps: in all.
        follow: which gradient writes the memories meanwhile: the states that the networks learn on. `alternate` changes
            from step to step after the warm-up: exact ones keep the states sensible, their own are what they will meet.
    """

    def __init__(
        self, model: TitansModel, lanes: Lanes, settings: OptimizerSettings, steps: int, follow: Follow = "alternate"
    ) -> None:
        self.model, self.lanes, self.settings, self.steps, self.follow = model, lanes, settings, steps, follow
        self._parameters = [p for fan in networks(model).values() for p in fan.parameters()]
        decay = settings.weight_decay
        self._optimizer = torch.optim.AdamW(self._parameters, settings.lr, settings.betas, settings.eps, decay)
        self._state: States | None = None

    def run(self) -> Iterator[tuple[int, float, Alignment]]:
        """Train; gives step (from 1), loss, and alignment of that step's writes."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for step in range(self.steps):
            ready = step >= self.settings.warmup_steps and step % 2 == 1  # what untrained networks write is noise
            own = self.follow == "fan" or (self.follow == "alternate" and ready)
            lessons = self._write(self.lanes.next().batch, own)
            yield step + 1, self._learn(lessons, lr_at(step, self.steps, self.settings)), summarise(lessons)
        for parameter in self._parameters:
            parameter.requires_grad_(False)

    def _write(self, batch: Batch, own: bool) -> dict[int, Lesson]:
        lessons, state = observe(self.model, batch, self._state, own)
        self._state = MemoryState(state).mended()[0].layers
        return lessons

    def _learn(self, lessons: dict[int, Lesson], lr: float) -> float:
        losses = [loss for lesson in lessons.values() for loss in lesson.losses]
        if not losses:
            return 0.0
        loss = torch.stack(losses).mean()
        if not bool(torch.isfinite(loss)):
            raise TrainingError("the loss of a Forward Alignment Network is not finite; lower optimizer.lr")
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, self.settings.clip or float("inf"))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return float(loss.detach())


@torch.no_grad()
def observe(
    model: TitansModel, batch: Batch, state: States | None, own: bool
) -> tuple[dict[int, Lesson], dict[int, dict[str, Tensor]]]:
    """Write one segment of every lane; what each layer's network can learn of it, and the state after it.

    Args:
        model: of `with_networks`.
        batch: segments.
        state: before them.
        own: write what the networks predict, not the exact gradient.
    """
    lessons = {index: Lesson(own) for index in networks(model)}
    for index, fan in networks(model).items():
        fan.lesson = lessons[index]
    ids, mask, reset = (torch.from_numpy(x).to(model.device) for x in (batch.input_ids, batch.mask, batch.reset))
    try:
        output = model.read_write(ids, state=state, reset=reset, write_mask=mask)
    finally:
        for fan in networks(model).values():
            fan.lesson = None
    return lessons, output.state


def summarise(lessons: dict[int, Lesson]) -> Alignment:
    """Means over writes and samples."""
    by_layer = {index: _mean(lesson.cosines) for index, lesson in lessons.items()}
    return Alignment(by_layer, _mean([cosine for lesson in lessons.values() for cosine in lesson.total]))


def measure(model: TitansModel, lanes: Lanes, steps: int, own: bool = True) -> Alignment:
    """Alignment on segments that are not trained on, in memories that the networks (or the exact gradient) write."""
    state: States | None = None
    together = {index: Lesson(own) for index in networks(model)}
    for _ in range(steps):
        lessons, state = observe(model, lanes.next().batch, state, own)
        for index, lesson in lessons.items():
            together[index].cosines += lesson.cosines
            together[index].total += lesson.total
    return summarise(together)


def _mean(cosines: list[Tensor]) -> float:
    return float(torch.cat(cosines).mean()) if cosines else float("nan")
