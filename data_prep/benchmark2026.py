"""The benchmark that comes with this project: samples from packages first released in 2026.

    python -m data_prep.benchmark2026 --out DIR

Unpacks assets/benchmark2026/benchmark2026.tar.xz into DIR: as_is/ and renamed/, the packages' licences, and the
manifest. How it was made, and how "first released in 2026" was established, stands in the README beside it.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from pathlib import Path
from typing import Any

from titans_ds.errors import DataError
from titans_ds.files import atomic_file, atomic_folder, check_file, check_folder, sha256_of
from titans_ds.program import program
from titans_ds.reading import read_json

from .benchmark.build import BENCHMARK
from .console import GO_ON, STDERR

ASSET = Path(__file__).parent / "assets" / "benchmark2026" / "benchmark2026.tar.xz"


def unpack(out: Path) -> Path:
    """Unpack the benchmark into folder `out`, unless it is there already, and return `out`.

    Raises OutputError where `out` holds something else, DataError where a file's hash is not the manifest's.
    """
    if (check_folder(out, BENCHMARK) / BENCHMARK.marker).exists():
        return out
    with atomic_folder(out, BENCHMARK) as folder, tarfile.open(ASSET) as archive:
        archive.extractall(folder, filter="data")
        for name, digest in read_json(folder / BENCHMARK.marker, dict[str, Any])["sha256"].items():
            if sha256_of(folder / name) != digest:
                raise DataError(f"{ASSET}: {name} is damaged. Install the package again.")
    return out


def pack(folder: Path, target: Path) -> None:
    """Write a benchmark folder as .tar.xz, the same bytes for the same files."""
    import lzma

    check_file(target, rb"\A\xfd7zXZ")
    if not (folder / BENCHMARK.marker).is_file():
        raise DataError(f"{folder} has no {BENCHMARK.marker}; expected a folder that data_prep.build_benchmark wrote.")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with (
        atomic_file(target) as temporary,
        lzma.open(temporary, "wb", preset=9 | lzma.PRESET_EXTREME) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for path in files:
            info = tarfile.TarInfo(path.relative_to(folder).as_posix())
            info.size = path.stat().st_size
            with open(path, "rb") as handle:
                tar.addfile(info, handle)


@program(GO_ON)
def main(arguments: list[str]) -> None:
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
    sys.exit(main())
