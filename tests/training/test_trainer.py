"""MemoryTrainer on one process: its gradients against those of a plain loop, checkpoints, evaluation, and refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import titans_ds
from tests.support.tiny_models import VOCAB, tiny_base, token_ids
from titans_ds import DeltaConfig, GraftConfig, LoraSettings, TitansModel, preset
from titans_ds.errors import AdapterError, ConfigError, DataError, TitansError, TrainingError
from titans_ds.memory import Pass
from titans_ds.training import MemoryTrainer, RepositoryCollator

MODEL = Path(os.environ.get("TITANS_EVAL_MODEL", Path.home() / ".cache" / "titans-models" / "smollm2-135m"))
ROOT, BASE = Path(__file__).resolve().parents[2], "titans_ds/assets/base_hybrid"
SEGMENT = 16
REPOSITORIES = [[token_ids(20 + 7 * i, seed=i).tolist(), token_ids(9, seed=50 + i).tolist()] for i in range(6)]


def graft(memory: Any = None, lora: LoraSettings | None = None, dtype: torch.dtype = torch.float32) -> TitansModel:
    torch.manual_seed(1)
    config = GraftConfig(layers=[1, 2], segment_tokens=SEGMENT, memory=memory or DeltaConfig(dim=16))
    return titans_ds.attach(tiny_base("llama").to(dtype), config, lora=lora)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2,
        "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**given, **settings})


def trainer(model: TitansModel, folder: Path, order: Any = "second", **settings: Any) -> MemoryTrainer:
    own = {name: settings.pop(name) for name in ("callbacks", "second_order", "eval_dataset") if name in settings}
    collator = RepositoryCollator(segment_tokens=SEGMENT, segments=3)
    return MemoryTrainer(
        model, arguments(folder, **settings), collator, train_dataset=REPOSITORIES, order=order, **own
    )  # fmt: skip


def losses(trained: MemoryTrainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


class Gradients(TrainerCallback):
    """Keeps the gradients of the last optimizer step, before clipping has its way."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        named = model.model.titans_parameters()
        self.kept = {name: p.grad.clone() for name, p in named if p.grad is not None}


def by_hand(model: TitansModel, batches: list[dict[str, torch.Tensor]], second: bool) -> torch.Tensor:
    """One graph over every batch's segments, in plain PyTorch: the loss that a step is said to have."""
    targets = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        state = None
        for ids, labels in zip(batch["input_ids"].unbind(1), batch["labels"].unbind(1), strict=True):
            output = model.read_write(ids, state=state, write_mask=labels != -100, plan=Pass(graph=second))
            logits = model.logits(output.last_hidden)
            total = total + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
            state = output.state
            if not second:
                state = {i: {n: t.detach() for n, t in layer.items()} for i, layer in state.items()}
    return total / targets


