"""Look into a memory: one page of what it has read, what is left of it, and what it recalls where.

    titans-ds inspect --read REPOSITORY --text FILE --out memory.html

The page needs no network. It colours the text by what the memory is worth at each token, and what was read by how much
was written and how much of it is still there; for a token of the text, it shows what the memory recalled.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only its own folder is on the path

from launch.inspection.measure import inspect_memory
from launch.inspection.repository import add_model_options, load_model, read_files, tokenize
from titans_ds.errors import DataError
from titans_ds.files import check_file, write_text
from titans_ds.program import program, whole_number

TEMPLATE = Path(__file__).resolve().parent / "inspection" / "memory.html"
_PATTERN = rb"<title>Memory inspected"  # a page of ours may be written again
_OTHER = Path(sysconfig.get_paths()["stdlib"]) / "email"


@program("nothing was written; run the same command again")
def main(argv: list[str]) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="titans-ds inspect", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--read", type=Path, nargs="+", required=True, help="folders and files that the memory reads")
    parser.add_argument("--text", type=Path, required=True, help="file to predict with it; not among those")
    parser.add_argument(
        "--other", type=Path, nargs="+", default=[_OTHER],
        help="something else, for the memory of another text (default: Python's own package `email`)",
    )  # fmt: skip
    parser.add_argument("--suffix", nargs="+", default=[".py"], help="of a folder's files (default: .py)")
    number = whole_number(2, 100_000)
    parser.add_argument("--read-tokens", type=number, default=4096, help="at most (default: %(default)s)")
    parser.add_argument("--text-tokens", type=number, default=512, help="at most (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("memory.html"), help="page to write (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the four losses as JSON")
    add_model_options(parser)
    options = parser.parse_args(argv)
    check_file(options.out, _PATTERN)
    chosen = read_files([options.text], options.suffix)
    of_text = {options.text.resolve()} if options.text.is_file() else set()
    sources = [read_files(paths, options.suffix) for paths in (options.read, options.other)]
    if of_text & {path.resolve() for path in options.read}:
        raise DataError(
            f"--text {options.text} is also in --read; a memory that has read the text itself shows nothing"
        )
    model, tokenizer = load_model(options.base, options.adapter, options.device)
    start = time.perf_counter()
    (text, *_), _ = tokenize(tokenizer, chosen[:1], options.text_tokens)
    # The text's own file, where it lies in the folder, must not be read.
    own = [(name, content) for name, content in sources[0] if content != chosen[0][1]]
    read, total = tokenize(tokenizer, own, options.read_tokens)
    count = sum(len(file.ids) for file in read)
    other, _ = tokenize(tokenizer, sources[1], count)
    if len(text.ids) < 2 or not read:
        raise DataError(f"--text {options.text}, --read {options.read[0]}: too little to look at; give more text")
    found = inspect_memory(model, tokenizer, read, other, text)
    found["left_out"] = total - count
    write_text(options.out, page(found))
    means = found["means"]
    if options.json:
        print(json.dumps({**means, "tokens": len(text.ids) - 1, "read_tokens": count, "out": str(options.out)}))
        return
    print(model.memory_summary())
    print(f"read {len(read)} files, {count:,} tokens; predicted {len(text.ids) - 1:,} tokens of {text.name}")
    print("nats a token: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    print(f"wrote {options.out} in {time.perf_counter() - start:.1f} s; open it in a browser")


def page(found: dict[str, Any]) -> str:
    """The template with its data, in which no text can end the script."""
    data = json.dumps(found, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", data)


if __name__ == "__main__":
    sys.exit(main())
