"""Documents: links lead somewhere, pages are short, and every code block is run, or says why not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from tests.support.documents import LANGUAGES, REASONS, Block, anchors, blocks, links, prose

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Folders' own pages are linked from the documents, and packaged models' cards are read on their own.
FOLDERS = [p for top in ("titans_ds", "launch", "eval", "data_prep", "ds_configs") for p in (ROOT / top).rglob("*.md")]
LINKED = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *FOLDERS})
WITH_CODE = [ROOT / "README.md", *PAGES]
MOST_WORDS = 900  # of a page, code and tables too
GENERATED = {"model_types.md"}  # its table has a line for each type of model
README_LINES, README_NUMBERS = 120, 5  # at most; numbers for each 100 words of prose


def name(page: Path) -> str:
    """Of a page in the results."""
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        known = goal.exists() and goal.is_relative_to(ROOT)
        if not known or (anchor and goal.suffix == ".md" and anchor not in anchors(goal)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *WITH_CODE], ids=name)
def test_paths_in_the_text_exist(page: Path) -> None:
    """`path/like/this.py` in backticks, as seen from the project's root."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    tops = "titans_ds|launch|eval|data_prep|ds_configs|docs|tests|benchmarks|examples"
    paths = [path for path in re.findall(rf"`((?:{tops})/[\w./-]+)`", text) if "NAME" not in path]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=name)
def test_a_page_has_one_theme_and_few_words(page: Path) -> None:
    text = page.read_text()
    assert len(re.sub(r"<!--.*?-->", "", text).split()) <= MOST_WORDS
    titles = re.findall(r"^# .+", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    assert len(titles) == 1


def test_the_readme_is_short_and_holds_few_numbers() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= README_LINES
    words = prose(text)
    numbers = re.findall(r"(?<![\w.])\d[\d,.]*", words)
    assert len(numbers) / len(words.split()) <= README_NUMBERS / 100


def test_every_page_is_in_the_sites_navigation() -> None:
    named = re.findall(r"^ +- (?:.+: )?([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert set(named) >= {page.name for page in PAGES}
    assert [target for target in named if not (ROOT / "docs" / target).is_file()] == []


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_every_code_block_names_its_language_and_says_why_it_is_not_run(page: Path) -> None:
    wrong = {f"{page.name}:{block.line}": problem for block in blocks(page) if (problem := problem_of(block))}
    assert wrong == {}


def problem_of(block: Block) -> str | None:
    """What is wrong with a block; None where nothing is."""
    if block.language not in LANGUAGES:
        return f"a fence names one of {', '.join(LANGUAGES)}"
    if block.reason is not None and block.reason not in REASONS:
        return f"a block is left out where it {', '.join(REASONS)}"
    if block.test is not None and not (ROOT / block.test).is_file():
        return f"{block.test} does not exist"
    if block.language == "yaml":
        yaml.safe_load(block.code)
    return None


def test_functions_that_the_way_of_a_token_names_stand_in_their_files() -> None:
    rows = re.findall(r"^\| `([\w./]+)` \| (.+?) \|", (ROOT / "docs/reading_the_code.md").read_text(), re.MULTILINE)
    assert len(rows) > 15
    for path, functions in rows:
        file = ROOT / (path if path.startswith("launch/") else f"titans_ds/{path}")
        tree = ast.parse(file.read_text())
        held = [node for top in tree.body for node in [top, *getattr(top, "body", [])]]
        known = {node.name for node in held if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        named = {part for name in re.findall(r"`([\w.]+)`", functions) for part in name.split(".")}
        assert named <= known, path


def test_a_block_is_found_with_its_place_its_path_and_its_reason(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n```python\nx = 1\n```\n\n```python\n# a/b.py\nx = 2\n```\n\n"
        "<!-- not run: needs a GPU -->\n```bash\nnvidia-smi\n```\n\n- point\n\n  ```bash\n  true\n  ```\n"
    )
    first, second, third, fourth = blocks(page)
    assert (first.line, first.code, first.path, first.is_run) == (3, "x = 1\n", None, True)
    assert (second.path, second.is_run) == ("a/b.py", True)
    assert (third.reason, third.is_run) == ("needs a GPU", False)
    assert fourth.code == "true\n"


def test_headings_become_the_anchors_that_links_name(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One, two\n\n```bash\n# no heading\n```\n\n## `attach` & [more](x.md)?\n")
    assert anchors(page) == {"one-two", "attach--more", "attach-more"}
