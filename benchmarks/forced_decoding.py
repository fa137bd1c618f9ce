"""The part of benchmarks.eval_throughput that needs no data: random prompts of one length, N forced new tokens.

Every way does the same work: N tokens after each prompt, no stop, no end of text. Random weights serve as well as
trained ones. In the memory mode C of the prompt's tokens are written into the memory instead of standing before the
rest; `concat` reads them, as part of the prompt. The floor is the time that the matrix products of reading the prompt
and making N tokens, counted by PyTorch, take at the rate of a large product measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import titans_ds
from benchmarks.memory_layer import matmul_rate
from benchmarks.program import save
from benchmarks.train_step import RANDOM_BASES, attention_flops, device_name, now, peak, reset_peak
from eval.decoding import Decoder, DecodeSettings, Job
from eval.provenance import describe_environment
from eval.subject import ModelSettings, Subject, load_base, load_tokenizer
from titans_ds import GraftConfig, MemoryConfig

WAYS = ("generate", "growing", "fixed", "concat", "memory")
_WHOLE_RUN = 2665 * 4  # rows of CrossCodeEval's Python part, in four modes
_TOKENIZER = Path(titans_ds.__file__).parent / "assets" / "base_hybrid"


class RandomSubject(Subject):
    """A model whose texts are random tokens: the text "7 512" is 512 tokens of seed 7."""

    def random_ids(self, seed: int, count: int) -> list[int]:
        """Token ids, the same for the same seed."""
        size = self.base_model.config.get_text_config().vocab_size
        return torch.randint(3, size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    def _encode(self, text: str) -> list[int]:
        return self.random_ids(*map(int, text.split()))


class Forced:
    """Prompts, and the ways to go on with them.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = ModelSettings(options.base, device=options.device).resolved_device()
        base = self._load_base().requires_grad_(False)
        self.vanilla = RandomSubject(base, None, load_tokenizer(_tokenizer_of(options.base)))
        self.vanilla.base_model.generation_config.eos_token_id = None
        self.grafted: RandomSubject | None = None  # made last: a graft stays in its base

    def _load_base(self) -> Any:
        settings = ModelSettings(self.options.base, device=str(self.device), dtype=self.options.dtype)
        if self.options.base not in RANDOM_BASES:
            return load_base(settings)
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**RANDOM_BASES[self.options.base])
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=settings.resolved_dtype())
        return model.to(self.device).eval()

    def attach(self) -> None:
        """Graft memories onto the base model."""
        config = GraftConfig(memory=MemoryConfig(dim=self.options.memory_dim))
        grafted = titans_ds.attach(self.vanilla.base_model, config).eval()
        self.grafted = RandomSubject(grafted.base_model, grafted.to(self.device), self.vanilla.tokenizer)

    def sample_flops(self) -> float:
        """Operations of the matrix products and attention for one prompt and its new tokens, before any compilation.

        A new token is counted as one of the prompt's, and the head for new tokens alone. Kernels that PyTorch can't
        see into, such as DeltaNet's, count nothing.
        """
        model, ids = self.vanilla.base_model, self._prompts([0])
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=attention_flops()) as counter:
            getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False)
        head = 2 * model.get_output_embeddings().weight.numel()
        new = self.options.force_new_tokens
        return counter.get_total_flops() * (1 + new / ids.numel()) + head * new

    def generate(self, batch_size: int, count: int, num_new: int) -> int:
        """Transformers' own way; returns the batch size."""
        model = self.vanilla.base_model
        for start in range(0, count, batch_size):
            ids = self._prompts(range(start, min(start + batch_size, count)))
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False, pad_token_id=0
            )
            _check_length(made.shape[1] - ids.shape[1], num_new)
        return batch_size

    def _prompts(self, seeds: Sequence[int]) -> Tensor:
        length = self.options.prompt_tokens
        return torch.tensor([self.vanilla.random_ids(seed, length) for seed in seeds], device=self.device)

    def decode(self, batch_size: int, count: int, num_new: int, fixed: bool, path: str = "vanilla") -> int:
        """Our way, with growing or fixed shapes; returns the batch size it ended with."""
        subject = self.vanilla if path == "vanilla" else self.grafted
        if subject is None:
            raise RuntimeError("attach() comes before decoding with memory")
        context = self.options.context_tokens if path == "graft" else 0
        jobs = []
        for seed in range(count):
            prompt = subject.random_ids(seed, self.options.prompt_tokens)[context:]
            priming = (f"{seed} {context}",) if context else ()
            jobs.append(Job(str(seed), prompt, [], b"", ("plain",), {}, priming))
        decoder = Decoder(
            subject, subject.vocabulary, DecodeSettings(batch_size, num_new, fixed_shapes=fixed), self.device
        )
        with subject.on_path(path):
            for completion in decoder.run(jobs):
                _check_length(len(completion.tokens), num_new)
        return decoder.batch_size

    def prime(self, batch_size: int) -> int:
        """Write a batch of contexts into memories; returns the tokens read."""
        if self.grafted is None:
            raise RuntimeError("attach() comes before priming")
        with self.grafted.on_path("graft"):
            self.grafted.memory_for([(f"{seed} {self.options.context_tokens}",) for seed in range(batch_size)])
        return batch_size * self.options.context_tokens

    def forward(self, batch_size: int) -> int:
        """The same contexts through the base model's decoder alone; returns the tokens read."""
        if self.grafted is None:
            raise RuntimeError("attach() comes before the forward pass that priming is compared with")
        size = self.options.context_tokens
        ids = torch.tensor([self.grafted.random_ids(s, size) for s in range(batch_size)], device=self.device)
        with self.grafted.grafted.disable_memory(), torch.no_grad():
            self.grafted.grafted.read_write(ids, write=False)
        return ids.numel()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All ways, one after the other; the report is saved after each."""
    work = Forced(options)
    sizes, first = options.batch_sizes, options.batch_sizes[0]
    report: dict[str, Any] = {"settings": {name: str(value) for name, value in vars(options).items()}, "ways": {}}
    report |= {"device": device_name(work.device), **describe_environment()}
    report["matmul_flops_per_second"] = matmul_rate(work.device, next(work.vanilla.base_model.parameters()).dtype)
    report["flops_per_sample"] = work.sample_flops()

    def way(name: str, run: Callable[[int, int], int], batch_size: int) -> None:
        if name.partition("@")[0] not in options.ways:
            return
        found = report["ways"][name] = _measured(run, options, batch_size, work.device)
        if "samples_per_second" in found:
            floor = report["matmul_flops_per_second"] / report["flops_per_sample"]
            found["share_of_floor"] = found["samples_per_second"] / floor
        report["ratios"] = ratios(report, options)
        save(report, options.out)
        print(f"{name}: {report['ways'][name]}", flush=True)

    way(f"generate@{first}", lambda count, new: work.generate(first, count, new), first)
    if options.compile != "none":
        work.vanilla.compile()  # for what follows: `generate` has the model as transformers makes it
    way(f"growing@{first}", lambda count, new: work.decode(first, count, new, False), first)
    for size in sizes:
        way(f"fixed@{size}", lambda count, new, size=size: work.decode(size, count, new, True), size)
    work.attach()
    for size in sizes:
        way(f"concat@{size}", lambda count, new, size=size: work.decode(size, count, new, True, "ablation"), size)
        way(f"memory@{size}", lambda count, new, size=size: work.decode(size, count, new, True, "graft"), size)
    report["tokens_per_second"] = {
        name: _tokens_per_second(run, first, work.device, options.repeats)
        for name, run in (("priming", work.prime), ("forward", work.forward))
    }
    report["ratios"] = ratios(report, options)
    return report


def _measured(
    run: Callable[[int, int], int], options: argparse.Namespace, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Samples a second over all prompts; milliseconds a step, from one batch with N new tokens and with one."""
    many, one = options.force_new_tokens, min(batch_size, options.prompts)
    reset_peak(device)
    try:
        run(one, min(4, many))  # kernels compile
        short = _seconds(lambda: run(one, 1), device)
        long = _seconds(lambda: run(one, many), device)
        start = now(device)
        batch_size = run(options.prompts, many)
        seconds = now(device) - start
    except torch.OutOfMemoryError as error:
        return {"error": str(error).partition("\n")[0]}
    per_second = options.prompts / seconds
    return {
        "samples_per_second": per_second,
        "batch_size": batch_size,
        "step_milliseconds": 1000 * (long - short) / max(1, many - 1),
        "read_seconds_a_batch": short,
        "hours_for_2665_rows_in_4_modes": _WHOLE_RUN / per_second / 3600,
        "peak_gib": peak(device) / 2**30,
    }


