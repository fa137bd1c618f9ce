"""One completion that a person can read: a held-out package's own names, with its memory, with another's, without.

    python -m launch.demo_example --base M --adapter DIR --corpus PACKED --out example.json [--samples 24]

A sample is a place in a held-out package where a name follows that the package's other files hold and the prompt does
not. Its own memory has read those other files, the wrong one as much of another package. Of all samples the one is
shown whose true continuation the own memory makes likeliest beside the wrong one: the best case, and it says so.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titans_ds import TitansModel
from titans_ds.errors import DataError
from titans_ds.files import check_file, write_json
from titans_ds.graft.compare import compare, primed
from titans_ds.program import program, whole_number
from titans_ds.training.build import load_tokenizer
from titans_ds.training.data.packed import PackedSplit, open_corpus
from titans_ds.training.settings import ModelSettings

PROMPT, CONTINUATION, READ = 64, 16, 1024  # tokens
_NAME = re.compile(r"\b(?:[A-Za-z][A-Za-z0-9]*_[A-Za-z0-9_]{2,}|[A-Z][a-z0-9]+[A-Z][A-Za-z0-9]+)\b")  # a_name or AName


@dataclass(frozen=True)
class Sample:
    """A place in a package: what its memory reads, a prompt, and what follows it, as token ids."""

    package: str
    name: str
    read: list[list[int]]
    prompt: list[int]
    truth: list[int]


@program("run the same command again")
def main(argv: list[str]) -> None:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo_example", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="the base model, a folder or hub id")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the trained memory")
    parser.add_argument("--corpus", type=Path, required=True, help="packed corpus")
    parser.add_argument("--split", default="validation", help="of packages that were not trained on")
    parser.add_argument("--samples", type=whole_number(1, 1000), default=24, help="to choose from (default: 24)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    check_file(options.out, rb"\"wrong_package\":")
    tokenizer = load_tokenizer(ModelSettings(base=options.base, tokenizer=options.base))
    split = open_corpus(options.corpus).split(options.split, 2)
    samples = [s for s, _ in zip(find_samples(split, tokenizer), range(options.samples), strict=False)]
    if len({s.package for s in samples}) < 2:
        raise DataError(
            f"split {options.split!r} of {options.corpus} has no two packages with a name to complete; take a "
            "larger corpus"
        )
    model = TitansModel.from_pretrained(options.base, options.adapter).eval()
    write_json(options.out, choose(model, tokenizer, samples))


def find_samples(split: PackedSplit, tokenizer: Any) -> Iterator[Sample]:
    """Samples of all packages in turn, one of a file, until no file is left."""
    waiting = [list(range(int(split.repo_files[r]), int(split.repo_files[r + 1]))) for r in range(split.num_repos)]
    while any(waiting):
        for repo, files in enumerate(waiting):
            if files and (found := _sample_of(split, repo, files.pop(0), tokenizer)) is not None:
                yield found


def _sample_of(split: PackedSplit, repo: int, target: int, tokenizer: Any) -> Sample | None:
    """The first place in a file where a name follows that other files of the package hold and the prompt does not."""
    read: list[list[int]] = []
    room = READ
    for file in range(int(split.repo_files[repo]), int(split.repo_files[repo + 1])):
        if file != target and room > 0:
            read.append([int(t) for t in split.file(file)[:room]])
            room -= len(read[-1])
    ids = [int(t) for t in split.file(target)[:4096]]
    known = set(_NAME.findall(tokenizer.decode([t for file in read for t in file])))
    # Where each token starts in the text, to find the token that a name starts with.
    pieces = [tokenizer.decode([t]) for t in ids]
    starts, text = {}, ""
    for place, piece in enumerate(pieces):
        starts[len(text) + len(piece) - len(piece.lstrip())] = place
        text += piece
    for match in _NAME.finditer(text):
        place = starts.get(match.start(), 0)
        if not PROMPT <= place <= len(ids) - CONTINUATION or match.group() not in known:
            continue
        if match.group() not in "".join(pieces[place - PROMPT : place]):
            prompt, truth = ids[place - PROMPT : place], ids[place : place + CONTINUATION]
            return Sample(split.repo_names[repo], match.group(), read, prompt, truth)
    return None


def choose(model: TitansModel, tokenizer: Any, samples: list[Sample]) -> dict[str, Any]:
    """Measure all samples, and complete the one that own memory helps most, in three ways."""
    measured = []
    for number, sample in enumerate(samples):
        other = next(s for s in samples[number + 1 :] + samples if s.package != sample.package)
        text = [*sample.prompt, *sample.truth]
        found = compare(model, read=sample.read, wrong=other.read, text=text, prompt_tokens=len(sample.prompt))
        measured.append((found.wrong - found.own, sample, other, found))
    gain, sample, other, losses = max(measured, key=lambda entry: entry[0])
    completions = {}
    for name, files in (("own", sample.read), ("wrong", other.read)):
        with primed(model, files) as memory:
            completions[name] = _complete(model, tokenizer, sample.prompt, memory=memory)
    with model.disable_memory():
        completions["ablated"] = _complete(model, tokenizer, sample.prompt)
    return {
        "package": sample.package,
        "wrong_package": other.package,
        "name": sample.name,
        "samples": len(samples),
        "samples_where_own_is_better": sum(entry[0] > 0 for entry in measured),
        "wrong_minus_own": gain,
        "losses": {"own": losses.own, "wrong": losses.wrong, "empty": losses.empty, "ablated": losses.ablated},
        "prompt": tokenizer.decode(sample.prompt),
        "truth": tokenizer.decode(sample.truth),
        "completions": completions,
    }


def _complete(model: TitansModel, tokenizer: Any, prompt: list[int], **memory: Any) -> str:
    ids = torch.tensor([prompt], device=model.device)
    options = {"max_new_tokens": CONTINUATION, "do_sample": False, "pad_token_id": 0}
    done = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **memory)
    return str(tokenizer.decode(done[0, len(prompt) :]))


if __name__ == "__main__":
    sys.exit(main())
