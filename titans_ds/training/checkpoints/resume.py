"""Which checkpoint a run goes on from: the newest that is whole, and only one of the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titans_ds.errors import CheckpointError
from titans_ds.training.checkpoints import files
from titans_ds.training.checkpoints.checkpoint import Found
from titans_ds.training.data.packed import PackedCorpus
from titans_ds.training.settings import TrainConfig
from titans_ds.zero.pickles import problem_of_pickle

logger = logging.getLogger("titans_ds")

# What may differ between a checkpoint and the run that goes on from it: none of it changes what is computed.
_FREE_SECTIONS = ("run", "checkpoint", "evaluation", "deepspeed")
_FREE_KEYS = (
    "model.base",  # by content, below
    "model.tokenizer",
    "model.trust_remote_code",
    "model.allow_pickle",
    "data.corpus",  # by content, below
    "training.checkpointing",
    "training.log_interval",
    "training.loss_chunk_tokens",
    "training.nonfinite_limit",
)
TRUST_HELP = "also load pickles that import anything: they can run any code, so only from who you trust"
_ALWAYS = ("model.base", "data.corpus", "engine")  # in the identity of every checkpoint


def identity(config: TrainConfig, corpus: PackedCorpus, engine: str) -> dict[str, Any]:
    """What a run and its checkpoints have in common, flat: settings that change the computation, base, corpus, engine.

    Args:
        config: of the run.
        corpus: its packed corpus.
        engine: `torch`, or `ZeRO-` and the stage.
    """
    sections = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE_SECTIONS}
    settings = {k: v for k, v in _flat(sections, "") if k not in _FREE_KEYS}
    contents = {"model.base": _base_fingerprint(config.model.base), "data.corpus": _digest(corpus.path / "packed.json")}
    plain: dict[str, Any] = json.loads(json.dumps({**settings, **contents, "engine": engine}, default=str))
    return plain


def find(resume: str, run_dir: Path, own: dict[str, Any], world_size: int, trust: bool) -> Found | None:
    """The checkpoint that `run.resume` means.

    Args:
        resume: `auto` (the newest whole one of this run), `none`, or a checkpoint or run folder.
        run_dir: of this run.
        own: this run's identity.
        world_size: its number of ranks.
        trust: load from outside the run folder.

    Returns:
        None where the run starts from the beginning.

    Raises:
        CheckpointError: all are torn; or it is of another run, another number of ranks, or not to be trusted: from
            outside the run folder with pickles in it, or with pickles that would import more than tensors need.
    """
    if resume == "none":
        return None
    root = run_dir / "checkpoints"
    found = _newest(root) if resume == "auto" else _given(Path(resume), root, trust)
    if found is None:
        logger.warning("no checkpoint in %s yet; starting from the beginning", root)
        return None
    _check_identity(found, own)
    found = _for_ranks(found, world_size)
    check_loadable(found, trust, "set run.trust_checkpoint to true")
    return found


def open_checkpoint(path: Path) -> Found:
    """A checkpoint folder, or the newest whole one of a run folder. Raises CheckpointError where there is none."""
    if (path / "checkpoints").is_dir():
        found = _newest(path / "checkpoints")
        if found is None:
            raise CheckpointError(f"{path / 'checkpoints'} has no checkpoint yet")
        return found
    if not path.is_dir():
        raise CheckpointError(f"the checkpoint {path} does not exist; give a folder RUN/checkpoints/step_… or RUN")
    marker = files.read_marker(path)
    problem = files.damage(path, marker)
    if problem or marker is None:
        raise CheckpointError(f"the checkpoint {path} is torn: {problem}; give another, or use run.resume auto")
    return Found(path, marker)


def universal_of(checkpoint: Path) -> Path:
    """Where a checkpoint's universal form is, or would be."""
    return checkpoint.with_name(checkpoint.name + files.UNIVERSAL_SUFFIX)


def _newest(root: Path) -> Found | None:
    paths = files.candidates(root)
    for path in paths:
        marker = files.read_marker(path)
        problem = files.damage(path, marker)
        if marker is not None and problem is None:
            return Found(path, marker)
        logger.warning("the checkpoint %s is torn (%s); trying the one before", path, problem)
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {root} is whole; set run.overwrite to true and run.resume to "
            "none to start from the beginning"
        )
    return None


