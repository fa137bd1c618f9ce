"""TrainingModule: one segment in, its losses and the next state out. What an engine wraps.

Everything that crosses this boundary is a tensor, or a dict of tensors, as ZeRO-3 needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from titans_ds.graft.call import MemoryOutput
from titans_ds.graft.titans_model import TitansModel
from titans_ds.memory import LayerState, Tape
from titans_ds.training.loss import LossKernel, fused_token_losses, fused_weight, token_losses
from titans_ds.training.segments import Batch

States = dict[int, LayerState]


class LanguageModel(Protocol):
    """What training needs of a model; TitansModel has it, and PlainModel for a base without memory."""

    base_model: nn.Module

    def read_write(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> MemoryOutput:
        """Hidden states [B, T, H] of one segment, and the state after it."""

    def logits(self, last_hidden: Tensor) -> Tensor:
        """[..., H] -> [..., vocabulary]."""


class PlainModel(nn.Module):
    """A causal LM without memory, behind the same two methods as TitansModel."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    def read_write(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> MemoryOutput:
        """Hidden states of one segment [B, T] -> [B, T, H]; no state."""
        decoder = getattr(self.base_model, str(self.base_model.base_model_prefix))
        output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return MemoryOutput(output.last_hidden_state, {}, {})

    def logits(self, last_hidden: Tensor) -> Tensor:
        """The language-modelling head: [..., H] -> [..., vocabulary]."""
        return cast(Tensor, self.base_model.get_output_embeddings()(last_hidden))  # type: ignore[operator]


@dataclass(frozen=True)
class Mode:
    """What one forward pass of the training module does.

    Args:
        memory: off ablates: every memory is skipped.
        write: compute the state after the segment.
        graph: keep the graph of the write (second order).
        stats: collect gates, inner losses and write norms.
        lora: false skips LoRA too: without memory, the base model before training.
        through_base: with `graph`, writes see attached hidden states.
        derived: take the hand-derived backward of the write, where there is one.
    """

    memory: bool = True
    write: bool = True
    graph: bool = False
    stats: bool = False
    lora: bool = True
    through_base: bool = False
    derived: bool = True


@dataclass(frozen=True)
class Window:
    """What the second phase of a window needs: tapes of its segments, the states before the first one, and `derived`
    of Mode."""

    tapes: list[Tape]
    state: States | None
    derived: bool = True


@dataclass(frozen=True)
class Outputs:
    """One forward pass: loss summed over its tokens (scalar), and by row [B]; the next state; stats [B] by layer."""

    loss_sum: Tensor
    row_losses: Tensor
    state: States
    stats: States


class TrainingModule(nn.Module):
    """A language model with its loss.

    Args:
        model: TitansModel or PlainModel.
        loss_chunk_tokens: tokens whose logits exist at a time.
        loss_kernel: see TrainingSettings.
    """

    def __init__(
        self, model: TitansModel | PlainModel, loss_chunk_tokens: int, loss_kernel: LossKernel = "auto"
    ) -> None:
        super().__init__()
        self.model = model
        self.loss_chunk_tokens = loss_chunk_tokens
        self.loss_kernel = loss_kernel

    def forward(self, *inputs: Any) -> Any:
        """`segment`; or `replay`, where the one input is a Window. An engine knows a single forward."""
        return self.replay(inputs[0]) if isinstance(inputs[0], Window) else self.segment(*inputs)

    def replay(self, window: Window) -> Tensor:
        """The second phase of a window, a scalar whose gradient is missing after the first; see titans_ds.memory."""
        checkpointing = _recomputes(self.model.base_model)
        return cast(TitansModel, self.model).replay(window.tapes, window.state, checkpointing, window.derived)

    def segment(
        self,
        input_ids: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        reset: Tensor,
        state: States | None,
        mode: tuple[bool, ...],
        tape: Tape | None = None,
    ) -> tuple[Tensor, Tensor, States, States]:
        """One segment per row.

        Args:
            input_ids: [B, T], right-padded.
            labels: [B, T], already shifted, IGNORED where there is no target.
            mask: bool [B, T], true where a token may be written; None: everywhere.
            reset: bool [B], true where a row starts from W_0.
            state: by layer; None starts every row from W_0.
            mode: the fields of Mode, in order.
            tape: takes what the second phase needs; None where there is none.

        Returns:
            loss sum (scalar), loss by row [B], state after the segment, stats.
        """
        wanted = Mode(*mode)
        model = cast(LanguageModel, self.model)
        with contextlib.ExitStack() as ablation:
            if not wanted.memory:
                ablation.enter_context(cast(TitansModel, self.model).disable_memory())
            if not wanted.lora:
                ablation.enter_context(cast(TitansModel, self.model).disable_lora())
            # Right padding under causal mixing: no real token sees a padding, so no attention mask is needed.
            output = model.read_write(
                input_ids,
                state=state,
                reset=reset,
                write_mask=mask,
                write=wanted.write,
                graph=wanted.graph,
                collect_stats=wanted.stats,
                through_base=wanted.through_base,
                derived=wanted.derived,
                tape=tape,
            )
        row_losses = self._token_losses(output.last_hidden, labels).sum(dim=1)
        return row_losses.sum(), row_losses, output.state, output.stats

    def _token_losses(self, hidden_BTH: Tensor, labels_BT: Tensor) -> Tensor:
        weight = fused_weight(cast(Any, self.model.base_model).get_output_embeddings(), self.loss_kernel)
        if weight is not None:
            return fused_token_losses(weight, hidden_BTH, labels_BT, self.loss_chunk_tokens)
        return token_losses(cast(LanguageModel, self.model).logits, hidden_BTH, labels_BT, self.loss_chunk_tokens)


def _recomputes(base: nn.Module) -> bool:
    """Whether activation checkpointing is on, by its name in newer transformers or the older one."""
    newer = getattr(base, "is_activation_checkpointing", None)
    return bool(getattr(base, "is_gradient_checkpointing", False) if newer is None else newer)


class Runner(Protocol):
    """An engine around a TrainingModule: its forward, and where inputs go."""

    @property
    def device(self) -> torch.device:
        """Where inputs go."""

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward."""


def run_segment(engine: Runner, batch: Batch, state: States | None, mode: Mode, tape: Tape | None = None) -> Outputs:
    """Run an engine's TrainingModule on one segment of every lane."""
    mask = None if batch.mask.all() else batch.mask  # without one a memory has less to compute
    arrays = (batch.input_ids, batch.labels, mask, batch.reset)
    tensors = [None if x is None else torch.from_numpy(x).to(engine.device, non_blocking=True) for x in arrays]
    given = None if not state else {index: dict(layer) for index, layer in state.items()}  # ZeRO-3 rewrites dicts
    mode = dataclasses.replace(mode, write=mode.write and mode.memory, stats=mode.stats and mode.memory)
    return Outputs(*engine(*tensors, given, dataclasses.astuple(mode), *([] if tape is None else [tape])))


def detach(state: States) -> States:
    """The state cut off from the graph that wrote it."""
    return {index: {name: t.detach() for name, t in layer.items()} for index, layer in state.items()}
