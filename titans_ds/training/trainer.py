"""MemoryTrainer: transformers' Trainer for a grafted model, and the collator that hands it repositories.

An example is a repository: files in reading order, cut into segments as everywhere in this project. In a training step
every repository of the batch starts with an unwritten memory and is read segment after segment; each segment reads what
those before it have written, and the memory is carried from one to the next. With the order `second` the loss of later
segments trains what earlier ones wrote. The step is the one that launch/train.py takes (titans_ds.training.step), and
its loss is the mean over the target tokens of all segments, ranks and accumulation steps.

A step has several backward passes. On several processes their gradients are averaged once, after the last of them:
here, in place of DDP; or by DeepSpeed, at ZeRO 0 to 3. See docs/trainers.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from titans_ds.config import Order
from titans_ds.errors import ConfigError, DataError
from titans_ds.graft import adapter, lora
from titans_ds.graft.titans_model import TitansModel
from titans_ds.memory import Pass
from titans_ds.training import ranks
from titans_ds.training.data.lanes import Step
from titans_ds.training.data.packed import Integers, PackedSplit
from titans_ds.training.data.segments import IGNORED, Batch, RepositoryReader, collate
from titans_ds.training.engine import Engine
from titans_ds.training.module import States, TrainingModule, run_segment
from titans_ds.training.optimizer import is_matrix
from titans_ds.training.settings import SecondOrder, TrainingSettings
from titans_ds.training.step import Carried, run_windows
from titans_ds.zero.engine import backward, gathered

_FIRST = "first_segment"
_ANY_TOKEN = 2**63 - 1


class RepositoryCollator:
    """Makes a batch of repositories: their first segments in reading order, one repository a row.

    A repository is a list of files, each a text or a list of token ids; or a mapping with this list under `files` (or
    `input_ids`, where it may also be the ids of a single file). A segment never holds tokens of two files.

    Args:
        tokenizer: of the base model; not needed where all files are token ids.
        segment_tokens: T, tokens of a segment: the graft's `segment_tokens`.
        segments: N, how many of a repository are read. The rest is left out; see `windows`.
    """

    def __init__(self, tokenizer: Any | None = None, *, segment_tokens: int, segments: int = 4) -> None:
        if segment_tokens < 2 or segments < 1:
            raise ConfigError(
                f"RepositoryCollator: segment_tokens is {segment_tokens} and segments is {segments}; they must be at "
                "least 2 and 1"
            )
        self.tokenizer, self.segment_tokens, self.segments = tokenizer, segment_tokens, segments

    def __call__(self, repositories: Sequence[Any]) -> dict[str, Tensor]:
        """A batch of B repositories.

        Returns:
            input_ids and labels, both int64 [B, n, t] with n at most N and t at most T. Labels are shifted already, and
            IGNORED where there is no token.

        Raises:
            DataError: a repository is of another form, or has no file of two tokens.
        """
        rows = [self._segments(repository) for repository in repositories]
        number = max(len(row) for row in rows)
        length = max(len(segment.inputs) for row in rows for segment in row)
        times = [collate([row[n] if n < len(row) else None for row in rows], length) for n in range(number)]
        return {
            "input_ids": torch.from_numpy(np.stack([batch.input_ids for batch in times], axis=1)),
            "labels": torch.from_numpy(np.stack([batch.labels for batch in times], axis=1)),
        }

    def windows(self, repositories: Sequence[Any]) -> list[dict[str, Any]]:
        """Every repository as examples of N segments, one after another, so that no token is left out.

        Each example starts with an unwritten memory, whatever the one before it has read.
        """
        examples = []
        for repository in repositories:
            files = [file.tolist() for file in self._files(repository)]
            total = self._reader(files).num_segments(0)
            examples += [{"files": files, _FIRST: first} for first in range(0, total, self.segments)]
        return examples

    def _segments(self, repository: Any) -> list[Any]:
        first = int(repository.get(_FIRST, 0)) if isinstance(repository, Mapping) else 0
        reader = self._reader(self._files(repository))
        segments = range(first, min(reader.num_segments(0), first + self.segments))
        if not segments:
            raise DataError(
                "a repository has no file of two tokens, so that there is nothing to predict in it; leave it out"
            )
        return [reader.segment(0, number) for number in segments]

    def _reader(self, files: Sequence[Any]) -> RepositoryReader:
        """The reader of packed corpora, over the files of one repository."""
        lengths = np.array([len(file) for file in files], dtype=np.int64)
        tokens = np.concatenate([np.asarray(file, dtype=np.int64) for file in files] or [np.zeros(0, np.int64)])
        starts = np.cumsum(lengths) - lengths
        split = PackedSplit(
            "repository", tokens, starts, lengths, np.array([0, len(files)]), ["repository"], _ANY_TOKEN
        )
        return RepositoryReader(split, self.segment_tokens)

    def _files(self, repository: Any) -> list[Integers]:
        """The token ids of every file."""
        files = repository
        if isinstance(repository, Mapping):
            files = repository.get("files", repository.get("input_ids"))
        if isinstance(files, Tensor):
            files = files.tolist()
        if not isinstance(files, (list, tuple)):
            raise DataError(
                f"a repository is {type(files).__name__}; expected a list of files (texts or token ids), or a mapping "
                "with that list under 'files'"
            )
        if files and all(isinstance(token, (int, np.integer)) for token in files):
            files = [files]  # the ids of one file
        return [self._tokens(file) for file in files]

    def _tokens(self, file: Any) -> Integers:
        if isinstance(file, str):
            if self.tokenizer is None:
                raise DataError("a repository holds texts; give RepositoryCollator the base model's tokenizer")
            file = self.tokenizer(file, add_special_tokens=False)["input_ids"]
        tokens = np.asarray(file)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise DataError("a file is neither a text nor a list of token ids; a repository is a list of these")
        return tokens.astype(np.int64)


class MemoryTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer, whose steps write memories and carry them over the segments of a repository.

    It starts alone or under `accelerate launch` or `torchrun`: on one process, under DDP, and under DeepSpeed. Only
    what the graft (and LoRA) learns trains and is saved: a checkpoint folder is an adapter folder, beside what Trainer
    needs to go on exactly. `evaluate` reports `eval_loss`, in nats a target token, and `eval_loss_off`, the same tokens
    with memories skipped.

    Args:
        model: of titans_ds.attach or TitansModel.from_pretrained, with a frozen base.
        args: of transformers. Weight decay is of matrices alone.
        data_collator: RepositoryCollator; where None, one of four segments with `processing_class` as tokenizer.
        order: `second` differentiates through the writes; `first` does not, and freezes what acts through them alone.
        second_order: see TrainingSettings.
        loss_chunk_tokens: tokens whose logits exist at a time.
        options: of Trainer: train_dataset, eval_dataset (repositories; see RepositoryCollator), callbacks, ...

    Raises:
        ConfigError: something that this trainer can't do, or would do silently wrong; says what to do instead.
    """

    control: Any  # Trainer's

    def __init__(
        self,
        model: TitansModel,
        args: Any = None,
        data_collator: RepositoryCollator | None = None,
        *,
        order: Order = "second",
        second_order: SecondOrder = "auto",
        loss_chunk_tokens: int = 1024,
        **options: Any,
    ) -> None:
        if not isinstance(model, TitansModel):
            raise ConfigError(
                f"MemoryTrainer: the model is a {type(model).__name__}; expected a TitansModel: titans_ds.attach(base)"
            )
        if data_collator is None:
            data_collator = RepositoryCollator(
                options.get("processing_class"), segment_tokens=model.graft.segment_tokens
            )
        if order == "first":  # these would get no gradient, and optimizers and ZeRO expect one
            for _, parameter in model.write_only_parameters():
                parameter.requires_grad_(False)
        if second_order == "auto" and model.graft.is_prefix:
            second_order = "through_base"
        self.settings = TrainingSettings(order=order, second_order=second_order, loss_chunk_tokens=loss_chunk_tokens)
        _check_model(model, data_collator)
        super().__init__(_Module(model, loss_chunk_tokens), args, data_collator, **options)
        self.args.remove_unused_columns = False  # a repository's columns are none of forward()'s arguments
        _check_arguments(self)
        self._engine, self._num_segments = cast(Engine, _TrainerEngine(self)), 0

    @property
    def titans_model(self) -> TitansModel:
        """The model that was given."""
        return cast(TitansModel, self.model.model)

    # --- training ----------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of an optimizer step, and its target tokens on all ranks, a scalar.

        All ranks then read as many segments, since DeepSpeed's backward passes are collectives.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        targets = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        longest = max((batch["labels"].shape[1] for batch in batches), default=0)
        counts = self.accelerator.gather(torch.tensor([[targets, longest]], device=device))
        self._num_segments = int(counts[:, 1].max())
        return batches, counts[:, 0].sum()

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch; returns its part of the step's mean loss times the number of ranks."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        window = [Step(batch, 0) for batch in self._window(inputs, self._num_segments)]
        targets, world = int(num_items_in_batch), self.accelerator.num_processes
        passes = run_windows(self._engine, [window], Carried(), self.settings, world, targets)
        if self.accelerator.sync_gradients and self.deepspeed is None:
            self._average_gradients()
        return cast(Tensor, passes.loss_sum * world / targets)

    def _window(self, inputs: dict[str, Tensor], number: int) -> list[Batch]:
        """The segments of a batch in order, `number` of them; empty ones at the end where it has fewer."""
        given = {name: inputs[name].cpu() for name in ("input_ids", "labels")}
        self.titans_model.check_ids(given["input_ids"])
        self.titans_model.check_ids(given["labels"].clamp(min=0))  # a file's last token is a label alone
        ids, labels = given["input_ids"].numpy(), given["labels"].numpy()
        rows, segments = ids.shape[0], []
        for time in range(number):
            if time >= ids.shape[1]:
                segments.append(collate([None] * rows, 1))
                continue
            mask = labels[:, time] != IGNORED
            length = max(int(mask.sum(axis=1).max()), 1)  # the longest row; they are padded on the right
            part = slice(0, length)
            repos = np.where(mask.any(axis=1), np.arange(rows), -1)
            starts = np.full(rows, time == 0)
            segments.append(Batch(ids[:, time, part], labels[:, time, part], mask[:, part], starts, repos))
        return segments

    def _average_gradients(self) -> None:
        """The mean over ranks of every gradient, as DDP would make it in a single backward pass."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # on this rank: all of them send the same
                parameter.grad = torch.zeros_like(parameter)
        for dtype in dict.fromkeys(p.dtype for p in trained) if ranks.distributed() else ():
            gradients = [cast(Tensor, p.grad) for p in trained if p.dtype == dtype]
            flat = ranks.sum_over(torch.cat([g.flatten() for g in gradients])) / ranks.world_size()
            start = 0
            for gradient in gradients:
                gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
                start += gradient.numel()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices; gates, norms, biases and step sizes have no weight decay."""
        return [name for name, parameter in model.named_parameters() if is_matrix(parameter)]

    # --- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean losses over the target tokens of all segments, memories written and carried; and with memories off."""
        self.model.to(self.args.device).eval()  # DeepSpeed moves it when training begins
        self.callback_handler.eval_dataloader = dataloader
        rows = []
        for inputs in dataloader:
            # On several processes the last batch is filled up with examples of the first: these are dropped here.
            rows.append(self.accelerator.gather_for_metrics(self._row_losses(inputs)).double().cpu())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        own, off, targets = torch.cat(rows).sum(dim=0).tolist()
        metrics = {f"{metric_key_prefix}_loss": own / targets, f"{metric_key_prefix}_loss_off": off / targets}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=sum(map(len, rows)))

    def _row_losses(self, inputs: dict[str, Tensor]) -> Tensor:
        """By repository [B, 3]: the sum of its token losses, the same with memories off, its target tokens."""
        own: States | None = None
        total = torch.zeros(len(inputs["labels"]), 3, device=self.args.device)
        total[:, 2] = (inputs["labels"] != IGNORED).sum(dim=(1, 2))
        segments = torch.tensor([inputs["labels"].shape[1]], device=self.args.device)
        for batch in self._window(inputs, int(self.accelerator.gather(segments).max())):  # as many on every rank
            written = run_segment(self._engine, batch, own, Pass())
            with self.model.ablated():
                off = run_segment(self._engine, batch, None, Pass(write=False))
            total[:, 0] += written.row_losses
            total[:, 1] += off.row_losses
            own = written.state
        return total

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, and the tokenizer beside it; a collective, of which the main process writes."""
        folder = Path(output_dir or self.args.output_dir)
        model = self.titans_model
        with gathered([p for _, p in (*model.titans_parameters(), *lora.parameters(model.base_model))]):
            if not self.args.should_save:
                return
            adapter.write(model, folder)  # not in place of the folder, which holds more of Trainer's
        tokenizer = self.processing_class or self.data_collator.tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")  # where other tools look for them

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Trainer's hook: what trains, out of an adapter folder, when a run goes on."""
        adapter.load_into(self.titans_model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Trainer's hook: the same at the end of a run, with `load_best_model_at_end`."""
        if self.deepspeed is not None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Module(TrainingModule):
    """What is wrapped by DDP and DeepSpeed. What it doesn't have itself, Trainer finds in the model."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)


class _TrainerEngine:
    """A trainer as the engine that titans_ds.training.step runs: four of an Engine's members."""

    def __init__(self, trainer: MemoryTrainer) -> None:
        self._trainer = trainer

    @property
    def module(self) -> TrainingModule:
        """The module whose forward pass is the loss."""
        return cast(TrainingModule, self._trainer.model)

    @property
    def device(self) -> torch.device:
        """The device that batches have to be on."""
        return cast(torch.device, self._trainer.args.device)

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward: past DDP, which would average at every backward pass; through DeepSpeed's engine."""
        return (self._trainer.deepspeed or self.module)(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a loss; `last` of this batch. DeepSpeed then takes the step, in the last batch of it."""
        engine = self._trainer.deepspeed
        if engine is None:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        final = last and self._trainer.accelerator.sync_gradients
        engine.set_gradient_accumulation_boundary(final)
        backward(engine, loss, final)
        if final:
            engine.step()


def _check_model(model: TitansModel, collator: Any) -> None:
    """Raise ConfigError where training this model with this collator would lose something, or do nothing."""
    own = {id(p) for _, p in model.titans_parameters()} | {id(p) for _, p in lora.parameters(model.base_model)}
    trained = [(name, id(p) in own) for name, p in model.named_parameters() if p.requires_grad]
    others = [name for name, ours in trained if not ours]
    if others:
        raise ConfigError(
            f"MemoryTrainer saves the memory and LoRA alone, but {others[0]} of the base model trains, too. Attach "
            "with freeze_base=True, or with lora=; launch/train.py trains a base with model.trainable 'all'"
        )
    if not trained:
        raise ConfigError("MemoryTrainer: no parameter of the graft requires a gradient, so that nothing would train")
    if not isinstance(collator, RepositoryCollator):
        raise ConfigError(
            f"MemoryTrainer: the data_collator is a {type(collator).__name__}; expected a RepositoryCollator, which "
            "keeps the segments of a repository in order"
        )
    if collator.segment_tokens != model.graft.segment_tokens:
        raise ConfigError(
            f"MemoryTrainer: the collator's segment_tokens is {collator.segment_tokens}, the graft's "
            f"{model.graft.segment_tokens}, in which `prime` will read; make them equal"
        )


def _check_arguments(trainer: MemoryTrainer) -> None:
    """Raise ConfigError for what this trainer can't do."""
    args, plugin = trainer.args, getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    alone = "load the base model with dtype=torch.bfloat16 instead; memories and their gradients stay in fp32"
    reasons = {
        "FSDP gathers a layer's parameters in the layer's own forward pass, and memories are also called outside of "
        "it; use DDP or ZeRO 1 to 3": trainer.is_fsdp_enabled,
        f"fp16 scales losses, and the second phase would be scaled twice; {alone}": args.fp16,
        f"bf16 without DeepSpeed is autocast, which would round what memories compute; {alone}": (
            args.bf16 and plugin is None
        ),
        "there are several GPUs and one process; start one for each: accelerate launch": args.n_gpu > 1,
        "torch_compile compiles a forward pass that isn't used; set training.compile of launch/train.py": (
            args.torch_compile
        ),
        "label_smoothing_factor and compute_loss_func change a loss that isn't used": (
            bool(args.label_smoothing_factor) or trainer.compute_loss_func is not None
        ),
        "compute_metrics needs logits, which are never kept; read eval_loss and eval_loss_off": (
            trainer.compute_metrics is not None
        ),
        "push_to_hub would upload the base model's files; call model.push_to_hub(...) after training": args.push_to_hub,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"MemoryTrainer: {reason}")