def _given(path: Path, root: Path, trust: bool) -> Found:
    found = open_checkpoint(path)
    if root.resolve() in found.path.resolve().parents:
        return found
    if not trust and has_pickles(found):
        raise CheckpointError(
            f"{found.path} is outside the run folder, and holds pickles, which can run any code when they are loaded. "
            "If you trust who made it, set run.trust_checkpoint to true"
        )
    return found


def check_loadable(found: Found, trust: bool, remedy: str) -> None:
    """Look through a checkpoint's pickles, without running them, before they are loaded.

    Args:
        found: the checkpoint.
        trust: load whatever they import, with a warning.
        remedy: how the user says so.

    Raises:
        CheckpointError: one imports what no checkpoint of this project does, and `trust` is off.
    """
    for path in _pickles(found):
        problem = problem_of_pickle(path)
        if problem and not trust:
            raise CheckpointError(
                f"{path} {problem}, so loading it could run any code. If you trust who made it, {remedy}"
            )
        if problem:
            logger.warning("loading %s, which can run any code: it %s", path, problem)


def has_pickles(found: Found) -> bool:
    """Whether loading a checkpoint unpickles: DeepSpeed's do, plain torch's don't."""
    return bool(_pickles(found))


def _pickles(found: Found) -> list[Path]:
    """By what lies there, whatever its name: DeepSpeed finds its files by patterns."""
    paths = sorted(p for p in (found.path / files.ENGINE).rglob("*") if not p.is_dir())
    return [p for p in paths if p.suffix != ".safetensors"]


def _check_identity(found: Found, own: dict[str, Any]) -> None:
    theirs = found.marker["identity"]
    missing = [key for key in _ALWAYS if key not in theirs]
    if missing:
        raise CheckpointError(
            f"the checkpoint {found.path} does not say what it is of ({', '.join(missing)} is missing in its "
            f"{files.MARKER}); give one that a run of this project wrote"
        )
    keys = sorted({*own, *theirs})
    new = [k for k in keys if _unknown(k, own) or _unknown(k, theirs)]
    other = [k for k in keys if own.get(k) != theirs.get(k) and k not in new]
    if new:
        logger.warning("settings that the checkpoint's version and this one do not share: %s", ", ".join(new))
    if other:
        shown = "; ".join(f"{k} is {_show(own, k)} here, {_show(theirs, k)} there" for k in other[:4])
        more = f"; and {len(other) - 4} more" if len(other) > 4 else ""
        raise CheckpointError(
            f"the checkpoint {found.path} is of another run: {shown}{more}. Use the settings in its config.yaml, or "
            "start anew in another run.dir"
        )


def _unknown(key: str, values: dict[str, Any]) -> bool:
    """Whether another version wrote the values, which had no such setting: no section above it is null, either."""
    parts = key.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts))]
    below = any(k.startswith(key + ".") for k in values)
    return key not in values and not below and not any(section in values for section in above)


def _for_ranks(found: Found, world_size: int) -> Found:
    """The checkpoint itself for as many ranks as wrote it, or where nothing is partitioned; else its universal form."""
    wrote = found.marker["world_size"]
    if found.universal or wrote == world_size or not any(n.endswith("optim_states.pt") for n in found.marker["files"]):
        return found
    universal = universal_of(found.path)
    marker = files.read_marker(universal)
    if marker is not None and files.damage(universal, marker) is None:
        return Found(universal, marker)
    raise CheckpointError(
        f"the checkpoint {found.path} was written by {wrote} ranks, and this run has {world_size}. Make it universal "
        f"first, then start this run again:\n    python launch/universal_checkpoint.py {found.path}"
    )


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def _show(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"


def _base_fingerprint(base: str | None) -> str | None:
    """A hub id as it is; a folder by its configuration and the sizes of its weights, wherever it is."""
    if base is None or not Path(base).is_dir():
        return base
    weights = sorted((p.name, p.stat().st_size) for p in Path(base).iterdir() if p.suffix in (".safetensors", ".bin"))
    config = Path(base) / "config.json"
    digest = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
    digest.update(json.dumps(weights).encode())
    return f"a folder with fingerprint {digest.hexdigest()[:16]}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
