"""Settings of a training run: what `launch/train.py` reads from YAML and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from titans_ds.config import GraftConfig, LoraSettings, Order, check_choices
from titans_ds.errors import ConfigError
from titans_ds.graft.quantized import check_name
from titans_ds.memory.graphs import Choice as MemoryGraphsChoice
from titans_ds.training.data.segments import Layout, Reset
from titans_ds.training.speed.compiled import Compile
from titans_ds.training.speed.loss import LossKernel, check_kernel
from titans_ds.training.trackers import check_names

SecondOrder = Literal["auto", "two_phase", "window", "through_base"]
ONE_GRAPH = ("window", "through_base")
_MAX_LANES = 65_536


@dataclass(frozen=True)
class ModelSettings:
    """The base model, and which of its parameters are trained.

    Args:
        base: folder or hub id of a pretrained causal LM.
        architecture: instead of `base`, keys of a transformers configuration with its model_type, for a model with
            random weights (seeded by training.seed).
        tokenizer: folder, hub id or tokenizer.json file of the tokenizer; the one of `base` where not given.
        dtype: of the base model, and of the arithmetic. Fast weights and optimizer are fp32 always.
        trainable: `memory` trains the graft alone on a frozen base; `all` trains everything.
        quantization: store the linear maps of a pretrained, frozen base in fewer bits: `none`, `bnb-4bit` (nf4) or
            `bnb-8bit`, of bitsandbytes; `torchao-int8`. A base that is stored so already needs no name here.
        quantization_options: fields of transformers' BitsAndBytesConfig, or of torchao's Int8WeightOnlyConfig.
        attn_implementation: passed to transformers.
        trust_remote_code: run code that comes with the checkpoint. Off, unless you have read that code.
        allow_pickle: also load weights that are not safetensors. A pickle can run any code: only from who you trust.
    """

    base: str | None = None
    architecture: dict[str, Any] | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    trainable: Literal["memory", "all"] = "memory"
    quantization: str = "none"
    quantization_options: dict[str, Any] | None = None
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        _check(self, "model")
        _require(self.base != "", "model.base is empty; is a variable of your shell unset?")
        given = [self.base is not None, self.architecture is not None]
        _require(sum(given) == 1, "set either model.base (pretrained) or model.architecture (random weights), not both")
        architecture = self.architecture
        _require(
            architecture is None or isinstance(architecture.get("model_type"), str),
            "model.architecture needs a model_type, such as 'qwen3_5_text'",
        )
        check_name(self.quantization)
        quantized = f"model.quantization is {self.quantization!r}, but"
        _require(
            self.quantization == "none" or self.base is not None,
            f"{quantized} model.architecture makes random weights; give model.base, or set it to 'none'",
        )
        _require(
            self.quantization == "none" or self.trainable == "memory",
            f"{quantized} model.trainable is 'all', and weights of few bits don't learn; set one of the two otherwise",
        )
        _require(
            self.quantization != "none" or not self.quantization_options,
            "model.quantization_options are set, but model.quantization is 'none'; name a form, or leave them out",
        )


@dataclass(frozen=True)
class DataSettings:
    """Where tokens come from, and how they are dealt to lanes.

    Args:
        corpus: a packed corpus, or a corpus folder of parquet files, which is then packed with the model's tokenizer.
        train_split: trained on.
        layout: `files` cuts each file into segments, and memory goes from one to the next within a repository;
            `repository` joins a repository's files and fills every segment, for base pretraining without memory.
        reset: where memories start anew: `repository`, so that they go from file to file within it; or `file`, so that
            every file stands alone. Of the layout `files`.
        num_lanes: repositories read side by side, over all ranks: the batch size. A multiple of the number of ranks.
        segment_tokens: of the layout `repository`; where there is a graft, graft.segment_tokens holds.
    """

    corpus: str = ""
    train_split: str = "train"
    layout: Layout = "files"
    reset: Reset = "repository"
    num_lanes: int = 4
    segment_tokens: int = 2048

    def __post_init__(self) -> None:
        _check(self, "data")
        _require(bool(self.corpus), "data.corpus is not set; give a packed corpus, or a corpus folder of parquet files")
        _at_least(self, "data", num_lanes=1, segment_tokens=2)
        _require(self.num_lanes <= 65_536, f"data.num_lanes is {self.num_lanes}; it must be 65,536 or less")
        _require(
            self.num_lanes <= _MAX_LANES,
            f"data.num_lanes is {self.num_lanes}; it must be {_MAX_LANES} or less: so many texts are read side by side",
        )
        _require(
            self.reset == "repository" or self.layout == "files",
            "data.reset is 'file', but data.layout 'repository' has no files apart; set data.layout to 'files'",
        )


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up and cosine decay.

    Args:
        lr: peak learning rate.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: of matrices; gates, norms, biases and step sizes have none.
        warmup_steps: steps of linear warm-up.
        min_lr_ratio: the cosine ends at lr times this.
        clip: greatest global gradient norm; 0 switches clipping off.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "optimizer")
        _require(self.lr > 0, f"optimizer.lr is {self.lr}; it must be above 0")
        _require(all(0 <= b < 1 for b in self.betas), f"optimizer.betas are {self.betas}; they must be in [0, 1)")
        _at_least(self, "optimizer", eps=0, weight_decay=0, warmup_steps=0, min_lr_ratio=0, clip=0)


@dataclass(frozen=True)
class TrainingSettings:
    """The loop.

    Args:
        steps: optimizer steps.
        order: with `second` the loss differentiates through the writes of a window of segments, so that what is written
            is learned; `first` detaches states between segments, and parts that act through writes alone stay as they
            start. A base model without memory knows no orders.
        second_order: how. `two_phase`: one backward a segment, then one through the writes, done again; the same
            gradient as `window`, one graph over all segments, at about the memory of first order. `through_base`: one
            graph, and writes see attached hidden states, so that what made them learns what to write. `auto`:
            two_phase, but through_base for a prefix memory (where `window` takes the inner gradient as given).
        write_backward: how second order goes back through a write: `derived`, by hand, keeping what it wrote and not
            how; or `autograd`, through the graph of the inner step. titans_ds/memory/mlp/write_function.py says which
            rules have the first; the others take the second.
        window: segments of every lane in a window.
        accumulation: windows in an optimizer step. Accumulation runs along time, in the same lanes.
        checkpointing: recompute the base model's activations in backward (non-reentrant).
        offload_activations: keep activations in host memory (pinned, for a GPU) until backward; with checkpointing, the
            layers' inputs.
        loss_chunk_tokens: tokens whose logits exist at a time.
        loss_kernel: how the loss is made: `liger`, with Liger's kernel where the language-model head is frozen and
            whole on every rank (not under ZeRO-3; otherwise like `chunked`); `chunked`, in plain PyTorch; `auto`: liger
            on a GPU, where it is installed.
        compile: torch.compile for each layer's norms and MLP (`mlp`), or all of its token mixer (`layers`). Not under
            ZeRO-3, and not through_base, which needs second derivatives.
        memory_graphs: replay what a memory computes as CUDA graphs, a forward and a backward one: `auto`, where it is
            chunked and runs on a GPU; `on`, every memory, and an error where there are no graphs (on a CPU, under
            ZeRO-3); or `off`. A graph's backward computes the forward again. See docs/cuda_graphs.md.
        layer_graphs: replay the layers that learn nothing and have no memory as CUDA graphs, for a GPU that waits for
            its processor. With a frozen base, one segment in a graph, on a GPU, not under ZeRO-3; activations stay in
            the graphs. See docs/frozen_step.md.
        seed: of everything random.
        log_interval: steps between lines of metrics.
        nonfinite_limit: stop after this many steps in a row with a loss, gradient or state that is not finite.
    """

    steps: int = 1000
    order: Order = "second"
    second_order: SecondOrder = "auto"
    write_backward: Literal["derived", "autograd"] = "derived"
    window: int = 4
    accumulation: int = 1
    checkpointing: bool = False
    offload_activations: bool = False
    loss_chunk_tokens: int = 1024
    loss_kernel: LossKernel = "auto"
    compile: Compile = "none"
    memory_graphs: MemoryGraphsChoice = "auto"
    layer_graphs: bool = False
    seed: int = 0
    log_interval: int = 1
    nonfinite_limit: int = 10

    def __post_init__(self) -> None:
        _check(self, "training")
        _at_least(self, "training", steps=1, window=1, accumulation=1, loss_chunk_tokens=1)
        _at_least(self, "training", log_interval=1, nonfinite_limit=1, seed=0)
        check_kernel(self.loss_kernel)
        _require(
            self.order == "first" or self.window >= 2,
            "training.order is 'second', but training.window is 1: no segment follows another's writes in it. Set "
            "training.window to 2 or more, or training.order to 'first'",
        )

    @property
    def scheme(self) -> Literal["first", "two_phase", "window", "through_base"]:
        """What the passes of a window are like."""
        if self.order == "first":
            return "first"
        return "two_phase" if self.second_order == "auto" else self.second_order

    @property
    def segments_in_graph(self) -> int:
        """Segments whose base graph is alive at once."""
        return self.window if self.scheme in ONE_GRAPH else 1

    @property
    def backwards_per_step(self) -> int:
        """Backward passes in an optimizer step: one a segment; in one graph one a window; in two phases one more."""
        if self.scheme in ONE_GRAPH:
            return self.accumulation
        return self.accumulation * (self.window + int(self.scheme == "two_phase"))


@dataclass(frozen=True)
class EvaluationSettings:
    """Held-out evaluation: loss with a repository's own memory, another's, an empty one, and with memory ablated.

    Args:
        interval: steps between evaluations; there is one at the end, too. 0 switches evaluation off.
        split: held-out repositories.
        repositories: how many of them, drawn by training.seed.
        max_segments: of each repository, from its start.
        group_size: repositories in a batch, each other's wrong memory; the same whatever the number of ranks.
        segment_writes: a segment's tokens write while they are read, whatever state it started from, as in training;
            false only reads, as `generate` does.
    """

    interval: int = 500
    split: str = "validation"
    repositories: int = 64
    max_segments: int = 8
    group_size: int = 4
    segment_writes: bool = True

    def __post_init__(self) -> None:
        _check(self, "evaluation")
        _at_least(self, "evaluation", interval=0, repositories=2, max_segments=2, group_size=2)


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints of the run: everything that it needs to go on exactly, also the optimizer's state.

    Args:
        interval: steps between checkpoints; there is one at the end and at SIGTERM, too. 0 switches them all off.
        keep: the newest ones that stay.
    """

    interval: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        _check(self, "checkpoint")
        _at_least(self, "checkpoint", interval=0, keep=1)


