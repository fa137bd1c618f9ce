"""TrainingModule: one segment in, its losses and the next state out. What an engine wraps.

Everything that crosses this boundary is a tensor, or a dict of tensors, as ZeRO-3 needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from titans_ds.graft import head
from titans_ds.graft.call import MemoryOutput
from titans_ds.graft.titans_model import TitansModel
from titans_ds.memory import LayerState, Pass, SegmentTrace
from titans_ds.training.data.segments import Batch
from titans_ds.training.speed.loss import LossKernel, fused_token_losses, fused_weight, token_losses

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
        decoder = head.decoder_of(self.base_model)
        output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return MemoryOutput(output.last_hidden_state, {}, {})

    def logits(self, last_hidden: Tensor) -> Tensor:
        """The language-modelling head: [..., H] -> [..., vocabulary]."""
        return head.logits(self.base_model, last_hidden)


@dataclass(frozen=True)
class Window:
    """What the second phase of a window needs: traces of its segments, the states before the first one, and the plan
    of its passes."""

    traces: list[SegmentTrace]
    state: States | None
    plan: Pass


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
        """`segment`; or `surrogate_loss`, where the one input is a Window. An engine knows a single forward."""
        return self.surrogate_loss(inputs[0]) if isinstance(inputs[0], Window) else self.segment(*inputs)

    def surrogate_loss(self, window: Window) -> Tensor:
        """The second phase of a window, a scalar whose gradient is missing after the first; see titans_ds.memory."""
        checkpointing = _recomputes(self.model.base_model)
        return cast(TitansModel, self.model).surrogate_loss(window.traces, window.state, window.plan, checkpointing)

    def segment(
        self,
        input_ids: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        reset: Tensor,
        state: States | None,
        plan: Pass,
        trace: SegmentTrace | None = None,
    ) -> tuple[Tensor, Tensor, States, States]:
        """One segment per row.

        Args:
            input_ids: [B, T], right-padded.
            labels: [B, T], already shifted, IGNORED where there is no target.
            mask: bool [B, T], true where a token may be written; None: everywhere.
            reset: bool [B], true where a row starts from W_0.
            state: by layer; None starts every row from W_0.
            plan: what the pass does with the memories.
            trace: takes what the second phase needs; None where there is none.

        Returns:
            loss sum (scalar), loss by row [B], state after the segment, stats.
        """
        model = cast(LanguageModel, self.model)
        # Right padding under causal mixing: no real token sees a padding, so no attention mask is needed.
        output = model.read_write(input_ids, state=state, reset=reset, write_mask=mask, plan=plan, trace=trace)
        row_losses = self._token_losses(output.last_hidden, labels).sum(dim=1)
        return row_losses.sum(), row_losses, output.state, output.stats

    @contextlib.contextmanager
    def ablated(self, lora: bool = False) -> Iterator[None]:
        """Inside, every memory is skipped; and with `lora` LoRA too: the base model before training."""
        model = cast(TitansModel, self.model)
        with model.disable_memory(), model.disable_lora() if lora else contextlib.nullcontext():
            yield

    def _token_losses(self, hidden_BTH: Tensor, labels_BT: Tensor) -> Tensor:
        base = self.model.base_model
        weight = fused_weight(cast(Any, base).get_output_embeddings(), self.loss_kernel)
        if head.has_linear_head(base) and weight is not None:
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
        """The device that batches have to be on."""

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward."""


def run_segment(
    engine: Runner, batch: Batch, state: States | None, plan: Pass, trace: SegmentTrace | None = None
) -> Outputs:
    """Run an engine's TrainingModule on one segment of every lane."""
    mask = None if batch.mask.all() else batch.mask  # without one a memory has less to compute
    arrays = (batch.input_ids, batch.labels, mask, batch.reset)
    tensors = [None if x is None else torch.from_numpy(x).to(engine.device, non_blocking=True) for x in arrays]
    given = None if not state else {index: dict(layer) for index, layer in state.items()}  # ZeRO-3 rewrites dicts
    return Outputs(*engine(*tensors, given, plan, *([] if trace is None else [trace])))


def detach(state: States) -> States:
    """The state cut off from the graph that wrote it."""
    return {index: {name: t.detach() for name, t in layer.items()} for index, layer in state.items()}
