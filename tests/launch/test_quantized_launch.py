"""launch/train.py on a base in 4 bits: in one process, under ZeRO-2 on two ranks, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from launch import scaling
from launch.arguments import parse
from launch.memory import footprint
from launch.train import main
from tests.launch.test_launch import ROOT, launched, lines_of
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.tiny_models import tiny_base
from titans_ds import TitansModel
from titans_ds.errors import ConfigError
from titans_ds.training import build
from titans_ds.training.settings import ModelSettings
from titans_ds.zero.footprint import FOUR_BITS, GIB, Setup, check_fits, total_bytes

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a hybrid base on disk, and a configuration that stores it in 4 bits."""
    folder = tmp_path_factory.mktemp("place")
    splits = {"train": random_repos(8, seed=1), "validation": random_repos(6, seed=2, files=4, least=12)}
    write_packed(folder / "corpus", splits)
    tiny_base("qwen3_5", hidden_size=64, intermediate_size=128).save_pretrained(folder / "base")
    config = {
        "model": {"base": str(folder / "base"), "quantization": "bnb-4bit", "dtype": "bfloat16"},
        "data": {"corpus": str(folder / "corpus"), "num_lanes": 4},
        "graft": {"layers": "attention", "segment_tokens": 8, "memory": {"dim": 8}},
        "optimizer": {"lr": 0.01, "warmup_steps": 1},
        "training": {"steps": 4, "window": 2},
        "evaluation": {"interval": 2, "repositories": 6, "group_size": 2},
        "checkpoint": {"interval": 2},
        "run": {"trackers": []},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def trained(place: Path, name: str) -> list[float]:
    """Losses of a run whose adapter says on what it was trained, and loads on both forms of the base."""
    adapter = place / name / "adapter"
    config = json.loads((adapter / "titans_config.json").read_text())
    assert config["base_model"]["quantization"]["load_in_4bit"]
    assert 'Trained on "corpus" (split "train")' in (adapter / "README.md").read_text()
    for form in ("bnb-4bit", "none"):
        TitansModel.from_pretrained(
            build.load_base(ModelSettings(str(place / "base"), quantization=form), 0, 0), adapter
        )
    return [line["loss"] for line in lines_of(place / name, "train")]


def test_a_run_on_four_bits_trains_stops_and_goes_on(place: Path) -> None:
    options = ["--config", str(place / "tiny.yaml"), "--deepspeed=null"]
    assert main([*options, f"--run.dir={place / 'whole'}"]) == 0
    losses = trained(place, "whole")
    assert len(losses) == 4
    assert "| memory ablated | 5." in (place / "whole" / "adapter" / "README.md").read_text()
    resumed = [f"--run.dir={place / 'again'}", f"--run.resume={place / 'whole/checkpoints/step_0000002'}"]
    assert main([*options, *resumed]) == 0
    assert trained(place, "again") == losses[2:]
    ours, whole = (load_file(place / name / "adapter" / "titans_memory.safetensors") for name in ("again", "whole"))
    assert all(ours[name].equal(whole[name]) for name in whole)


@pytest.mark.long
def test_two_ranks_under_zero_2_train_as_one_process(place: Path) -> None:
    short = ["--model.dtype=float32", "--training.steps=2", "--evaluation.interval=0", "--checkpoint.interval=0"]
    options = [*short, f"--deepspeed={ROOT / 'ds_configs/zero2.json'}"]
    done = launched(place, "--run.dir", "two", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    alone = ["--config", str(place / "tiny.yaml"), "--deepspeed=null", f"--run.dir={place / 'one'}"]
    assert main([*alone, *short]) == 0
    assert trained(place, "two") == pytest.approx(trained(place, "one"), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model.quantization=bnb-4it"], "'bnb-4it', which is unknown; did you mean 'bnb-4bit'?"),
        (["--model.quantization_options={bnb_4bit_quant: nf4}"], "'bnb_4bit_quant', which is unknown; did you mean"),
        ([f"--deepspeed={ROOT / 'ds_configs/zero3.json'}"], "model.quantization is on under ZeRO-3"),
        (["--model.trainable=all", "--graft=null"], "weights of few bits don't learn"),
    ],
)
def test_what_can_not_work_is_refused(
    place: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = [] if any("deepspeed" in option for option in options) else ["--deepspeed=null"]
    assert main(["--config", str(place / "tiny.yaml"), *one, f"--run.dir={place / 'refused'}", *options]) == 2
    assert says in capsys.readouterr().err
    assert not (place / "refused").exists()


def test_the_footprint_of_a_run_counts_bits(place: Path) -> None:
    """Also of a base that is stored in 4 bits already."""
    config, _ = parse(["--config", str(place / "tiny.yaml")])
    model, setup = footprint(config, {}, 1)
    assert setup.linear_bytes == FOUR_BITS
    assert 0 < model.linear < model.parameters
    base = build.load_base(config.model, 0, 0)
    base.save_pretrained(place / "stored")
    stored, _ = parse(
        ["--config", str(place / "tiny.yaml"), "--model.quantization=none", f"--model.base={place / 'stored'}"]
    )
    assert footprint(stored, {}, 1) == (model, setup)
    plain, _ = parse(["--config", str(place / "tiny.yaml"), "--model.quantization=none"])
    assert footprint(plain, {}, 1)[1].linear_bytes == 0


def test_nine_billion_parameters_in_four_bits_train_on_24_gb(capsys: pytest.CaptureFixture[str]) -> None:
    """24 GB are 22.4 GiB. In 16 bits they don't fit, and the refusal says what would."""
    options = ["--model", "9B", "--gpus", "1", "--gib", "22.4"]
    assert scaling.main([*options, "--quantization", "bnb-4bit"]) == 0
    printed = capsys.readouterr().out
    assert "15.4" in printed
    assert "does not fit" not in printed
    assert scaling.main(options) == 0
    assert capsys.readouterr().out.count("does not fit") == 4
    assert scaling.main([*options, "--quantization", "bnb-4bit", "--trainable", "all"]) == 2
    model = scaling.sizes("9B", "memory")
    setup = Setup(0, 1, loss_chunk_tokens=2048)
    assert total_bytes(model, setup) / GIB > 22.4
    with pytest.raises(ConfigError, match=r"model\.quantization bnb-4bit with that \(about"):
        check_fits(model, setup, int(16 * GIB))
