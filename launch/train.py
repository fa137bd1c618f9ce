"""Train a memory, or a base model: one command, on one process or many.

    deepspeed [--num_accelerators N] launch/train.py --config launch/configs/quickstart.yaml [--section.key value …]

The same under torchrun, or as plain `python launch/train.py …` for one process. titans_ds/training/settings.py has the
settings.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run as a script, only this file's own folder is on the path

# The first: it notes this rank's launcher, which may be killed during the imports below.
import titans_ds.zero.launcher  # noqa: F401

# isort: split

import torch
import transformers

from launch.arguments import parse
from launch.corpus import packed_corpus
from launch.memory import base_config, check_memory
from launch.show import TerminalReporter, print_comparison
from titans_ds.errors import ConfigError, TitansError
from titans_ds.files import locked
from titans_ds.graft import quantized
from titans_ds.graft.titans_model import TitansModel
from titans_ds.program import plain_console, program
from titans_ds.training import build, ranks, trackers
from titans_ds.training.checkpoints.checkpoint import Checkpoints, Found, restore
from titans_ds.training.checkpoints.files import candidates
from titans_ds.training.checkpoints.resume import find, identity
from titans_ds.training.data.lanes import Lanes, check_divisible
from titans_ds.training.data.packed import PackedCorpus, open_corpus
from titans_ds.training.data.segments import RepositoryReader
from titans_ds.training.engine import Engine, TorchEngine
from titans_ds.training.evaluation import Evaluator
from titans_ds.training.loop import Trainer, evaluation_due
from titans_ds.training.metrics import peak_host_bytes
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.run_folder import RunFolder
from titans_ds.training.settings import TrainConfig
from titans_ds.training.step import Carried
from titans_ds.zero.config import complete_config, read_config, zero_stage
from titans_ds.zero.engine import DeepSpeedEngine, local_device, start_ranks
from titans_ds.zero.gathering import whole_numel
from titans_ds.zero.heartbeat import LOST, failed_everywhere, lost_contact, say_lost
from titans_ds.zero.leaving import leave, leave_at_once, stop_ranks
from titans_ds.zero.loading import partitioned_loading
from titans_ds.zero.offload import check_checkpointable, place_nvme
from titans_ds.zero.ops import needed_ops, prepare_ops

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
STOPPED = 143  # 128 + SIGTERM, as a shell reports it


@program("the newest checkpoint stays; the same command with --run.resume auto goes on from it")
def main(argv: list[str]) -> int:
    """Run the program; returns 0, 2 for an error that the user can mend, 75 for a lost rank, 143 after SIGTERM."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return train(*parse(argv))
    except TitansError as error:
        together = failed_everywhere()
        if not together:
            where = f"rank {ranks.rank()} on {socket.gethostname()} alone"
            print(f"error: {error} ({where})", file=sys.stderr, flush=True)
            leave_at_once(2)
        stop_ranks()
        if ranks.rank() == 0:
            raise
        return 2
    except RuntimeError as error:
        lost = lost_contact(error) if ranks.distributed() else None
        if lost is None:
            raise
        say_lost(lost)
        leave_at_once(LOST)


def train(config: TrainConfig, text: str) -> int:
    """Set the run up on this rank, run it, and print the comparison on rank 0."""
    trackers.check_installed(config.run.trackers)
    settings = read_deepspeed(config)
    quantized.check_installed(config.model.quantization)
    if settings is not None:
        start_ranks()
        settings = place_nvme(settings)  # a folder of this rank's node, so that it can be missing on one alone
    # Held by rank 0 from before a checkpoint is looked for until all is saved.
    with contextlib.ExitStack() as held:
        ranks.on_rank_zero(lambda: hold(config, held))
        stopped = run(set_up(config, text, settings))
    stop_ranks()
    return STOPPED if stopped else 0


def hold(config: TrainConfig, held: contextlib.ExitStack) -> None:
    """Keep the run folder for this process alone. Raises TitansError where this run can't have it."""
    # A run that lost its status.json is known by its checkpoints.
    if config.run.resume != "auto" or not candidates(Path(str(config.run.dir)) / "checkpoints"):
        RunFolder.check(config.run.dir, config.run.overwrite or config.run.resume != "none")
    busy = f"another training runs in {config.run.dir}: wait for it, end it (ranks of a killed launcher take 30 s), "
    held.enter_context(locked(str(config.run.dir), busy + "or choose another run.dir"))


