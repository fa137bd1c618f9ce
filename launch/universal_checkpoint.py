"""Make a checkpoint universal, so that a run goes on with another number of ranks.

    python launch/universal_checkpoint.py RUN

RUN is a run folder, or one of its checkpoints. The universal form is written beside the checkpoint, where
`--resume auto` finds it. For ZeRO 1, 2 and 3; plain torch and ZeRO 0 resume with any number of ranks as they are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only its own folder is on the path

from titans_ds.errors import CheckpointError, TitansError
from titans_ds.training import checkpoint_files as files
from titans_ds.training.checkpoint import Found
from titans_ds.training.resume import open_checkpoint, universal_of, warn_of_pickles
from titans_ds.zero.universal import make_universal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code, 2 for an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="launch/universal_checkpoint.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="run folder, or a checkpoint in it")
    options = parser.parse_args(argv)
    try:
        found = open_checkpoint(options.checkpoint)
        print(f"universal checkpoint: {convert(found)}")
    except TitansError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(found: Found) -> Path:
    """Write the universal form beside a checkpoint; nothing to do where it is there.

    Raises:
        CheckpointError: the checkpoint has nothing partitioned.
    """
    if not any(name.endswith("optim_states.pt") for name in found.marker["files"]):
        raise CheckpointError(
            f"{found.path} is of {found.marker['identity']['engine']}: any number of ranks can load it"
        )
    out = universal_of(found.path)
    if found.universal or files.damage(out, files.read_marker(out)) is None:
        return found.path if found.universal else out
    warn_of_pickles(found)
    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for path in found.path.iterdir():
        if path.is_file() and path.name != files.MARKER:
            shutil.copy2(path, partial)
    make_universal(found.path / files.ENGINE, partial / files.ENGINE)
    described = files.describe(partial, sorted(p for p in partial.rglob("*") if p.is_file()))
    files.write_marker(partial, {**found.marker, "universal": True, "files": described})
    shutil.rmtree(out, ignore_errors=True)
    return partial.rename(out)


if __name__ == "__main__":
    sys.exit(main())
