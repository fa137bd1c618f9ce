"""The stages of `make demo`: the commands, each as one would type it."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.stages.chain import Stage
from titans_ds import assets
from titans_ds.errors import DataError, TitansError
from titans_ds.reading import read_json
from titans_ds.zero.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = "scratch"  # --base: train a tiny one from random weights
SHIPPED = assets.base()
_CPU_RANKS = 2
_HUGE = ("torch", "transformers", "sympy", "pandas", "scipy", "numpy")  # most of the files to read, a dozen each kept
_LANES = 8  # at least; a multiple of the number of ranks


@dataclass(frozen=True)
class Machine:
    """What there is to train on.

    Args:
        ranks: processes of the launcher.
        gpu: whether each has a GPU.
    """

    ranks: int
    gpu: bool

    @property
    def lanes(self) -> int:
        """Repositories read side by side."""
        return math.ceil(_LANES / self.ranks) * self.ranks


def find_machine(ranks: int | None) -> Machine:
    """One rank a GPU, or two on the CPU, unless `ranks` says otherwise."""
    import torch

    gpus = torch.cuda.device_count()
    return Machine(ranks or gpus or _CPU_RANKS, gpus > 0)


def make_stages(options: argparse.Namespace, machine: Machine) -> list[Stage]:
    """All of them, in order. Raises DataError where the shipped base is missing."""
    out = options.out.resolve()
    base, scratch = base_of(options), options.base == SCRATCH
    stages = [corpus_stage(out, options.packages, None if scratch else base)]
    if scratch:
        stages.append(tokenizer_stage(out))
    stages.append(pack_stage(out, str(out / "tokenizer") if scratch else base))
    if scratch:
        stages.append(base_stage(out, options, machine))
    stages.append(memory_stage(out, base, options, machine))
    if options.samples:
        stages.append(example_stage(out, base, options))
    return stages


def base_of(options: argparse.Namespace) -> str:
    """Folder or hub id of the base. Raises DataError where the shipped one is missing."""
    if options.base == SCRATCH:
        return str(options.out.resolve() / "base" / "model")
    if options.base is not None:
        return absolute(options.base)
    if not (SHIPPED / "model.safetensors").is_file():
        raise DataError(
            f"the base model that ships with this project is not in {SHIPPED}; check it out again, or choose one: "
            f"--base FOLDER_OR_HUB_ID, or --base {SCRATCH} to train a tiny one here"
        )
    return str(SHIPPED)


def absolute(name: str) -> str:
    """The path of what is there, for commands that run in another folder; or a hub id, as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def trained_on(base: str) -> list[str] | None:
    """Packages that the base was trained on, from the manifest beside its weights; None where there is none."""
    manifest = Path(base) / "corpus_manifest.json"
    if not manifest.is_file():
        return None
    names = read_json(manifest, dict[str, Any]).get("train_repositories")
    return None if names is None else [str(name) for name in names]


def corpus_stage(out: Path, packages: int | None, base: str | None) -> Stage:
    """Many packages, little of each, and none that the base has been trained on: it may know those by heart."""
    known = [] if base is None else trained_on(base) or []
    arguments = ["-m", "data_prep.build_corpus", "--installed", "--restart"]
    arguments += ["--exclude", ",".join(sorted({*_HUGE, *known}))]
    arguments += ["--max-files-per-repo", "12", "--max-file-bytes", "30000", "--split-ratios", "65/30/5"]
    arguments += ["--out", str(out / "corpus")]
    if packages is not None:
        arguments += ["--max-repos", str(packages)]
    return Stage("corpus from the packages installed here", [sys.executable], arguments, out / "corpus")


def tokenizer_stage(out: Path) -> Stage:
    """Byte-pair encoding."""
    arguments = ["-m", "data_prep.train_tokenizer", "--corpus", str(out / "corpus")]
    arguments += ["--vocab-size", "2048", "--out", str(out / "tokenizer")]
    return Stage("byte-pair tokenizer", [sys.executable], arguments, out / "tokenizer")


def pack_stage(out: Path, tokenizer: str) -> Stage:
    """Tokens, memory-mapped."""
    arguments = ["-m", "data_prep.pack_corpus", "--corpus", str(out / "corpus")]
    arguments += ["--tokenizer", tokenizer, "--out", str(out / "packed")]
    return Stage("corpus into tokens", [sys.executable], arguments, out / "packed")


def base_stage(out: Path, options: argparse.Namespace, machine: Machine) -> Stage:
    """Three DeltaNet layers to one of attention, twice, from random weights."""
    arguments = ["--data.corpus", str(out / "packed"), "--model.tokenizer", str(out / "tokenizer")]
    arguments += ["--training.steps", str(options.base_steps)]
    title = "tiny hybrid base model, trained from random weights"
    return training_stage(title, "demo_base.yaml", arguments, out / "base", machine)


def memory_stage(out: Path, base: str, options: argparse.Namespace, machine: Machine) -> Stage:
    """The default memory on the frozen base, ZeRO-2."""
    arguments = ["--model.base", base, "--data.corpus", str(out / "packed")]
    arguments += ["--training.steps", str(options.steps)]
    if options.base not in (None, SCRATCH):
        arguments += ["--training.checkpointing", "true"]
        arguments += ["--model.dtype", "bfloat16"] if machine.gpu else []
    title = "memory grafted, base frozen, trained"
    return training_stage(title, "demo_memory.yaml", arguments, out / "memory", machine)


def training_stage(title: str, config: str, arguments: list[str], run_folder: Path, machine: Machine) -> Stage:
    """`deepspeed launch/train.py`."""
    path = f"launch/configs/{config}"
    arguments = ["launch/train.py", "--config", path, *arguments]
    arguments += ["--data.num_lanes", str(machine.lanes), "--run.dir", str(run_folder)]
    title = f"{title} ({machine.ranks} ranks, ZeRO-2)"
    return Stage(title, launcher(machine.ranks), arguments, run_folder, [ROOT / path])


def example_stage(out: Path, base: str, options: argparse.Namespace) -> Stage:
    """Completions of a held-out package with its memory, another's, and none."""
    arguments = ["-m", "launch.demo_example", "--base", base, "--adapter", str(out / "memory" / "adapter")]
    arguments += ["--corpus", str(out / "packed"), "--samples", str(options.samples)]
    arguments += ["--out", str(out / "example.json")]
    title = f"an example, chosen among {options.samples}"
    return Stage(title, [sys.executable], arguments, out / "example.json")


def launcher(ranks: int) -> list[str]:
    """The `deepspeed` command of this environment, on the GPUs that CUDA_VISIBLE_DEVICES names where it names any."""
    found = shutil.which("deepspeed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise TitansError("the command `deepspeed` is not installed in this environment; run `make setup`")
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip().isdigit()]
    # Given a number, the launcher takes the machine's first GPUs, whatever that variable says.
    chosen = ["--include", f"localhost:{','.join(visible[:ranks])}"]
    count = chosen if len(visible) >= ranks and torch.cuda.is_available() else ["--num_accelerators", str(ranks)]
    return [found, "--quiet", *count, "--master_port", str(free_port())]
