"""Generation: healing is exact, results do not depend on the batch, likelihoods are the model's, runs resume
exactly.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import titans_ds
from eval import crosscodeeval
from eval.data.prompts import infill_tokens
from eval.errors import EvalError
from eval.generation.decoding import Decoder, DecodeSettings, Job
from eval.generation.healing import heal
from eval.generation.likelihood import ScoredTarget, healed_target, plain_target, summarise_likelihood
from eval.generation.model import Subject
from eval.generation.token_bytes import TokenBytes
from tests.support.tiny_models import tiny_base
from titans_ds import GraftConfig
from titans_ds.files import locked
from titans_ds.memory.mlp import MLPConfig

VOCAB = 400
_CODE = (
    "def get_value(self):\n    return self.get_total(values)\nclass Total:\n    def add(self, other.values):\n  x = é\n"
)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # As in Qwen and Llama 3: one character that is no letter may stand before a word, so that ".get" is a token.
    words = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s+|."), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=special, min_frequency=1)
    tokenizer.train_from_iterator([_CODE, ".get .add .total .values( self.get"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def _sentencepiece() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = sorted({*"▁.()=:abcdefghijklmnopqrstuvwxyzT", "▁a", "ge", "get", ".g", ".ge", ".get", "▁se", "lf"})
    vocabulary = {piece: i for i, piece in enumerate(pieces + words)}
    merges = [(".", "g"), ("g", "e"), (".g", "e"), (".ge", "t"), ("ge", "t"), ("▁", "a"), ("l", "f")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _plain_words() -> PreTrainedTokenizerFast:
    """A tokenizer of neither kind: characters and a few words, joined as they are."""
    words = ["<unk>", "<eos>", ".get", ".g", "get", *sorted({*_CODE} - {"é"})]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.mark.parametrize("make", [byte_level_tokenizer, _sentencepiece, _plain_words])
def test_tokens_as_bytes_join_to_the_text_and_prefix_searches_find_what_a_scan_finds(make: Any) -> None:
    tokenizer = make()
    vocabulary = TokenBytes(tokenizer)
    text = "self.get (total)\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert vocabulary.text(ids) == text
    table = [vocabulary.of(token) for token in range(len(tokenizer))]
    for wanted in (b".", b".g", b"get", b" "):
        starting = {t for t, b in enumerate(table) if b and b.startswith(wanted)}
        shorter = {t for t, b in enumerate(table) if b and wanted.startswith(b)}
        assert set(vocabulary.starting_with(wanted)) == starting
        assert set(vocabulary.spelling(wanted)) == starting | shorter
        assert vocabulary.extends(wanted) == any(b and b.startswith(wanted) and b != wanted for b in table)
    assert vocabulary.of(tokenizer.eos_token_id) is None


def test_bytes_beyond_ascii_survive_cuts_inside_a_character(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = TokenBytes(tokenizer)
    ids = tokenizer.encode("x = 打卡é", add_special_tokens=False)
    assert vocabulary.join(ids).decode() == "x = 打卡é"
    assert vocabulary.text(ids[:-1]).startswith("x = 打卡")


def test_healing_backs_up_over_every_token_that_a_longer_one_could_swallow(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = TokenBytes(tokenizer)
    prompt = tokenizer.encode("x = self.", add_special_tokens=False)
    healed = heal(prompt, vocabulary)
    assert healed.kept + healed.removed == prompt
    assert healed.text.endswith(b".")
    assert vocabulary.extends(healed.text)
    assert len(vocabulary.spelling(healed.text)) > 1
    # A prompt that stops inside ".get", in more than one token: all of ".ge" is taken off.
    pieces = [token for part in ("x", ".", "g", "e") for token in tokenizer.encode(part, add_special_tokens=False)]
    assert heal(pieces, vocabulary).text == b".ge"
    assert heal(prompt[:1], vocabulary).removed == []
    assert heal([tokenizer.bos_token_id, tokenizer.eos_token_id], vocabulary).removed == []


def _subject(tokenizer: Any, family: str = "llama", seed: int = 0) -> Subject:
    return Subject(tiny_base(family, seed, vocab_size=VOCAB, max_position_embeddings=512), None, tokenizer)


def _jobs(tokenizer: Any, vocabulary: TokenBytes, count: int = 9) -> list[Job]:
    generator = random.Random(0)
    jobs = []
    for number in range(count):
        prompt = _CODE[: generator.randint(8, len(_CODE))]
        target = generator.choice(["get_total(values)", "add(é)", "values"])
        healed = heal(tokenizer.encode(prompt, add_special_tokens=False), vocabulary)
        targets = {
            "heal": healed_target(tokenizer, vocabulary, prompt, target, healed),
            "plain": plain_target(tokenizer, target),
        }
        both = ("heal", "plain")
        jobs.append(Job(f"t{number}", healed.kept, healed.removed, healed.text, both, targets, seed=number))
    return jobs


def _decode(subject: Subject, jobs: list[Job], batch_size: int, **settings: Any) -> dict[tuple[str, str], Any]:
    settings = {"max_new_tokens": 12, "eos_tokens": frozenset([2])} | settings
    decoder = Decoder(subject, subject.vocabulary, DecodeSettings(batch_size, **settings))
    with subject.on_path("vanilla"):
        return {(c.key, c.boundary): c for c in decoder.run(jobs)}


@pytest.mark.parametrize("family", ["llama", "qwen3_5", "gpt_neox"])
def test_completions_and_likelihoods_do_not_depend_on_batch_or_order(family: str, tokenizer: Any) -> None:
    subject = _subject(tokenizer, family)
    jobs = _jobs(tokenizer, subject.vocabulary)
    alone = _decode(subject, jobs, 1)
    assert len(alone) == 18
    shuffled = random.Random(1).sample(jobs, len(jobs))
    for other in (_decode(subject, jobs, 3), _decode(subject, shuffled, 8), _decode(subject, jobs, 64)):
        for key, completion in alone.items():
            assert other[key].tokens == completion.tokens
            assert other[key].nats == pytest.approx(completion.nats, rel=1e-3, abs=1e-3)


def test_sliding_window_models_decode_batch_after_batch_to_the_same_text(tokenizer: Any) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 6}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **sizes)).eval()
    subject = Subject(model, None, tokenizer)
    jobs = _jobs(tokenizer, subject.vocabulary)
    alone = _decode(subject, jobs, 1)
    together = _decode(subject, jobs, 8)
    assert {k: c.tokens for k, c in alone.items()} == {k: c.tokens for k, c in together.items()}
    job = jobs[0]
    ids = torch.tensor([job.prefix + job.removed])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert (
        together[job.key, "plain"].tokens == found[0, ids.shape[1] :].tolist()[: len(together[job.key, "plain"].tokens)]
    )


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_plain_greedy_is_what_generate_gives(family: str, tokenizer: Any) -> None:
    subject = _subject(tokenizer, family)
    jobs = _jobs(tokenizer, subject.vocabulary, 4)
    ours = _decode(subject, jobs, 4)
    for job in jobs:
        ids = torch.tensor([job.prefix + job.removed])
        expected = subject.base_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=2
        )[0, ids.shape[1] :].tolist()
        assert ours[job.key, "plain"].tokens == [token for token in expected if token != 2]


def test_healed_completions_spell_the_removed_text_and_match_a_plain_search(tokenizer: Any) -> None:
    subject = _subject(tokenizer)
    vocabulary, jobs = subject.vocabulary, _jobs(tokenizer, subject.vocabulary)
    for (key, boundary), completion in _decode(subject, jobs, 4).items():
        job = next(job for job in jobs if job.key == key)
        if boundary == "plain":
            continue
        assert vocabulary.join(completion.tokens).startswith(job.healed_text)
        # The same by the definition: at every step the best token that agrees with what is left, no cache, no batch.
        missing, tokens = job.healed_text, list(job.prefix)
        for token in completion.tokens:
            logits = subject.base_model(torch.tensor([tokens])).logits[0, -1]
            if missing:
                agree = [
                    t
                    for t in range(VOCAB)
                    if (b := vocabulary.of(t)) and (b.startswith(missing) or missing.startswith(b))
                ]
                best = max(agree, key=logits.tolist().__getitem__)
                missing = missing[len(vocabulary.of(best) or b"") :]
            else:
                best = int(logits.argmax())
            assert token == best
            tokens.append(token)


def test_likelihood_is_teacher_forced_and_renormalised_only_where_the_boundary_is(tokenizer: Any) -> None:
    subject = _subject(tokenizer)
    vocabulary, jobs = subject.vocabulary, _jobs(tokenizer, subject.vocabulary, 5)
    for (key, boundary), completion in _decode(subject, jobs, 3).items():
        job = next(job for job in jobs if job.key == key)
        start = job.prefix + (job.removed if boundary == "plain" else [])
        target = job.targets[boundary]
        logits = subject.base_model(torch.tensor([start + target.tokens])).logits[0]
        logp = torch.log_softmax(logits[len(start) - 1 : -1], dim=-1)
        expected, missing = [], target.healed_text
        for i, token in enumerate(target.tokens):
            value = logp[i, token]
            if missing:
                value = value - torch.logsumexp(logp[i, vocabulary.spelling(missing)], 0)
                missing = missing[len(vocabulary.of(token) or b"") :]
            expected.append(-value.item())
        assert completion.nats == pytest.approx(expected, abs=1e-3)
        assert vocabulary.join(target.tokens).endswith(vocabulary.join(job.targets["plain"].tokens))


def test_likelihood_parts_name_the_first_identifier_that_the_prompt_lacks(tokenizer: Any) -> None:
    vocabulary = TokenBytes(tokenizer)
    target = 'get_total(values, "x", other)'
    scored = plain_target(tokenizer, target)
    nats = [1.0] * len(scored.tokens)
    parts = summarise_likelihood(target, "values = self.get_total", "python", scored, nats, vocabulary)
    assert parts["missing_identifier"] == "other"
    assert 0 < parts["missing_nats"] <= parts["identifiers_nats"] < parts["target_nats"] == len(nats)
    everything = summarise_likelihood(target, target, "python", scored, nats, vocabulary)
    assert everything["missing_identifier"] is None
    assert everything["missing_tokens"] == 0
    shifted = ScoredTarget(tokenizer.encode(".", add_special_tokens=False) + scored.tokens, b".")
    same = summarise_likelihood(target, "values", "python", shifted, [0.0, *nats], vocabulary)
    assert same["identifiers_nats"] == parts["identifiers_nats"]


def test_sampling_is_the_rows_own_and_follows_the_distribution(tokenizer: Any) -> None:
    subject = _subject(tokenizer)
    jobs = _jobs(tokenizer, subject.vocabulary, 6)
    sampled = {"temperature": 1.3, "top_p": 0.9}
    alone, together = _decode(subject, jobs, 1, **sampled), _decode(subject, jobs, 12, **sampled)
    assert {k: c.tokens for k, c in alone.items()} == {k: c.tokens for k, c in together.items()}
    greedy = _decode(subject, jobs, 4)
    assert any(greedy[key].tokens != completion.tokens for key, completion in alone.items())
    cold = _decode(subject, jobs, 4, temperature=1e-4)
    assert {k: c.tokens for k, c in cold.items()} == {k: c.tokens for k, c in greedy.items()}


def test_refill_decodes_with_fewer_passes_than_one_batch_after_another(tokenizer: Any) -> None:
    subject = _subject(tokenizer)
    jobs = _jobs(tokenizer, subject.vocabulary, 12)
    lengths = {"t0": 1, "t1": 1, "t2": 1}
    for job in jobs:
        object.__setattr__(job, "stop", (lambda text: True) if job.key in lengths else None)
    decoder = Decoder(subject, subject.vocabulary, DecodeSettings(8, 12))
    with subject.on_path("vanilla"):
        assert len(list(decoder.run(jobs))) == 24
    assert decoder.num_prefills >= 3
    assert decoder.num_steps < 12 * decoder.num_prefills


def test_out_of_memory_halves_the_batch_and_loses_nothing(tokenizer: Any) -> None:
    subject = _subject(tokenizer)
    jobs = _jobs(tokenizer, subject.vocabulary)
    expected = {key: c.tokens for key, c in _decode(subject, jobs, 2).items()}

    class Small(Subject):
        limit = 4

        def __call__(self, ids: Any, *args: Any, **kwargs: Any) -> Any:
            if ids.shape[0] > self.limit:
                raise torch.OutOfMemoryError("out of memory")
            return super().__call__(ids, *args, **kwargs)

    small = Small(subject.base_model, None, tokenizer)
    decoder = Decoder(small, small.vocabulary, DecodeSettings(16, 12, eos_tokens=frozenset([2])))
    with small.on_path("vanilla"):
        found = {(c.key, c.boundary): c.tokens for c in decoder.run(jobs)}
    assert found == expected
    assert decoder.batch_size == 4
    small.limit = 0
    with small.on_path("vanilla"), pytest.raises(EvalError, match="Out of memory"):
        list(decoder.run(jobs))


# --- through the command line, on a tiny grafted model
# -----------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """A base model, an adapter whose memory shows, and twelve rows of three repositories."""
    root = tmp_path_factory.mktemp("eval")
    base = tiny_base("qwen3_5", vocab_size=VOCAB, max_position_embeddings=512)
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    config = GraftConfig(layers="attention", gate_init=3.0, memory=MLPConfig(dim=16, step_size=0.3))
    titans_ds.attach(copy.deepcopy(base), config).save_pretrained(root / "adapter")
    rows = [_row(number) for number in range(12)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"base": root / "base", "adapter": root / "adapter", "rows": root / "rows.jsonl"}


def _row(number: int) -> dict[str, Any]:
    chunks = [
        {"retrieved_chunk": f"def get_{number}_{i}(self):\n    return {i}", "filename": f"m{i}.py", "score": 1.0}
        for i in range(number % 3)
    ]
    text = "# get " + " ".join(c["retrieved_chunk"] for c in chunks) + "\n"
    return {
        "prompt": "import values\n" * (number % 4 + 1) + f"x{number} = self.",
        "groundtruth": f"get_{number}(values)",
        "right_context": "\nreturn x",
        "metadata": {"task_id": f"task/{number}", "repository": f"repo{number % 3}", "file": "a.py"},
        "crossfile_context": {"text": text, "list": chunks} if chunks else "",
    }


def _run(folders: dict[str, Path], out: Path, modes: str, *options: str, adapter: bool = True) -> int:
    arguments = ["run", "--base", str(folders["base"]), "--data", str(folders["rows"]), "--modes", modes]
    arguments += ["--out", str(out), "--device", "cpu", "--max-new-tokens", "6", *options]
    if adapter:
        arguments += ["--adapter", str(folders["adapter"])]
    return crosscodeeval.main(arguments)


def _predictions(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return {(line["task_id"], line["mode"], line["boundary"]): line for line in lines}


def _nats(prediction: dict[str, Any]) -> float:
    return float(prediction["likelihood"]["target_nats"])


def test_memory_is_isolated_and_batch_size_changes_nothing_through_run(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    modes = "memory,none,ablation,memory_wrong,memory_signflip"
    runs = {}
    for size in (1, 3, 8):
        assert _run(folders, tmp_path / f"b{size}", modes, "--batch-size", str(size), "--no-report") == 0
        runs[size] = _predictions(tmp_path / f"b{size}")
    assert len(runs[1]) == 60
    for size in (3, 8):
        for key, line in runs[1].items():
            assert runs[size][key]["prediction"] == line["prediction"]
            assert _nats(runs[size][key]) == pytest.approx(_nats(line), rel=1e-3, abs=1e-3)
    # A row without snippets has an unwritten memory; a written one shows, and so does another repository's.
    first = runs[1]
    for number in range(12):
        memory, none, wrong, flipped = (
            first[f"task/{number}", mode, "heal"] for mode in ("memory", "none", "memory_wrong", "memory_signflip")
        )
        same = _nats(memory) == pytest.approx(_nats(none), abs=1e-4)
        assert same == (number % 3 == 0)
        assert wrong["primed_from"] is not None
        assert int(wrong["primed_from"].split("/")[1]) % 3 != number % 3
        assert _nats(wrong) != pytest.approx(_nats(none), abs=1e-4)
        assert number % 3 == 0 or _nats(flipped) != pytest.approx(_nats(memory), abs=1e-4)


def test_ablation_is_the_vanilla_model_and_context_reaches_the_prompt(folders: dict[str, Path], tmp_path: Path) -> None:
    assert _run(folders, tmp_path / "r", "ablation,vanilla,concat,vanilla_concat", "--boundary", "both") == 0
    found = _predictions(tmp_path / "r")
    assert len(found) == 96
    for (task, mode, boundary), line in found.items():
        if mode in ("ablation", "concat"):
            other = found[task, mode.replace("ablation", "vanilla").replace("concat", "vanilla_concat"), boundary]
            assert other["prediction"] == line["prediction"]
            assert _nats(other) == pytest.approx(_nats(line), rel=1e-5)
    assert found["task/1", "concat", "heal"]["num_context_tokens"] > 0
    assert found["task/0", "concat", "heal"]["num_context_tokens"] == 0
    report = (tmp_path / "r" / "report.html").read_text()
    assert "ablation@heal" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert report.count("<script") == 1  # the page's own
    scores = json.loads((tmp_path / "r" / "scores.json").read_text())
    modes = ("ablation", "vanilla", "concat", "vanilla_concat")
    assert set(scores) == {f"{mode}@{boundary}" for mode in modes for boundary in ("heal", "plain")}
    harness = json.loads(next((tmp_path / "r").glob("results_*.json")).read_text())
    assert harness["results"]["crosscodeeval_concat_heal"]["em,parity-difflib"] == scores["concat@heal"]["em"]


def test_a_stopped_run_resumes_to_the_same_predictions(folders: dict[str, Path], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _run(folders, whole, "memory,vanilla", "--no-report") == 0
    assert _run(folders, broken, "memory,vanilla", "--no-report") == 0
    lines = (broken / "predictions.jsonl").read_text().splitlines(keepends=True)
    (broken / "predictions.jsonl").write_text("".join(lines[:7]) + lines[7][: len(lines[7]) // 2])
    assert _run(folders, broken, "memory,vanilla", "--resume", "--no-report") == 0
    assert {k: v["prediction"] for k, v in _predictions(broken).items()} == {
        k: v["prediction"] for k, v in _predictions(whole).items()
    }
    assert (broken / "predictions.jsonl").read_text().startswith("".join(lines[:7]))
    assert crosscodeeval.main(["compare", str(whole), str(broken)]) == 0


def test_limit_grows_on_resume_and_a_changed_setting_is_refused(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    assert _run(folders, out, "vanilla", "--limit", "4", "--no-report", adapter=False) == 0
    assert len(_predictions(out)) == 4
    assert _run(folders, out, "vanilla", "--limit", "6", "--no-report", adapter=False) == 2
    assert "--resume" in capsys.readouterr().err
    assert _run(folders, out, "vanilla", "--limit", "6", "--resume", "--no-report", adapter=False) == 0
    assert len(_predictions(out)) == 6
    assert _run(folders, out, "vanilla", "--resume", "--temperature", "0.5", "--no-report", adapter=False) == 2
    assert "temperature" in capsys.readouterr().err
    assert len(_predictions(out)) == 6


@pytest.mark.parametrize(
    ("modes", "options", "said"),
    [
        ("memory", [], "--adapter"),
        ("vanila", [], "Did you mean 'vanilla'"),
        ("vanilla,vanilla", [], "twice"),
        ("vanilla_fim", [], "fill-in-the-middle"),
        ("memory_steps=0", [], "inner steps"),
        ("vanilla", ["--boundary", "healed"], "heal, plain or both"),
        ("vanilla", ["--limit", "0"], "--limit"),
        ("vanilla", ["--max-length", "20"], "--max-length"),
        ("vanilla_concat", ["--context-tokens", "490", "--max-length", "500"], None),
        ("vanilla", ["--retrieval", "embedding"], "--embedder"),
        ("vanilla", ["--device", "gpu"], "--device 'gpu'"),
        ("vanilla", ["--device", ""], "--device ''"),
        ("vanilla", ["--device", "cuda:99"], "--device 'cuda:99'"),
        ("vanilla", ["--device", "meta"], "--device 'meta'"),
        ("vanilla", ["--dtype", "int7"], "Unknown dtype"),
        ("vanilla", ["--temperature", "nan"], "--temperature"),
        ("vanilla", ["--seed", "-1"], "--seed"),
        ("vanilla", ["--batch-size", "1e3"], "--batch-size"),
        ("vanilla", ["--max-new-tokens", "99999999999999999999"], "--max-new-tokens"),
        ("vanilla", ["--base", "/nowhere/at/all"], "/nowhere/at/all"),
        ("vanilla", ["--base", ""], "--base"),
    ],
)
def test_bad_settings_end_in_one_message(
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    modes: str,
    options: list[str],
    said: str | None,
) -> None:
    code = _run(folders, tmp_path / "r", modes, "--no-report", *options, adapter=False)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if said is None:
        assert code == 0
    else:
        assert code == 2
        assert said in error
        assert list(tmp_path.iterdir()) == []  # so that the mended command finds no run there


def test_damaged_models_end_in_one_message_and_leave_nothing(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (folders["base"] / "model.safetensors").read_bytes()
    config = json.loads((folders["base"] / "config.json").read_text())
    damages = {
        "cut": ("model.safetensors", weights[: len(weights) // 2]),
        "garbage": ("model.safetensors", b"\xff" * 1000),
        "list": ("config.json", b"[]"),
        "negative": ("config.json", json.dumps(config | {"hidden_size": -8}).encode()),
    }
    for name, (file, content) in damages.items():
        base = tmp_path / name
        shutil.copytree(folders["base"], base)
        (base / file).write_bytes(content)
        assert _run(folders | {"base": base}, tmp_path / "r", "vanilla", "--no-report", adapter=False) == 2, name
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert str(base) in error
        assert not (tmp_path / "r").exists()


def test_damaged_run_folders_are_named_and_a_second_process_is_refused(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    assert _run(folders, out, "vanilla", "--limit", "2", "--no-report", adapter=False) == 0
    again = ("vanilla", "--resume", "--limit", "3", "--no-report")
    with locked(out, "busy"):
        assert _run(folders, out, *again, adapter=False) == 2
    assert "another process writes" in capsys.readouterr().err
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    config = json.loads(whole["config.json"])
    del config["config_hash"]
    for name, content, told in (
        ("predictions.jsonl", b"nonsense\n" + whole["predictions.jsonl"], "predictions.jsonl, line 1: not JSON"),
        ("predictions.jsonl", b"[]\n", "predictions.jsonl, line 1: all of it"),
        ("predictions.jsonl", b'{"task_id": "\xff"}\n', "predictions.jsonl, line 1: not JSON"),
        ("config.json", json.dumps(config).encode(), "config_hash is missing"),
        ("config.json", b'{"modes": ' + b"[" * 1000, "no run folder"),
        ("config.json", b"{}", "something else than a run"),
    ):
        (out / name).write_bytes(content)
        assert _run(folders, out, *again, adapter=False) == 2
        assert told in capsys.readouterr().err
        assert (out / name).read_bytes() == content
        (out / name).write_bytes(whole[name])
    assert _run(folders, out, *again, adapter=False) == 0
    assert len(_predictions(out)) == 3


def test_inner_steps_query_key_and_combined_modes_run_and_differ(folders: dict[str, Path], tmp_path: Path) -> None:
    modes = "memory,memory_steps=3,memory_query_key,memory_plus_concat,memory_oracle,concat_oracle,ablation"
    assert _run(folders, tmp_path / "r", modes, "--no-report", "--retrieval", "bm25") == 0
    found = _predictions(tmp_path / "r")
    memory = _nats(found["task/2", "memory", "heal"])
    for other in ("memory_steps=3", "memory_query_key", "memory_plus_concat"):
        assert _nats(found["task/2", other, "heal"]) != pytest.approx(memory, abs=1e-5)
    assert found["task/2", "memory_plus_concat", "heal"]["num_context_tokens"] > 0


def test_infill_shows_the_right_context_and_heals_the_end_of_the_prompt(tokenizer: Any, tmp_path: Path) -> None:
    special = copy.deepcopy(tokenizer)
    special.add_special_tokens({"additional_special_tokens": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]})
    base = tiny_base("llama", vocab_size=len(special), max_position_embeddings=512)
    base.save_pretrained(tmp_path / "base")
    special.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(_row(n)) + "\n" for n in range(3)))
    folders = {"base": tmp_path / "base", "rows": tmp_path / "rows.jsonl"}
    options = ["--boundary", "both", "--no-report"]
    assert _run(folders, tmp_path / "r", "vanilla,vanilla_fim,vanilla_fim_concat", *options, adapter=False) == 0
    found = _predictions(tmp_path / "r")
    assert len(found) == 18
    assert _nats(found["task/1", "vanilla", "heal"]) != _nats(found["task/1", "vanilla_fim", "heal"])
    assert len(infill_tokens(special)) == 3
