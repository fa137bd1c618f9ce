"""Spaces: grids, conditions, settings that go together; what is refused, before anything is made; the shipped ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import FloatDistribution, IntDistribution

from launch.sweep import main
from launch.sweeping.cluster import read_hosts, remote_command
from launch.sweeping.space import Space, base_config, parse_space, read_space, show
from launch.sweeping.study import Study, open_study
from launch.sweeping.trial import make_sampler
from tests.support.sweep_processes import ROOT, write_space
from titans_ds.errors import TitansError

SHIPPED = sorted((ROOT / "launch" / "spaces").glob("*.yaml"))
CONFIG = "launch/configs/quickstart.yaml"


def space_of(parameters: dict[str, Any], **others: Any) -> Space:
    settings = {"graft.memory.preset": "paper", **others.pop("settings", {})}
    return parse_space({"config": CONFIG, "parameters": parameters, "settings": settings, **others}, "space.yaml")


def draw(space: Space, index: int) -> dict[str, Any]:
    """The point of a trial of a random search."""
    study = optuna.create_study(sampler=make_sampler(space.search, index))
    trial = study.ask()
    return {parameter.name: parameter.suggest(trial) for parameter in space.parameters}


def test_grid_with_pairs() -> None:
    """Every combination once; pairs set several settings at once; the seed says in which order."""
    titans = {"graft.memory.rule.optimizer": "momentum", "graft.memory.write": "token"}
    space = space_of(
        {
            "graft.memory.dim": [32, 64],
            "rule": {"pairs": {"plain": {"graft.memory.rule.optimizer": "sgd"}, "titans": titans}},
        }
    )
    points = space.grid()
    assert len({tuple(sorted(p.items())) for p in points}) == len(points) == 4
    point = {"graft.memory.dim": 32, "rule": "titans"}
    memory = yaml.safe_load(space.trial_config(base_config(CONFIG, ROOT / "space.yaml"), point))["graft"]["memory"]
    assert (memory["dim"], memory["write"], memory["rule"]["optimizer"]) == (32, "token", "momentum")
    assert space.grid() == points
    first, other = (space_of({"training.seed": [0, 1, 2, 3]}, search={"seed": seed}).grid() for seed in (0, 1))
    assert first != other
    assert sorted(map(show, first)) == sorted(map(show, other))


def test_ranges(tmp_path: Path) -> None:
    """Whole where the setting is; 1e-4 is a number, as in Python."""
    (tmp_path / "s.yaml").write_text(
        f"config: {ROOT / CONFIG}\n"
        "parameters:\n"
        "  optimizer.lr: {low: 1e-4, high: 1E-2, log: true}\n"
        "  graft.memory.inner_steps: {low: 1, high: 8}\n"
        "  graft.gate_floor: {low: 0, high: 0.5, step: 0.1}\n"
        "search: {method: random, trials: 1}\n"
    )
    rate, inner, floor = (p.distribution for p in parse_space(read_space(tmp_path / "s.yaml"), "s").parameters)
    assert rate == FloatDistribution(1e-4, 1e-2, log=True)
    assert inner == IntDistribution(1, 8)
    assert floor == FloatDistribution(0.0, 0.5, step=0.1)


def test_random_points_belong_to_seed_and_number() -> None:
    """Whoever draws trial 7 draws the same, and another trial another."""
    parameters = {"graft.memory.step_size": {"low": 1.0e-4, "high": 1.0, "log": True}, "training.seed": [0, 1, 2]}
    space = space_of(parameters, search={"method": "random", "trials": 50, "seed": 5})
    points = [draw(space, n) for n in range(20)]
    assert points == [draw(space, n) for n in range(20)]
    assert len({p["graft.memory.step_size"] for p in points}) == 20
    assert {p["training.seed"] for p in points} == {0, 1, 2}


LR = "optimizer.lr"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown setting": ({"parameters": {"graft.memory.stepsize": [1]}}, "did you mean graft.memory.step_size"),
    "no values": ({"parameters": {"graft.memory.dim": []}}, "no values"),
    "no parameters": ({"parameters": {}}, "no parameters"),
    "unknown key": ({"serach": {}}, "did you mean 'search'"),
    "unknown search key": ({"search": {"methd": "grid"}}, "did you mean 'method'"),
    "unknown method": ({"search": {"method": "bayes"}}, "expected one of 'grid', 'random', 'adaptive'"),
    "unknown key of a range": ({"parameters": {LR: {"low": 0.1, "hihg": 1.0}}}, "did you mean 'high'"),
    "random without number": ({"search": {"method": "random"}}, "needs search.trials"),
    "too many trials": ({"search": {"method": "random", "trials": 10**9}}, "from 1 to 10,000"),
    "grid with number": ({"search": {"trials": 3}}, "leave it out"),
    "range on a grid": ({"parameters": {LR: {"low": 0.1, "high": 1.0}}}, "a grid needs a list of values"),
    "upside down": ({"parameters": {LR: {"low": 1.0, "high": 0.1}}}, "got (low=1.0, high=0.1)"),
    "not a number": ({"parameters": {LR: {"low": 0.1, "high": float("nan")}}}, "expected float (finite)"),
    "past a float": ({"parameters": {LR: {"low": 0.1, "high": 10**400}}}, "expected float (finite)"),
    "endless": ({"parameters": {LR: [0.1, float("inf")]}}, "not finite"),
    "huge grid": (
        {"parameters": {f"training.{name}": list(range(1, 102)) for name in ("seed", "steps", "window")}},
        "the grid has 1,030,301 points; a sweep takes at most 10,000",
    ),
    "log from 0": ({"parameters": {LR: {"low": 0.0, "high": 1.0, "log": True}}}, "`low > 0` must hold"),
    "halves of a dim": ({"parameters": {"graft.memory.dim": {"low": 1.5, "high": 2.5}}}, "whole numbers"),
    "twice": ({"settings": {"training.seed": 1}, "parameters": {"training.seed": [1, 2]}}, "leave it to one"),
    "set by two": (
        {"parameters": {LR: [0.1], "pair": {"pairs": {"a": {LR: 0.2}}}}}, "two parameters set optimizer.lr"
    ),
    "run folder": ({"parameters": {"run.dir": ["a", "b"]}}, "the sweep's own business"),
    "metric": ({"metric": {"name": "loss"}}, "such as evaluation.losses.memory.mean"),
    "no such configuration": ({"config": "nowhere.yaml"}, "nowhere.yaml can't be read"),
    "combination": (
        {"parameters": {"graft.memory.rule.token_momentum": [True, False]}},
        "a combination can't work: token_momentum True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_spaces(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one line that says what to do, and no study folder left behind."""
    change, message = REFUSED[name]
    space = write_space(tmp_path / "space.yaml", **{"parameters": {"graft.memory.dim": [8, 16]}, **change})
    assert main(["--space", str(space), "--study", str(tmp_path / "study")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["space.yaml"]


def test_a_study_never_changes(tmp_path: Path) -> None:
    """Another space, other settings, another base configuration, another kind of folder: refused, naming the change."""
    study, base = tmp_path / "study", tmp_path / "base.yaml"
    base.write_text((ROOT / CONFIG).read_text())
    path = write_space(tmp_path / "space.yaml", {"graft.memory.dim": [8, 16]}, config="base.yaml")
    first = open_study(study, path, {"training.steps": 3}, None, 60)
    assert open_study(study, path, {"training.steps": 3}, None, 60).meta["id"] == first.meta["id"]
    assert len(open_study(study, None, {}, None, 60).rows()) == 2
    with pytest.raises(TitansError, match=r"settings.training.steps is 3 there, 4 here"):
        open_study(study, path, {"training.steps": 4}, None, 60)
    write_space(path, {"graft.memory.dim": [8, 32]}, config="base.yaml")
    with pytest.raises(TitansError, match=r"another space: parameters.graft.memory.dim is \[8, 16\] there"):
        open_study(study, path, {"training.steps": 3}, None, 60)
    write_space(path, {"graft.memory.dim": [8, 16]}, config="base.yaml")
    base.write_text((ROOT / CONFIG).read_text().replace("lr: 3.0e-3", "lr: 1.0e-3"))
    with pytest.raises(TitansError, match=r"another base configuration: optimizer.lr is 0.003 there, 0.001 here"):
        open_study(study, path, {"training.steps": 3}, None, 60)


def test_damaged_studies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no study, or no longer one, is said so by every command, and left as it is."""
    path = write_space(tmp_path / "space.yaml", {"training.seed": [0]})
    study = tmp_path / "study"
    open_study(study, path, {}, None, 60)
    meta, database = (study / "study.json").read_bytes(), (study / "study.db").read_bytes()

    def refused(*arguments: object) -> str:
        assert main([str(a) for a in arguments]) == 2
        return capsys.readouterr().err

    assert "no trial of" in refused("best", "--study", study)
    assert "is no study; start one with" in refused("status", "--study", tmp_path)
    for content, message in (
        (b"{}", "not of a study that this version made"),
        (b"\xff{", "not JSON"),
        (b"7", "expected a valid JSON object"),
    ):
        (study / "study.json").write_bytes(content)
        for command in (["status"], ["report"], ["best"], ["run", "--space", path]):
            assert message in refused(*command, "--study", study)
        assert (study / "study.json").read_bytes() == content
    (study / "study.json").write_bytes(meta)
    (study / "study.db").write_bytes(b"no database" * 100)
    assert "file is not a database" in refused("status", "--study", study)
    (study / "study.db").unlink()
    assert "does not hold the study" in refused("--space", path, "--study", study)
    (study / "study.db").write_bytes(database)
    assert main(["status", "--study", str(study)]) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert "exists and is no study" in refused("--space", path, "--study", tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slots", "0"], "'0'; expected a whole number from 1 to 1000"),
        (["--slots", "100000000"], "expected a whole number from 1 to 1000"),
        (["--slots", "nan"], "'nan'; expected a whole number"),
        (["--lease", "1e3"], "'1e3'; expected a whole number"),
        (["--grace", "nan"], "'nan'; expected a number"),
        (["--executor", "ssh"], "needs --hostfile"),
        (["--executor", "ssh", "--hostfile", "absent"], "absent can't be read"),
        (["--hostfile", "absent"], "is for --executor ssh"),
        (["--executor", "slurm"], "can't share SQLite over a network file system"),
        (["--storage", "nonsense"], "no URL of a database"),
        (["--storage", "sqlite:///study.db"], "needs a whole path"),
        (["--storage", "sqlite:////absent/study.db"], "unable to open database file"),
        (["--launcher", "'"], "No closing quotation"),
        (["--graft.memory.dmi", "3"], "did you mean graft.memory.dim"),
        (["--sloots", "3"], "unknown option --sloots"),
    ],
)
def test_refused_options(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = write_space(tmp_path / "space.yaml", {"training.seed": [1]})
    try:
        code = main(["--space", str(space), "--study", str(tmp_path / "study"), *options])
    except SystemExit as leaving:  # argparse
        code = leaving.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["space.yaml"]


def test_a_database_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its password is not shown; with no driver for it the message names one."""
    space = write_space(tmp_path / "space.yaml", {"training.seed": [1]})
    for kind in ("postgresql+psycopg", "mysql+pymysql"):
        url = f"{kind}://me:secret@127.0.0.1:9/sweeps"
        assert main(["--space", str(space), "--study", str(tmp_path / "study"), "--storage", url]) == 2
        error = capsys.readouterr().err
        assert f"{kind}://me:***@127.0.0.1:9/sweeps" in error
        assert "does not answer" in error or "pip install" in error
        assert "secret" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["space.yaml"]


def test_hosts_and_what_their_shells_get(tmp_path: Path) -> None:
    """No host is an option of pdsh's; no path is a command of a remote shell's."""
    hosts = tmp_path / "hosts"
    hosts.write_text("# all\nnode1 slots=8\nme@node2.example  # old\n\nnode1\n")
    assert read_hosts(hosts) == ["node1", "me@node2.example"]
    for name in ("-oProxyCommand=x", "^/etc/passwd", "node[1-9]", "a,b", "a;b"):
        hosts.write_text(f"{name} slots=1\n")
        with pytest.raises(TitansError, match="is no host's name"):
            read_hosts(hosts)
    path = write_space(tmp_path / "space.yaml", {"training.seed": [0]})
    study = open_study(tmp_path / "a'; touch x; '100%h $(b)", path, {}, None, 60)
    command = remote_command(study, ["--launcher", "a 'b'"])
    quoted = """/a'"'"'; touch x; '"'"'100%%h $(b)'"""
    assert quoted in command
    assert command.endswith("""--launcher 'a '"'"'b'"'"''""")


def test_no_path_runs_a_command_through_the_deepspeed_launcher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It pastes the arguments of its ranks into a remote shell, unquoted."""
    space = write_space(tmp_path / "space.yaml", {"training.seed": [0]})
    launcher = ["--launcher", "deepspeed --hostfile hosts"]
    assert main(["--space", str(space), "--study", str(tmp_path / "it's"), *launcher]) == 2
    assert "choose a folder whose path has letters" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["space.yaml"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_spaces(path: Path) -> None:
    """Every one can be read; its first points are configurations that launch/train.py takes."""
    space = parse_space(read_space(path), str(path))
    base = base_config(space.config, path)
    points = space.grid()[:8] if space.search.method == "grid" else [draw(space, n) for n in range(8)]
    for point in points:
        assert yaml.safe_load(space.trial_config(base, point))["training"]["steps"] >= 1


def test_the_study_file_holds_no_password(tmp_path: Path) -> None:
    """Nor does a study need its URL again."""
    path = write_space(tmp_path / "space.yaml", {"training.seed": [0]})
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    open_study(tmp_path / "study", path, {}, url, 60)
    assert json.loads((tmp_path / "study" / "study.json").read_text())["storage"] == url
    assert [row.state for row in Study(tmp_path / "study").rows()] == ["waiting"]
    assert not (tmp_path / "study" / "study.db").exists()
