"""Make CrossCodeEval-format samples from any repositories.

    python -m data_prep.build_benchmark --archives DIR --licenses permissive --rename --out DIR

A sample is a place where the code needs another file of its repository, found by static analysis. Writes, for the
files as they are (OUT/as_is) and, with --rename, with the repository's own names changed (OUT/renamed),
<language>/line_completion.jsonl and line_completion_{rg1,oracle}_<retriever>.jsonl, and OUT/manifest.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from titans_ds.program import program, some_text, whole_number

from .benchmark.build import BenchmarkSettings, build_benchmark
from .benchmark.languages import LANGUAGES
from .benchmark.retrieval import BM25, Embeddings, Ranker
from .benchmark.sample_filters import SampleLimits
from .console import GO_ON, STDERR, command_line
from .licenses import allow_list
from .settings import CorpusSettings
from .sources import ArchiveFolder, InstalledPackages, RepositoryFolders, Source


def _parser() -> argparse.ArgumentParser:
    limits = SampleLimits()
    parser = argparse.ArgumentParser(prog="python -m data_prep.build_benchmark", description=__doc__.split("\n\n")[0])
    sources = parser.add_argument_group("source").add_mutually_exclusive_group(required=True)
    sources.add_argument(
        "--archives", type=some_text, metavar="DIR", help="a folder of wheels, sdists or other archives"
    )
    sources.add_argument(
        "--folders", type=some_text, metavar="DIR", help="a folder with one folder for each repository"
    )
    sources.add_argument("--installed", action="store_true", help="the Python packages of this environment")
    parser.add_argument("--repo-depth", type=whole_number(1, 16), default=1, help="2: --folders DIR holds OWNER/NAME")
    parser.add_argument("--out", type=Path, required=True, help="the benchmark folder to write (replaced if there)")
    many = whole_number(1, 10**9)
    parser.add_argument("--language", choices=sorted(LANGUAGES), default="python")
    parser.add_argument("--licenses", default="", metavar="SPDX", help="allow-list, or `permissive`; unknown ones go")
    parser.add_argument(
        "--retrieval", type=some_text, default="bm25", metavar="bm25|MODEL", help="or an encoder's folder or Hub id"
    )
    parser.add_argument("--rename", action="store_true", help="also write a copy with the repository's names changed")
    parser.add_argument("--max-samples", type=many, help="choose so many (default: all)")
    parser.add_argument("--min-files", type=many, default=3, help="per repository (default %(default)s)")
    for name, help_text in _LIMITS.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(
            option,
            type=whole_number(0, 10**9),
            default=getattr(limits, name),
            help=f"{help_text} (default %(default)s)",
        )
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, help="of the choice and of the new names")
    return parser


_LIMITS = {
    "min_prompt_lines": "lines of code before the target, imports not counted",
    "min_target_tokens": "words and signs in the target",
    "max_target_tokens": "words and signs in the target",
    "max_file_characters": "longer files give no samples",
    "max_per_file": "samples of one file",
    "max_per_repository": "samples of one repository",
}


def _source(options: argparse.Namespace) -> Source:
    if options.installed:
        return InstalledPackages()
    if options.archives:
        return ArchiveFolder(options.archives)
    return RepositoryFolders(options.folders, options.repo_depth)


@program(GO_ON)
def main(arguments: list[str]) -> None:
    """Run the program with these arguments (default: the command line's)."""
    options = _parser().parse_args(arguments)
    licenses = allow_list(options.licenses)
    settings = BenchmarkSettings(
        language=options.language,
        limits=SampleLimits(**{name: getattr(options, name) for name in _LIMITS}),
        min_files=options.min_files,
        max_samples=options.max_samples,
        rename=options.rename,
        seed=options.seed,
    )
    files = CorpusSettings(licenses=licenses, require_license=bool(licenses))
    ranker: Ranker = BM25() if options.retrieval == "bm25" else Embeddings(options.retrieval)
    manifest = build_benchmark(_source(options), files, settings, ranker, options.out, command_line())
    STDERR.print(f"{options.out}: {manifest['samples']} samples of {len(manifest['repositories'])} repositories")
    for reason, number in manifest["targets_dropped"].items():
        STDERR.print(f"  {number} targets left out: {reason}")


if __name__ == "__main__":
    sys.exit(main())