def set_up(config: TrainConfig, text: str, settings: dict[str, Any] | None) -> Parts:
    """Everything that the run is made of on this rank."""
    device = local_device() if settings is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_divisible(config.data.num_lanes, ranks.world_size())
    corpus = find_corpus(config)
    tokenizer = build.load_tokenizer(config.model)
    train_reader, held_out = make_readers(config, corpus, tokenizer)
    lanes = Lanes(train_reader, config.data.num_lanes, ranks.rank(), ranks.world_size(), config.training.seed)
    evaluator = make_evaluator(config, held_out)
    own = identity(config, corpus, "torch" if settings is None else f"ZeRO-{zero_stage(settings)}")
    found = find_checkpoint(config, own)
    engine = make_engine(config, settings, corpus, device, universal=found is not None and found.universal)
    # Before the run folder says that it runs: a checkpoint that can't be loaded leaves it as it was.
    carried = None if found is None else restore(found, engine, lanes)
    folder = make_folder(config, text, found)
    root = Path(str(config.run.dir)) / "checkpoints"
    checkpoints = Checkpoints(root, config.checkpoint.keep, own, text, corpus.vocab_size)
    return Parts(config, engine, lanes, evaluator, folder, tokenizer, checkpoints, found, carried)


def read_deepspeed(config: TrainConfig) -> dict[str, Any] | None:
    """The DeepSpeed configuration, from the working folder or the checkout; None for plain torch in one process."""
    if config.deepspeed is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("deepspeed is null, which is plain torch in one process; set it to use several ranks")
        return None
    path = Path(config.deepspeed)
    settings = read_config(path if path.is_file() or path.is_absolute() else ROOT / path)
    check_checkpointable(settings, config.checkpoint.interval, config.run.resume)
    return settings


def find_corpus(config: TrainConfig) -> PackedCorpus:
    """The packed corpus; rank 0 packs one while the others wait."""
    name = config.model.tokenizer or config.model.base
    return open_corpus(ranks.on_rank_zero(lambda: packed_corpus(config.data.corpus, name)))


def make_readers(
    config: TrainConfig, corpus: PackedCorpus, tokenizer: Any
) -> tuple[RepositoryReader, RepositoryReader | None]:
    """Segments of the training split, and of the held-out one if it is evaluated."""
    separators = build.separators_of(tokenizer)

    def reader(name: str, min_repos: int) -> RepositoryReader:
        split = corpus.split(name, min_repos)
        return RepositoryReader(split, config.segment_tokens, config.data.layout, separators, config.data.reset)

    held_out = reader(config.evaluation.split, 2 if config.graft else 1) if config.evaluation.interval else None
    return reader(config.data.train_split, 1), held_out


def make_evaluator(config: TrainConfig, held_out: RepositoryReader | None) -> Evaluator | None:
    """None where evaluation is off."""
    if held_out is None:
        return None
    memory, lora = config.graft is not None, config.lora is not None
    return Evaluator(held_out, config.evaluation, config.training.seed, with_memory=memory, before=lora)


def make_engine(
    config: TrainConfig,
    settings: dict[str, Any] | None,
    corpus: PackedCorpus,
    device: torch.device,
    universal: bool = False,
) -> Engine:
    """Base, graft, optimizer, engine; `universal`: it will load a universal checkpoint."""
    world = ranks.world_size()
    if settings is not None:
        settings = complete_config(
            settings,
            rows=config.data.num_lanes // world,
            backwards_per_step=config.backwards_per_step,
            world_size=world,
            clip=config.optimizer.clip,
            bf16=config.model.dtype == "bfloat16",
            recomputed=config.training.checkpointing,
        )
        settings = {**settings, "checkpoint": {**settings.get("checkpoint", {}), "load_universal": universal}}
        prepare_ops(needed_ops(settings))
        check_stage(config, zero_stage(settings))
        if zero_stage(settings) == 3 and quantized.describe(base_config(config)) is not None:
            raise ConfigError(
                f"the base model {config.model.base} is quantised, and ZeRO-3 can't partition what is packed; take "
                "ds_configs/zero2.json, where a frozen base is whole on every rank"
            )
    check_memory(config, settings or {}, device)
    pretrained = settings is not None and config.model.base is not None  # random weights are the same at every stage
    with partitioned_loading(settings) if pretrained else contextlib.nullcontext():
        base = build.load_base(config.model, config.training.seed, corpus.vocab_size)
    corpus.check_vocabulary(build.vocabulary_of(base))
    module = build.make_module(base, config)
    if ranks.rank() == 0 and isinstance(module.model, TitansModel):
        plain_console().print(module.model.memory_summary(), highlight=False)
    if settings is None:
        return TorchEngine(module.to(device), make_optimizer(module, config.optimizer), config.optimizer.clip, device)
    return DeepSpeedEngine(module, make_optimizer(module, config.optimizer), settings, device)


