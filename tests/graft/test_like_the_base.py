"""A grafted model behaves like its base: attributes, pipelines, streams, and any call of the base inside `reading`."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, Trainer, TrainingArguments, pipeline

import titans_ds
from tests.support.tiny_models import VOCAB, tiny_base, token_ids
from titans_ds import DeltaConfig, GraftConfig, LoraSettings, TitansModel, preset
from titans_ds.errors import DataError, StateError


def graft(**settings: Any) -> TitansModel:
    where = {"layers": "attention", "gate_init": 2.0, "segment_tokens": 16, "memory": DeltaConfig(dim=16), **settings}
    return titans_ds.attach(tiny_base("llama"), GraftConfig(**where)).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token, `w3` to `w127`."""
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text_of(ids: torch.Tensor) -> str:
    return " ".join(f"w{i}" for i in ids.flatten().tolist())


def test_what_it_does_not_have_itself_is_the_bases() -> None:
    model = graft()
    base = model.base_model
    assert model.config is base.config
    assert model.graft.segment_tokens == 16
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.can_generate()
    assert model.config.get_text_config().vocab_size == VOCAB
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert base.is_gradient_checkpointing
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.max_new_tokens = 3
    assert base.generation_config.max_new_tokens == 3
    model.resize_token_embeddings(VOCAB + 8)
    with model.memory_session(1) as memory:
        model.prime(torch.tensor([[5, VOCAB + 7]]), memory)
    for missing in ("no_such_name",):  # of neither of them
        with pytest.raises(AttributeError, match=missing):
            getattr(model, missing)


def test_a_pipeline_reads_the_memory_that_it_is_given(tokenizer: PreTrainedTokenizerFast) -> None:
    model, prompt = graft(), token_ids(1, 6)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "return_tensors": True,
        "add_special_tokens": False,
    }
    with model.memory_session(1) as memory:
        model.prime(token_ids(1, 40, seed=1), memory)
        expected = model.generate(prompt, memory=memory, max_new_tokens=5, do_sample=False)[0].tolist()
        with model.disable_memory():
            plain = model.generate(prompt, max_new_tokens=5, do_sample=False)[0].tolist()
        with model.reading(memory):
            inside = generator(text_of(prompt), **options)[0]["generated_token_ids"]
            several = generator([text_of(prompt)] * 3, batch_size=3, **options)
    with pytest.warns(UserWarning, match="without a memory"):
        outside = generator(text_of(prompt), **options)[0]["generated_token_ids"]
    assert inside == expected != plain == outside
    assert [one[0]["generated_token_ids"] for one in several] == [expected] * 3


@pytest.mark.parametrize("name", ["delta", "gradmem", "titans"])
def test_inside_reading_every_call_of_the_base_reads(name: str) -> None:
    sizes = {} if name == "gradmem" else {"dim": 16}
    where = {"layers": "attention"} if name == "gradmem" else {"layers": "attention", "gate_init": 2.0}
    model = titans_ds.attach(tiny_base("llama"), GraftConfig(memory=preset(name, **sizes), **where)).eval()
    ids, base = token_ids(2, 7), model.base_model
    with torch.no_grad(), model.memory_session(2) as memory:
        model.prime(token_ids(2, 30, seed=1), memory)
        first = model(ids, memory=memory.state)
        with model.reading(memory):
            torch.testing.assert_close(base(ids).logits, first.logits)
            torch.testing.assert_close(base.lm_head(base.model(ids).last_hidden_state), first.logits)
            torch.testing.assert_close(model(inputs_embeds=base.get_input_embeddings()(ids)).logits, first.logits)
            twice = base(ids.repeat_interleave(2, dim=0)).logits
            torch.testing.assert_close(twice[::2], first.logits)
            torch.testing.assert_close(twice[1::2], first.logits)
            with model.disable_memory():
                assert torch.equal(base(ids).logits, tiny_base("llama")(ids).logits)
            model.prime(token_ids(2, 30, seed=2), memory)  # a session is read as it stands
            assert (base(ids).logits - first.logits).abs().max() > 1e-4
            torch.testing.assert_close(base(ids).logits, model(ids, memory=memory.state).logits)
            with pytest.raises(StateError, match="holds 2 samples, but the input has 3"):
                base(token_ids(3, 7))
        with model.reading(memory.state), pytest.raises(StateError, match="holds 2 samples, but the input has 3"):
            base(token_ids(3, 7))


