"""What a document holds: its code blocks, links, headings and words. As a program it runs a page's blocks, in order.

    python tests/support/documents.py PAGE...

It runs them in the folder that it is started in, which has to be a copy of the project. A ```python block goes on with
the names of those before it; ```bash is a shell of its own. A block whose first line is a comment with a path, such as
`# eval/modes/mine.py`, is written there instead; ```diff is applied. A comment in front of a block says why it is left
out: see LEFT_OUT.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LANGUAGES = ("bash", "python", "yaml", "diff", "text")
REASONS = ("needs the hub", "needs a GPU", "needs a cluster", "takes hours", "needs the network")
LEFT_OUT = re.compile(r"<!-- (?:not run: (?P<reason>[^>]+?)|run by (?P<test>[\w./]+)) -->")
_FENCE = re.compile(r"^( *)```(.*)$")
_PATH = re.compile(r"# ([\w./-]+\.(?:py|yaml))$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: that it stands in.
        line: of its fence, from 1.
        language: after the fence; empty where there is none.
        code: between the fences.
        reason: why it is not run; None where it is.
        test: the file of tests that runs it instead.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str | None
    test: str | None

    @property
    def path(self) -> str | None:
        """The file that the block is: named by a comment in its first line."""
        found = _PATH.match(self.code.partition("\n")[0])
        return found[1] if found else None

    @property
    def is_run(self) -> bool:
        """Whether the page's run does something with it."""
        runs = self.language in ("bash", "python", "diff") or (self.language == "yaml" and self.path is not None)
        return runs and self.reason is None and self.test is None


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
        # The comment is the last line before the fence that holds anything.
        before = next((line for line in reversed(lines[:number]) if line.strip()), "")
        mark = LEFT_OUT.fullmatch(before.strip())
        reason, test = (mark["reason"], mark["test"]) if mark else (None, None)
        code = "".join(f"{line.removeprefix(fence[1])}\n" for line in lines[number + 1 : end])
        found.append(Block(page, number + 1, fence[2].strip(), code, reason, test))
        number = end + 1
    return found


def prose(text: str) -> str:
    """A page without its code blocks, comments and the targets of its links."""
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text)


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are no address, code left out."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", target)]


def anchors(page: Path) -> set[str]:
    """What a link may name after #: the headings, as GitHub and mkdocs spell them."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\]\([^)]*\)", "", heading).lower())
        found.add(re.sub(r"\s", "-", words.strip()))  # GitHub
        found.add(re.sub(r"[-\s]+", "-", words.strip()))  # mkdocs
    return found


def run(page: Path, names: dict[str, Any]) -> None:
    """Run a page's blocks in this folder. Raises whatever a block raises, and CalledProcessError of a command."""
    for block in blocks(page):
        if not block.is_run:
            continue
        print(f"--- {page.name}:{block.line}", flush=True)
        if block.path is not None:
            Path(block.path).parent.mkdir(parents=True, exist_ok=True)
            Path(block.path).write_text(block.code)
        elif block.language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
        elif block.language == "diff":
            subprocess.run(["git", "apply", "-"], input=block.code, text=True, check=True)
        else:  # with its lines where they are in the page, for tracebacks
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        run(Path(given), {"__name__": "__main__"})
