"""`docs/compatibility.md` is what the table of the tests says, and each row has its test."""

from __future__ import annotations

import ast
from pathlib import Path

from compatibility_table import PAGE, SINGLES, page, rows

HERE = Path(__file__).parent


def test_the_page_is_made_of_the_table():
    made = "run `python tests/compatibility_table.py`"
    assert PAGE.read_text(encoding="utf-8") == page(), f"docs/compatibility.md is old: {made}"


def test_each_row_is_there_once():
    names = [(row.group, row.name) for row in rows()]
    assert len(set(names)) == len(names)


def test_rows_that_name_a_test_name_one_that_exists():
    for row in SINGLES:
        file, _, function = row.test.partition("::")
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in ast.walk(tree) if hasattr(node, "name")}, row.test
