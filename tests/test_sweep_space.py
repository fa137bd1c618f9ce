"""Spaces: grids, conditions, settings that go together, draws by seed; what is refused; and the shipped ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.sweep import main
from launch.sweeping.configs import trial_config
from launch.sweeping.points import grid_points, random_point, settings_of
from launch.sweeping.space import Space, base_config, load_space, parse_space
from launch.sweeping.study import open_study
from titans_ds.errors import TitansError

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "launch" / "spaces").glob("*.yaml"))
CONFIG = "launch/configs/quickstart.yaml"


def space_of(parameters: dict[str, Any], **others: Any) -> Space:
    return parse_space({"config": CONFIG, "parameters": parameters, **others}, "space.yaml")


def test_grid_with_conditions_and_pairs() -> None:
    """The conditional parameter multiplies only where it counts; pairs set several settings at once."""
    space = space_of(
        {
            "graft.memory.dim": [32, 64],
            "rule": {
                "pairs": {
                    "plain": {"graft.memory.rule.optimizer": "sgd"},
                    "titans": {"graft.memory.rule.optimizer": "momentum", "graft.memory.write": "token"},
                }
            },
            "graft.memory.rule.momentum": {"values": [0.5, 0.9, 0.95], "when": {"rule": "titans"}},
        }
    )
    points = grid_points(space)
    assert len(points) == 2 * (1 + 3)
    assert len({tuple(sorted(p.items())) for p in points}) == 8
    assert all(("graft.memory.rule.momentum" in p) == (p["rule"] == "titans") for p in points)
    settings = settings_of(space, {"graft.memory.dim": 32, "rule": "titans", "graft.memory.rule.momentum": 0.5})
    assert settings == {
        "graft.memory.dim": 32,
        "graft.memory.rule.optimizer": "momentum",
        "graft.memory.write": "token",
        "graft.memory.rule.momentum": 0.5,
    }
    again = grid_points(space)
    other = grid_points(space_of({"graft.memory.dim": [32, 64], "training.seed": [0, 1, 2]}, search={"seed": 1}))
    first = grid_points(space_of({"graft.memory.dim": [32, 64], "training.seed": [0, 1, 2]}, search={"seed": 0}))
    assert again == points
    assert other != first
    assert sorted(map(str, other)) == sorted(map(str, first))


def test_ranges() -> None:
    """Ends included, even on their scale, whole numbers where the setting takes them."""
    space = space_of(
        {
            "graft.memory.step_size": {"low": 0.001, "high": 10, "log": True, "points": 5},
            "graft.memory.inner_steps": {"low": 1, "high": 8, "points": 3},
            "graft.gate_floor": {"low": 0.0, "high": 0.3, "step": 0.1},
        }
    )
    step_size, inner, floor = (p.values() for p in space.parameters)
    assert step_size == pytest.approx([1e-3, 1e-2, 0.1, 1.0, 10.0])
    assert inner == [1, 4, 8]
    assert all(isinstance(v, int) for v in inner)
    assert floor == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """1e-4 is a number, as in Python."""
    (tmp_path / "s.yaml").write_text(
        f"config: {ROOT / CONFIG}\nparameters:\n  optimizer.lr: {{low: 1e-4, high: 1E-2, log: true, points: 3}}\n"
    )
    (parameter,) = parse_space(load_space(tmp_path / "s.yaml"), "s").parameters
    assert parameter.values() == pytest.approx([1e-4, 1e-3, 1e-2])


def test_random_points_belong_to_seed_and_number() -> None:
    """Whoever draws trial 7 draws the same; a log range is even in its logarithm."""
    parameters = {
        "graft.memory.step_size": {"low": 1.0e-4, "high": 1.0, "log": True},
        "graft.memory.inner_steps": {"low": 1, "high": 3},
    }
    space = space_of(parameters, search={"method": "random", "trials": 400, "seed": 5})
    points = [random_point(space, n) for n in range(400)]
    assert points == [random_point(space, n) for n in range(400)]
    other = space_of(parameters, search={"method": "random", "trials": 400, "seed": 6})
    assert points != [random_point(other, n) for n in range(400)]
    logs = [math.log10(p["graft.memory.step_size"]) for p in points]
    assert all(-4 <= value <= 0 for value in logs)
    assert sum(logs) / 400 == pytest.approx(-2, abs=0.25)
    assert {p["graft.memory.inner_steps"] for p in points} == {1, 2, 3}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown setting": ({"parameters": {"graft.memory.stepsize": [1]}}, "did you mean graft.memory.step_size"),
    "no values": ({"parameters": {"graft.memory.dim": []}}, "no values"),
    "no parameters": ({"parameters": {}}, "no parameters"),
    "unknown key": ({"serach": {}}, "did you mean 'search'"),
    "unknown search key": ({"search": {"methd": "grid"}}, "did you mean 'method'"),
    "unknown method": ({"search": {"method": "bayes"}}, "expected one of 'grid', 'random', 'adaptive'"),
    "random without number": ({"search": {"method": "random"}}, "needs search.trials"),
    "grid with number": ({"search": {"trials": 3}}, "leave it out"),
    "pruning a grid": ({"search": {"pruning": "median"}}, "needs search.method 'adaptive'"),
    "range on a grid": ({"parameters": {"optimizer.lr": {"low": 0.1, "high": 1.0}}}, "needs its `points:`"),
    "upside down": ({"parameters": {"optimizer.lr": {"low": 1.0, "high": 0.1, "points": 2}}}, "low must be below high"),
    "log from 0": ({"parameters": {"optimizer.lr": {"low": 0.0, "high": 1.0, "log": True}}}, "low above 0"),
    "halves of a dim": ({"parameters": {"graft.memory.dim": {"low": 1.5, "high": 2.5}}}, "whole numbers"),
    "twice": ({"settings": {"training.seed": 1}, "parameters": {"training.seed": [1, 2]}}, "leave it to one"),
    "condition on nothing": (
        {"parameters": {"training.seed": {"values": [1], "when": {"graft.memory.dim": 8}}}},
        "no parameter above it",
    ),
    "condition never true": (
        {"parameters": {"graft.memory.dim": [8], "training.seed": {"values": [1], "when": {"graft.memory.dim": 9}}}},
        "it can be [8]",
    ),
    "run folder": ({"parameters": {"run.dir": ["a", "b"]}}, "the sweep's own business"),
    "metric": ({"metric": {"name": "loss"}}, "such as evaluation.losses.memory.mean"),
    "no such configuration": ({"config": "nowhere.yaml"}, "nowhere.yaml does not exist"),
    "combination": (
        {"parameters": {"graft.memory.rule.token_momentum": [True, False]}},
        "1 of 2 combinations can't work, such as token_momentum True",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_spaces(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one line that says what to do, and no study folder left behind."""
    change, message = REFUSED[name]
    space = {"config": str(ROOT / CONFIG), "parameters": {"graft.memory.dim": [8, 16]}, **change}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    code = main(["--space", str(tmp_path / "space.yaml"), "--study", str(tmp_path / "study")])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["space.yaml"]


