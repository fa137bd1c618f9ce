"""launch/train.py as users run it: under the deepspeed launcher on two ranks, in one process; and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from launch.train import main
from tests.support.clean_environment import without_ranks
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.tiny_models import VOCAB, tiny_base
from titans_ds.graft.titans_model import TitansModel
from titans_ds.zero.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
LORA = ["--lora.rank=2", "--lora.targets=[q_proj,v_proj]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a base model as a user has it on disk, and a configuration for both."""
    folder = tmp_path_factory.mktemp("place")
    splits = {
        "train": random_repos(8, seed=1),
        "validation": random_repos(7, seed=2, files=4, least=12),
        "one": random_repos(1, seed=3),
        "empty": [],
    }
    write_packed(folder / "corpus", splits)
    save_multimodal(folder / "base")
    config = {
        "model": {"base": str(folder / "base")},
        "data": {"corpus": str(folder / "corpus"), "num_lanes": 4},
        "graft": {"layers": "attention", "segment_tokens": 8, "memory": {"dim": 8}},
        "optimizer": {"lr": 0.01, "warmup_steps": 1},
        "training": {"steps": 4, "window": 2},
        "evaluation": {"interval": 2, "repositories": 6, "group_size": 2},
        "run": {"trackers": []},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def save_multimodal(folder: Path) -> None:
    """A tiny hybrid as the released ones come: with a vision tower, the text weights under a language_model prefix."""
    text = tiny_base("qwen3_5")
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config=text.config.to_dict(), vision_config=vision, tie_word_embeddings=False)
    whole = Qwen3_5ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(folder)


