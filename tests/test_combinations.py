"""The script that judges combinations of settings: which there are, and how they are reported."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from sla_video.pipelines.errors import InputError
from sla_video.pipelines.json_file import JsonFile

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import combinations as script
from combinations import Combinations, config_of, print_table, read_combinations


def test_those_of_the_file_beside_it_are_settings_that_exist() -> None:
    found = read_combinations(script._SETTINGS)
    assert len(found) == 24
    config = config_of(found["hilbert, keys in place, 90%"])
    assert (config.token_order, config.sparsity, config.dense_steps) == ("hilbert", 0.9, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "holds no combinations"),
        ("[]", "holds no combinations"),
        ("{}", 'neither "axes" nor "also"'),
        ('{"also": {"a": {"magic": 1}}}', "a: unknown settings magic"),
        ('{"axes": {"s": {"much": {"sparsity": 2}}}}', "much: `sparsity` must be in"),
        ('{"also": {"a": {"recipe": "no.json"}}}', "no recipe at 'no.json'"),
    ],
)
def test_bad_files(text: str, words: str, here: Path) -> None:
    Path("c.json").write_text(text)
    with pytest.raises(InputError, match=r"c\.json") as caught:
        read_combinations(Path("c.json"))
    assert words in str(caught.value)


def test_the_table_has_what_is_finished(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = {"order": {"raster": {}, "curve": {"token_order": "hilbert"}}}
    Path("c.json").write_text(json.dumps({"axes": axes, "also": {"x": {"sparsity": 0.5}}}))
    every = Combinations(argparse.Namespace(combinations=Path("c.json"), out=Path("out")))
    assert list(every.combinations) == ["raster", "curve", "x"]
    for name in ("dense", "x", "raster"):
        report = {"combination": name, "all": 50.0, "seconds_per_video": 0.25, "recall": None}
        script.write(every.file(name), report)
    print_table(every, JsonFile(Path("all.json")))
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["dense", "raster", "x"]
    assert all(line.endswith("| 50 | 250 |") for line in lines)
    assert [r["combination"] for r in json.loads(Path("all.json").read_text())] == [
        "dense",
        "raster",
        "x",
    ]
