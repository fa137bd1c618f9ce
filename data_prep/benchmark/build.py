"""From repositories to samples: find targets, filter and choose, rename where asked, retrieve, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from titans_ds.files import (
    Kind,
    atomic_folder,
    check_folder,
    sha256_of,
    work_folder,
    write_json,
    write_jsonl,
    write_text,
)

from ..console import progress_bar
from ..crosscodeeval import CrossCodeEvalRow, CrossFileChunk, build_crossfile_text
from ..errors import DataPrepError
from ..hashing import hash64
from ..settings import CorpusSettings
from ..sources.base import Source
from ..sources.reading import path_component
from .languages import LANGUAGES, Language
from .parts import Parts
from .renaming import Renamer
from .repository import Repository, read_repositories
from .retrieval import MODES, Ranker, Retriever
from .sample_filters import SampleLimits, choose
from .targets import Target

BENCHMARK = Kind("a benchmark", "manifest.json", rb'"target_kinds"|"samples"\s*:')


@dataclass(frozen=True)
class BenchmarkSettings:
    """What decides the samples. `rename` adds a second copy of every sample with the repository's own names changed."""

    language: str = "python"
    limits: SampleLimits = field(default_factory=SampleLimits)
    min_files: int = 3
    max_samples: int | None = None
    rename: bool = False
    seed: int = 0


@dataclass
class _Built:
    """Samples and counts on their way to the files."""

    rows: dict[str, dict[str, list[dict[str, Any]]]]
    dropped: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    repositories: list[dict[str, Any]] = field(default_factory=list)
    license_texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Variant:
    """One form of a repository: as it is, or renamed."""

    label: str
    files: dict[str, str]
    renamer: Renamer | None


def build_benchmark(
    source: Source, files: CorpusSettings, settings: BenchmarkSettings, ranker: Ranker, out: Path, command: str
) -> dict[str, Any]:
    """Write the benchmark to folder `out` and return its manifest.

    `files` holds the file filters and the licence allow-list. A build that was stopped goes on where it was when the
    same command is given again. Raises DataPrepError naming the filters where no sample is left.
    """
    check_folder(out, BENCHMARK)
    language = _language(settings.language)
    # A part's name says what decides it: those of any settings may lie side by side.
    with work_folder(out, "a benchmark") as work:
        parts = Parts(work, {"settings": asdict(settings), "files": files.to_json(), "retrieval": ranker.name})
        built = _build(source, files, settings, ranker, language, parts)
        return _write(built, source, files, settings, ranker, out, command)


def _build(
    source: Source,
    files: CorpusSettings,
    settings: BenchmarkSettings,
    ranker: Ranker,
    language: Language,
    parts: Parts,
) -> _Built:
    """Find, choose, rename and retrieve, one repository after the other."""
    found = list(_found(source, files, settings, language, parts))
    kept = _sampled([(repository, target) for repository, chosen, _ in found for target in chosen], settings)
    built = _Built({variant: {mode: [] for mode in ("none", *MODES)} for variant in _variants(settings)})
    for repository, chosen, dropped in found:
        built.dropped.update(dropped)
        mine = [target for target in chosen if (repository.name, target.file, target.start) in kept]
        if mine:
            _add_repository(built, repository, mine, settings, ranker, language, parts)
            for name, text in source.license_texts(repository.unit).items():
                place = f"{path_component(repository.label)}/{path_component(name.replace('/', '_'))}"
                built.license_texts[place] = text
    _require_samples(built, len(found))
    return built


def _language(name: str) -> Language:
    if name not in LANGUAGES:
        raise DataPrepError(f"--language {name!r}: expected one of {', '.join(LANGUAGES)}.")
    return LANGUAGES[name]


def _variants(settings: BenchmarkSettings) -> tuple[str, ...]:
    return ("as_is", "renamed") if settings.rename else ("as_is",)


def _found(
    source: Source, files: CorpusSettings, settings: BenchmarkSettings, language: Language, parts: Parts
) -> Iterator[tuple[Repository, list[Target], Counter[str]]]:
    with progress_bar() as progress:
        task = progress.add_task("finding targets", total=len(source.list_units()))
        for repository in read_repositories(source, files):
            progress.advance(task)
            if len(repository.files) >= settings.min_files:
                yield repository, *_targets(repository, settings, language, parts)


def _targets(
    repository: Repository, settings: BenchmarkSettings, language: Language, parts: Parts
) -> tuple[list[Target], Counter[str]]:
    done = parts.get("targets", repository)
    if done is not None:
        return [Target(**target) for target in done["chosen"]], Counter(done["dropped"])
    targets = language.find(repository)
    chosen, dropped = choose(targets, repository.files, settings.limits, repository.name, settings.seed)
    parts.put({"chosen": [asdict(target) for target in chosen], "dropped": dict(dropped)}, "targets", repository)
    return chosen, dropped


def _sampled(pairs: list[tuple[Repository, Target]], settings: BenchmarkSettings) -> set[tuple[str, str, int]]:
    """Return `max_samples` of the samples, by a hash of name, place and seed."""
    keys = [(repository.name, target.file, target.start) for repository, target in pairs]
    keys.sort(key=lambda key: hash64("\0".join(map(str, key)), f"benchmark{settings.seed}"))
    return set(keys[: settings.max_samples])


