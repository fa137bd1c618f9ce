"""The benchmark that comes with this project: samples from packages first released in 2026.

    python -m data_prep.benchmark2026 --out DIR

Unpacks assets/benchmark2026/benchmark2026.tar.xz into DIR: as_is/ and renamed/, the packages' licences, and the
manifest. How it was made, and how "first released in 2026" was established, stands in the README beside it.
"""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Sequence
from pathlib import Path

from .console import STDERR, run_program
from .errors import DataPrepError
from .output import atomic_folder, read_json, sha256_of

ASSET = Path(__file__).parent / "assets" / "benchmark2026" / "benchmark2026.tar.xz"


def unpack(out: Path) -> Path:
    """Unpack the benchmark into folder `out`, unless it is there already, and return `out`.

    Raises DataPrepError where `out` holds something else, or a file's hash is not the manifest's.
    """
    if out.exists():
        if not (out / "manifest.json").is_file():
            raise DataPrepError(f"{out} is there already and is no benchmark folder. Give another --out.")
        return out
    with atomic_folder(out) as folder, tarfile.open(ASSET) as archive:
        archive.extractall(folder, filter="data")
        for name, digest in read_json(folder / "manifest.json")["sha256"].items():
            if sha256_of(folder / name) != digest:
                raise DataPrepError(f"{ASSET}: {name} is damaged. Install the package again.")
    return out


def pack(folder: Path, target: Path) -> None:
    """Write a benchmark folder as .tar.xz, the same bytes for the same files."""
    import lzma

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with (
        lzma.open(target, "wb", preset=9 | lzma.PRESET_EXTREME) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for path in files:
            info = tarfile.TarInfo(path.relative_to(folder).as_posix())
            info.size = path.stat().st_size
            with open(path, "rb") as handle:
                tar.addfile(info, handle)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program with these arguments (default: the command line's)."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.benchmark2026", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where to unpack it")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="instead: write a benchmark folder to the file --out")
    options = parser.parse_args(arguments)
    if options.pack:
        pack(options.pack, options.out)
    else:
        unpack(options.out)
    STDERR.print(f"{options.out}: written")


if __name__ == "__main__":
    run_program(main)