def check_stage(config: TrainConfig, stage: int) -> None:
    """Refuse before anything is loaded what needs a base model whose parameters stay where they are."""
    training = config.training
    wanted = {"training.compile": training.compile != "none", "training.layer_graphs": training.layer_graphs}
    wanted["model.quantization"] = config.model.quantization != "none"
    for name in (name for name, on in wanted.items() if on and stage == 3):
        raise ConfigError(
            f"{name} is on under ZeRO-3, which gathers and releases parameters at every pass; switch it off, or take "
            "ds_configs/zero2.json, where a frozen base is whole on every rank"
        )


def find_checkpoint(config: TrainConfig, own: dict[str, Any]) -> Found | None:
    """What run.resume means, checked on rank 0 and the same on all."""
    run, world = config.run, ranks.world_size()
    return ranks.on_rank_zero(lambda: find(run.resume, Path(str(run.dir)), own, world, run.trust_checkpoint))


def make_folder(config: TrainConfig, text: str, found: Found | None) -> RunFolder | None:
    """The run folder, on rank 0: new, or as the checkpoint left it."""
    path = Path(str(config.run.dir))

    def make() -> RunFolder:
        if found is not None and path.resolve() in found.path.resolve().parents:
            again = config.evaluation.interval > 0 and evaluation_due(found.step, config)
            return RunFolder.reopen(path, text, found.step, again)
        restart = config.run.resume == "auto" and RunFolder(path).unfinished  # killed before its first checkpoint
        return RunFolder.create(path, text, config.run.overwrite or restart)

    made = ranks.on_rank_zero(make)
    return made if ranks.rank() == 0 else None


@dataclass(frozen=True)
class Parts:
    """What a Trainer is made of on this rank."""

    config: TrainConfig
    engine: Engine
    lanes: Lanes
    evaluator: Evaluator | None
    folder: RunFolder | None
    tokenizer: Any
    checkpoints: Checkpoints
    found: Found | None
    carried: Carried | None

    def trainer(self, reporter: TerminalReporter | None = None) -> Trainer:
        """Ready to run."""
        return Trainer(
            self.config,
            self.engine,
            self.lanes,
            self.evaluator,
            self.folder,
            reporter,
            self.tokenizer,
            self.checkpoints,
            self.found,
            self.carried,
        )


def run(parts: Parts) -> bool:
    """The loop, with a progress bar on rank 0, and the comparison at its end. Returns whether it was stopped early."""
    hosts = ranks.gather(peak_host_bytes())
    if parts.folder is None:
        return parts.trainer().run().stopped
    console = plain_console()
    describe(console, parts.engine, hosts)
    if parts.found is not None:
        console.print(f"going on from {parts.found.path}", highlight=False)
    with TerminalReporter(parts.config.training.steps) as reporter:
        outcome = parts.trainer(reporter).run()
    if outcome.evaluation is not None:
        print_comparison(console, outcome.evaluation)
    console.print(f"run folder: {parts.folder.path}", highlight=False)
    return outcome.stopped


def describe(console: Console, engine: Engine, hosts: list[int]) -> None:
    """What trains, and the peak host memory of every rank after loading."""
    sizes = [(whole_numel(p), p.requires_grad) for p in engine.module.parameters()]
    trained, total = sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)
    console.print(f"trainable parameters: {trained:,} of {total:,} ({100 * trained / total:.2f}%)", highlight=False)
    peaks = ", ".join(f"{h / 2**30:.2f} GiB" for h in hosts)
    console.print(f"peak host memory by rank, base model loaded: {peaks}", highlight=False)


if __name__ == "__main__":
    leave(main())