def ratios(report: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Samples a second over those of `generate` at the first batch size, and the other comparisons, as far as made."""
    speeds = {n: way["samples_per_second"] for n, way in report["ways"].items() if "samples_per_second" in way}
    first = options.batch_sizes[0]
    base = speeds.get(f"generate@{first}")
    found = {} if base is None else {f"{name} / generate@{first}": speed / base for name, speed in speeds.items()}
    best = max((name for name in speeds if name.startswith("fixed@")), key=speeds.__getitem__, default=None)
    if base is not None and best is not None:
        found[f"best ({best}) / generate@{first}"] = speeds[best] / base
    for size in options.batch_sizes:
        if f"memory@{size}" in speeds and f"concat@{size}" in speeds:
            found[f"memory@{size} / concat@{size}"] = speeds[f"memory@{size}"] / speeds[f"concat@{size}"]
    if "tokens_per_second" in report:
        rates = report["tokens_per_second"]
        found["priming / forward, tokens/s"] = rates["priming"] / rates["forward"]
    return found


def table(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    floor = report["matmul_flops_per_second"] / report["flops_per_sample"]
    lines = ["", f"floor {floor:,.2f} samples/s: {report['flops_per_sample'] / 1e12:.3g} TFLOP a sample", ""]
    lines += ["| way | samples/s | share of floor | ms a step | s to read a batch |", "|---|---|---|---|---|"]
    for name, way in report["ways"].items():
        if "error" in way:
            lines.append(f"| {name} | {way['error']} | | | |")
            continue
        figures = [way["samples_per_second"], way["share_of_floor"], way["step_milliseconds"]]
        figures.append(way["read_seconds_a_batch"])
        lines.append(f"| {name} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |")
    lines += ["", "| ratio | |", "|---|---|", *(f"| {n} | {r:.3f} |" for n, r in report["ratios"].items())]
    return "\n".join(lines)


def _tokens_per_second(run: Callable[[int], int], batch_size: int, device: torch.device, repeats: int) -> float:
    run(batch_size)
    seconds = statistics.median(_seconds(lambda: run(batch_size), device) for _ in range(max(3, repeats)))
    return run(batch_size) / seconds


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    start = now(device)
    call()
    return now(device) - start


def _check_length(made: int, wanted: int) -> None:
    if made != wanted:
        raise RuntimeError(f"{made} new tokens, where {wanted} are forced")


def _tokenizer_of(base: str) -> str:
    return str(_TOKENIZER) if base in RANDOM_BASES else base
