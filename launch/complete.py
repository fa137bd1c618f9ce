"""Complete a file with the memory of a repository, which `titans-ds prime` has written.

    titans-ds complete --memory repo.memory FILE [--max-new-tokens 64] [--off]

The end of FILE is the prompt (`-`: of the standard input); the completion goes to the standard output, everything else
to the error output. The repository itself is not needed any more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only its own folder is on the path

import torch

from launch.inspection.repository import add_model_options, decoded, load_model, read_files
from titans_ds.errors import DataError, StateError
from titans_ds.memory import MemoryState
from titans_ds.program import program, whole_number


@program("run the same command again")
def main(argv: list[str]) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="titans-ds complete", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="text to go on from; - for the standard input")
    parser.add_argument("--memory", type=Path, required=True, help="file of `titans-ds prime`")
    number = whole_number(1, 10**6)
    parser.add_argument("--max-new-tokens", type=number, default=64, help="default: %(default)s")
    parser.add_argument("--prompt-tokens", type=number, default=1024, help="of the file's end (default: %(default)s)")
    parser.add_argument("--off", action="store_true", help="the base model without its memory, to compare")
    parser.add_argument("--json", action="store_true", help="print completion and figures as JSON")
    add_model_options(parser, default=False)
    options = parser.parse_args(argv)
    text = decoded(sys.stdin.buffer.read()) if options.file == "-" else read_files([Path(options.file)], ())[0][1]
    if text is None:
        raise DataError("the standard input is not UTF-8 text; give text")
    _, about = MemoryState.load(options.memory)
    base, adapter = options.base or about.get("base"), options.adapter or about.get("adapter")
    if base is None or adapter is None:
        raise StateError(f"{options.memory} names no base and adapter; give --base and --adapter, or prime again")
    model, tokenizer = load_model(base, adapter, options.device)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][-options.prompt_tokens :]
    if not ids:
        raise DataError(f"{options.file}: the text is empty; there is nothing to go on from")
    prompt = torch.tensor([ids], device=model.device)
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False, "pad_token_id": 0}
    with model.memory_session(batch_size=1) as memory:
        memory.load(options.memory)
        start = time.perf_counter()
        with model.disable_memory() if options.off else contextlib.nullcontext():
            done = model.generate(prompt, attention_mask=torch.ones_like(prompt), memory=memory, **settings)
    seconds, new = time.perf_counter() - start, done[0, len(ids) :]
    completion = tokenizer.decode(new, skip_special_tokens=True)
    if options.json:
        found = {"completion": completion, "prompt_tokens": len(ids), "tokens": len(new), "seconds": round(seconds, 3)}
        print(json.dumps(found))
        return
    print(completion)
    print(f"{len(new)} tokens after a prompt of {len(ids)}, in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
