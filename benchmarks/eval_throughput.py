"""Speed of evaluation and of priming: `generate`, this project's decoder, a memory beside concatenated context.

    python -m benchmarks.eval_throughput                                               # a tiny hybrid
    python -m benchmarks.eval_throughput --base qwen3.5-9b-random --dtype bfloat16 --force-new-tokens 50 \
        --prompt-tokens 2048 --context-tokens 512 --prompts 256 --batch-sizes 32,64,128 --out FILE

Random prompts of one length, N forced new tokens: every way does the same work, without a stop or an end of text, and
random weights serve as well as trained ones.

    generate   transformers' own, at the first batch size, of the model as transformers makes it
    growing    the decoder with a cache that grows
    fixed      the decoder in steps of fixed shapes, replayed as CUDA graphs on a GPU
    concat     the same with a graft whose memory is skipped: the context is read as part of the prompt
    memory     the context is written into the memory instead, and the rest of the prompt is read

`priming` writes a batch of contexts, `forward` takes them through the base model alone. The floor is the time that the
matrix products of reading the prompt and making N tokens, counted by PyTorch, take at the rate of a large product
measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import titans_ds
from benchmarks.program import first_line, matmul_rate, median_seconds, new_report, now, peak, reset_peak, save
from benchmarks.program import table as markdown
from benchmarks.train_step import RANDOM_BASES, attention_flops, load_base, model_settings
from eval.generation.decoding import Decoder, DecodeSettings, Job
from eval.generation.model import ModelSettings, Subject, load_tokenizer
from titans_ds import GraftConfig, assets, preset
from titans_ds.memory import READ
from titans_ds.memory.registry import PRESETS
from titans_ds.program import program, whole_number

WAYS = ("generate", "growing", "fixed", "concat", "memory")


@program("--out has the ways that were measured")
def main(argv: list[str]) -> None:
    """Run the program; returns its exit code."""
    print(table(measure(_options(argv), argv)))


class RandomSubject(Subject):
    """A model whose texts are random tokens: the text "7 512" is 512 tokens of seed 7."""

    def random_ids(self, seed: int, count: int) -> list[int]:
        """Token ids, the same for the same seed."""
        size = self.base_model.config.get_text_config().vocab_size
        return torch.randint(3, size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    def _encode(self, text: str) -> list[int]:
        return self.random_ids(*map(int, text.split()))


class Ways:
    """Prompts, and the ways to go on with them.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        settings = ModelSettings(options.base, device=options.device, dtype=options.dtype)
        self.device = settings.resolved_device()
        tokenizer = load_tokenizer(str(assets.base()) if options.base in RANDOM_BASES else options.base)
        dtype = str(settings.resolved_dtype()).removeprefix("torch.")
        with self.device:  # where random weights are drawn
            base = load_base(model_settings(options.base, dtype)).to(self.device).eval().requires_grad_(False)
        self.subject = RandomSubject(base, None, tokenizer)
        self.subject.base_model.generation_config.eos_token_id = None

    def attach(self) -> None:
        """Graft memories onto the base model, where they stay."""
        config = GraftConfig(memory=preset(self.options.preset), segment_tokens=self.options.context_tokens)
        grafted = titans_ds.attach(self.subject.base_model, config).eval().to(self.device)
        self.subject = RandomSubject(grafted.base_model, grafted, self.subject.tokenizer)

    def sample_flops(self) -> float:
        """Operations of the matrix products and attention for one prompt and its new tokens, before any compilation.

        A new token is counted as one of the prompt's, and the head for new tokens alone. Kernels that PyTorch can't
        see into, such as DeltaNet's, count nothing.
        """
        model, ids = self.subject.base_model, self._ids([0], self.options.prompt_tokens)
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=attention_flops()) as counter:
            getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False)
        head = 2 * model.get_output_embeddings().weight.numel()
        new = self.options.force_new_tokens
        return counter.get_total_flops() * (1 + new / ids.numel()) + head * new

    def generate(self, batch_size: int, count: int, num_new: int) -> int:
        """Transformers' own way; returns the batch size."""
        model = self.subject.base_model
        for start in range(0, count, batch_size):
            ids = self._ids(range(start, min(start + batch_size, count)), self.options.prompt_tokens)
            mask = torch.ones_like(ids)
            made = model.generate(ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, pad_token_id=0)
            _check_length(made.shape[1] - ids.shape[1], num_new)
        return batch_size

    def decode(self, path: str, fixed: bool, batch_size: int, count: int, num_new: int) -> int:
        """Our way on one of the subject's paths, in growing or fixed shapes; returns the batch size it ended with."""
        subject, context = self.subject, self.options.context_tokens if path == "graft" else 0
        jobs = []
        for seed in range(count):
            prompt = subject.random_ids(seed, self.options.prompt_tokens)[context:]
            priming = (f"{seed} {context}",) if context else ()
            jobs.append(Job(str(seed), prompt, [], b"", ("plain",), {}, priming))
        settings = DecodeSettings(batch_size, num_new, fixed_shapes=fixed)
        decoder = Decoder(subject, subject.vocabulary, settings, self.device)
        with subject.on_path(path):
            for completion in decoder.run(jobs):
                _check_length(len(completion.tokens), num_new)
        return decoder.batch_size

    def prime(self, batch_size: int) -> None:
        """Write a batch of contexts into memories."""
        with self.subject.on_path("graft"):
            self.subject.memory_for([(f"{seed} {self.options.context_tokens}",) for seed in range(batch_size)])

    def forward(self, batch_size: int) -> None:
        """The same contexts through the base model's decoder alone."""
        grafted = self.subject.grafted
        with grafted.disable_memory(), torch.no_grad():
            grafted.read_write(self._ids(range(batch_size), self.options.context_tokens), plan=READ)

    def _ids(self, seeds: Sequence[int], count: int) -> Tensor:
        return torch.tensor([self.subject.random_ids(seed, count) for seed in seeds], device=self.device)