@dataclass(frozen=True)
class RunSettings:
    """Where the run lives, and whether it goes on from a checkpoint.

    Args:
        dir: run folder; runs/NAME of the config file where not given.
        overwrite: replace a run that is there.
        trackers: where metrics go beside metrics.jsonl: accelerate's trackers, by name (tensorboard, wandb, mlflow,
            trackio, comet_ml, aim, clearml, dvclive, swanlab).
        project: that the run belongs to in a tracker that has projects.
        resume: `auto` goes on from the newest whole checkpoint of the run folder, if there is one; `none` starts a new
            run; or the folder of a checkpoint or run to go on from.
        trust_checkpoint: also load pickles from outside the run folder. A pickle can run any code: only from who you
            trust.
        check_memory: estimate before loading whether the run fits the GPU, and stop where it does not.
    """

    dir: str | None = None
    overwrite: bool = False
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    project: str = "titans-ds"
    resume: str = "none"
    trust_checkpoint: bool = False
    check_memory: bool = True

    def __post_init__(self) -> None:
        _check(self, "run")
        check_names(self.trackers)


@dataclass(frozen=True)
class TrainConfig:
    """Train a memory grafted on a causal LM, or the LM itself, with DeepSpeed.

    Args:
        model: the base model.
        data: the corpus.
        graft: memories and where they sit; null trains the base model without memory.
        lora: low-rank adapters trained beside the memory; null for none.
        optimizer: AdamW and its schedule.
        training: the loop.
        evaluation: on held-out repositories.
        checkpoint: how often the run is saved so that it can go on.
        deepspeed: DeepSpeed configuration (JSON), such as ds_configs/zero2.json; null runs plain torch in one process.
        run: the run folder.
    """

    model: ModelSettings
    data: DataSettings
    graft: GraftConfig | None = field(default_factory=GraftConfig)
    lora: LoraSettings | None = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    deepspeed: str | None = "ds_configs/zero2.json"
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        _require(
            self.graft is not None or self.model.trainable == "all",
            "graft is null and model.trainable is 'memory': nothing to train. Set graft, or model.trainable to 'all'",
        )
        _require(
            self.lora is None or (self.graft is not None and self.model.trainable == "memory"),
            "lora needs a graft and model.trainable 'memory' (it freezes the base model); set these, or lora to null",
        )
        _require(
            self.graft is None or self.data.layout == "files",
            "data.layout is 'repository', where a segment may hold several files; a memory needs data.layout 'files'",
        )
        prefix = self.graft is not None and self.graft.is_prefix
        self._check_second_order(prefix)
        if self.graft is None:
            object.__setattr__(self, "training", replace(self.training, order="first"))
        elif prefix and self.training.second_order == "auto":
            object.__setattr__(self, "training", replace(self.training, second_order="through_base"))
        self._check_compile(prefix)
        if self.training.layer_graphs:
            self._check_layer_graphs()

    def _check_second_order(self, prefix: bool) -> None:
        _require(
            not prefix or self.training.order == "first" or self.training.second_order != "two_phase",
            "training.second_order is 'two_phase', but a prefix memory is written through the base model; set "
            "training.second_order to 'through_base', or to 'window', which takes the inner gradient as given",
        )

    def _check_compile(self, prefix: bool) -> None:
        through_base = prefix or self.training.scheme == "through_base"
        _require(
            self.training.compile == "none" or not through_base,
            f"training.compile is {self.training.compile!r}, but the memory is written through the base model, and a "
            "compiled layer has no second derivatives; set training.compile to 'none'",
        )

    def _check_layer_graphs(self) -> None:
        """A layer's activations lie in its graph, until the next segment comes."""
        training = self.training
        prefix = self.graft is not None and self.graft.is_prefix
        reasons = {
            "a prefix memory is written through the base model's second derivatives": prefix,
            "model.trainable is 'all', so that no layer is frozen": self.model.trainable == "all",
            "training.checkpointing is on, which keeps no activations": training.checkpointing,
            "training.offload_activations is on, and a graph's activations can't leave the GPU": (
                training.offload_activations
            ),
            f"training.second_order is {training.second_order!r}, with several segments in one graph ('two_phase' goes "
            "with it)": training.scheme in ONE_GRAPH,
        }
        for reason, holds in reasons.items():
            _require(not holds, f"training.layer_graphs is on, but {reason}; switch one of the two off")

    @property
    def segment_tokens(self) -> int:
        """T: tokens of a segment."""
        return self.data.segment_tokens if self.graft is None else self.graft.segment_tokens

    @property
    def backwards_per_step(self) -> int:
        """Backward passes in an optimizer step."""
        return self.training.backwards_per_step


def _check(settings: Any, section: str) -> None:
    try:
        check_choices(settings)
    except ConfigError as error:
        raise ConfigError(f"{section}.{error}") from error


def _at_least(settings: Any, section: str, **limits: float) -> None:
    for name, least in limits.items():
        value = getattr(settings, name)
        _require(value >= least, f"{section}.{name} is {value}; it must be {least} or more")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
