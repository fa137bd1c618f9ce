"""The command `titans-ds`: every program of launch/, eval/ and data_prep/, in any folder, from a wheel or a checkout.

    titans-ds COMMAND [OPTIONS]

A wheel holds those folders below titans_ds/programs, laid out as in a checkout, so that they run there unchanged. As a
module it goes through any launcher: `deepspeed --module titans_ds train …`, `torchrun -m titans_ds train …`.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from pathlib import Path

from titans_ds.program import missing_extra

# Command -> module, and what it does.
COMMANDS = {
    "demo": ("launch.demo", "the whole path, small: corpus, memory, comparison, example"),
    "train": ("launch.train", "train a memory, or a base model"),
    "prime": ("launch.prime", "read a repository once, and keep its memory in a file"),
    "complete": ("launch.complete", "complete a file with the memory of a repository"),
    "inspect": ("launch.inspect_memory", "a page of what a memory has read, holds and recalls"),
    "eval": ("eval.crosscodeeval", "repository-level completion, with controls and a report"),
    "control": ("eval.positive_control", "tasks that a memory must solve"),
    "capacity": ("eval.capacity", "how many pairs a memory holds"),
    "study": ("launch.run_study", "arms of a study, trained and evaluated"),
    "sweep": ("launch.sweep", "search settings with Optuna"),
    "preflight": ("launch.preflight", "check the nodes before a long run"),
    "export": ("launch.export_adapter", "make an adapter of a checkpoint"),
    "universal": ("launch.universal_checkpoint", "make a checkpoint for another number of ranks"),
    "fan": ("launch.train_fan", "train a Forward Alignment Network for an adapter"),
    "build-corpus": ("data_prep.build_corpus", "a corpus from packages, folders or StarCoderData"),
    "pack-corpus": ("data_prep.pack_corpus", "tokenise a corpus for training"),
    "train-tokenizer": ("data_prep.train_tokenizer", "a tokenizer of a corpus's own"),
    "decontaminate": ("data_prep.decontaminate", "take a benchmark's files out of a corpus"),
    "cross-file-pairs": ("data_prep.cross_file_pairs", "completions of a corpus that need other files"),
    "build-benchmark": ("data_prep.build_benchmark", "a benchmark of recent packages"),
    "benchmark2026": ("data_prep.benchmark2026", "unpack the benchmark that comes along"),
}


def main() -> int:
    """Run one program; returns its exit code, and 2 for an unknown command or a package that is not installed."""
    words = [word for word in sys.argv[1:] if not word.startswith(("--local_rank", "--local-rank"))]
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print("titans-ds COMMAND [OPTIONS]; COMMAND --help lists its options\n")
        print("\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()))
        return 0
    name, *options = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "`titans-ds --help` lists all"
        print(f"error: titans-ds has no command {name!r}; {hint}", file=sys.stderr)
        return 2
    package = Path(__file__).resolve().parent
    inside = package / "programs"
    sys.path.insert(0, str(inside if inside.is_dir() else package.parent))
    sys.argv = [f"titans-ds {name}", *options]
    try:
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        message = missing_extra(error.name or "")
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
