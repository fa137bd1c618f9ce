"""The README's example runs as printed; only the base model's name is replaced by a small one made here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from titans_ds import TitansModel

README = Path(__file__).resolve().parents[1] / "README.md"
BASE = "Qwen/Qwen3.5-0.8B-Base"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3.5 hybrid of four layers with random weights, and a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(folder)
    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=len(alphabet),
        hidden_size=512,  # the memory of the example is 512 wide, and orthonormal rows need as many columns
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def example() -> str:
    """The first Python block of the README."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    return blocks[0]


def test_example_is_ten_lines_or_so() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= 12


def test_example_runs_and_its_adapter_loads(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = example()
    assert BASE in code
    names: dict[str, object] = {}
    exec(compile(code.replace(BASE, str(base_folder)), "README.md", "exec"), names)

    prompt, completion = names["prompt"], names["completion"]
    assert completion.shape[1] > prompt.input_ids.shape[1]
    again = TitansModel.from_pretrained(base_folder, tmp_path / "my-memory")
    expected = names["model"](prompt.input_ids, memory=names["memory"].state).logits
    torch.testing.assert_close(again(prompt.input_ids, memory=names["memory"].state).logits, expected)
    assert not torch.equal(names["model"](prompt.input_ids).logits, expected), "priming left no trace"
