"""Ten kinds of input, damaged at random: each gives a result or one TitansError, and what was there stays.

    python -m tests.support.generated_inputs [SEED]

A program of its own, since Hypothesis draws also from the constants of all modules that are loaded: so the same inputs
are made at every run. It prints the table that stands in docs/faults.md; another seed tries other inputs.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import titans_ds
from data_prep.corpus.assemble import CORPUS_SCHEMA
from data_prep.crosscodeeval import load_rows
from data_prep.shards import read_batches, read_manifest
from eval.scoring.predictions import load_predictions
from launch.arguments import parse
from launch.sweeping.space import parse_space, read_space
from tests.support.tiny_models import tiny_base
from titans_ds.errors import TitansError
from titans_ds.files import check_file, write_text
from titans_ds.training.checkpoints import files as files
from titans_ds.training.checkpoints.resume import open_checkpoint
from titans_ds.zero.config import complete_config, read_config, zero_stage
from titans_ds.zero.offload import check_checkpointable

INPUTS = 300  # of each kind
LENGTH = 1600  # characters of a message, of which all names of a section can be most

NUMBERS = [17, 0, -1.5, 10**20, -(10**400), float("nan"), float("inf")]
TEXTS = ["text", "", "\ud800", "../../x", "9" * 500]
OTHERS = [None, True, [], {}, [1, [2]], {"a": {"b": None}}, ["x"]]
MADE = st.recursive(st.integers() | st.floats() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v))
VALUES = st.sampled_from([*NUMBERS, *TEXTS, *OTHERS]) | MADE


class Kind(NamedTuple):
    """A kind of input.

    Args:
        name: as the table says it.
        path: of the file that is damaged, in a folder of its own.
        valid: what it holds when it is whole: a value of JSON, or bytes.
        read: what is done with it.
    """

    name: str
    path: Path
    valid: Any
    read: Callable[[Path], Any]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a value of JSON, as keys and indices."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def edited(draw: Callable[..., Any], valid: Any) -> bytes:
    """One to three places get another value, another name, or go; then the text may be damaged, too."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(list(places(value)) or [(0,)]))
        holder = value
        for key in above:
            holder = holder[key]
        change = draw(st.sampled_from(["set", "set", "remove", "rename"]))
        if change == "set" and holder:
            holder[last] = copy.deepcopy(draw(VALUES))
        elif change == "remove" and holder:
            del holder[last]
        elif isinstance(holder, dict) and holder:
            holder[draw(st.sampled_from([f"{last}s", str(last).upper(), "", "x.y"]))] = holder.pop(last)
    content = json.dumps(value).encode()
    return damaged(draw, content) if draw(st.integers(0, 3)) == 0 else content


def damaged(draw: Callable[..., Any], content: bytes) -> bytes:
    """The content cut, with a part of it twice, or with other bytes in it."""
    start = draw(st.integers(0, len(content)))
    stop = min(len(content), start + draw(st.integers(0, 40)))
    change = draw(st.sampled_from(["cut", "twice", "other"]))
    if change == "cut":
        return content[:start]
    if change == "twice":
        return content[:stop] + content[start:]
    return content[:start] + draw(st.binary(max_size=stop - start)) + content[stop:]


def outputs(draw: Callable[..., Any], valid: Any) -> bytes:
    """A path below the folder: names that are there, odd ones, long ones, and too many."""
    name = st.sampled_from(["notes.txt", "folder", "new", "..", ".", "", "~", "[/b]", "x" * 300, "\0", "\ud800"])
    parts = draw(st.lists(name | st.text(max_size=8), max_size=5))
    return "/".join(parts).encode("utf-8", "surrogatepass")