def launched(place: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Two ranks under the deepspeed launcher, from another folder than the checkout."""
    runner = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command = [*runner, TRAIN, "--config", str(place / "tiny.yaml"), *options]
    environment = without_ranks(OMP_NUM_THREADS="1")
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def run_alone(place: Path, name: str, *options: str) -> int:
    """One process on plain torch, inside this one."""
    return main(["--config", str(place / "tiny.yaml"), "--deepspeed=null", f"--run.dir={place / name}", *options])


@pytest.mark.long
def test_deepspeed_launch_equals_one_process(place: Path) -> None:
    """ZeRO-3 on two ranks, LoRA, multimodal base loaded in parts: run folder complete, numbers as on plain torch."""
    zero3 = ["--deepspeed", str(ROOT / "ds_configs/zero3.json")]
    done = launched(place, "--run.dir", "two", *zero3, "--run.trackers=[tensorboard]", *LORA)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "another repository's memory" in done.stdout
    assert "peak host memory by rank" in done.stdout
    assert run_alone(place, "one", *LORA) == 0
    two, one = place / "two", place / "one"
    for name in ("config.yaml", "versions.json", "status.json", "README.md", "adapter/titans_config.json"):
        assert (two / name).is_file(), name
    assert list((two / "tensorboard").iterdir())
    assert not list(two.rglob("*.part"))
    assert "NaN" not in (two / "metrics.jsonl").read_text()
    status = json.loads((two / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 4)
    assert json.loads((two / "versions.json").read_text())["packages"]["deepspeed"]
    for ours, plain in zip(lines_of(two, "train"), lines_of(one, "train"), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert ours["gate_gradient_norm"] == pytest.approx(plain["gate_gradient_norm"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
        assert ours["inner_loss_after"] == pytest.approx(plain["inner_loss_after"], rel=1e-4)
        assert ours["targets"] == plain["targets"]
    for ours, plain in zip(lines_of(two, "evaluation"), lines_of(one, "evaluation"), strict=True):
        assert ours["losses"]["before"]["mean"] == pytest.approx(plain["losses"]["before"]["mean"], abs=1e-6)
        for mode in ("memory", "ablated", "wrong"):
            assert ours["losses"][mode]["mean"] == pytest.approx(plain["losses"][mode]["mean"], abs=1e-5)
            assert ours["losses"][mode]["standard_error"] == pytest.approx(
                plain["losses"][mode]["standard_error"], abs=1e-5
            )
    ours_weights, plain_weights = (load_file(run / "adapter" / "titans_memory.safetensors") for run in (two, one))
    for name, weight in plain_weights.items():
        torch.testing.assert_close(ours_weights[name], weight, atol=1e-4, rtol=1e-3)
    TitansModel.from_pretrained(str(place / "base"), two / "adapter")


def test_a_base_model_trains_without_memory_and_then_carries_one(place: Path) -> None:
    """Everything trainable on whole repositories, saved as safetensors, and loaded again as the base of a graft."""
    options = ["--graft=null", "--model.trainable=all", "--data.layout=repository", "--data.segment_tokens=16"]
    assert run_alone(place, "pretrained", *options, "--optimizer.lr=1e-3") == 0
    losses = [line["loss"] for line in lines_of(place / "pretrained", "train")]
    assert len(losses) == 4
    saved = place / "pretrained" / "model"
    assert (saved / "model.safetensors").is_file()
    before = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    moved = [n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert moved == [n for n, _ in before.named_parameters()]
    assert run_alone(place, "grafted", f"--model.base={saved}", "--training.steps=1") == 0


@pytest.mark.parametrize("injection", ["additive", "mac"])
def test_lora_trains_beside_the_memory(place: Path, capsys: pytest.CaptureFixture[str], injection: str) -> None:
    """On single files; both adapters are saved and load together; the table shows what the base model has forgotten."""
    options = [f"--graft.injection={injection}", "--data.reset=file", *LORA]
    assert run_alone(place, f"lora-{injection}", *options) == 0
    shown = capsys.readouterr().out
    assert "before training" in shown
    assert "forgetting, loss without memory minus loss before training: " in shown
    run = place / f"lora-{injection}"
    first, last = (lines_of(run, "evaluation")[i] for i in (0, -1))
    assert first["losses"]["before"] == last["losses"]["before"]
    assert last["losses"]["before"]["mean"] != last["losses"]["ablated"]["mean"]
    difference = last["losses"]["ablated"]["mean"] - last["losses"]["before"]["mean"]
    assert last["forgetting"]["mean"] == pytest.approx(difference, abs=1e-9)
    assert last["perplexity"]["before"] == pytest.approx(math.exp(last["losses"]["before"]["mean"]))
    model = TitansModel.from_pretrained(str(place / "base"), run / "adapter")
    assert (run / "adapter" / "lora" / "adapter_config.json").is_file()
    up = [p for n, p in model.named_parameters() if ".lora_B." in n]
    assert len(up) == 4  # two targets in two layers
    assert all(p.norm() > 0 for p in up)  # they start at zero


def test_a_base_trained_beside_a_memory_shows_what_it_forgot(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its loss before training is that of the untrained base, and a resumed run still knows it."""
    options = ["--model.trainable=all", "--optimizer.lr=1e-3", "--training.steps=4", "--checkpoint.interval=2"]
    assert run_alone(place, "whole", *options) == 0
    assert run_alone(place, "frozen", "--training.steps=1") == 0
    whole, frozen = (lines_of(place / name, "evaluation") for name in ("whole", "frozen"))
    assert [line["losses"]["before"] for line in whole] == [frozen[0]["losses"]["ablated"]] * 2
    assert whole[-1]["forgetting"]["mean"] != 0
    for checkpoint in (place / "whole" / "checkpoints").glob("step_*4"):
        shutil.rmtree(checkpoint)
    capsys.readouterr()
    assert run_alone(place, "whole", *options, "--resume=auto") == 0
    assert "going on from" in capsys.readouterr().out
    assert lines_of(place / "whole", "evaluation") == whole


def test_zero_0_has_a_gradient_norm(place: Path) -> None:
    """DeepSpeed gives none in fp32: it is that of plain torch, and nothing in the metrics is NaN."""
    options = ["--evaluation.interval=0", "--training.steps=2", "--deepspeed", str(ROOT / "ds_configs/zero0.json")]
    done = launched(place, "--run.dir", "zero0", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert run_alone(place, "plain", *options[:2]) == 0
    assert "NaN" not in (place / "zero0" / "metrics.jsonl").read_text()
    for ours, plain in zip(lines_of(place / "zero0", "train"), lines_of(place / "plain", "train"), strict=True):
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


def test_user_errors_reach_the_shell(place: Path) -> None:
    """Under the launcher: one message, exit code 2, no traceback, no run folder."""
    done = launched(place, "--run.dir", "bad", "--data.num_lanes", "5")
    assert done.returncode == 2
    assert done.stderr.count("error: data.num_lanes is 5, which 2 ranks can't share evenly") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert not (place / "bad").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.stpes=3"], "did you mean training.steps?"),
        (["--training.steps=few"], "training.steps is few; expected int"),
        (["--config=nowhere.yaml"], "nowhere.yaml does not exist"),
        (
            ["--deepspeed=nowhere.json"],
            "nowhere.json: No such file or directory. A DeepSpeed configuration is a JSON object",
        ),
        (["--model.base=/nowhere/at/all"], "the base model /nowhere/at/all can't be loaded: there is no such folder"),
        (
            [
                "--model.base=null",
                '--model.architecture={"model_type": "nemotron_h"}',
            ],
            "model type 'nemotron_h' is not supported: no child of layer 1",
        ),
        (["--model.base=null", '--model.architecture={"model_type": "nonsense"}'], "can't be loaded: "),
        (["--graft.layers=[1, 9]"], "names layer 9, but this model has layers 0 to 3"),
        (["--graft.gate_floor=1.0"], "gate_floor is 1.0; it must be in [0, 1)"),
        (
            ["--graft.memory.key_projection=learned"],
            "key_projection is no setting of the preset 'delta'; it is one of paper,",
        ),
        (["--data.corpus=/nowhere"], "the folder /nowhere does not exist"),
        (["--data.train_split=none"], "has no split 'none'; it has: empty, one, train, validation"),
        (["--data.train_split=empty"], "is empty"),
        (["--evaluation.split=one"], "has 1 repository; the wrong-memory control needs 2"),
    ],
)
def test_bad_input(place: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    """Exit code 2, one line on stderr, nothing written."""
    arguments = [] if any(o.startswith("--deepspeed") for o in options) else ["--deepspeed=null"]
    code = main(["--config", str(place / "tiny.yaml"), *arguments, f"--run.dir={place / 'refused'}", *options])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in error
    assert not (place / "refused").exists()


def test_an_existing_run_is_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run into the same folder is refused, unless asked; a folder that is no run is never replaced."""
    assert run_alone(place, "kept", "--training.steps=1", "--evaluation.interval=0") == 0
    before = (place / "kept" / "metrics.jsonl").read_text()
    assert run_alone(place, "kept", "--training.steps=1") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (place / "kept" / "metrics.jsonl").read_text() == before
    assert run_alone(place, "kept", "--training.steps=2", "--evaluation.interval=0", "--run.overwrite=true") == 0
    assert len(lines_of(place / "kept", "train")) == 2
    assert run_alone(place, "corpus", "--run.overwrite=true") == 2
    assert (place / "corpus" / "packed.json").is_file()


def test_damaged_corpora(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Truncated tokens, a broken index, a vocabulary that the model lacks: each says so."""
    repos = {"train": random_repos(2, seed=0), "validation": random_repos(2, seed=0)}
    damages: list[tuple[str, Any]] = [
        ("it is truncated", lambda c: os.truncate(c / "train.tokens.bin", 20)),
        ("train.index.npz is damaged", lambda c: (c / "train.index.npz").write_bytes(b"PK\x03\x04")),
        ("train.index.npz is missing", lambda c: (c / "train.index.npz").unlink()),
        ("packed.json: not JSON", lambda c: (c / "packed.json").write_text("{")),
    ]
    for number, (message, damage) in enumerate(damages):
        corpus = write_packed(tmp_path / str(number), repos)
        damage(corpus)
        assert run_alone(place, "refused", f"--data.corpus={corpus}") == 2
        assert message in capsys.readouterr().err
    large = write_packed(tmp_path / "large", repos, vocab_size=VOCAB + 1)
    assert run_alone(place, "refused", f"--data.corpus={large}") == 2
    assert f"vocabulary of {VOCAB + 1} tokens (test), but the model has {VOCAB}" in capsys.readouterr().err


def write_parquet_corpus(folder: Path, columns: tuple[str, ...] = ("repo", "content", "n_bytes")) -> Path:
    """A corpus as data_prep.build_corpus leaves it, and a tokenizer of single words beside it."""
    folder.mkdir()
    words = [f"w{i}" for i in range(20)]
    for split, first in (("train", 0), ("validation", 10)):
        rows = [(f"o/r{first + r}", " ".join(words[r : r + 12] * 2)) for r in range(4) for _ in range(2)]
        table = {"repo": [r for r, _ in rows], "content": [c for _, c in rows], "n_bytes": [len(c) for _, c in rows]}
        pq.write_table(pa.table({name: table[name] for name in columns}), folder / f"{split}-00000-of-00001.parquet")
    (folder / "manifest.json").write_text("{}")
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(["?", *words])}, unk_token="?"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder / "tokenizer")
    return folder


