"""A `datasets` dataset: a Hub id, a local folder that `load_dataset` or `load_from_disk` opens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_ds.files import start_work

from ..errors import DataPrepError
from ..settings import WORK, fingerprint
from .base import Source, SourceFile, Unit, source_file

REQUIRED = ("repo", "path", "content")
OPTIONAL = ("license", "stars", "version")
_ROWS_PER_UNIT = 4096


@dataclass(frozen=True)
class DatasetFiles(Source):
    """The Arrow files of a loaded dataset, with the names of its columns."""

    name: str
    split: str
    arrow_files: tuple[tuple[str, int], ...]
    columns: tuple[tuple[str, str], ...]
    dataset_fingerprint: str

    def describe(self) -> dict[str, Any]:
        """Return the dataset's name, split, columns and fingerprint."""
        return {
            "kind": "dataset",
            "name": self.name,
            "split": self.split,
            "columns": dict(self.columns),
            "fingerprint": self.dataset_fingerprint,
        }

    def list_units(self) -> list[Unit]:
        """Return one unit for every few thousand rows."""
        units = []
        for index, (path, num_rows) in enumerate(self.arrow_files):
            size = Path(path).stat().st_size // max(1, num_rows)
            for start in range(0, num_rows, _ROWS_PER_UNIT):
                stop = min(start + _ROWS_PER_UNIT, num_rows)
                units.append(Unit(f"{index}:{start}:{stop}", size * (stop - start)))
        return units

    def read(self, unit: Unit, max_file_bytes: int) -> Iterator[SourceFile]:
        """Yield some rows' files."""
        from datasets import Dataset

        index, start, stop = map(int, unit.key.split(":"))
        rows = Dataset.from_file(self.arrow_files[index][0]).select(range(start, stop))
        names = dict(self.columns)
        for row in rows:
            values = {key: row.get(column) for key, column in names.items()}
            yield source_file(**values)


def open_dataset(name: str, split: str, columns: dict[str, str], work_folder: Path) -> DatasetFiles:
    """Load a dataset and return it as a source. `columns` maps repo, path, content, … to the dataset's names.

    Raises DataPrepError where it cannot be loaded or lacks a column.
    """
    dataset = _load(name, split)
    unknown = [key for key in columns if key not in REQUIRED + OPTIONAL]
    if unknown:
        raise DataPrepError(f"--columns: unknown {', '.join(unknown)}. Expected {', '.join(REQUIRED + OPTIONAL)}.")
    names = {key: columns.get(key, key) for key in REQUIRED + OPTIONAL}
    missing = [names[key] for key in REQUIRED if names[key] not in dataset.column_names]
    if missing:
        raise DataPrepError(
            f"The dataset {name} lacks {', '.join(missing)}; it has {', '.join(dataset.column_names)}. "
            "Name its columns: --columns repo=…,path=…,content=…"
        )
    found = tuple((key, column) for key, column in names.items() if column in dataset.column_names)
    return DatasetFiles(name, split, _arrow_files(dataset, work_folder), found, _fingerprint(dataset))


def _load(name: str, split: str) -> Any:
    import datasets

    try:
        if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataPrepError(
            f"Cannot load the dataset {name!r}, split {split!r}: "
            f"{str(error).splitlines()[0] if str(error) else error!r}. "
            "Expected a Hub id or a local folder; --dataset-split names the split."
        ) from error


def _arrow_files(dataset: Any, work_folder: Path) -> tuple[tuple[str, int], ...]:
    """Return (path, rows) of the dataset's Arrow files; written first where they hold more than its rows."""
    from datasets import Dataset

    paths = [entry["filename"] for entry in dataset.cache_files]
    sizes = [len(Dataset.from_file(path)) for path in paths]
    if sum(sizes) != len(dataset):
        folder = work_folder / f"rows-{dataset._fingerprint}"
        if not (folder / "state.json").exists():
            start_work(work_folder, WORK)
            dataset.save_to_disk(str(folder))
        paths = sorted(map(str, folder.glob("*.arrow")))
        sizes = [len(Dataset.from_file(path)) for path in paths]
    return tuple(zip(paths, sizes, strict=True))


def _fingerprint(dataset: Any) -> str:
    return fingerprint([dataset._fingerprint, len(dataset), dataset.column_names])