@pytest.mark.parametrize("second_order", ["two_phase", "window"])
@pytest.mark.parametrize("order", ["second", "first"])
@pytest.mark.parametrize("kind", ["delta", "titans"])
def test_a_step_is_the_gradient_of_all_segments_in_order(
    tmp_path: Path, kind: str, order: str, second_order: str
) -> None:
    """Two batches accumulate, and their repositories have different numbers of segments."""
    rule = {"rule": {"chunk_size": 8}} if kind == "titans" else {}
    memory, gradients = preset(kind, dim=16, **rule), Gradients()
    settings = {"max_steps": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "save_strategy": "no"}
    model = graft(memory)
    trained = trainer(
        model, tmp_path, order, callbacks=[gradients], second_order=second_order,
        train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    trained.train()
    other = graft(memory)
    collator = RepositoryCollator(segment_tokens=SEGMENT, segments=3)
    loss = by_hand(other, [collator(REPOSITORIES[:2]), collator(REPOSITORIES[2:4])], order == "second")
    loss.backward()
    assert losses(trained)[0] == pytest.approx(loss.item(), abs=2e-6)
    write_only = {name for name, _ in other.write_only_parameters()}
    expected = {n: p.grad for n, p in other.titans_parameters() if p.grad is not None and p.requires_grad}
    for name, gradient in expected.items():
        if order == "first" and name in write_only:
            assert name not in gradients.kept
        else:
            torch.testing.assert_close(gradients.kept[name], gradient, rtol=1e-3, atol=1e-6)
    if order == "second":  # what is written is trained
        keys = [n for n in gradients.kept if n.endswith("key_projection.weight")]
        assert keys
        assert all(gradients.kept[n].abs().max() > 0 for n in keys)


@pytest.mark.parametrize("order", ["second", "first"])
def test_a_run_goes_on_exactly_from_a_checkpoint_which_is_an_adapter(tmp_path: Path, order: str) -> None:
    lora = LoraSettings(rank=2, targets=["q_proj"])
    whole = trainer(graft(lora=lora), tmp_path / "whole", order)
    whole.train()
    resumed = trainer(graft(lora=lora), tmp_path / "resumed", order)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for (name, mine), theirs in zip(
        resumed.titans_model.named_parameters(), whole.titans_model.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    loaded = TitansModel.from_pretrained(tiny_base("llama"), tmp_path / "whole" / "checkpoint-4")
    for (name, mine), theirs in zip(loaded.named_parameters(), whole.titans_model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    optimized = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in whole.titans_model.parameters() if p.requires_grad}
    assert not any("weight" in f.name and f.suffix == ".bin" for f in (tmp_path / "whole" / "checkpoint-4").iterdir())


def test_another_graft_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    trainer(graft(), tmp_path, max_steps=2).train()
    with pytest.raises(AdapterError, match="other settings than this model's graft"):
        trainer(graft(DeltaConfig(dim=8)), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    best = trainer(
        graft(), tmp_path, eval_dataset=REPOSITORIES[:3], load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=2, metric_for_best_model="loss",
    )  # fmt: skip
    best.train()
    assert best.state.best_model_checkpoint is not None
    kept = TitansModel.from_pretrained(tiny_base("llama"), best.state.best_model_checkpoint)
    for mine, theirs in zip(best.titans_model.parameters(), kept.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_evaluation_has_the_loss_with_and_without_memories(tmp_path: Path) -> None:
    """Against a plain loop, and the base model itself."""
    model, collator = graft(), RepositoryCollator(segment_tokens=SEGMENT, segments=3)
    metrics = trainer(model, tmp_path, per_device_eval_batch_size=2).evaluate(REPOSITORIES[:5])
    batch = collator(REPOSITORIES[:5])
    with torch.no_grad():
        own = by_hand(model.eval(), [batch], False)
        logits = tiny_base("llama")(batch["input_ids"].flatten(0, 1)).logits
    off = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    assert metrics["eval_loss"] == pytest.approx(own.item(), abs=1e-5)
    assert metrics["eval_loss_off"] == pytest.approx(off.item(), abs=1e-5)
    assert abs(metrics["eval_loss"] - metrics["eval_loss_off"]) > 1e-3


@pytest.mark.parametrize("settings", [{"activation_checkpointing": True}, {"dtype": torch.bfloat16}, {"lora": True}])
def test_it_learns_what_a_memory_is_for(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The second half of every repository is its first half again, which only a memory across segments can know."""
    dtype, lora = settings.pop("dtype", torch.float32), settings.pop("lora", False)
    halves = [token_ids(SEGMENT + 1, seed=i).tolist() for i in range(4)]
    model = graft(lora=LoraSettings(rank=2, targets=["q_proj"]) if lora else None, dtype=dtype)
    collator = RepositoryCollator(segment_tokens=SEGMENT, segments=2)
    given = arguments(tmp_path, max_steps=30, learning_rate=3e-2, save_strategy="no", **settings)
    trained = MemoryTrainer(model, given, collator, train_dataset=[[half, half] for half in halves])
    trained.train()
    metrics = trained.evaluate([[half, half] for half in halves])
    assert losses(trained)[-1] < losses(trained)[0] - 0.5
    assert metrics["eval_loss"] < metrics["eval_loss_off"] - 0.5


# --- the collator ----------------------------------------------------------------------------------------------------


def test_repositories_become_segments_in_order() -> None:
    """No segment holds tokens of two files, and every token but a file's first is a target once."""
    files = [list(range(3, 25)), [30, 31, 32], [40]]
    batch = RepositoryCollator(segment_tokens=8, segments=9)([files, [[50, 51]]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 4, 8)
    rows = [labels[labels != -100].tolist() for labels in batch["labels"][0]]
    assert rows == [list(range(4, 12)), list(range(12, 20)), list(range(20, 25)), [31, 32]]
    assert batch["input_ids"][0, 1].tolist() == list(range(11, 19))
    assert (batch["labels"][1, 0, 0], int((batch["labels"][1] != -100).sum())) == (51, 1)


def test_a_long_repository_is_cut_or_made_into_several_examples() -> None:
    files = [list(range(3, 60)), list(range(60, 70))]
    collator = RepositoryCollator(segment_tokens=8, segments=3)
    assert collator([files])["labels"].shape == (1, 3, 8)
    windows = collator.windows([files])
    targets = [t for window in windows for t in collator([window])["labels"].flatten().tolist() if t != -100]
    assert len(windows) == 3
    assert targets == [*range(4, 60), *range(61, 70)]


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def test_texts_ids_and_mappings_are_the_same_repository() -> None:
    forms: list[Any] = [
        ["3 4 5", "6 7"],
        [[3, 4, 5], [6, 7]],
        {"files": ["3 4 5", [6, 7]], "name": "other columns are left alone"},
        {"input_ids": [torch.tensor([3, 4, 5]), torch.tensor([6, 7])]},
    ]
    batches = [RepositoryCollator(Words(), segment_tokens=8)([form]) for form in forms]
    assert all(torch.equal(batch["labels"], batches[0]["labels"]) for batch in batches)
    one = RepositoryCollator(segment_tokens=8)([{"input_ids": [3, 4, 5]}])
    assert one["labels"].tolist() == [[[4, 5]]]


def test_a_dataset_of_datasets_keeps_its_column_of_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_list([{"files": files, "name": "x"} for files in REPOSITORIES[:4]])
    given = arguments(tmp_path, max_steps=1, save_strategy="no")
    trained = MemoryTrainer(graft(), given, RepositoryCollator(segment_tokens=SEGMENT), train_dataset=rows)
    trained.train()
    assert losses(trained)[0] > 0


@pytest.mark.parametrize(
    ("repository", "said"),
    [
        ("3 4 5", "a repository is str; expected a list of files"),
        ({"text": "3 4"}, "a repository is NoneType; expected a list of files"),
        (["3 4"], "give RepositoryCollator the base model's tokenizer"),
        ([[3.5, 4.5]], "a file is neither a text nor a list of token ids"),
        ([[3], []], "no file of two tokens"),
        ([], "no file of two tokens"),
    ],
)
def test_what_is_no_repository_is_named(repository: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        RepositoryCollator(segment_tokens=8)([repository])


def test_a_token_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    wrong = MemoryTrainer(
        graft(), arguments(tmp_path), RepositoryCollator(segment_tokens=SEGMENT), train_dataset=[[[3, VOCAB]]] * 2
    )
    with pytest.raises(DataError, match=f"this model knows 0 to {VOCAB - 1}"):
        wrong.train()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bf16": True}, "load the base model with dtype=torch.bfloat16"),
        ({"label_smoothing_factor": 0.1}, "change a loss that isn't used"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer(graft(), tmp_path, **settings)


def test_fsdp_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate says of it needs an accelerator; the trainer asks it at this one place."""
    before = Trainer.create_accelerator_and_postprocess

    def with_fsdp(self: Trainer) -> None:
        before(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_fsdp)
    with pytest.raises(ConfigError, match="memories are also called outside of it; use DDP or ZeRO"):
        trainer(graft(), tmp_path)


def test_models_and_collators_that_can_not_train_are_refused(tmp_path: Path) -> None:
    collator = RepositoryCollator(segment_tokens=SEGMENT)
    frozen = graft().requires_grad_(False)
    whole = titans_ds.attach(tiny_base("llama"), GraftConfig(segment_tokens=SEGMENT), freeze_base=False)
    wrong: list[tuple[Any, Any, str]] = [
        (tiny_base("llama"), collator, r"expected a TitansModel: titans_ds\.attach"),
        (frozen, collator, "nothing would train"),
        (whole, collator, "of the base model trains, too"),
        (graft(), lambda rows: rows, "expected a RepositoryCollator"),
        (graft(), RepositoryCollator(segment_tokens=8), "the collator's segment_tokens is 8, the graft's 16"),
    ]
    for model, given, said in wrong:
        with pytest.raises(ConfigError, match=said):
            MemoryTrainer(model, arguments(tmp_path), given, train_dataset=REPOSITORIES)
    with pytest.raises(ConfigError, match="they must be at least 2 and 1"):
        RepositoryCollator(segment_tokens=SEGMENT, segments=0)


def test_the_plain_trainer_would_train_an_unwritten_memory_and_says_so(tmp_path: Path) -> None:
    rows = [{"input_ids": token_ids(8, seed=i), "labels": token_ids(8, seed=i)} for i in range(4)]
    with pytest.raises(TrainingError, match=r"titans_ds\.training\.MemoryTrainer in place of Trainer or SFTTrainer"):
        Trainer(graft(), arguments(tmp_path), train_dataset=rows).train()


def test_so_does_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_list([{"input_ids": token_ids(8, seed=i).tolist()} for i in range(4)])
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    given = trl.SFTConfig(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], bf16=False, disable_tqdm=True)
    sft = trl.SFTTrainer(graft(), given, train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(TrainingError, match="called for training without a memory"):
        sft.train()


def test_only_training_without_a_memory_is_an_error() -> None:
    model, ids = graft().train(), token_ids(1, 8)
    for call in (model, model.base_model):
        with pytest.raises(TitansError, match="called for training without a memory"):
            call(ids, labels=ids)
    with model.disable_memory():
        model(ids, labels=ids)
    with model.memory_session(1) as memory:
        model(ids, labels=ids, memory=memory.state).loss.backward()
        with model.reading(memory):
            model.base_model(ids, labels=ids).loss.backward()
    with torch.no_grad(), pytest.warns(UserWarning, match="called without a memory"):
        model(ids)
    model.requires_grad_(False)(ids)  # nothing trains


def test_the_library_alone_imports_no_trainer() -> None:
    code = "import sys, titans_ds, titans_ds.training; print(sorted({'accelerate', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_documented_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/trainers.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    assert BASE in code
    exec(compile(code.replace(BASE, str(ROOT / BASE)), "trainers.md", "exec"), {})
    assert "'eval_loss_off': " in capsys.readouterr().out
    TitansModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ROOT / BASE), tmp_path / "memory-run" / "adapter")


# --- a real base -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not MODEL.is_dir(), reason=f"no real base in {MODEL}; set TITANS_EVAL_MODEL")
def test_a_real_base_trains_on_texts(tmp_path: Path) -> None:
    """In bf16, with checkpointing: one text is learned, the base stays as it is, and the adapter loads."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    code = "def area(width, height):\n    return width * height\n\n\n" * 3
    model = titans_ds.attach(base, GraftConfig(layers=[10, 20], segment_tokens=32, memory=DeltaConfig(dim=64)))
    given = arguments(
        tmp_path, max_steps=4, per_device_train_batch_size=1, activation_checkpointing=True, save_strategy="no"
    )
    collator = RepositoryCollator(tokenizer, segment_tokens=32, segments=2)
    trained = MemoryTrainer(model, given, collator, train_dataset=[[code, code]] * 2)
    before = trained.evaluate([[code, code]])
    trained.train()
    after = trained.evaluate([[code, code]])
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_loss_off"] == before["eval_loss_off"]
    trained.save_model()
    loaded = TitansModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16), tmp_path)
    for (name, mine), (_, theirs) in zip(loaded.titans_parameters(), model.titans_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
