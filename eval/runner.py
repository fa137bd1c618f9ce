"""Generation: every mode over every row, appended sample by sample, so that nothing that was generated is ever lost.

A run folder can be stopped anywhere and resumed: what is there for (task, mode, boundary, configuration) is not made
again.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from titans_ds.files import check_folder, sha256_of, whole_lines, write_json
from titans_ds.graft.adapter import CONFIG_FILE, WEIGHTS_FILE
from titans_ds.reading import read_jsonl

from .data.benchmark import load_benchmark, select_rows
from .data.prompts import Budget, BuiltPrompt, PromptBuilder
from .data.retrieval import Retriever
from .errors import EvalError
from .generation.decoding import Completion, Decoder, DecodeSettings, Job
from .generation.likelihood import healed_target, plain_target, summarise_likelihood
from .generation.model import Subject
from .modes import Mode, ModeInputs, get_modes
from .modes.mode import no_context
from .options import RunOptions
from .provenance import describe_environment
from .run_folder import CONFIG, PREDICTIONS, RUN, TEXTS, Text, read_config
from .scoring.postprocess import is_settled
from .scoring.predictions import REMEDY, Line

if TYPE_CHECKING:
    from data_prep.crosscodeeval import CrossCodeEvalRow

Progress = Callable[[str, int, int], None]
LoadSubject = Callable[[RunOptions, bool], Subject]


@dataclass
class RunPlan:
    """A checked run: what is to be made, and under which configuration (`config` as config.json holds it)."""

    options: RunOptions
    folder: Path
    all_rows: dict[str, CrossCodeEvalRow]
    rows: dict[str, CrossCodeEvalRow]
    modes: list[Mode]
    config_hash: str
    config: dict[str, Any] = field(default_factory=dict)


def load_subject(options: RunOptions, vanilla: bool) -> Subject:
    """Load the model of a run."""
    return Subject.load(options.model, vanilla)


def plan_run(options: RunOptions, folder: Path, resume: bool) -> RunPlan:
    """Check everything that can be checked without the model. Writes nothing: config.json comes with the first sample.

    Raises:
        EvalError: an unknown mode or boundary, a mode that needs an adapter, a folder that holds a run already (without
            `resume`) or one with another configuration.
    """
    check_folder(folder, RUN)
    if resume and options.compile == "auto" and (folder / CONFIG).exists():
        options = replace(options, compile=read_config(folder).get("compile", "none"))  # as the rows that are there
    options = options.resolved()
    modes = get_modes(options.modes)
    _ = options.boundaries
    grafted = [mode.name for mode in modes if mode.path != "vanilla"]
    if grafted and options.adapter is None:
        raise EvalError(
            f"Modes {', '.join(grafted)} need a grafted model. Give one with --adapter, "
            "or run vanilla and vanilla_concat."
        )
    if any(mode.context is not no_context for mode in modes):
        options.check_room()
    all_rows = load_benchmark(options.data, options.language)
    rows = select_rows(all_rows, options.limit, options.subset, options.seed)
    identity = {"data_sha256": sha256_of(options.data), "adapter_sha256": _adapter_digest(options.adapter)}
    identity["base_files"] = _base_files(options.base)
    plan = RunPlan(options, folder, all_rows, rows, modes, options.digest(identity))
    _check_folder(plan, resume)
    plan.config = _config(plan, identity)
    return plan


def _adapter_digest(adapter: str | None) -> str | None:
    if adapter is None:
        return None
    files = [Path(adapter) / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    for path in files:
        if not path.is_file():
            raise EvalError(
                f"{adapter} holds no adapter ({path.name} is missing). Expected what save_pretrained wrote."
            )
    return hashlib.sha256("".join(sha256_of(path) for path in files).encode()).hexdigest()


def _base_files(base: str) -> dict[str, Any] | None:
    """What tells one local base model from another without reading all of it; None for a hub id."""
    folder = Path(base)
    if not (folder / "config.json").is_file():
        return None
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    return {"config_sha256": sha256_of(folder / "config.json"), "sizes": sizes}


def _check_folder(plan: RunPlan, resume: bool) -> None:
    if not (plan.folder / CONFIG).exists() and not (plan.folder / PREDICTIONS).exists():
        return
    if not resume:
        raise EvalError(f"{plan.folder} holds a run already. Go on with it by --resume, or give another --out.")
    before = read_config(plan.folder)
    if before["config_hash"] != plan.config_hash:
        now = _config(plan, {})
        changed = [name for name in plan.options.hashed() if before.get(name) != now.get(name)]
        raise EvalError(
            f"{plan.folder} was made with another configuration ({', '.join(changed) or 'data or adapter'} differ). "
            "Results of two configurations do not mix: give another --out, or the settings of config.json."
        )


def _config(plan: RunPlan, identity: Mapping[str, Any]) -> dict[str, Any]:
    settings = asdict(plan.options) | {"data": str(Path(plan.options.data).resolve())}
    modes = [{"name": mode.name, "description": mode.description, "path": mode.path} for mode in plan.modes]
    return settings | {
        "config_hash": plan.config_hash,
        **identity,
        "mode_list": modes,
        "num_rows": len(plan.all_rows),
        "task_ids": _task_ids(plan),
        **describe_environment(),
    }


def _task_ids(plan: RunPlan) -> list[str]:
    """The rows of this run and, in a folder that is gone on with, of those before it."""
    before = read_config(plan.folder)["task_ids"] if (plan.folder / CONFIG).exists() else []
    wanted = {*before, *plan.rows}
    return [task for task in plan.all_rows if task in wanted]


def run(plan: RunPlan, progress: Progress, load: LoadSubject = load_subject) -> dict[str, Any]:
    """Generate what is missing.

    Return counts: samples made, prompts cut, rows without context, tokens primed, batch size.
    """
    done = _finished(plan)
    counts: dict[str, Any] = {"generated": 0, "prompts_cut": 0, "contexts_cut": 0, "rows_without_context": 0}
    counts |= {"tokens_primed": 0, "batch_size": plan.options.batch_size}
    for vanilla in (False, True):
        modes = [mode for mode in plan.modes if (mode.path == "vanilla") == vanilla and _missing(plan, mode, done)]
        if modes:
            subject = load(plan.options, vanilla)
            for mode in modes:
                _run_mode(plan, subject, mode, done, progress, counts)
            counts["tokens_primed"] += subject.num_tokens_primed
            del subject
            gc.collect()  # the next model may need the room
    write_json(plan.folder / CONFIG, plan.config | {"counts": counts})
    return counts


def _finished(plan: RunPlan) -> set[tuple[str, str | None, str | None]]:
    """(task, mode, boundary) on disk under this configuration."""
    path = plan.folder / PREDICTIONS
    records = [record for record, _ in read_jsonl(path, Line, REMEDY)] if whole_lines(path) else []
    return {
        (r["task_id"], r.get("mode"), r.get("boundary")) for r in records if r.get("config_hash") == plan.config_hash
    }


def _missing(plan: RunPlan, mode: Mode, done: set[tuple[str, str | None, str | None]]) -> dict[str, tuple[str, ...]]:
    """{task: boundaries still to be made}."""
    left = {task: tuple(b for b in plan.options.boundaries if (task, mode.name, b) not in done) for task in plan.rows}
    return {task: boundaries for task, boundaries in left.items() if boundaries}


def _run_mode(
    plan: RunPlan,
    subject: Subject,
    mode: Mode,
    done: set[tuple[str, str | None, str | None]],
    progress: Progress,
    counts: dict[str, Any],
) -> None:
    maker = _JobMaker(plan, subject, mode)
    missing = _missing(plan, mode, done)
    jobs = [job for task, boundaries in missing.items() for job in maker.jobs(plan.rows[task], boundaries)]
    settings = DecodeSettings(
        counts["batch_size"],
        plan.options.max_new_tokens,
        plan.options.temperature,
        plan.options.top_p,
        subject.eos_tokens,
        fixed_shapes=plan.options.decode_graphs == "on",
    )
    decoder = Decoder(subject, subject.vocabulary, settings, subject.device)
    total, made = sum(map(len, missing.values())), 0
    with subject.on_path(mode.path, **mode.controls), _Appender(plan) as appender:
        for completion in decoder.run(jobs):
            appender.write(*maker.record(completion))
            made += 1
            progress(mode.name, made, total)
    counts["generated"] += made
    counts["batch_size"] = decoder.batch_size  # once halved, it stays so
    for name, number in maker.counts.items():
        counts[name] += number


class _JobMaker:
    """Turns rows into jobs and completions into records, for one mode."""

    def __init__(self, plan: RunPlan, subject: Subject, mode: Mode) -> None:
        options = plan.options
        budget = Budget(options.max_length, options.context_tokens, options.right_tokens, options.max_new_tokens)
        self._plan, self._subject, self._mode = plan, subject, mode
        self._builder = PromptBuilder(subject.tokenizer, subject.vocabulary, budget.fitted_to(subject.max_positions))
        retriever = Retriever(options.retrieval, options.num_chunks, options.embedder)
        self._inputs = ModeInputs(plan.all_rows, retriever, options.seed)
        self._facts: dict[str, tuple[dict[str, Any], dict[str, str], Job]] = {}
        self.counts = {"prompts_cut": 0, "contexts_cut": 0, "rows_without_context": 0}

    def jobs(self, row: CrossCodeEvalRow, boundaries: Sequence[str]) -> Iterator[Job]:
        """One job a row.

        In fill-in-the-middle one for each boundary, since there the prompt's end is not the input's end.
        """
        context = self._mode.context(row, self._inputs)
        priming = self._mode.priming(row, self._inputs)
        built = self._builder.build(row, context, self._mode.infill)
        self._count(row, built)
        texts = {_digest(text): text for text in (built.context, *priming.texts) if text}
        facts = {
            "context": _digest(built.context) if built.context else None,
            "memory": [_digest(text) for text in priming.texts],
            "primed_from": priming.source,
            "num_prompt_tokens": built.num_prompt_tokens,
            "num_context_tokens": built.num_context_tokens,
            "num_cut_tokens": built.num_cut_prompt_tokens,
        }
        for job in self._split(row, built, priming.texts, tuple(boundaries)):
            self._facts[job.key] = (facts, texts, job)
            yield job

    def _count(self, row: CrossCodeEvalRow, built: BuiltPrompt) -> None:
        self.counts["prompts_cut"] += built.num_cut_prompt_tokens > 0
        self.counts["contexts_cut"] += built.num_cut_context_tokens > 0
        self.counts["rows_without_context"] += not row.crossfile_list

    def _split(
        self, row: CrossCodeEvalRow, built: BuiltPrompt, priming: tuple[str, ...], boundaries: tuple[str, ...]
    ) -> Iterator[Job]:
        subject, target = self._subject, row.groundtruth
        healed = healed_target(subject.tokenizer, subject.vocabulary, row.prompt, target, built.healed)
        targets = {"heal": healed, "plain": plain_target(subject.tokenizer, target)}
        targets = {name: scored for name, scored in targets.items() if scored.tokens}
        job = Job(
            key=row.task_id,
            prefix=built.prefix,
            removed=built.healed.removed,
            healed_text=built.healed.text,
            boundaries=boundaries,
            targets=targets,
            priming=priming,
            stop=self._stop(row),
            seed=_seed(self._plan.options.seed, self._mode.name, row.task_id),
        )
        if not self._mode.infill:
            yield job
            return
        for boundary in boundaries:
            prefix = built.prefix if boundary == "heal" else built.plain_prefix
            key = f"{boundary} {row.task_id}"
            yield replace(job, key=key, prefix=prefix, removed=[], boundaries=(boundary,))

    def _stop(self, row: CrossCodeEvalRow) -> Callable[[str], bool] | None:
        if self._plan.options.stop == "none":
            return None
        return lambda text: is_settled(row.prompt, text, row.language)

    def record(self, completion: Completion) -> tuple[dict[str, Any], dict[str, str]]:
        """Return a line of predictions.jsonl, and the texts that it names by digest."""
        facts, texts, job = self._facts[completion.key]
        task = completion.key.removeprefix(f"{completion.boundary} ") if self._mode.infill else completion.key
        record = {
            "task_id": task,
            "mode": self._mode.name,
            "boundary": completion.boundary,
            "prediction": completion.text,
            "config_hash": self._plan.config_hash,
            "finish_reason": completion.finish_reason,
            "num_new_tokens": len(completion.tokens),
            "healed_text": job.healed_text.decode("utf-8", "replace") if completion.boundary == "heal" else "",
            **facts,
        }
        if completion.nats is not None:
            record["likelihood"] = self._likelihood(task, job, completion)
        return record, texts

    def _likelihood(self, task: str, job: Job, completion: Completion) -> dict[str, Any]:
        row, scored = self._plan.rows[task], job.targets[completion.boundary]
        nats = completion.nats or []
        return summarise_likelihood(row.groundtruth, row.prompt, row.language, scored, nats, self._subject.vocabulary)


class _Appender:
    """Appends records and texts, each flushed to disk before the next is made.

    The configuration and the files come with the first sample: a start that fails before it leaves nothing.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._plan, self._files = plan, contextlib.ExitStack()
        self._texts: IO[str] | None = None
        path = plan.folder / TEXTS
        lines = read_jsonl(path, Text, "Make the run again.") if whole_lines(path) else ()
        self._known = {record["digest"] for record, _ in lines}

    def __enter__(self) -> _Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _open(self, name: str) -> IO[str]:
        return self._files.enter_context((self._plan.folder / name).open("a", encoding="utf-8", errors="replace"))

    def write(self, record: dict[str, Any], texts: Mapping[str, str]) -> None:
        """Append one sample; its texts first, so that every digest on disk can be looked up."""
        if self._texts is None:
            write_json(self._plan.folder / CONFIG, self._plan.config)
            self._texts, self._predictions = self._open(TEXTS), self._open(PREDICTIONS)
        for digest in texts.keys() - self._known:
            self._texts.write(json.dumps({"digest": digest, "text": texts[digest]}, ensure_ascii=False) + "\n")
            self._known.add(digest)
        self._texts.flush()
        self._predictions.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._predictions.flush()
        os.fsync(self._predictions.fileno())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _seed(seed: int, mode: str, task: str) -> int:
    """A sample's own seed for sampling: independent of batch, order and limit."""
    return int.from_bytes(hashlib.sha256(f"{seed} {mode} {task}".encode()).digest()[:7], "big")
