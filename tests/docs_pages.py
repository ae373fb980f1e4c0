"""The pages of the documentation, cut into what a test can run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "kernels/README.md",
    "calibration/README.md",
    "calibration/FINETUNE.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^ *(```|~~~)", re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, and its text from line `line` of `page` on."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def title(self) -> str:
        """What it is called: the comment in its first line, up to a colon."""
        first = self.text.split("\n", 1)[0]
        return first[1:].split(":")[0].strip() if first.startswith("#") else ""


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks_of(page: str) -> tuple[Block, ...]:
    """All fenced blocks of a page."""
    text = text_of(page)
    blocks = tuple(
        Block(page, text.count("\n", 0, found.start(2)) + 1, found[1].strip(), found[2])
        for found in _BLOCK.finditer(text)
    )
    # An indented or an unclosed block would be left out, and nobody would know.
    assert len(_FENCE.findall(text)) == 2 * len(blocks), f"{page} has a fence that is not found"
    return blocks


def commands_of(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            end = words.index("&&")
            yield words[:end]
            words = words[end + 1 :]
        if words:
            yield words


def spans_of(page: str) -> list[str]:
    """Code within the prose, on one line each."""
    return [" ".join(span.split()) for span in _SPAN.findall(_BLOCK.sub("", text_of(page)))]


def options_in(span: str) -> list[str]:
    """The long options that a piece of code names."""
    return _OPTION.findall(span)


def tables_of(page: str) -> Iterator[list[str]]:
    """The cells of each row of each table, without its head."""
    head = True
    for line in text_of(page).splitlines():
        if not line.startswith("|"):
            head = True
        elif set(line) <= set("|-: "):
            head = False
        elif not head:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def links_of(page: str) -> list[tuple[str, str]]:
    """(file, heading) of each link that stays within the repository."""
    return _LINK.findall(text_of(page))


def anchors_of(text: str) -> set[str]:
    """What the headings of a page are called in links to them."""
    titles = _HEADING.findall(_BLOCK.sub("", text))
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