def test_a_study_never_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another space, other settings, another base configuration, another kind of folder: refused, naming the change."""
    path, study = tmp_path / "space.yaml", tmp_path / "study"
    (tmp_path / "base.yaml").write_text((ROOT / CONFIG).read_text())
    path.write_text(yaml.safe_dump({"config": "base.yaml", "parameters": {"graft.memory.dim": [8, 16]}}))
    first = open_study(study, path, {"training.steps": 3})
    assert open_study(study, path, {"training.steps": 3}).id == first.id
    assert open_study(study, None, {}).size == 2
    with pytest.raises(TitansError, match=r"settings.training.steps is 3 there, 4 here"):
        open_study(study, path, {"training.steps": 4})
    path.write_text(yaml.safe_dump({"config": "base.yaml", "parameters": {"graft.memory.dim": [8, 32]}}))
    with pytest.raises(TitansError, match=r"another space: parameters.graft.memory.dim is \[8, 16\] there"):
        open_study(study, path, {"training.steps": 3})
    path.write_text(yaml.safe_dump({"config": "base.yaml", "parameters": {"graft.memory.dim": [8, 16]}}))
    (tmp_path / "base.yaml").write_text((ROOT / CONFIG).read_text().replace("lr: 3.0e-3", "lr: 1.0e-3"))
    with pytest.raises(TitansError, match=r"another base configuration: optimizer.lr is 0.003 there, 0.001 here"):
        open_study(study, path, {"training.steps": 3})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(TitansError, match="exists and is no study"):
        open_study(tmp_path / "other", path, {})
    for arguments in (["status", "--study", str(tmp_path)], ["--study", str(tmp_path / "absent")]):
        assert main(arguments) == 2
        assert "is no study; start one with" in capsys.readouterr().err
    assert main(["best", "--study", str(study)]) == 2
    assert "no trial of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slots", "0"], "no slot, no trial"),
        (["--executor", "fork", "--ranks", "2"], "use the executor local"),
        (["--executor", "hostfile"], "no slot: the executor hostfile needs --hostfile"),
        (["--executor", "hostfile", "--hostfile", "absent"], "absent does not exist"),
        (["--gpus", "0,0", "--slots", "2", "--ranks", "2"], "no slot: 2 with 2 GPU(s) each asked for"),
        (["--graft.memory.dmi", "3"], "did you mean graft.memory.dim"),
        (["--sloots", "3"], "unknown option --sloots"),
    ],
)
def test_refused_options(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = {"config": str(ROOT / CONFIG), "parameters": {"training.seed": [1]}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    assert main(["--space", str(tmp_path / "space.yaml"), "--study", str(tmp_path / "study"), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_spaces(path: Path) -> None:
    """Every one can be read; its first points are configurations that launch/train.py takes."""
    space = parse_space(load_space(path), str(path))
    base = base_config(space, path)
    first = grid_points(space) if space.search.method == "grid" else [random_point(space, n) for n in range(12)]
    for point in first[:12]:
        text = trial_config(base, settings_of(space, point))
        assert yaml.safe_load(text)["training"]["steps"] >= 1