def test_a_corpus_of_parquet_files_is_packed_on_the_way(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the model's tokenizer, once; without one, or without a column, there is a message."""
    corpus = write_parquet_corpus(tmp_path / "good")
    options = [f"--data.corpus={corpus}", f"--model.tokenizer={corpus / 'tokenizer'}", "--training.steps=1"]
    assert run_alone(place, "parquet", *options) == 0
    packed = next(corpus.glob("packed-*/packed.json"))
    before = packed.stat().st_mtime_ns
    assert run_alone(place, "parquet", *options, "--run.overwrite=true") == 0
    assert packed.stat().st_mtime_ns == before
    bad = write_parquet_corpus(tmp_path / "bad", columns=("repo", "n_bytes"))
    assert run_alone(place, "refused", *options, f"--data.corpus={bad}") == 2
    assert "lacks content; it has repo, n_bytes" in capsys.readouterr().err
    (bad / "train-00000-of-00001.parquet").write_bytes(b"no parquet")
    assert run_alone(place, "refused", *options, f"--data.corpus={bad}") == 2
    assert "is not a whole parquet file" in capsys.readouterr().err
    architecture = '--model.architecture={"model_type": "llama"}'
    without = ["--model.base=null", architecture, f"--data.corpus={write_parquet_corpus(tmp_path / 'third')}"]
    assert run_alone(place, "refused", *without) == 2
    assert "is not packed; set model.tokenizer to pack it with" in capsys.readouterr().err


def test_non_finite_losses_end_the_run_with_a_message(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step size that blows the memory up: steps are skipped, then the run stops; its status says why."""
    memory = "--graft.memory={preset: paper, dim: 8, step_size: 9e18, write: token}"
    blown = [memory, "--training.nonfinite_limit=2"]
    assert run_alone(place, "blown", *blown, "--training.steps=9", "--evaluation.interval=0") == 2
    assert "was not finite in 2 steps in a row" in capsys.readouterr().err
    status = json.loads((place / "blown" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "not finite" in status["error"]
