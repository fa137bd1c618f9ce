"""Evaluation speed against plain Hugging Face `generate`, as ratios measured in one run.

    python -m benchmarks.eval_throughput --base BASE [--adapter DIR] --data rows.jsonl --limit 32 --batch-size 8
    python -m benchmarks.eval_throughput --base qwen3.5-9b-random --force-new-tokens 50 --prompt-tokens 2048 \
        --context-tokens 512 --prompts 256 --batch-sizes 32,64,128 --out FILE
    python -m benchmarks.eval_throughput --base tiny --force-new-tokens 8 --prompt-tokens 64 --context-tokens 16 \
        --prompts 8 --batch-sizes 2,4 --memory-dim 64 --compile none

Two workloads on the same rows, greedy, with the same lengths and the same batch size:
  completions   one boundary, completions only: `generate` in batches as the rows come, left-padded, against the decoder
                with refill and its stop at the end of the statement
  full          what an evaluation needs: both boundaries and the target's likelihood under each; for `generate` two
                calls (it cannot heal: the unhealed prompt twice) and two forward passes
With an adapter the memory is primed on the row's snippets in both. Also printed: the share of equal scored predictions.

With --force-new-tokens: random prompts, no data (benchmarks/forced_decoding.py): `generate` at the first batch size
against the decoder in growing shapes and in fixed ones (CUDA graphs) at all, memory against concatenated context, and
priming against a plain forward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import forced_decoding
from benchmarks.program import run
from eval.benchmark import load_benchmark, select_rows
from eval.decoding import Decoder, DecodeSettings, Job
from eval.likelihood import healed_target, plain_target
from eval.postprocess import is_settled, postprocess
from eval.prompts import Budget, PromptBuilder
from eval.provenance import describe_environment
from eval.retrieval import Retriever
from eval.subject import ModelSettings, Subject


class Workload:
    """The same rows as jobs for the decoder and as batches for `generate`."""

    def __init__(self, subject: Subject, options: argparse.Namespace) -> None:
        self.subject, self.options = subject, options
        self.path = "graft" if options.adapter else "vanilla"
        rows = select_rows(load_benchmark(options.data), options.limit, "random", 0)
        self.rows = rows
        budget = Budget(options.max_length, 0, 0, options.max_new_tokens).fitted_to(subject.max_positions)
        builder = PromptBuilder(subject.tokenizer, subject.vocabulary, budget)
        retriever = Retriever()
        self.jobs = {}
        for task, row in rows.items():
            built = builder.build(row, "", infill=False)
            healed = healed_target(subject.tokenizer, subject.vocabulary, row.prompt, row.groundtruth, built.healed)
            self.jobs[task] = Job(
                task,
                built.prefix,
                built.healed.removed,
                built.healed.text,
                ("heal", "plain"),
                {"heal": healed, "plain": plain_target(subject.tokenizer, row.groundtruth)},
                retriever.snippets(row) if options.adapter else (),
                lambda text, row=row: is_settled(row.prompt, text, row.language),
            )

    def decode(self, full: bool) -> dict[str, str]:
        """Our way; returns the plain completions."""
        options, subject = self.options, self.subject
        decoder = self._decoder(options.batch_size)
        jobs = list(self.jobs.values())
        if not full:
            jobs = [Job(j.key, j.prefix, j.removed, j.healed_text, ("plain",), {}, j.priming, j.stop) for j in jobs]
        with subject.on_path(self.path):
            return {c.key: c.text for c in decoder.run(jobs) if c.boundary == "plain"}

    def _decoder(self, batch_size: int) -> Decoder:
        options, subject = self.options, self.subject
        fixed, eos = options.decode_graphs == "on", subject.eos_tokens
        settings = DecodeSettings(batch_size, options.max_new_tokens, eos_tokens=eos, fixed_shapes=fixed)
        return Decoder(subject, subject.vocabulary, settings, subject.device)

    def equal_tokens(self, batch_size: int) -> float:
        """Share of tokens that come out the same alone and in a batch: 1 in float32, less in bfloat16 on a GPU."""
        runs = []
        for size in (1, batch_size):
            decoder = self._decoder(size)
            with self.subject.on_path(self.path):
                runs.append({(c.key, c.boundary): c.tokens for c in decoder.run(self.jobs.values())})
        pairs = [(runs[0][key], runs[1][key]) for key in runs[0]]
        equal = sum(a == b for first, second in pairs for a, b in zip(first, second, strict=False))
        return equal / sum(max(len(first), len(second)) for first, second in pairs)

    def generate(self, full: bool) -> dict[str, str]:
        """Plain Hugging Face; returns the completions."""
        completions: dict[str, str] = {}
        jobs, size = list(self.jobs.values()), self.options.batch_size
        with self.subject.on_path(self.path):
            for start in range(0, len(jobs), size):
                part = jobs[start : start + size]
                for _ in range(2 if full else 1):
                    completions |= self._generate(part)
                    if full:
                        self._score(part)
        return completions

    @contextlib.contextmanager
    def _memory(self, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        if not self.options.adapter:
            yield {}
            return
        with self.subject.grafted.memory_session(len(jobs)) as session:
            self.subject.forget()  # what the decoder primed is not this side's to use
            session.state = self.subject.memory_for([job.priming for job in jobs])
            yield {"memory": session}

    def _generate(self, jobs: Sequence[Job]) -> dict[str, str]:
        ids, mask = _left_padded([job.prefix + job.removed for job in jobs], self.subject.device)
        model = self.subject.grafted if self.options.adapter else self.subject.base_model
        length = self.options.max_new_tokens
        with self._memory(jobs) as memory, torch.no_grad():
            found = model.generate(
                ids, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=0, **memory
            )
        texts = [self.subject.vocabulary.text(row) for row in found[:, ids.shape[1] :].tolist()]
        return dict(zip((job.key for job in jobs), texts, strict=True))

    def _score(self, jobs: Sequence[Job]) -> None:
        ids, mask = _left_padded([j.prefix + j.removed + j.targets["plain"].tokens for j in jobs], self.subject.device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            state = self.subject.memory_for([job.priming for job in jobs])
            self.subject(ids, mask, positions, None, state, last_only=False)

    def same_share(self, first: dict[str, str], second: dict[str, str]) -> float:
        """Share of rows whose completions come out the same after post-processing."""
        cut = [
            [postprocess("parity", row.prompt, side[task], row.groundtruth, row.language) for side in (first, second)]
            for task, row in self.rows.items()
        ]
        return sum(a == b for a, b in cut) / len(cut)


def _left_padded(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(map(len, sequences))
    ids = torch.tensor([[0] * (length - len(s)) + s for s in sequences], device=device)
    mask = torch.tensor([[0] * (length - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def _timed(call: Callable[[], dict[str, str]], device: torch.device, repeats: int) -> tuple[float, dict[str, str]]:
    """Return the best of `repeats` times in seconds, and the result."""
    best, result = float("inf"), {}
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, result


def main() -> int:
    """Measure and print one JSON object, or tables where new tokens are forced; returns the exit code."""
    options = _options()
    if options.force_new_tokens:
        return run(forced_decoding.measure, forced_decoding.table, options)
    subject = Subject.load(ModelSettings(options.base, options.adapter, options.device, options.dtype), False)
    work = Workload(subject, options)
    report: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(options).items()}, "rows": len(work.rows)}
    for name, full in (("completions", False), ("full", True)):
        ours, decoded = _timed(lambda full=full: work.decode(full), subject.device, options.repeats)
        theirs, generated = _timed(lambda full=full: work.generate(full), subject.device, options.repeats)
        report[name] = {
            "decoder_seconds": round(ours, 2),
            "generate_seconds": round(theirs, 2),
            "speedup": round(theirs / ours, 2),
            "same_predictions": work.same_share(decoded, generated),
        }
    if options.invariance:
        report["equal_tokens_alone_and_in_batch"] = work.equal_tokens(options.batch_size)
    print(json.dumps(report | describe_environment(), indent=2))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--data", type=Path, help="not needed with --force-new-tokens")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--max-new-tokens", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--invariance", action="store_true", help="also compare a batch with single rows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--decode-graphs", choices=("on", "off"), default="off", help="of the decoder, with --data")
    _add_forced(parser)
    options = parser.parse_args()
    if options.data is None and not options.force_new_tokens:
        parser.error("give --data, or --force-new-tokens for random prompts")
    return options


def _add_forced(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("random prompts; --base may be tiny or qwen3.5-9b-random")
    group.add_argument("--force-new-tokens", type=int, default=0, help="new tokens of every prompt, no stop")
    group.add_argument("--prompt-tokens", type=int, default=2048)
    group.add_argument("--context-tokens", type=int, default=512, help="of these, what the memory is primed with")
    group.add_argument("--prompts", type=int, default=64, help="prompts a way")
    group.add_argument("--batch-sizes", type=_sizes, default=[32], help="the first is that of generate; 32,64,128")
    group.add_argument("--memory-dim", type=int, default=512)
    group.add_argument("--ways", nargs="+", choices=forced_decoding.WAYS, default=list(forced_decoding.WAYS))
    group.add_argument(
        "--compile",
        choices=("mlp", "none"),
        default="mlp",
        help="of all ways but generate: the base model's norms, MLPs and convolutions fused (default: mlp)",
    )
    group.add_argument("--out", type=Path, help="JSON, written anew after every way")


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
