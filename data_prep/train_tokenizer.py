"""Train a byte-level BPE tokenizer for code on the train split of a corpus.

    python -m data_prep.train_tokenizer --corpus DIR --vocab-size 8192 --out DIR

Writes tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` loads. The special tokens are
those of Qwen2.5-Coder, so that fill-in-the-middle and repository prompts can be built in the same way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titans_ds.files import Kind, atomic_folder, check_folder
from titans_ds.program import program, whole_number

from .console import GO_ON, STDERR
from .errors import DataPrepError
from .shards import read_batches, shard_paths

TOKENIZER = Kind("a tokenizer", "tokenizer.json", rb'"added_tokens"')
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
SPECIAL_TOKENS = (
    END_OF_TEXT, PADDING, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
)  # fmt: skip
# Qwen2's rule: contractions, words, single digits, punctuation with line ends, runs of blanks.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUM_BYTES = 256


def train(corpus: Path, vocab_size: int, out: Path, max_bytes: int | None = None) -> None:
    """Train on the train split's files (the first `max_bytes` of them) and write the tokenizer folder `out`.

    Raises DataPrepError where the corpus has no train split or `vocab_size` cannot hold the bytes and special tokens.
    """
    smallest = _NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise DataPrepError(f"--vocab-size {vocab_size}: expected at least {smallest} (256 bytes and special tokens).")
    check_folder(out, TOKENIZER)
    paths = shard_paths(corpus, "train")
    if not paths:
        raise DataPrepError(f"{corpus} has no train-*.parquet. Expected a folder that data_prep.build_corpus wrote.")
    tokenizer = _train(_texts(paths, max_bytes), vocab_size)
    with atomic_folder(out, TOKENIZER) as folder:
        _save(tokenizer, folder)


def _texts(paths: Sequence[Path], max_bytes: int | None) -> Iterator[str]:
    num_bytes = 0
    for path in paths:
        for batch in read_batches(path, ("content", "n_bytes"), batch_size=256):
            for text, size in zip(batch["content"].to_pylist(), batch["n_bytes"].to_pylist(), strict=True):
                if max_bytes is not None and num_bytes + size > max_bytes:
                    return
                num_bytes += size
                yield text


def _train(texts: Iterator[str], vocab_size: int) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Text that spells a special token is text, here too.
    tokenizer.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _save(tokenizer: Any, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    named = {"eos_token": END_OF_TEXT, "pad_token": PADDING}
    others = [token for token in SPECIAL_TOKENS if token not in named.values()]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        additional_special_tokens=others,
        clean_up_tokenization_spaces=False,
        model_max_length=1_000_000,
    )
    fast.save_pretrained(folder)


@program(GO_ON)
def main(arguments: list[str]) -> None:
    """Run the program with these arguments (default: the command line's)."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.train_tokenizer", description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="a folder that build_corpus wrote")
    parser.add_argument(
        "--vocab-size",
        type=whole_number(1, 10_000_000),
        default=8192,
        help="special tokens included (default %(default)s)",
    )
    parser.add_argument(
        "--max-bytes", type=whole_number(1, 2**62), help="train on so much of the split only (default: all of it)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer folder to write")
    options = parser.parse_args(arguments)
    train(options.corpus, options.vocab_size, options.out, options.max_bytes)
    STDERR.print(f"{options.out}: written")


if __name__ == "__main__":
    sys.exit(main())
