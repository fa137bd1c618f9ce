"""The commands of a study, as one would type them: prepare, train every arm, evaluate it on every benchmark."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.stages.chain import Stage
from launch.stages.demo import SHIPPED as SHIPPED_BASE
from launch.stages.demo import launcher
from launch.study.settings import ROOT, SHIPPED, Study
from titans_ds.errors import ConfigError

_ROWS = "line_completion_rg1_bm25.jsonl"


@dataclass(frozen=True)
class Place:
    """Where a study is made, and from what.

    Args:
        out: folder of everything made.
        corpus: corpus folder, or one packed with the base's tokenizer; by base, or one (key "") for all.
        ranks: processes of each training; one runs without a launcher.
        retrain: also train the arms whose adapter comes with this project.
        batch_size: of the evaluations; the program's own choice where None.
    """

    out: Path
    corpus: dict[str, Path]
    ranks: int = 1
    retrain: bool = False
    batch_size: int | None = None

    def run(self, arm: str) -> Path:
        """Folder of an arm's training run."""
        return self.out / "runs" / arm

    def evaluation(self, arm: str, benchmark: str) -> Path:
        """Folder of an evaluation."""
        return self.out / "evaluations" / arm / benchmark


def trained(study: Study, place: Place) -> list[str]:
    """The arms to train: those without an adapter that comes with the project, or all."""
    return [name for name, arm in study.arms.items() if arm.adapter is None or place.retrain]


def preparation(study: Study, place: Place) -> list[Stage]:
    """What several arms use: the shipped benchmark, and the corpus in tokens of each base."""
    stages: list[Stage] = []
    if any(str(rows).startswith(SHIPPED) for rows in study.benchmarks.values()):
        arguments, samples = ["-m", "data_prep.benchmark2026", "--out"], place.out / "benchmark"
        stages.append(Stage("benchmark of 2026 unpacked", [sys.executable], [*arguments, str(samples)], samples))
    for base in dict.fromkeys(study.arms[name].base for name in trained(study, place)):
        corpus = corpus_of(base, place)
        if not (corpus / "packed.json").is_file():
            arguments = ["-m", "data_prep.pack_corpus", "--corpus", str(corpus)]
            packed = place.out / "packed" / base
            arguments += ["--tokenizer", base_of(study, base), "--out", str(packed)]
            stages.append(Stage(f"corpus into tokens of {base}", [sys.executable], arguments, packed))
    return stages


def training(study: Study, name: str, place: Place) -> Stage:
    """Train an arm."""
    arm = study.arms[name]
    corpus = corpus_of(arm.base, place)
    if not (corpus / "packed.json").is_file():
        corpus = place.out / "packed" / arm.base
    arguments = ["launch/train.py", "--config", arm.config, "--model.base", base_of(study, arm.base)]
    arguments += ["--data.corpus", str(corpus)]
    for setting, value in arm.settings.items():
        arguments += [f"--{setting}", _as_text(value)]
    arguments += ["--run.dir", str(place.run(name))]
    program = [sys.executable] if place.ranks == 1 else launcher(place.ranks)
    resume = ["--run.resume", "auto"]
    title = f"{name}: trained on {place.ranks} rank(s)"
    return Stage(title, program, arguments, place.run(name), [ROOT / arm.config], resume=resume)


def evaluation(study: Study, name: str, benchmark: str, place: Place) -> list[Stage]:
    """Evaluate an arm on a benchmark, with its report."""
    arm, out, run = study.arms[name], place.evaluation(name, benchmark), place.run(name)
    own = name in trained(study, place)
    adapter = run / "adapter" if own else ROOT / str(arm.adapter)
    arguments = ["-m", "eval.crosscodeeval", "run", "--base", base_of(study, arm.base), "--adapter", str(adapter)]
    arguments += ["--data", str(rows_of(study, benchmark, place)), "--modes", ",".join(study.modes)]
    for option, value in study.options.items():
        arguments += [f"--{option.replace('_', '-')}", str(value)]
    arguments += ["--language", "python", "--no-report", "--out", str(out)]
    speed = [] if place.batch_size is None else ["--batch-size", str(place.batch_size)]
    report = ["-m", "eval.crosscodeeval", "report", str(out), *(["--training-run", str(run)] if own else [])]
    title, python, made_of = f"{name} on {benchmark}", [sys.executable], [adapter / "titans_config.json"]
    made_of += [run / "config.yaml"] if own else []
    return [
        Stage(title, python, arguments, out, made_of, speed=speed, resume=["--resume"]),
        Stage(f"{title}: report", python, report, out / "report.html"),
    ]


def base_of(study: Study, base: str) -> str:
    """Folder or hub id of a base."""
    value = study.bases[base]
    return str(SHIPPED_BASE) if value == SHIPPED else str(value)


def rows_of(study: Study, benchmark: str, place: Place) -> Path:
    """The rows of a benchmark."""
    value = str(study.benchmarks[benchmark])
    prefix, _, kind = value.partition("/")
    return place.out / "benchmark" / kind / "python" / _ROWS if prefix == SHIPPED else Path(value).resolve()


def corpus_of(base: str, place: Place) -> Path:
    """The corpus to train a base's arms on. Raises ConfigError where there is none."""
    found = place.corpus.get(base, place.corpus.get(""))
    if found is None:
        raise ConfigError(
            f"there is no corpus to train on base {base!r}; give --corpus FOLDER (from `python -m "
            f"data_prep.build_corpus`, decontaminated), or --corpus {base}=FOLDER"
        )
    if not found.is_dir():
        raise ConfigError(f"--corpus: there is no folder {found}; make one with `python -m data_prep.build_corpus`")
    return found.resolve()


def _as_text(value: Any) -> str:
    """As the command line takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
