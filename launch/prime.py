"""Read a repository once, and keep what the memory made of it in one file.

    titans-ds prime REPOSITORY --out repo.memory
    titans-ds complete --memory repo.memory FILE

REPOSITORY is a folder, or several folders and files. The file holds the memory's state, whose size does not depend on
how much was read, and names the base and the adapter that it belongs to.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only its own folder is on the path

from launch.inspection.repository import add_model_options, load_model, read_files, tokenize
from titans_ds.files import check_file
from titans_ds.graft.compare import primed
from titans_ds.program import program, whole_number

PATTERN = rb"titans-ds memory state"  # a file of ours may be written again


@program("nothing was written; run the same command again")
def main(argv: list[str]) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="titans-ds prime", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="folders and files, read in this order")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--suffix", nargs="+", default=[".py"], help="of a folder's files (default: .py)")
    most = whole_number(1, 10**9)
    parser.add_argument("--max-tokens", type=most, default=10**9, help="read no more than this")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_model_options(parser)
    options = parser.parse_args(argv)
    check_file(options.out, PATTERN)
    texts = read_files(options.paths, options.suffix)
    model, tokenizer = load_model(options.base, options.adapter, options.device)
    files, total = tokenize(tokenizer, texts, options.max_tokens)
    start = time.perf_counter()
    with primed(model, [file.ids for file in files]) as memory:
        seconds = time.perf_counter() - start
        read = sum(len(file.ids) for file in files)
        about = {"base": _name(options.base), "adapter": _name(options.adapter), "files": len(files), "tokens": read}
        memory.save(options.out, {name: str(value) for name, value in about.items()})
    size = options.out.stat().st_size
    if options.json:
        done = {"tokens_left_out": total - read, "seconds": round(seconds, 3), "out": str(options.out), "bytes": size}
        print(json.dumps(about | done))
        return
    print(model.memory_summary())
    print(f"read {len(files)} files, {read:,} tokens, in {seconds:.1f} s ({read / max(seconds, 1e-9):,.0f} tokens/s)")
    if total > read:
        print(f"left out {total - read:,} tokens above --max-tokens")
    print(f"wrote {options.out}: {size / 2**20:.2f} MiB")


def _name(given: str) -> str:
    """An absolute path of what is a folder here, so that `complete` finds it from elsewhere; a hub id as it is."""
    return str(Path(given).resolve()) if Path(given).exists() else given


if __name__ == "__main__":
    sys.exit(main())