def test_two_grafted_models_at_once_keep_to_their_own_memories() -> None:
    big, small, ids = graft(), graft(layers=[2]), token_ids(1, 7)
    with torch.no_grad(), big.memory_session(1) as one, small.memory_session(1) as other:
        big.prime(token_ids(1, 30, seed=1), one)
        small.prime(token_ids(1, 30, seed=2), other)
        expected = big(ids, memory=one.state).logits, small(ids, memory=other.state).logits
        with big.reading(one), small.reading(other):
            assert torch.equal(big.base_model(ids).logits, expected[0])
            assert torch.equal(small.base_model(ids).logits, expected[1])


@pytest.mark.parametrize("call", ["model", "base", "decoder", "generate", "base generate"])
def test_a_call_without_a_memory_is_warned_of_once(call: str) -> None:
    model, ids = graft(), token_ids(1, 6)
    calls = {
        "model": lambda: model(ids),
        "base": lambda: model.base_model(ids),
        "decoder": lambda: model.decoder(ids),
        "generate": lambda: model.generate(ids, max_new_tokens=2),
        "base generate": lambda: model.base_model.generate(ids, max_new_tokens=2),
    }
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with model.disable_memory():
                calls[call]()
            with model.memory_session(1) as memory, model.reading(memory):
                calls[call]()
            model.read_write(ids)
        with pytest.warns(UserWarning, match=r"called without a memory.*model\.reading"):
            calls[call]()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            calls[call]()


def test_inputs_and_streams(tokenizer: PreTrainedTokenizerFast) -> None:
    model, prompt = graft(), token_ids(1, 6)
    with model.memory_session(1) as memory:
        model.prime(token_ids(1, 40, seed=1), memory)
        expected = model.generate(prompt, memory=memory, max_new_tokens=5, do_sample=False)
        options: dict[str, Any] = {"memory": memory, "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(inputs=prompt, **options), expected)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        thread = threading.Thread(target=model.generate, args=(prompt,), kwargs={**options, "streamer": streamer})
        thread.start()
        assert "".join(streamer).split() == text_of(expected[:, 6:]).split()
        thread.join()


def test_texts_are_primed_in_order_each_from_its_own_start(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, files, ids = graft(), [token_ids(30, seed=1), token_ids(9, seed=2)], token_ids(1, 8)
    (tmp_path / "b.txt").write_text(text_of(files[1]))
    with torch.no_grad(), model.memory_session(1) as memory, model.memory_session(1) as texts:
        for file in files:
            model.prime(file.unsqueeze(0), memory)
        model.prime_text(tokenizer, [text_of(files[0]), "", tmp_path / "b.txt"], texts)
        assert torch.equal(model(ids, memory=texts.state).logits, model(ids, memory=memory.state).logits)
        with pytest.raises(DataError, match="put it into a list"):
            model.prime_text(tokenizer, "w3 w4", texts)
        with pytest.raises(DataError, match=r"missing\.txt can't be read"):
            model.prime_text(tokenizer, [tmp_path / "missing.txt"], texts)
    with model.memory_session(2) as two, pytest.raises(StateError, match="holds 2 samples, but the input has 1"):
        model.prime_text(tokenizer, ["w3 w4"], two)


def test_transformers_trainer_takes_it(tmp_path: Path) -> None:
    """It reads the configuration, enables checkpointing and steps; here it trains LoRA, beside a memory that is off."""
    where = {"layers": "attention", "segment_tokens": 16, "memory": DeltaConfig(dim=16)}
    model = titans_ds.attach(tiny_base("llama"), GraftConfig(**where), lora=LoraSettings(rank=2, targets=["q_proj"]))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_checkpointing=True, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": token_ids(8, seed=i), "labels": token_ids(8, seed=i)} for i in range(4)]
    with model.disable_memory():
        loss = Trainer(model, arguments, train_dataset=rows).train().training_loss
    assert loss > 0


@pytest.mark.parametrize("name", ["delta", "gradmem"])
def test_a_grafted_model_can_be_pickled_and_copied(name: str) -> None:
    sizes = {} if name == "gradmem" else {"dim": 16}
    model = titans_ds.attach(tiny_base("llama"), GraftConfig(layers="attention", memory=preset(name, **sizes))).eval()
    ids = token_ids(1, 7)
    with torch.no_grad(), model.memory_session(1) as memory:
        model.prime(token_ids(1, 30, seed=1), memory)
        expected = model(ids, memory=memory.state).logits
        for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert torch.equal(other(ids, memory=memory.state).logits, expected)
            with other.reading(memory):
                assert torch.equal(other.base_model(ids).logits, expected)