def write_output(path: Path) -> None:
    """Write a file at the path that `path` holds, below its folder, and take it away again."""
    text = path.read_bytes().decode("utf-8", "surrogatepass")
    target = Path(f"{path.parent}/{text}")
    check_file(target, b"made by this program")
    if not target.exists() and path.parent in target.resolve().parents:
        before = set(path.parent.rglob("*"))
        write_text(target, "made by this program")
        for new in sorted(set(path.parent.rglob("*")) - before, reverse=True):
            new.rmdir() if new.is_dir() else new.unlink()


def held(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, and b"" for every folder in it."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def count(kind: Kind, chosen: int | None) -> tuple[int, list[str], int]:
    """Inputs tried, the tracebacks and wrong messages, and bytes that were lost."""
    tried, problems, lost = 0, [], 0
    names = {str(key) for place in places(kind.valid) for key in place} | {kind.path.name}

    @settings(max_examples=INPUTS, derandomize=chosen is None, database=None, phases=[Phase.generate], deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def try_one(data: st.DataObject) -> None:
        nonlocal tried, lost
        make = outputs if kind.read is write_output else damaged if isinstance(kind.valid, bytes) else edited
        kind.path.write_bytes(content := make(data.draw, kind.valid))
        before, tried = held(kind.path.parent), tried + 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind.read(kind.path)
        except TitansError as error:
            said = str(error)
            if len(said) > LENGTH or not (kind.read is write_output or any(name in said for name in names)):
                problems.append(f"{content[:2000]!r}: {said}")
        except Exception:
            problems.append(f"{content[:2000]!r}: {traceback.format_exc()}")
        after = held(kind.path.parent)
        lost += sum(max(len(value), 1) for name, value in before.items() if after.get(name) != value)
        if set(after) - set(before):
            problems.append(f"{content[:2000]!r} left {sorted(set(after) - set(before))}")

    (try_one if chosen is None else seed(chosen)(try_one))()
    return tried, problems, lost


def read_deepspeed(path: Path) -> Any:
    """As launch/train.py does it."""
    config = read_config(path)
    check_checkpointable(config, 500, "none")
    zero_stage(config)
    return complete_config(config, rows=2, backwards_per_step=3, world_size=2, clip=1.0, bf16=True)


def all_kinds(root: Path) -> list[Kind]:
    """All ten, each in a folder of its own below `root`."""

    def place(name: str) -> Path:
        (folder := root / name.partition(".")[0]).mkdir()
        return folder / name

    chunk = {"retrieved_chunk": "x = 1", "filename": "b.py", "score": 0.5}
    metadata = {"task_id": "t/1", "repository": "o-r", "file": "a.py"}
    context = {"text": "# x", "list": [chunk]}
    row = {"prompt": "a", "groundtruth": "b", "right_context": "c", "metadata": metadata, "crossfile_context": context}
    likelihood = {"target_nats": 1.5, "target_tokens": 3, "target_bytes": 9}
    line = {"task_id": "t/1", "mode": "memory", "prediction": "x", "boundary": "token", "likelihood": likelihood}
    repository = {"repo": "o/r", "split": "train", "files": 3, "license": None, "version": "1", "stars": 5}
    manifest = {
        "identity": "0" * 64, "format_version": 1, "command": "c", "made_with": {"titans-ds": "0"},
        "settings": {"min_files": 3, "split_ratios": [90.0, 5.0, 5.0]}, "repositories": [repository],
        "splits": {"train": {"files": 3}}, "filters": [{"filter": "read", "files": 3}],
        "decontamination": {"removed": [{"repo": "o/s", "path": "", "reason": "name", "matched": "o-s"}]},
    }  # fmt: skip
    marker = {
        "format": 1, "progress": {"step": 3, "skipped": 0, "bad_in_a_row": 0, "tokens": 5},
        "lanes": {"num_lanes": 1, "positions": [[0, 0]]}, "world_size": 1, "universal": False, "vocab_size": 9,
        "identity": {"engine": "torch"}, "files": {},
    }  # fmt: skip
    training = {
        "model": {"base": "B", "dtype": "float32"}, "data": {"corpus": "C", "num_lanes": 4},
        "graft": {"layers": [1, 3], "gate_init": -1.0, "memory": {"preset": "titans", "dim": 8, "depth": 2}},
        "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}, "training": {"steps": 5, "order": "second"},
        "lora": {"rank": 4, "targets": ["q_proj"]}, "checkpoint": {"interval": 2},
    }  # fmt: skip
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu"}}
    deepspeed = {"zero_optimization": {"stage": 3, **offload}, "aio": {"block_size": 1048576}, "train_batch_size": 12}
    space = {
        "config": "launch/configs/quickstart.yaml", "settings": {"training.steps": 5}, "retries": 2,
        "metric": {"name": "train.loss", "direction": "minimize"}, "search": {"method": "random", "trials": 5},
        "parameters": {
            "graft.memory.dim": [8, 16], "optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
            "rule": {"pairs": {"a": {"graft.gate_floor": 0.1}, "b": {"graft.gate_floor": 0.2}}},
            "graft.gate_init": {"values": [-1.0, 0.0]},
        },
    }  # fmt: skip

    adapter = place("titans_config.json")
    base = tiny_base("llama")
    graft = {"memory": {"preset": "paper", "dim": 8, "write": "token", "query_projection": "tied"}}
    model = titans_ds.attach(base, titans_ds.GraftConfig.from_dict(graft))
    model.save_pretrained(adapter.parent)
    model.detach()

    def load_adapter(path: Path) -> None:
        titans_ds.TitansModel.from_pretrained(base, path.parent).detach()

    shard, out = place("train-00000-of-00001.parquet"), place("out")
    rows = [["o/r"] * 9, [f"{n}.py" for n in range(9)], [f"x = {n}\n" * 9 for n in range(9)], ["MIT"] * 9, [5] * 9]
    columns = [*rows, ["1"] * 9, list(range(9)), [60] * 9]
    pq.write_table(pa.table(columns, schema=CORPUS_SCHEMA), shard)
    (out.parent / "notes.txt").write_text("mine")
    (out.parent / "folder").mkdir()
    (out.parent / "folder" / "mine.txt").write_text("mine")
    wanted = ["repo", "path", "content", "n_bytes"]
    return [
        Kind("row of a benchmark", place("rows.jsonl"), row, load_rows),
        Kind("prediction", place("predictions.jsonl"), line, load_predictions),
        Kind("manifest of a corpus", place("manifest.json"), manifest, lambda path: read_manifest(path.parent)),
        Kind("configuration of an adapter", adapter, json.loads(adapter.read_text()), load_adapter),
        Kind("training configuration", place("own.yaml"), training, lambda path: parse(["--config", str(path)])),
        Kind("path as `--out`", out, b"", write_output),
        Kind("shard of a corpus", shard, shard.read_bytes(), lambda path: list(read_batches(path, wanted))),
        Kind("marker of a checkpoint", place(files.MARKER), marker, lambda path: open_checkpoint(path.parent)),
        Kind("DeepSpeed configuration", place("ds.json"), deepspeed, read_deepspeed),
        Kind("space of a sweep", place("space.yaml"), space, lambda path: parse_space(read_space(path), str(path))),
    ]


def main() -> int:
    """Print the table, and of every kind the first two problems; returns 1 where there is one."""
    chosen = int(sys.argv[1]) if len(sys.argv) > 1 else None
    print("| kind | inputs | tracebacks | bytes lost |", "|---|---|---|---|", sep="\n")
    shown: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        for kind in all_kinds(Path(root)):
            tried, problems, lost = count(kind, chosen)
            print(f"| {kind.name} | {tried} | {len(problems)} | {lost} |", flush=True)
            shown += problems[:2]
    print("\n\n".join(["", *shown]))
    return 1 if shown else 0


if __name__ == "__main__":
    sys.exit(main())