def measure(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """All ways, one after the other; the report is saved after each."""
    work = Ways(options)
    report = new_report("eval_throughput", argv, work.device, options.out) | {"batch_sizes": options.batch_sizes}
    report["matmul_flops_per_second"] = matmul_rate(work.device, next(work.subject.base_model.parameters()).dtype)
    report["flops_per_sample"] = work.sample_flops()

    def way(name: str, run: Callable[[int, int, int], int], batch_sizes: list[int]) -> None:
        for size in batch_sizes if name in options.ways else ():
            report["rows"][f"{name}@{size}"] = _measured(functools.partial(run, size), options, size, work.device)
            _add_ratios(report)
            save(report, options.out)
            print(f"{name}@{size}: {report['rows'][f'{name}@{size}']}", file=sys.stderr, flush=True)

    sizes, first = options.batch_sizes, options.batch_sizes[:1]
    way("generate", work.generate, first)
    if options.compile != "none":
        work.subject.compile()
    way("growing", functools.partial(work.decode, "vanilla", False), first)
    way("fixed", functools.partial(work.decode, "vanilla", True), sizes)
    work.attach()
    way("concat", functools.partial(work.decode, "ablation", True), sizes)
    way("memory", functools.partial(work.decode, "graft", True), sizes)
    for name, run in (("priming", work.prime), ("forward", work.forward)):
        seconds = median_seconds(functools.partial(run, first[0]), work.device, 0.5)
        report[f"{name}_tokens_per_second"] = first[0] * options.context_tokens / seconds
    _add_ratios(report)
    save(report, options.out)
    return report


def _measured(
    run: Callable[[int, int], int], options: argparse.Namespace, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Samples a second over all prompts; milliseconds a step, from one batch with N new tokens and with one."""
    many, one = options.force_new_tokens, min(batch_size, options.prompts)
    reset_peak(device)
    try:
        run(one, min(4, many))  # kernels compile
        short, long = (_seconds(functools.partial(run, one, new), device) for new in (1, many))
        start = now(device)
        batch_size = run(options.prompts, many)
        seconds = now(device) - start
    except torch.OutOfMemoryError as error:
        return {"error": first_line(error)}
    return {
        "samples_per_second": options.prompts / seconds,
        "batch_size": batch_size,
        "step_milliseconds": 1000 * (long - short) / max(1, many - 1),
        "read_seconds_a_batch": short,
        "peak_gib": peak(device) / 2**30,
    }


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = now(device)
    call()
    return now(device) - start


def _add_ratios(report: dict[str, Any]) -> None:
    """Shares of the floor; speed over `generate`, memory's over that of concatenated context, priming over a forward
    pass; as far as they were measured."""
    speeds = {name: row["samples_per_second"] for name, row in report["rows"].items() if "error" not in row}
    floor = report["matmul_flops_per_second"] / report["flops_per_sample"]
    base = speeds.get(f"generate@{report['batch_sizes'][0]}")
    for name, speed in speeds.items():
        report["rows"][name]["share_of_floor"] = speed / floor
        if base is not None:
            report["rows"][name]["over_generate"] = speed / base
        concat = speeds.get(name.replace("memory", "concat"))
        if name.startswith("memory") and concat is not None:
            report["rows"][name]["over_concat"] = speed / concat
    if "forward_tokens_per_second" in report:
        report["priming_over_forward"] = report["priming_tokens_per_second"] / report["forward_tokens_per_second"]


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    floor = report["matmul_flops_per_second"] / report["flops_per_sample"]
    lines = [
        f"{report['device']}; floor {floor:,.2f} samples/s: {report['flops_per_sample'] / 1e12:.3g} TFLOP a sample"
    ]
    lines.append(
        f"priming {report['priming_tokens_per_second']:,.0f} tokens/s, "
        f"{report['priming_over_forward']:.3f} times a plain forward pass\n"
    )
    keys = ("samples_per_second", "over_generate", "over_concat", "share_of_floor", "step_milliseconds")
    rows = []
    for name, row in report["rows"].items():
        cells = [f"{row[key]:.3f}" if key in row else "-" for key in (*keys, "read_seconds_a_batch", "peak_gib")]
        rows.append([name, row["error"]] if "error" in row else [name, *cells])
    columns = ("way", "samples/s", "x generate", "x concat", "share of floor", "ms a step", "s to read a batch")
    return "\n".join([*lines, markdown((*columns, "peak GiB"), rows)])


def _check_length(made: int, wanted: int) -> None:
    if made != wanted:
        raise RuntimeError(f"{made} new tokens, where {wanted} are forced")


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eval_throughput", description=__doc__.splitlines()[0])
    many = whole_number(1, 10**6)
    names = ", ".join(RANDOM_BASES)
    parser.add_argument("--base", default="tiny", help=f"{names}, or a path or hub id (default: tiny)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--preset", choices=list(PRESETS), default="delta", help="of the memory (default: delta)")
    parser.add_argument("--force-new-tokens", type=many, default=8, help="new tokens of every prompt (default: 8)")
    parser.add_argument("--prompt-tokens", type=many, default=64, help="(default: 64)")
    parser.add_argument("--context-tokens", type=many, default=16, help="of these, what is primed (default: 16)")
    parser.add_argument("--prompts", type=many, default=4, help="of each way (default: 4)")
    parser.add_argument("--batch-sizes", type=_sizes, default=[2, 4], help="32,64,128; the first is generate's")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    compiled = "the base model's norms, MLPs and convolutions are fused, but for generate (default: mlp on a GPU)"
    parser.add_argument("--compile", choices=("mlp", "none"), help=compiled)
    parser.add_argument("--out", type=Path, help="write the report as JSON after every way")
    options = parser.parse_args(argv)
    options.compile = options.compile or ("mlp" if torch.cuda.is_available() else "none")
    if options.context_tokens >= options.prompt_tokens:
        parser.error(f"--context-tokens is {options.context_tokens}; it must be below --prompt-tokens")
    return options


def _sizes(text: str) -> list[int]:
    return [whole_number(1, 10**5)(size) for size in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
