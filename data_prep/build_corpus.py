"""Build a corpus grouped by repository: filtered, without duplicates, in reading order, split by repository.

    python -m data_prep.build_corpus --installed --out DIR
    python -m data_prep.build_corpus --starcoderdata starcoderdata/python --max-repos 10000 --out DIR

Writes DIR/{train,validation,test}-*.parquet, which `datasets.load_dataset(DIR)` opens, and DIR/manifest.json. A stopped
build goes on when the same command is run again; a finished one is left as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from titans_ds.files import check_folder, unfinished
from titans_ds.program import program, real_number, some_text, whole_number

from .console import GO_ON, STDERR, command_line
from .corpus.build import build, build_shard
from .errors import DataPrepError
from .licenses import allow_list
from .settings import ORDERS, CorpusSettings
from .shards import CORPUS
from .sources import (
    ArchiveFolder,
    InstalledPackages,
    RepositoryFolders,
    Source,
    StarCoderData,
    open_dataset,
)
from .splits import parse_ratios


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.build_corpus", description=__doc__.split("\n\n")[0])
    sources = parser.add_argument_group("source").add_mutually_exclusive_group(required=True)
    sources.add_argument("--installed", action="store_true", help="the Python packages of this environment")
    sources.add_argument(
        "--folders", type=some_text, metavar="DIR", help="a folder with one folder for each repository"
    )
    sources.add_argument(
        "--archives", type=some_text, metavar="DIR", help="a folder of wheels, sdists or other zip and tar archives"
    )
    sources.add_argument("--starcoderdata", type=some_text, nargs="+", metavar="PATH", help="StarCoderData parquet")
    sources.add_argument("--dataset", type=some_text, metavar="ID_OR_DIR", help="a `datasets` dataset (see --columns)")
    parser.add_argument("--exclude", default="", metavar="NAMES", help="installed packages to leave out (a,b,c)")
    parser.add_argument("--repo-depth", type=whole_number(1, 16), default=1, help="2: --folders DIR holds OWNER/NAME")
    parser.add_argument(
        "--columns", default="", help="of --dataset: repo=A,path=B,content=C,license=D,stars=E,version=F"
    )
    parser.add_argument("--dataset-split", default="train", help="of --dataset (default %(default)s)")
    parser.add_argument("--shard", metavar="I/N", help="read only part I (from 0) of N; then run once without --shard")
    parser.add_argument("--out", type=Path, required=True, help="the corpus folder to write")
    parser.add_argument("--workers", type=whole_number(1, 1024), default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--restart", action="store_true", help="throw away unfinished work, and replace --out")
    _add_filters(parser.add_argument_group("filters"))
    _add_splits(parser.add_argument_group("choice, order and splits"))
    return parser


def _add_filters(group: Any) -> None:
    default = CorpusSettings()
    many = whole_number(1, 10**9)
    group.add_argument("--min-files", type=many, default=default.min_files, help="per repository (default %(default)s)")
    group.add_argument(
        "--min-stars", type=whole_number(0, 10**9), default=default.min_stars, help="where known (default %(default)s)"
    )
    group.add_argument("--max-file-bytes", type=many, default=default.max_file_bytes, help="default %(default)s")
    group.add_argument(
        "--licenses",
        default="",
        metavar="SPDX",
        help="allow-list (MIT,Apache-2.0), or `permissive`; holds where the licence is known",
    )
    group.add_argument("--require-license", action="store_true", help="also drop repositories of unknown licence")
    group.add_argument("--no-require-import", action="store_true", help="keep repositories without an import inside")
    group.add_argument("--require-parse", action="store_true", help="drop files that Python cannot parse")
    group.add_argument("--no-near-duplicates", action="store_true", help="drop exact duplicates only")
    group.add_argument(
        "--near-duplicate-threshold",
        type=real_number(0.5, 1),
        default=default.near_duplicate_threshold,
        help="default %(default)s",
    )
    group.add_argument("--keep-generated", action="store_true", help="keep generated, minified and data files")


def _add_splits(group: Any) -> None:
    default = CorpusSettings()
    group.add_argument("--order", choices=ORDERS, default=default.order, help="of files (default %(default)s)")
    many, seed = whole_number(1, 10**9), whole_number(0, 2**63 - 1)
    group.add_argument("--max-repos", type=many, help="how many repositories to choose (default: all)")
    group.add_argument("--max-files-per-repo", type=many, help="keep the first files in reading order (default: all)")
    group.add_argument("--seed", type=seed, default=default.seed, help="of the choice of repositories")
    group.add_argument("--split-ratios", default="90/5/5", help="train/validation/test (default %(default)s)")
    group.add_argument("--split-seed", type=seed, default=default.split_seed, help="of the split")


def _settings(options: argparse.Namespace) -> CorpusSettings:
    return CorpusSettings(
        min_files=options.min_files,
        min_stars=options.min_stars,
        max_file_bytes=options.max_file_bytes,
        licenses=allow_list(options.licenses),
        require_license=options.require_license,
        require_import=not options.no_require_import,
        require_parse=options.require_parse,
        keep_generated=options.keep_generated,
        near_duplicates=not options.no_near_duplicates,
        near_duplicate_threshold=options.near_duplicate_threshold,
        order=options.order,
        max_repos=options.max_repos,
        max_files_per_repo=options.max_files_per_repo,
        seed=options.seed,
        split_ratios=parse_ratios(options.split_ratios),
        split_seed=options.split_seed,
    )


def _source(options: argparse.Namespace) -> Source:
    if options.installed:
        return InstalledPackages(exclude=tuple(name for name in options.exclude.split(",") if name))
    if options.folders:
        return RepositoryFolders(options.folders, options.repo_depth)
    if options.archives:
        return ArchiveFolder(options.archives)
    if options.starcoderdata:
        return StarCoderData(tuple(options.starcoderdata))
    return open_dataset(options.dataset, options.dataset_split, _columns(options.columns), unfinished(options.out))


def _columns(text: str) -> dict[str, str]:
    pairs = [part.split("=") for part in text.split(",") if part]
    if any(len(pair) != 2 for pair in pairs):
        raise DataPrepError(f"--columns {text!r}: expected pairs as in repo=repo_name,path=path,content=code.")
    return {key: column for key, column in pairs}


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise DataPrepError(f"--shard {text!r}: expected I/N with I from 0 to N-1, as in 0/8.") from None
    return index, count


@program(GO_ON)
def main(arguments: list[str]) -> None:
    """Run the program with these arguments (default: the command line's)."""
    options = _parser().parse_args(arguments)
    check_folder(options.out, CORPUS)
    source, settings = _source(options), _settings(options)
    if options.shard:
        num_chunks = build_shard(source, settings, options.out, *_shard(options.shard), options.workers)
        STDERR.print(f"{unfinished(options.out)}: {num_chunks} chunks of shard {options.shard} are read")
        return
    manifest, reused = build(
        source,
        settings,
        options.out,
        num_workers=options.workers,
        command=command_line(),
        restart=options.restart,
    )
    _print_summary(manifest, options.out, reused)


def _print_summary(manifest: dict[str, Any], out: Path, reused: bool) -> None:
    STDERR.print(f"{out}: " + ("already complete, left as it is" if reused else "written"))
    for entry in manifest["filters"]:
        repositories = "" if entry["repositories"] is None else f" in {entry['repositories']} repositories"
        STDERR.print(f"  after {entry['filter']}: {entry['files']} files{repositories}")
    for split, record in manifest["splits"].items():
        STDERR.print(f"  {split}: {record['files']} files of {record['repositories']} repositories")


if __name__ == "__main__":
    sys.exit(main())
