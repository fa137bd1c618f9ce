"""Make a checkpoint universal, so that a run goes on with another number of ranks.

    python launch/universal_checkpoint.py RUN

RUN is a run folder, or one of its checkpoints. The universal form is written beside the checkpoint, where
`--resume auto` finds it. For ZeRO 1, 2 and 3; plain torch and ZeRO 0 resume with any number of ranks as they are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only its own folder is on the path

from titans_ds.errors import CheckpointError
from titans_ds.files import Kind, atomic_folder
from titans_ds.program import program
from titans_ds.training.checkpoints import files
from titans_ds.training.checkpoints.checkpoint import Found
from titans_ds.training.checkpoints.resume import TRUST_HELP, check_loadable, open_checkpoint, universal_of
from titans_ds.zero.universal import make_universal

_UNIVERSAL = Kind("a universal checkpoint", files.MARKER)


@program("run the same command again")
def main(argv: list[str]) -> None:
    """Run the program; returns its exit code, 2 for an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="launch/universal_checkpoint.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="run folder, or a checkpoint in it")
    parser.add_argument("--trust-checkpoint", action="store_true", help=TRUST_HELP)
    options = parser.parse_args(argv)
    found = open_checkpoint(options.checkpoint)
    print(f"universal checkpoint: {convert(found, options.trust_checkpoint)}")


def convert(found: Found, trust: bool = False) -> Path:
    """Write the universal form beside a checkpoint; nothing to do where it is there.

    Args:
        found: the checkpoint.
        trust: load its pickles whatever they import.

    Raises:
        CheckpointError: the checkpoint has nothing partitioned, or is not to be trusted.
    """
    if not any(name.endswith("optim_states.pt") for name in found.marker["files"]):
        raise CheckpointError(
            f"{found.path} is of {found.marker['identity'].get('engine')}: any number of ranks can load it"
        )
    out = universal_of(found.path)
    if found.universal or files.damage(out, files.read_marker(out)) is None:
        return found.path if found.universal else out
    check_loadable(found, trust, "give --trust-checkpoint")
    with atomic_folder(out, _UNIVERSAL) as partial:
        for path in found.path.iterdir():
            if path.is_file() and path.name != files.MARKER:
                shutil.copy2(path, partial)
        make_universal(found.path / files.ENGINE, partial / files.ENGINE)
        described = files.describe(partial, sorted(p for p in partial.rglob("*") if p.is_file()))
        files.write_marker(partial, {**found.marker, "universal": True, "files": described})
    return out


if __name__ == "__main__":
    sys.exit(main())
