"""Train Forward Alignment Networks for a saved memory: predictions of the write's gradient from forward activations.

    python -m launch.train_fan --config launch/configs/fan.yaml --model.base BASE --adapter DIR --data.corpus DIR

Streams segments of the training split through base and adapter, trains one network a layer against the exact gradient
of every write (titans_ds/memory/fan.py), and saves an adapter of its own (--out): the given one, with
memory.rule.gradient `fan` and the networks in it, which TitansModel.from_pretrained loads like any other. fan.json
beside it holds cosines, and the held-out loss with memories that the exact gradient wrote, that the networks wrote, and
that nothing wrote. One process, on the GPU if there is one.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from jsonargparse import ActionConfigFile, ArgumentParser

from launch.arguments import checked_values
from launch.corpus import packed_corpus
from titans_ds.errors import ConfigError
from titans_ds.files import atomic_folder, check_folder, write_json
from titans_ds.graft.adapter import ADAPTER, write
from titans_ds.graft.titans_model import TitansModel
from titans_ds.program import program
from titans_ds.training import alignment, build
from titans_ds.training.data.lanes import Lanes
from titans_ds.training.data.packed import PackedCorpus, open_corpus
from titans_ds.training.data.segments import RepositoryReader
from titans_ds.training.engine import TorchEngine
from titans_ds.training.evaluation import Estimate, Evaluator, estimate
from titans_ds.training.module import TrainingModule
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.settings import DataSettings, EvaluationSettings, ModelSettings, OptimizerSettings

REPORT = "fan.json"


@dataclass(frozen=True)
class FanConfig:
    """Train Forward Alignment Networks beside a memory that is trained already.

    Args:
        model: the base model.
        data: the corpus.
        adapter: folder of the memory.
        out: folder of the new adapter.
        width: units of each network's hidden layer.
        steps: optimizer steps, one segment of every lane each.
        follow: which gradient writes the memories meanwhile.
        optimizer: AdamW of the networks.
        evaluation: held-out repositories.
        seed: of lanes and held-out repositories.
        overwrite: replace what is in `out`.
    """

    model: ModelSettings
    data: DataSettings
    adapter: str
    out: str
    width: int = 64
    steps: int = 1000
    follow: Literal["exact", "fan", "alternate"] = "alternate"
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=5e-4, weight_decay=0.0))
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.width < 1:
            raise ConfigError(f"steps is {self.steps}, width is {self.width}; both must be 1 or more")
        if Path(self.out).resolve() == Path(self.adapter).resolve():
            raise ConfigError(f"out is the adapter's own folder, {self.adapter}; give another one")
        if Path(self.out).exists() and not self.overwrite:
            raise ConfigError(f"{self.out} exists already; give another folder with --out, or --overwrite true")


@program("nothing was written; the same command starts anew")
def main(arguments: list[str]) -> None:
    """Run the program; returns its exit code."""
    transformers.utils.logging.set_verbosity_error()
    run(parse(arguments))


def parse(arguments: Sequence[str]) -> FanConfig:
    """The configuration. Raises ConfigError for an unknown key, a wrong type or a missing file."""
    parser = ArgumentParser(prog="python -m launch.train_fan", description=__doc__, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; options after it override it")
    parser.add_class_arguments(FanConfig, as_group=False)
    values, _ = checked_values(parser, FanConfig, arguments)
    return FanConfig(**values)


def run(config: FanConfig) -> None:
    """Train, measure, save."""
    check_folder(config.out, ADAPTER)
    corpus = open_corpus(packed_corpus(config.data.corpus, config.model.tokenizer or config.model.base))
    model = load(config, corpus)
    train, held_out = (
        reader(config, model, corpus, name) for name in (config.data.train_split, config.evaluation.split)
    )
    before = measure(config, model, held_out)
    untrained = f"cosine {before.mean:.3f}, whole gradients {before.whole:.3f}"
    print(f"held out, feedback through the initial weights, untrained: {untrained}", flush=True)
    seconds = fit(config, model, train)
    after, elsewhere = (measure(config, model, held_out, own) for own in (True, False))
    losses = downstream(config, model, held_out)
    report = {
        "config": dataclasses.asdict(config),
        "seconds": seconds,
        "cosine_before": dataclasses.asdict(before),
        "cosine": dataclasses.asdict(after),
        "cosine_in_exact_memories": dataclasses.asdict(elsewhere),
        "held_out_loss": losses,
    }
    save(model, Path(config.out), report)
    show(after, losses, config.out)


def load(config: FanConfig, corpus: PackedCorpus) -> TitansModel:
    """Base, adapter and untrained networks, on the GPU if there is one."""
    base = build.load_base(config.model, config.seed, corpus.vocab_size)
    corpus.check_vocabulary(build.vocabulary_of(base))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return alignment.with_networks(base, Path(config.adapter), config.width).to(device).eval()


def reader(config: FanConfig, model: TitansModel, corpus: PackedCorpus, split: str) -> RepositoryReader:
    """Segments as long as the adapter's."""
    tokens = model.graft.segment_tokens
    return RepositoryReader(corpus.split(split, 2), tokens, config.data.layout, reset=config.data.reset)


