"""The whole path, small: corpus, tokenizer, base model, memory, comparison. Run by `make demo`.

    python -m launch.demo [--base FOLDER_OR_HUB_ID] [--steps N] [--out DIR]

Needs no network, no GPU and no model hub: the corpus is the Python packages installed in this environment, split by
package, and the base is a Qwen3.5-shaped hybrid of two million parameters, trained here. Done stages are skipped.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launch.show import print_comparison
from launch.stages import Stage, run_stages
from launch.verdict import last_evaluation, sentence
from titans_ds.errors import TitansError

ROOT = Path(__file__).resolve().parent.parent
_CPU_RANKS = 2
_HUGE = "torch,transformers,sympy,pandas,scipy,numpy"  # most of the files to read, for a dozen each in the corpus
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse(arguments)
    console = Console(highlight=False)
    try:
        run(options, console)
    except TitansError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on with the stage that was under way", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", help="pretrained causal LM, a folder or hub id; default: a tiny one is trained here")
    parser.add_argument(
        "--out", type=Path, default=Path(".demo"), help="folder of everything made (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=150, help="of the memory's training (default %(default)s)")
    parser.add_argument("--base-steps", type=int, default=500, help="of the tiny base's (default %(default)s)")
    parser.add_argument("--packages", type=int, help="greatest number of packages in the corpus (default: all)")
    parser.add_argument("--ranks", type=int, help="processes (default: one a GPU; 2 on CPU)")
    options = parser.parse_args(arguments)
    for name in ("steps", "base_steps", "packages", "ranks"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    return options


def run(options: argparse.Namespace, console: Console) -> None:
    """All stages, and what came of them. Raises TitansError where one fails."""
    start, machine = time.perf_counter(), find_machine(options.ranks)
    where = f"{machine.ranks} GPU(s)" if machine.gpu else f"CPU, {machine.ranks} processes"
    console.print(f"titans-ds demo on {where}; everything goes to {options.out}/")
    stages = make_stages(options, machine)
    ran = run_stages(stages, options.out / "stamps", ROOT, environment(machine), console.print)
    report(options, console, table=stages[-1] not in ran)  # a training run that ends now has printed its table
    console.print(f"run folder: {options.out / 'memory'} (made in {time.perf_counter() - start:.0f} s, set-up apart)")


def environment(machine: Machine) -> dict[str, str]:
    """Less talk from the libraries, and no search for accelerators where there are none."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return quiet if machine.gpu else quiet | {"DS_ACCELERATOR": "cpu"}


def find_machine(ranks: int | None) -> Machine:
    """One rank a GPU, or two on the CPU, unless `ranks` says otherwise."""
    import torch

    gpus = torch.cuda.device_count()
    return Machine(ranks or gpus or _CPU_RANKS, gpus > 0)


def make_stages(options: argparse.Namespace, machine: Machine) -> list[Stage]:
    """The commands, each as one would type it."""
    out = options.out.resolve()
    tokenizer = options.base or str(out / "tokenizer")
    stages = [corpus_stage(out, options.packages)]
    if options.base is None:
        stages.append(tokenizer_stage(out))
    stages.append(pack_stage(out, tokenizer))
    if options.base is None:
        stages.append(base_stage(out, options, machine))
    return [*stages, memory_stage(out, options, machine)]


def corpus_stage(out: Path, packages: int | None) -> Stage:
    """Many packages, little of each: a tiny model learns more from variety."""
    arguments = ["-m", "data_prep.build_corpus", "--installed", "--exclude", _HUGE, "--restart"]
    arguments += ["--max-files-per-repo", "12", "--max-file-bytes", "30000", "--split-ratios", "70/25/5"]
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


def memory_stage(out: Path, options: argparse.Namespace, machine: Machine) -> Stage:
    """Memory on the attention layers of the frozen base, ZeRO-2."""
    arguments = ["--model.base", options.base or str(out / "base" / "model"), "--data.corpus", str(out / "packed")]
    arguments += ["--training.steps", str(options.steps)]
    if options.base is not None:
        arguments += ["--training.checkpointing", "true"]
        arguments += ["--model.dtype", "bfloat16"] if machine.gpu else []
    return training_stage(
        "memory grafted, base frozen, trained", "demo_memory.yaml", arguments, out / "memory", machine
    )


def training_stage(title: str, config: str, arguments: list[str], run_folder: Path, machine: Machine) -> Stage:
    """`deepspeed launch/train.py`."""
    path = f"launch/configs/{config}"
    arguments = ["launch/train.py", "--config", path, *arguments]
    arguments += ["--data.num_lanes", str(machine.lanes), "--run.dir", str(run_folder)]
    title = f"{title} ({machine.ranks} ranks, ZeRO-2)"
    return Stage(title, launcher(machine.ranks), arguments, run_folder, [ROOT / path])


def launcher(ranks: int) -> list[str]:
    """The `deepspeed` command of this environment."""
    found = shutil.which("deepspeed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise TitansError("the command `deepspeed` is not installed in this environment; run `make setup`")
    return [found, "--quiet", "--num_accelerators", str(ranks), "--master_port", str(free_port())]


def free_port() -> int:
    """A port that nobody listens on, so that two launches on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def report(options: argparse.Namespace, console: Console, table: bool) -> None:
    """The comparison and what it means."""
    evaluation = last_evaluation(options.out / "memory")
    if table:
        print_comparison(console, evaluation)
    console.print(sentence(evaluation), soft_wrap=True)
    if options.base is None:
        console.print("This is a tiny base trained for minutes: it shows that the parts work together, no more.")


if __name__ == "__main__":
    sys.exit(main())
