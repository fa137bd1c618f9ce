"""Positive controls: episodes, cutting them into segments, scoring, settings, and the program itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.controls import models
from eval.controls.episodes import Episode, EpisodeStream, segments, whole
from eval.controls.measure import Answers, measure, score
from eval.controls.report import Report
from eval.controls.results import SeedResult, is_better, summarise, table, verdict
from eval.controls.settings import CONFIGS, load_control
from eval.controls.tasks import TASKS, make_task
from eval.controls.training import Budget, ControlTrainer
from eval.errors import EvalError
from eval.positive_control import main
from titans_ds.errors import ConfigError, TitansError
from titans_ds.training.data.segments import IGNORED

CPU = torch.device("cpu")
TINY = {
    "steps": 2,
    "curriculum.batch": 4,
    "curriculum.check_every": 1,
    "curriculum.check_episodes": 4,
    "measure.episodes": 4,
    "measure.levels": [2, 4],
    "curriculum.levels": [2, 4],
    "architecture.hidden_size": 32,
    "architecture.head_dim": 8,
    "architecture.intermediate_size": 32,
    "graft.memory.dim": 16,
    "graft.memory.hidden_dim": 16,
    "minutes": None,
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def answers_in_question(episode: Episode) -> list[list[int]]:
    return [[int(t) for t in row[row != IGNORED]] for row in episode.labels_BQ]


# --- episodes


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_stays_in_its_vocabulary_and_asks_as_much_in_every_row(name: str) -> None:
    task = make_task(name, {})
    episode = task.episode(rng(), 8, 5)
    for ids in (episode.context_BT, episode.question_BQ):
        assert ids.dtype == np.int64
        assert 0 <= ids.min() <= ids.max() < task.vocab_size
    assert episode.question_BQ.shape == episode.labels_BQ.shape
    counts = (episode.labels_BQ != IGNORED).sum(axis=1)
    assert counts.min() == counts.max() > 0
    assert counts[0] % episode.answer_length == 0


@pytest.mark.parametrize("name", sorted(TASKS))
def test_episodes_are_fresh_and_follow_the_seed(name: str) -> None:
    task, generator = make_task(name, {}), rng()
    first, second, again = task.episode(generator, 8, 4), task.episode(generator, 8, 4), task.episode(rng(), 8, 4)
    assert not np.array_equal(first.context_BT, second.context_BT)
    assert np.array_equal(first.context_BT, again.context_BT)
    assert np.array_equal(first.labels_BQ, again.labels_BQ)


def test_key_value_recall_asks_for_written_pairs() -> None:
    episode = make_task("kv_recall", {"questions": 8}).episode(rng(), 16, 3)
    for context, question, labels in zip(episode.context_BT, episode.question_BQ, episode.labels_BQ, strict=True):
        pairs = {tuple(pair[1:3]): tuple(pair[3:]) for pair in context.reshape(16, 5)}
        assert len(pairs) == 16, "keys are unique"
        asked = [tuple(q[1:3]) for q in question.reshape(8, 4)]
        assert len(set(asked)) == 8
        assert [tuple(v[2:]) for v in labels.reshape(8, 4)] == [pairs[key] for key in asked]
        assert [q[3] for q in question.reshape(8, 4)] == [pairs[key][0] for key in asked]


def test_permuted_values_leave_keys_and_move_every_value() -> None:
    episode = make_task("kv_recall", {}).episode(rng(), 16, 3)
    true, moved = (ids.reshape(3, 16, 5) for ids in (episode.context_BT, episode.permuted_BT))
    assert np.array_equal(true[..., :3], moved[..., :3])
    assert np.array_equal(true[:, :-1, 3:], moved[:, 1:, 3:])


def test_multi_query_recall_labels_are_the_values_of_the_keys_in_front() -> None:
    episode = make_task("mqar", {"keys": 32, "values": 32}).episode(rng(), 8, 4)
    for context, question, labels in zip(episode.context_BT, episode.question_BQ, episode.labels_BQ, strict=True):
        pairs = dict(context.reshape(8, 2).tolist())
        asked = labels != IGNORED
        assert [pairs[key] for key in question[asked].tolist()] == labels[asked].tolist()
        assert set(question[~asked].tolist()) <= {64}


def test_the_needle_stands_at_its_distance() -> None:
    episode = make_task("needle", {}).episode(rng(), 20, 3)
    assert episode.context_BT.shape == (3, 24)
    assert np.array_equal(episode.context_BT[:, 1], episode.question_BQ[:, 1])
    assert answers_in_question(episode) == episode.context_BT[:, 2:4].tolist()
    assert 62 not in episode.context_BT[:, 4:], "hay holds no mark"


def test_style_asks_for_nothing_but_habits_which_the_context_shows() -> None:
    task = make_task("style", {"functions": 6})
    same, other = 0, 0
    episode = task.episode(rng(), 8, 16)
    for row, asked in enumerate(answers_in_question(episode)):
        same += len(set(asked) - set(episode.context_BT[row].tolist()))
        other += len(set(asked) - set(episode.context_BT[row - 1].tolist()))
    assert same < other / 10, "a repository's words are in its own earlier files"


# --- segments and scoring


def test_segments_hold_the_context_then_the_questions_and_only_the_first_resets() -> None:
    episode = make_task("kv_recall", {}).episode(rng(), 16, 2)
    batches = segments(episode, 40, convolved=False)
    assert [b.input_ids.shape[1] for b in batches] == [40, 40, 64]
    assert np.array_equal(np.concatenate([b.input_ids for b in batches[:-1]], axis=1), episode.context_BT)
    assert [bool(b.reset.all()) for b in batches] == [True, False, False]
    assert [bool(b.mask.all()) for b in batches] == [True, True, False]
    assert [b.num_targets for b in batches] == [0, 0, 2 * 16 * 2]


def test_the_whole_has_context_and_questions_in_one_window() -> None:
    episode = make_task("kv_recall", {}).episode(rng(), 4, 2)
    batch = whole(episode)
    assert batch.input_ids.shape == (2, 20 + 16)
    assert np.array_equal(batch.labels[:, 20:], episode.labels_BQ)


def test_the_stream_gives_segments_in_order() -> None:
    stream, episode = EpisodeStream(), make_task("kv_recall", {}).episode(rng(), 16, 2)
    batches = segments(episode, 40, convolved=False)
    stream.add(batches)
    assert [stream.next().batch is batch for batch in batches] == [True] * 3


def test_an_answer_is_right_where_all_of_its_tokens_are() -> None:
    labels = np.array([[IGNORED, 1, 2, IGNORED, 3, 4], [IGNORED, 1, 1, IGNORED, 2, 2]])
    logits = torch.zeros(2, 6, 5)
    for place, token in {
        (0, 1): 1,
        (0, 2): 2,
        (0, 4): 3,
        (0, 5): 0,
        (1, 1): 1,
        (1, 2): 4,
        (1, 4): 2,
        (1, 5): 2,
    }.items():
        logits[place][token] = 5.0
    answers = score(logits, labels, 2)
    assert answers.right.tolist() == [[True, False], [False, True]]
    assert answers.em == 50.0
    confident = float(torch.nn.functional.cross_entropy(logits[0, 1:2], torch.tensor([1])))
    assert answers.nll[0, 0] == pytest.approx(confident, abs=1e-6)


# --- results


def seed_result(seed: int, memory: float, ablation: float) -> SeedResult:
    result = SeedResult(seed)
    shares = {"memory": memory, "ablation": ablation, "wrong": ablation}
    arms = {arm: Answers(np.arange(100).reshape(10, 10) < share, np.ones((10, 10))) for arm, share in shares.items()}
    result.add(8, arms)
    return result


def test_intervals_over_seeds_decide_whether_memory_is_better() -> None:
    clear = summarise([seed_result(s, m, a) for s, m, a in ((0, 90, 1), (1, 95, 2), (2, 92, 0))])
    assert clear["8"]["arms"]["memory"]["em"]["mean"] == pytest.approx(92.333, abs=1e-3)
    assert is_better(clear, "8") == {"ablation": True, "wrong": True}
    assert verdict(clear, "N =").endswith("N = 8 yes")
    unclear = summarise([seed_result(s, m, a) for s, m, a in ((0, 10, 1), (1, 2, 5), (2, 6, 4))])
    assert is_better(unclear, "8") == {"ablation": False, "wrong": False}
    assert verdict(unclear, "N =").endswith("N = 8 no")
    single = summarise([seed_result(0, 90, 1)])
    assert is_better(single, "8") == {"ablation": None, "wrong": None}
    assert "--seeds 3" in verdict(single, "N =")
    assert json.loads(json.dumps(single, allow_nan=False))


def test_the_table_has_a_row_for_each_arm_and_a_column_for_each_level() -> None:
    summary = summarise([seed_result(s, 90 + s, s) for s in range(3)])
    lines = table("kv_recall", summary, "N =").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "memory", "ablation", "wrong", "memory - ablation", "memory - wrong",
    ]  # fmt: skip
    assert "91.0 [88.5, 93.5]" in lines[2]


# --- settings and program


def test_every_control_has_a_file_that_loads_and_a_model_that_can_be_made() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= set(TASKS)
    for path in CONFIGS.glob("*.yaml"):
        name = path.stem.split("-")[0]
        config = load_control(name, {}, path)
        task = make_task(config.task, config.task_options)
        layers = models.with_memory(config, task.vocab_size, 0, CPU).module.model.layer_indices
        assert layers == ([0, 1, 2, 3] if config.graft.layers == "attention" else config.graft.layers)
        models.with_full_context(config, task.vocab_size, 0, CPU)


def test_first_order_leaves_what_it_cannot_train_as_it_starts() -> None:
    config = load_control("kv_recall", {**TINY, "order": "first"})
    task = make_task("kv_recall", config.task_options)
    engine = models.with_memory(config, task.vocab_size, 0, CPU)
    before = {name: p.detach().clone() for name, p in engine.module.model.titans_parameters()}
    ControlTrainer(engine, task, config, 0).run()
    moved = {n for n, p in engine.module.model.titans_parameters() if not torch.equal(p, before[n])}
    still = {name.split("memory.")[1] for name in set(before) - moved}
    assert still == {
        "initial_w0", "initial_w1", "log_step_sizes", "gates.weight", "gates.bias", "value_projection.weight",
        "key_convolution.weight", "value_convolution.weight",
    }  # fmt: skip


def test_second_order_trains_every_part_of_the_memory() -> None:
    config = load_control("kv_recall", TINY)
    task = make_task("kv_recall", config.task_options)
    engine = models.with_memory(config, task.vocab_size, 0, CPU)
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters() if p.requires_grad}
    ControlTrainer(engine, task, config, 0).run()
    assert [n for n, p in engine.module.named_parameters() if n in before and torch.equal(p, before[n])] == []


def test_a_prefix_memory_trains_through_its_writes_and_answers_in_every_arm() -> None:
    small = {name: value for name, value in TINY.items() if not name.startswith("graft")}
    config = load_control("kv_recall", small, CONFIGS / "kv_recall-gradmem.yaml")
    task = make_task("kv_recall", config.task_options)
    engine = models.with_memory(config, task.vocab_size, 0, CPU)
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    ControlTrainer(engine, task, config, 0).run()
    assert [n for n, p in engine.module.named_parameters() if torch.equal(p, before[n])] == []
    losses = {arm: answers.loss for arm, answers in measure(engine, task, 4, 4, seed=0).items()}
    assert len(losses) == len(set(losses.values())) == 5, "every arm sees something else"


def test_arms_of_a_row_do_not_depend_on_the_others_but_for_the_wrong_memory() -> None:
    config = load_control("kv_recall", TINY)
    task = make_task("kv_recall", config.task_options)
    engine = models.with_memory(config, task.vocab_size, 0, CPU)
    found = measure(engine, task, 4, 4, seed=0)
    assert set(found) == {"memory", "ablation", "wrong", "unwritten", "permuted"}
    losses = {arm: answers.loss for arm, answers in found.items()}
    assert len(set(losses.values())) == 5, "every arm sees something else"
    again = measure(engine, task, 4, 4, seed=0)
    assert {arm: answers.loss for arm, answers in again.items()} == losses


def test_budget_of_steps_and_of_time() -> None:
    steps = Budget(None, 10)
    assert (steps.spent(9), steps.spent(10), steps.total_steps(3)) == (False, True, 10)
    timed = Budget(60.0, None)
    assert not timed.spent(10**6)
    assert timed.total_steps(5) > 1000, "hardly any time has gone by"


def test_the_program_trains_measures_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [f"--set={name}={json.dumps(value)}" for name, value in TINY.items() if name not in ("minutes", "steps")]
    assert main(["kv_recall", "--steps", "2", "--seeds", "2", "--out", str(tmp_path), *changes]) == 0
    printed = capsys.readouterr().out
    assert "memory - wrong" in printed
    assert "full_context" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert [seed["seed"] for seed in results["seeds"]] == [0, 1]
    assert results["seeds"][0]["training"]["memory"]["steps"] == 2
    assert results["config"]["graft"]["memory"]["dim"] == 16
    assert set(results["summary"]) == {"2", "4"}
    assert (tmp_path / "results.md").read_text().startswith("| kv_recall: EM %")


def test_runs_that_differ_in_seeds_make_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        report = Report({"task": "kv_recall", "steps": 1}, {}, folder)
        report.seeds = [seed_result(seed, 90 + seed, 0)]
        report.save()
    both = ["kv_recall", "--merge", *map(str, folders), "--out", str(tmp_path / "both")]
    assert main(both) == 0
    assert json.loads((tmp_path / "both" / "results.json").read_text())["summary"]["8"]["arms"]["memory"]["em"] == {
        "mean": 90.5, "interval": [pytest.approx(84.147, abs=1e-3), pytest.approx(96.853, abs=1e-3)], "seeds": 2,
    }  # fmt: skip
    assert main([*both[:2], str(folders[0]), str(folders[0]), *both[-2:]]) == 2
    assert "--first-seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--steps", "1", "--minutes", "1"], "not both"),
        (["--pairs", "4,x"], "expected numbers"),
        (["--set", "graft.memory.dim"], "NAME=VALUE"),
        (["--set", "graft.memory.dimm=3"], "did you mean"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml can't be read"),
        (["--set", "task_options.colour=1"], "colour"),
        (["--device", "toaster"], "expected cpu"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--device", ""], "expected cpu"),
        (["--threads", "-1"], "--threads"),
        (["--minutes", "nan"], "--minutes"),
        (["--seeds", "-1"], "--seeds"),
        (["--pairs", "4,²"], "expected numbers"),
        (["--set", "graft.memory.dim=[1"], "is not YAML"),
        (["--merge", "/nowhere"], "cannot read /nowhere/results.json"),
        (["--set", "architecture.model_type=toaster"], "toaster"),
        (
            [
                "--set",
                "graft.memory={preset: gradmem}",
                "--set",
                "graft.gate_init=-2.0",
                "--set",
                "second_order=two_phase",
            ],
            "through_base",
        ),
    ],
)
def test_errors_say_what_to_do(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["kv_recall", "--out", str(tmp_path), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith(("error: ", "usage: "))
    assert told in message
    assert "Traceback" not in message


def test_the_command_line_makes_a_linear_memory_of_another_size(tmp_path: Path) -> None:
    kept = ("curriculum.batch", "measure.episodes", "architecture")
    tiny = [f"--set={name}={json.dumps(value)}" for name, value in TINY.items() if name.startswith(kept)]
    small = ["--steps", "1", "--memory", "linear", "--dim", "24", "--pairs", "2", "--measure", "3", "--no-full-context"]
    assert main(["kv_recall", "--order", "first", "--out", str(tmp_path), *tiny, *small]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    memory = results["config"]["graft"]["memory"]
    assert (memory["depth"], memory["dim"], results["config"]["order"]) == (1, 24, "first")
    assert list(results["summary"]) == ["3"]
    assert set(results["summary"]["3"]["arms"]) == {"memory", "ablation", "wrong", "unwritten", "permuted"}


def test_a_file_of_another_task_is_refused() -> None:
    with pytest.raises(EvalError, match="task 'kv_recall', not 'mqar'"):
        load_control("mqar", {}, CONFIGS / "kv_recall.yaml")
    with pytest.raises(ConfigError, match="either minutes or steps"):
        load_control("kv_recall", {"steps": 3})


# --- several configurations side by side


def test_a_file_extends_another_by_dotted_names(tmp_path: Path) -> None:
    for task in ("mqar", "needle"):
        whole_, without = (
            load_control(task, {}, CONFIGS / f"{task}-titans{end}.yaml") for end in ("", "-no-forget-gate")
        )
        rule, changed = whole_.graft.memory.rule, without.graft.memory.rule
        assert (rule.forget_gate, rule.token_forget_gate) == (0.001, True)
        assert changed == dataclasses.replace(rule, forget_gate=0.0, token_forget_gate=False)
        graft = dataclasses.replace(whole_.graft, memory=without.graft.memory)
        assert dataclasses.replace(whole_, graft=graft) == without, "one part is left out, and nothing else"
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    with pytest.raises(TitansError, match=r"b\.yaml can't be read"):
        load_control("mqar", {}, tmp_path / "a.yaml")


def test_several_files_are_trained_on_the_same_episodes_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(CONFIGS / f"mqar-titans{end}.yaml") for end in ("-no-momentum", "")]
    tiny = [f"--set={name}={json.dumps(value)}" for name, value in TINY.items() if name not in ("minutes", "steps")]
    arguments = ["--steps", "1", "--seeds", "2", "--no-full-context", "--out", str(tmp_path)]
    assert main(["mqar", "--config", *files, *arguments, *tiny]) == 0
    assert "| mqar-titans-no-momentum - mqar-titans |" in capsys.readouterr().out
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert (found["first"], set(found["runs"])) == ("mqar-titans", {"mqar-titans", "mqar-titans-no-momentum"})
    own = [json.loads((tmp_path / name / "results.json").read_text()) for name in found["runs"]]
    assert [run["config"]["graft"]["memory"]["rule"]["optimizer"] for run in own] == ["momentum", "sgd"]
    means = [run["summary"]["4"]["arms"]["memory"]["em"]["mean"] for run in own]
    cell = found["runs"]["mqar-titans-no-momentum"]["levels"]["4"]["memory_minus_first"]
    assert cell["mean"] == pytest.approx(means[1] - means[0])
    again = ["mqar", "--compare", *(str(tmp_path / name) for name in found["runs"]), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    assert json.loads((tmp_path / "again" / "comparison.json").read_text()) == found
    assert main(["mqar", "--compare", str(tmp_path / "mqar-titans"), "/nowhere", "--out", str(tmp_path)]) == 2
    assert "cannot read /nowhere/results.json" in capsys.readouterr().err
