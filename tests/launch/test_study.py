"""A study through its program: what it refuses, and a small one made, repeated and collected."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.run_study import main
from launch.stages.demo import SHIPPED
from launch.stages.study import Place, evaluation, training
from launch.study.results import without_texts
from launch.study.settings import ROOT, load_study
from tests.support.packed_corpora import random_repos, write_packed

ARM = {"base": "hybrid", "config": "launch/configs/demo_memory.yaml"}
GOOD = {"bases": {"hybrid": "shipped"}, "arms": {"a": ARM}}
CONTROLS = ["memory", "ablation", "memory_wrong"]


def write(path: Path, study: object) -> Path:
    path.write_text(yaml.safe_dump(study))
    return path


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ({"bases": {}, "arms": {"a": ARM}}, "arms.a.base: 'hybrid' is unknown"),
        (GOOD | {"arm": {}}, "did you mean 'arms'"),
        (GOOD | {"arms": {}}, "no arms"),
        (GOOD | {"arms": {"a": ARM | {"config": "launch/configs/none.yaml"}}}, "there is no file"),
        (GOOD | {"benchmarks": {"b": "shipped/asis"}, "modes": CONTROLS}, "shipped/as_is"),
        (GOOD | {"benchmarks": {"b": None}}, "no modes"),
        (GOOD | {"benchmarks": {"b": None}, "modes": ["memory", "ablation"]}, "lack memory_wrong"),
        (GOOD | {"benchmarks": {"b": None}, "modes": CONTROLS}, "--data b=FILE"),
        ({"bases": {"hybrid": None}, "arms": {"a": ARM}}, "--base hybrid="),
        (GOOD, "--corpus FOLDER"),
        ("text", "not a mapping"),
    ],
)
def test_a_wrong_study_says_what_is_wrong(
    study: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--study", str(write(tmp_path / "s.yaml", study)), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--arms", "--benchmarks"])
def test_an_unknown_name_gets_the_nearest(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), option, {"--arms": "hybrid-v3"}.get(option, "packages2025")]) == 2
    assert {"--arms": "hybrid-v2", "--benchmarks": "packages2026"}[option] in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_arm_of_the_shipped_studies_is_a_valid_run(path: Path, tmp_path: Path) -> None:
    study = load_study(path)
    corpus = write_packed(tmp_path / "packed", {"train": random_repos(2, 0)})
    for name in study.arms:
        command = training(study, name, Place(tmp_path, {"": corpus})).arguments
        shown = [sys.executable, *command, "--model.base", str(SHIPPED), "--print_config"]
        if name in (next(iter(study.arms)), list(study.arms)[-1]):  # a start of the interpreter each
            done = subprocess.run(shown, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert yaml.safe_load(done.stdout)["training"]["steps"] == study.arms[name].settings["training.steps"]


def test_batch_size_changes_no_fingerprint_and_shipped_adapters_need_no_corpus(tmp_path: Path) -> None:
    study = load_study(ROOT / "launch/studies/first.yaml")
    slow, fast = (
        evaluation(study, "hybrid-v2", "packages2026", Place(tmp_path, {}, batch_size=n))[0] for n in (None, 64)
    )
    assert slow.arguments == fast.arguments
    assert fast.command[-2:] == ["--batch-size", "64"]
    adapter = Path(slow.arguments[slow.arguments.index("--adapter") + 1])
    assert (adapter / "titans_memory.safetensors").is_file()


def test_predictions_keep_nothing_of_their_row_but_the_task() -> None:
    row = {"task_id": "t", "mode": "memory", "prediction": "p", "prompt": "secret", "likelihood": {"target_nats": 1.0}}
    row["likelihood"] = {"target_nats": 1.23456, "missing_identifier": "secret"}
    assert "secret" not in json.dumps(without_texts(row))


@pytest.mark.long
def test_a_small_study_is_made_repeated_and_collected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "graft.layers": [11],
        "graft.segment_tokens": 16,
        "training.steps": 2,
        "data.num_lanes": 2,
        "evaluation.repositories": 4,
        "deepspeed": None,
    }
    study = {
        "bases": {"hybrid": "shipped"},
        "arms": {"small": ARM | {"settings": settings}},
        "benchmarks": {"packages": "shipped/as_is"},
        "modes": CONTROLS,
        "options": {"limit": 2, "max_length": 96, "context_tokens": 32, "max_new_tokens": 4},
    }
    splits = {"train": random_repos(4, 0), "validation": random_repos(4, 1)}
    corpus = write_packed(tmp_path / "packed", splits)
    out = tmp_path / "out"
    command = ["--study", str(write(tmp_path / "s.yaml", study)), "--out", str(out), "--corpus", str(corpus)]
    assert main(command) == 0, capsys.readouterr().err
    results = out / "results"
    text = (results / "results.md").read_text()
    assert "### Held-out loss" in text
    assert "memory - memory_wrong" in text
    numbers = json.loads(gzip.decompress((results / "results.json.gz").read_bytes()))
    assert numbers["held_out"]["small"][-1]["step"] == 2
    lines = gzip.decompress((results / "predictions/small--packages.jsonl.gz").read_bytes()).decode().splitlines()
    assert len(lines) == 2 * len(CONTROLS)
    assert (results / "training.svg").read_text().startswith("<?xml")
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("done already") == 4