def lanes(config: FanConfig, segments: RepositoryReader) -> Lanes:
    """All lanes, on the one rank there is."""
    return Lanes(segments, config.data.num_lanes, 0, 1, config.seed)


def fit(config: FanConfig, model: TitansModel, train: RepositoryReader) -> float:
    """Train the networks; returns the seconds that it took."""
    start, told = time.monotonic(), 0.0
    trainer = alignment.AlignmentTrainer(model, lanes(config, train), config.optimizer, config.steps, config.follow)
    for step, loss, found in trainer.run():
        if time.monotonic() - told >= 5 or step == config.steps:
            told = time.monotonic()
            cosines = f"cosine {found.mean:.3f}, whole gradients {found.whole:.3f}"
            print(f"{told - start:5.0f} s  step {step}/{config.steps}  loss {loss:.4f}  {cosines}", flush=True)
    return time.monotonic() - start


def measure(config: FanConfig, model: TitansModel, held_out: RepositoryReader, own: bool = True) -> alignment.Alignment:
    """Cosines on the held-out split, in memories that the networks write (`own`) or the exact gradient does: as many
    segments of every lane as evaluation takes of a repository."""
    return alignment.measure(model, lanes(config, held_out), config.evaluation.max_segments, own)


def downstream(config: FanConfig, model: TitansModel, held_out: RepositoryReader) -> dict[str, Any]:
    """Held-out losses, nats a token, by what wrote the memory; and paired differences from the exact gradient."""
    module = TrainingModule(model, 1024)
    networks = alignment.networks(model).values()
    parameters = [p.requires_grad_(True) for fan in networks for p in fan.parameters()]  # an engine wants some
    engine = TorchEngine(module, make_optimizer(module, config.optimizer), 0.0, model.device)
    evaluator = Evaluator(held_out, config.evaluation, config.seed, with_memory=True)
    found = {}
    for writer in ("exact", "fan", "unwritten"):
        for fan in networks:
            fan.bypassed = writer == "exact"
        with model.controls(inner_steps=0 if writer == "unwritten" else None):
            found[writer] = evaluator.run(engine)
    for parameter in parameters:
        parameter.requires_grad_(False)
    by_writer = {writer: [r.losses["memory"] for r in result.repositories] for writer, result in found.items()}
    by_writer["ablated"] = [r.losses["ablated"] for r in found["exact"].repositories]
    exact = by_writer["exact"]
    differences = {w: [a - b for a, b in zip(v, exact, strict=True)] for w, v in by_writer.items() if w != "exact"}
    return {
        "losses": {writer: _plain(estimate(values)) for writer, values in by_writer.items()},
        "minus_exact": {writer: _plain(estimate(values)) for writer, values in differences.items()},
        "repositories": len(exact),
    }


def _plain(found: Estimate) -> dict[str, float | None]:
    error = found.standard_error
    return {"mean": found.mean, "standard_error": error if math.isfinite(error) else None}


def save(model: TitansModel, out: Path, report: dict[str, Any]) -> None:
    """The adapter and the report, whole or not at all."""
    with atomic_folder(out, ADAPTER) as folder:
        write(model, folder)
        write_json(folder / REPORT, report)


def show(found: alignment.Alignment, losses: dict[str, Any], out: str) -> None:
    """Cosines by layer, and the held-out losses."""
    layers = ", ".join(f"layer {index} {cosine:.3f}" for index, cosine in found.by_layer.items())
    print(f"held out: cosine {found.mean:.3f} ({layers}); whole gradients {found.whole:.3f}")
    for writer, loss in losses["losses"].items():
        against = losses["minus_exact"].get(writer)
        told = (
            "" if against is None else f"   minus exact {against['mean']:+.4f} ± {against['standard_error'] or 0:.4f}"
        )
        print(f"held-out loss, memory {writer:>9}: {loss['mean']:.4f} ± {loss['standard_error'] or 0:.4f}{told}")
    print(f"adapter: {out}")


if __name__ == "__main__":
    sys.exit(main())
