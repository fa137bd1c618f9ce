"""Every preset trains as it is; what names, files and options of memories mean; what an older version wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import titans_ds
from launch.arguments import parse
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.tiny_models import tiny_base, token_ids
from titans_ds import GraftConfig, TitansModel, preset
from titans_ds.errors import AdapterError, ConfigError, StateError
from titans_ds.memory import MemoryState
from titans_ds.memory.registry import PRESETS
from titans_ds.training.build import make_module, trainable_names
from titans_ds.training.data.lanes import Lanes
from titans_ds.training.data.packed import open_corpus
from titans_ds.training.data.segments import RepositoryReader
from titans_ds.training.engine import TorchEngine
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.settings import DataSettings, ModelSettings, TrainConfig
from titans_ds.training.step import Carried, commit, run_passes


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_with_no_other_setting_and_is_saved(name: str, tmp_path: Path) -> None:
    """Two steps, the second from the states of the first: every learned parameter gets a gradient."""
    corpus = write_packed(tmp_path / "corpus", {"train": random_repos(4, seed=1, files=8)})
    model, data = ModelSettings(base="tiny"), DataSettings(corpus=str(corpus), num_lanes=1)
    config = TrainConfig(model, data, GraftConfig(memory=preset(name)))
    module = make_module(tiny_base("llama"), config)
    engine = TorchEngine(module, make_optimizer(module, config.optimizer), config.optimizer.clip, torch.device("cpu"))
    reader = RepositoryReader(open_corpus(corpus).split("train"), config.graft.segment_tokens)
    lanes, carried, names = Lanes(reader, data.num_lanes, 0, 1, seed=0), Carried(), trainable_names(module)
    reached = set()
    for _ in range(2):
        passes = run_passes(engine, lanes, carried, config.training, 1)
        reached |= {n for n, g in engine.gradients(names).items() if g is not None and g.any()}
        assert torch.isfinite(passes.loss_sum)
        engine.step(1e-3, skip=False)
        commit(passes, carried)
    assert reached == set(names)
    module.model.save_pretrained(tmp_path / "adapter")
    again, ids = TitansModel.from_pretrained(tiny_base("llama"), tmp_path / "adapter"), token_ids(1, 12)
    module.eval()
    with torch.no_grad(), module.model.memory_session(1) as mine, again.memory_session(1) as theirs:
        for grafted, session in ((module.model, mine), (again, theirs)):
            grafted.prime(token_ids(1, 30, seed=1), session)
        assert torch.equal(again(ids, memory=theirs.state).logits, module.model(ids, memory=mine.state).logits)


@pytest.mark.parametrize("name", ["delta", "gated_delta"])
def test_one_token_alone_writes_nothing_but_is_carried_to_the_next(name: str) -> None:
    """A pair needs a token before it: the second call's first token writes under the first call's last."""
    model = titans_ds.attach(tiny_base("llama"), GraftConfig(layers="attention", memory=preset(name, dim=16))).eval()
    prompt, text = token_ids(1, 6, seed=3), token_ids(1, 2, seed=1)

    def logits(*pieces: torch.Tensor) -> torch.Tensor:
        with model.memory_session(1) as session, torch.no_grad():
            for piece in pieces:
                model.prime(piece, session)
            return model(prompt, memory=session.state).logits

    empty, alone, together, apart = logits(), logits(text[:, :1]), logits(text), logits(text[:, :1], text[:, 1:])
    assert torch.equal(alone, empty)
    assert (together - empty).abs().max() > 1e-3
    assert (apart - empty).abs().max() > 1e-3
    assert torch.equal(logits(text[:, 1:]), empty)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gated_detla", {}, "preset is 'gated_detla', which is no preset; did you mean 'gated_delta'"),
        ("delta", {"depth": 3}, "depth is no setting of the preset 'delta'; it is one of paper, titans, ttt_linear"),
        ("titans", {"tokens": 3}, "tokens is no setting of the preset 'titans'; it is one of gradmem"),
        ("titans", {"rule": {"chunk_sise": 3}}, "'graft.memory.rule.chunk_sise'; did you mean 'chunk_size'"),
        ("titans", {"kind": "delta"}, "preset 'titans' is of kind 'mlp', not 'delta'"),
        ("titans", {"kind": ["mlp"]}, r"kind is \['mlp'\], which is no kind of memory; did you mean 'mlp'"),
    ],
)
def test_wrong_names_say_which_are_right(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset(name, **changes)


def test_options_over_a_file_change_the_preset_and_settings_in_groups(tmp_path: Path) -> None:
    """Another preset starts anew; the same one keeps what the file says beside the options."""
    path = tmp_path / "own.yaml"
    path.write_text("model: {base: B}\ndata: {corpus: C}\ngraft: {layers: [1], memory: {preset: delta, heads: 2}}\n")
    titans = ["--graft.memory.preset", "titans", "--graft.memory.rule.chunk_size=32"]
    graft = parse(["--config", str(path), *titans])[0].graft
    assert graft == GraftConfig(layers=[1], memory=preset("titans", rule={"chunk_size": 32}))
    graft = parse(["--config", str(path), "--graft.memory.dim", "16"])[0].graft
    assert graft == GraftConfig(layers=[1], memory=preset("delta", heads=2, dim=16))
    train_base = ["--model.trainable=all", "--graft.memory.dim=16", "--graft=null"]
    assert parse(["--config", str(path), *train_base])[0].graft is None


def test_a_comparison_is_the_loss_of_one_text_with_four_memories() -> None:
    """Each recomputed by hand; the counted tokens are those behind the prompt."""
    model = titans_ds.attach(tiny_base("llama"), GraftConfig(layers="attention", gate_init=2.0)).eval()
    read, wrong, text = ([token_ids(40, seed=seed).tolist()] for seed in (1, 2, 3))
    found = titans_ds.compare(model, read=read, wrong=wrong, text=text[0], prompt_tokens=10)

    def loss(files: list[list[int]]) -> float:
        with model.memory_session(1) as session, torch.no_grad():
            for file in files:
                model.prime(torch.tensor([file]), session)
            logits = model(torch.tensor(text), memory=session.state).logits[0]
        return float(cross_entropy(logits[9:-1], torch.tensor(text[0][10:])))

    assert [found.own, found.wrong, found.empty] == pytest.approx([loss(read), loss(wrong), loss([])], abs=1e-5)
    with model.disable_memory():
        assert found.ablated == pytest.approx(loss(read), abs=1e-5)
    assert found.tokens == 30
    assert len({round(value, 4) for value in (found.own, found.wrong, found.empty)}) == 3


def test_what_an_older_version_wrote_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = titans_ds.attach(tiny_base("llama"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "titans_config.json").read_text())
    (tmp_path / "titans_config.json").write_text(json.dumps({**config, "format": 1}))
    with pytest.raises(AdapterError, match=r"has format 1; this version reads format 2.*Train it again"):
        TitansModel.from_pretrained(tiny_base("llama"), tmp_path)
    path = tmp_path / "state.safetensors"
    model.init_state(1).save(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, metadata={**header, "format": "titans-ds-memory-1"})
    with pytest.raises(StateError, match="state"):
        MemoryState.load(path)


def test_the_shipped_study_loads_and_writes() -> None:
    assets = Path(titans_ds.__file__).parent / "assets"
    model = TitansModel.from_pretrained(assets / "base_hybrid", assets / "studies" / "hybrid-v2").eval()
    ids = token_ids(1, 20)
    with model.memory_session(1) as session, torch.no_grad():
        before = model(ids, memory=session.state).logits
        model.prime(token_ids(1, 600, seed=1), session)
        assert (model(ids, memory=session.state).logits - before).abs().max() > 1e-4
