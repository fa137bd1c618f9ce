"""launch/train.py with a GradMem-style memory: two ranks under ZeRO-3 compute what one process computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launch.train import main
from tests.launch.test_launch import ROOT, launched, lines_of
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.tiny_models import tiny_base
from titans_ds.graft.titans_model import TitansModel

SECOND = ["--training.order=second", "--graft.memory.learn_step_size=true"]
WINDOW = [*SECOND, "--training.second_order=window"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    splits = {"train": random_repos(8, seed=1), "validation": random_repos(7, seed=2, files=4, least=12)}
    write_packed(folder / "corpus", splits)
    tiny_base("qwen3_5").save_pretrained(folder / "base")
    prefix = {"preset": "gradmem", "tokens": 3, "inner_steps": 2, "step_size": 5.0, "initial_std": 0.5}
    config = {
        "model": {"base": str(folder / "base")},
        "data": {"corpus": str(folder / "corpus"), "num_lanes": 4},
        "graft": {"segment_tokens": 8, "memory": prefix},
        "optimizer": {"lr": 0.01, "warmup_steps": 1},
        "training": {"steps": 3, "window": 2, "checkpointing": True},
        "evaluation": {"interval": 3, "repositories": 6, "group_size": 2},
        "run": {"trackers": []},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def run_alone(place: Path, name: str, *options: str) -> int:
    return main(["--config", str(place / "tiny.yaml"), "--deepspeed=null", f"--run.dir={place / name}", *options])


@pytest.mark.long
def test_two_ranks_under_zero_3_equal_one_process(place: Path) -> None:
    zero3 = ["--deepspeed", str(ROOT / "ds_configs/zero3.json")]
    done = launched(place, "--run.dir", "two", *zero3, *WINDOW)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert run_alone(place, "one", *WINDOW) == 0
    two, one = (lines_of(place / name, "train") for name in ("two", "one"))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-3)
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], abs=1e-6)
    assert all(line["inner_loss_after"]["0"] < line["inner_loss_before"]["0"] for line in one)
    evaluations = [lines_of(place / name, "evaluation")[-1] for name in ("two", "one")]
    losses = [
        [evaluation["losses"][mode]["mean"] for mode in ("memory", "ablated", "wrong")] for evaluation in evaluations
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert len(set(losses[1])) == 3
    saved = TitansModel.from_pretrained(tiny_base("qwen3_5"), place / "two" / "adapter")
    assert saved.graft.is_prefix
    assert saved.prefix is not None
    assert not saved.prefix.initial.equal(TitansModel(tiny_base("qwen3_5"), saved.graft).prefix.initial)


def test_orders_differ_in_their_gradients_alone(place: Path) -> None:
    for name, options in {"first": ["--training.order=first"], "window": WINDOW, "through": SECOND}.items():
        assert run_alone(place, name, *options) == 0
    steps = [lines_of(place / name, "train")[0] for name in ("first", "window", "through")]
    losses, norms = ([line[name] for line in steps] for name in ("loss", "grad_norm"))
    assert losses == pytest.approx(losses[:1] * 3, abs=1e-5)
    assert len({round(norm, 4) for norm in norms}) == 3


def test_refusals(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_alone(place, "no", *SECOND, "--training.second_order=two_phase") == 2
    assert "through_base" in capsys.readouterr().err