def _add_repository(
    built: _Built,
    repository: Repository,
    targets: list[Target],
    settings: BenchmarkSettings,
    ranker: Ranker,
    language: Language,
    parts: Parts,
) -> None:
    number, places = len(built.rows["as_is"]["none"]), [asdict(target) for target in targets]
    rows = parts.get("rows", repository, number, places)
    if rows is None:
        rows = {
            name: _variant_rows(repository, targets, name, number, settings, ranker, language) for name in built.rows
        }
        parts.put(rows, "rows", repository, number, places)
    for name, modes in rows.items():
        for mode, values in modes.items():
            built.rows[name][mode] += values
    built.kinds.update(target.kind for target in targets)
    record = {"repository": repository.label, "license": repository.license, "version": repository.version}
    built.repositories.append({**record, "files": len(repository.files), "samples": len(targets)})


def _variant_rows(
    repository: Repository,
    targets: list[Target],
    name: str,
    number: int,
    settings: BenchmarkSettings,
    ranker: Ranker,
    language: Language,
) -> dict[str, list[dict[str, Any]]]:
    """JSON rows by mode; task numbers count from `number`."""
    variant = _variant(repository, name, settings.seed)
    retriever = Retriever(variant.files, ranker)
    rows: dict[str, list[dict[str, Any]]] = {mode: [] for mode in ("none", *MODES)}
    for place, target in enumerate(targets):
        plain = _row(repository, target, variant, f"project_cc_{language.name}/{number + place}", language)
        rows["none"].append(plain.to_json())
        for mode in MODES:
            chunks = retriever.retrieve(plain.file, plain.prompt, plain.groundtruth, mode)
            rows[mode].append(_with_context(plain, chunks).to_json())
    return rows


def _variant(repository: Repository, name: str, seed: int) -> _Variant:
    if name == "as_is":
        return _Variant(repository.label, repository.files, None)
    renamer = Renamer(repository.files, seed)
    label = f"renamed-{hash64(repository.label, f'label{seed}'):016x}"
    return _Variant(label, renamer.rename_files(repository.files), renamer)


def _row(
    repository: Repository, target: Target, variant: _Variant, task_id: str, language: Language
) -> CrossCodeEvalRow:
    text = repository.files[target.file]
    parts = text[: target.start], text[target.start : target.end], text[target.end :]
    file = target.file
    if variant.renamer is not None:
        # The cursor stands between words, so the parts can be renamed one by one.
        parts = tuple(map(variant.renamer.rename, parts))
        file = variant.renamer.rename(file)
    prompt, truth, right = parts
    line = prompt.count("\n")
    metadata = {
        "task_id": task_id,
        "repository": variant.label,
        "file": file,
        "context_start_lineno": 0,
        "groundtruth_start_lineno": line,
        "right_context_start_lineno": line + 1 + truth.count("\n"),
        "target_kind": target.kind,
    }
    return CrossCodeEvalRow(task_id, variant.label, file, prompt, truth, right, language.name, metadata=metadata)


def _with_context(row: CrossCodeEvalRow, chunks: list[CrossFileChunk]) -> CrossCodeEvalRow:
    values = {**vars(row), "crossfile_text": build_crossfile_text(chunks, row.language)}
    return CrossCodeEvalRow(**{**values, "crossfile_list": tuple(chunks)})


def _require_samples(built: _Built, num_repositories: int) -> None:
    if not built.rows["as_is"]["none"]:
        reasons = ", ".join(f"{name}: {number}" for name, number in built.dropped.most_common()) or "no targets found"
        raise DataPrepError(
            f"No sample is left from {num_repositories} repositories ({reasons}). Relax the limit that took most, "
            f"or give "
            "repositories whose files import each other."
        )


def _write(
    built: _Built,
    source: Source,
    files: CorpusSettings,
    settings: BenchmarkSettings,
    ranker: Ranker,
    out: Path,
    command: str,
) -> dict[str, Any]:
    with atomic_folder(out, BENCHMARK) as folder:
        hashes: dict[str, str] = {}
        for variant, modes in built.rows.items():
            for mode, rows in modes.items():
                suffix = "" if mode == "none" else f"_{mode}_{ranker.name}"
                path = folder / variant / settings.language / f"line_completion{suffix}.jsonl"
                write_jsonl(path, rows)
                hashes[path.relative_to(folder).as_posix()] = sha256_of(path)
        for name, text in built.license_texts.items():
            write_text(folder / "licenses" / name, text)
        manifest = {
            "command": command,
            "source": source.describe(),
            "settings": asdict(settings),
            "file_filters": files.to_json(),
            "retrieval": ranker.name,
            "samples": len(built.rows["as_is"]["none"]),
            "target_kinds": dict(built.kinds),
            "targets_dropped": dict(built.dropped.most_common()),
            "repositories": built.repositories,
            "sha256": hashes,
        }
        write_json(folder / "manifest.json", manifest)
    return manifest
