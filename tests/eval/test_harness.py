"""The lm-evaluation-harness model: its tasks run on a grafted model, with and without memory."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

import titans_ds
from eval.errors import EvalError
from eval.harness_model import titans_lm
from tests.eval.test_generation import VOCAB, byte_level_tokenizer
from tests.support.tiny_models import tiny_base
from titans_ds import GraftConfig, MLPConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything here is local
lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install titans-ds[harness]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    base = tiny_base("qwen2", vocab_size=VOCAB, max_position_embeddings=512)
    base.save_pretrained(root / "base")
    byte_level_tokenizer().save_pretrained(root / "base")
    config = GraftConfig(layers="attention", gate_init=3.0, memory=MLPConfig(dim=16, step_size=0.3))
    titans_ds.attach(copy.deepcopy(base), config).save_pretrained(root / "adapter")
    docs = [{"question": f"x{n} = self.", "choices": ["get_total", "add"], "answer": n % 2} for n in range(4)]
    (root / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (root / "notes.txt").write_text("class Total:\n    def add(self, other)\n")
    return root


def _results(folder: Path, **arguments: Any) -> dict[str, Any]:
    model = titans_lm()(str(folder / "base"), str(folder / "adapter"), device="cpu", batch_size=2, **arguments)
    shared = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
    shared["dataset_kwargs"] = {"data_files": {"test": str(folder / "docs.jsonl")}}
    choice = shared | {"task": "tiny_choice", "output_type": "multiple_choice"}
    choice |= {"doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
    until = shared | {"task": "tiny_until", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
    until |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 5}, "metric_list": [{"metric": "exact_match"}]}
    found = lm_eval.simple_evaluate(model=model, tasks=[choice, until], log_samples=True, bootstrap_iters=0)
    return {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}


def test_harness_tasks_run_with_memory_without_it_and_primed(folder: Path) -> None:
    plain, ablated = _results(folder), _results(folder, path="ablation")
    primed = _results(folder, prime=str(folder / "notes.txt"))
    assert len(plain["tiny_choice"]) == len(plain["tiny_until"]) == 4
    assert plain["tiny_choice"] != ablated["tiny_choice"]
    assert primed["tiny_choice"] != plain["tiny_choice"]


def test_unknown_path_and_missing_file_are_refused(folder: Path) -> None:
    with pytest.raises(EvalError, match="graft, ablation"):
        _results(folder, path="vanilla")
    with pytest.raises(EvalError, match="prime the memory"):
        _results(folder, prime=str(folder / "none.txt"))
