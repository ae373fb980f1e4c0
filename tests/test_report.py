"""`generate --record` and `report`: the page against numbers found another way."""

from __future__ import annotations

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from cli_tools import assert_refused, call, files_below
from PIL import Image

import sla_video
from sla_video.pipelines import generation
from sla_video.pipelines.recording import Recording
from sla_video.pipelines.reports import pictures
from sla_video.pipelines.reports.runs import find_runs

PROMPT = "a red circle moves left"
# 3 x 8 x 8 = 192 tokens: three key blocks, of which one is kept, and two query blocks.
SIZE = ("--frames", 9, "--height", 64, "--width", 64, "--steps", 3, "--seed", 3, "--device", "cpu")
SPARSE = ("--sparsity", 0.6, "--dense-steps", 1)


@pytest.fixture(scope="module")
def runs(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs A (dense), B (sparse and recorded) and C (sparse, not recorded). Do not write there."""
    folder = tmp_path_factory.mktemp("runs")
    seen = {}
    write = generation.write_video

    def spy(path: Path, frames: Any, *rest: Any) -> None:
        seen[path.stem] = frames
        write(path, frames, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "write_video", spy)
        for name, options in (
            ("a", ["--dense"]),
            ("b", [*SPARSE, "--record"]),
            ("c", SPARSE),
        ):
            out = folder / f"{name}.mp4"
            done = call(
                "generate", PROMPT, "--model", tiny_pipeline_dir, *SIZE, *options, "--out", out
            )
            assert done.code == 0, done.err
    np.testing.assert_array_equal(seen["b"], seen["c"], "recording changed the video")
    return folder


@pytest.fixture(scope="module")
def report(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports") / "new" / "report"
    outcome = call("report", runs, "--out", out, "--frames", 3)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{out / 'report.html'}\n"
    return out


class Page(HTMLParser):
    """Tables by id, as rows of texts; pictures by id; and whatever a browser would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.marked: list[str] = []
        self.pictures: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self._table, self._cell, self._differs = "", False, False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        if tag == "table":
            self._table = found["id"]
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
            self._differs = found.get("class") == "differs"
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
            self._cell = True
        elif tag == "img":
            head, _, data = found["src"].partition(",")
            assert head == "data:image/png;base64"
            self.pictures[found["id"]] = base64.b64decode(data)
        if tag in ("script", "link", "iframe") or "href" in found:
            self.fetched.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False
        if tag == "tr" and self._differs:
            self.marked.append(self.tables[self._table][-1][0])

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[self._table][-1][-1] += data


def measured_anew(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Recall and relative L1 of each sparse call, by layer: the pipeline once more, in float64."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder)
    handle = sla_video.enable_sla(pipe, sparsity=0.6, dense_steps=1)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in handle.processors}

    def watch(name: str) -> Any:
        def attention(processor: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
            output = processor.sla2(query, key, value)
            q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
            # Without training the blocks of the highest mean score: here one of three.
            means = torch.stack([q[:, :, :128].mean(2), q[:, :, 128:].mean(2)], 2)
            best = (means @ k.unflatten(2, (3, 64)).mean(3).mT).argmax(-1)
            kept = torch.nn.functional.one_hot(best, 3).repeat_interleave(64, 3)
            kept = kept[:, :, [0] * 128 + [1] * 64]
            weights = torch.softmax(q @ k.mT / query.shape[-1] ** 0.5, -1)
            # By query block, as the second is shorter: 128 and 64 tokens.
            mass = (weights * kept).sum(-1)
            recall = (mass[..., :128].mean() + mass[..., 128:].mean()) / 2
            full = (weights @ v).transpose(1, 2)
            error = (output - full).abs().sum() / full.abs().sum()
            found[name].append((float(recall), float(error)))
            return output

        return attention

    for name, processor in handle.processors.items():
        processor.attention = watch(name)
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt(PROMPT, None, True, max_sequence_length=512)
        pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            num_frames=9,
            height=64,
            width=64,
            num_inference_steps=3,
            guidance_scale=5.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(3),
        )
    return found


def test_numbers_are_those_of_another_measurement(
    runs: Path, report: Path, tiny_pipeline_dir: Path
) -> None:
    page = Page(report / "report.html")
    head, *rows = page.tables["layers-B"]
    assert head[:4] == ["layer", "sparsity", "recall", "relative L1"]
    recording = Recording.load(runs / "b.recording.safetensors")
    found = measured_anew(tiny_pipeline_dir)
    assert [row[0] for row in rows] == list(found)
    for row, layer, calls in zip(rows, recording.layers, found.values(), strict=True):
        # Two of three steps were sparse, each ran with and without the prompt.
        assert len(calls) == 4
        recall, error = (sum(x) / 4 for x in zip(*calls, strict=True))
        assert float(row[1]) == pytest.approx(2 / 3 * 2 / 3, abs=6e-5)
        assert float(row[2]) == pytest.approx(recall, abs=2e-4)
        assert float(row[3]) == pytest.approx(error, rel=0.01, abs=1e-4)
        assert layer.recall[0].isnan().all()
        for step, pair in ((1, calls[:2]), (2, calls[2:])):
            wanted = (pair[0][0] + pair[1][0]) / 2
            assert float(layer.recall[step].mean()) == pytest.approx(wanted, abs=2e-4)
    assert page.tables["layers-C"][0] == ["layer", "sparsity", "seconds"]


def test_summary(runs: Path, report: Path) -> None:
    head, *rows = Page(report / "report.html").tables["summary"]
    table = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["run"] + row["video"] + row["attention"] for row in table] == [
        "Aa.mp4dense",
        "Bb.mp4SLA2",
        "Cc.mp4SLA2",
    ]
    layers = json.loads((runs / "b.json").read_text())["attention"]["layers"]
    mean = sum(layer["recall"] for layer in layers) / 3
    assert table[1]["recall"] == f"{mean:.4f}"
    assert table[0]["recall"] == table[2]["recall"] == "–"  # noqa: RUF001
    errors = [
        ((x.astype(float) - y) ** 2).mean()
        for x, y in zip(*(imageio.get_reader(runs / f"{x}.mp4") for x in "ab"), strict=True)
    ]
    psnr = np.mean(10 * np.log10(255**2 / np.array(errors)))
    assert table[1]["PSNR, dB"] == table[2]["PSNR, dB"] == f"{psnr:.2f} to A"
    assert table[0]["PSNR, dB"] == "–"  # noqa: RUF001


def test_page_needs_nothing_else_and_marks_what_differs(report: Path) -> None:
    page = Page(report / "report.html")
    assert page.fetched == []
    text = (report / "report.html").read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text
    wanted = ["frames", "recall-B", "heads-B", "sparsity", "error", "density"]
    assert list(page.pictures) == wanted
    assert files_below(report) == sorted([*(f"{name}.png" for name in wanted), "report.html"])
    for name, data in page.pictures.items():
        assert (report / f"{name}.png").read_bytes() == data
        image = Image.open(io.BytesIO(data))
        assert min(image.size) > 250 and len(image.convert("RGB").getcolors(2**24)) > 20
    settings = {row[0]: row[1:] for row in page.tables["settings"][1:]}
    assert settings["prompt"] == [PROMPT] * 3
    assert settings["record"] == ["False", "True", "False"]
    assert {"dense", "record", "attention.sparsity"} <= set(page.marked)
    assert not {"prompt", "seed", "steps", "versions.torch"} & set(page.marked)
    assert "not known of C" in text


def test_heat_map_shows_the_recall(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    monkeypatch.setattr(pictures, "_map", lambda *args, **names: shown.update(names, args=args))
    (_, run, _) = find_runs([runs])
    pictures.recall_by_step(run)
    table, dense = shown["args"]
    recording = Recording.load(runs / "b.recording.safetensors")
    assert shown["rows"] == ["0", "1", "2"] and shown["columns"] == ["1", "2", "3"]
    wanted = torch.stack([layer.recall.mean(1) for layer in recording.layers]).numpy()
    np.testing.assert_array_equal(table, wanted)
    np.testing.assert_array_equal(dense, np.isnan(wanted))


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["transformer.blocks.0.attn1", "transformer.blocks.1.attn1"], ["0", "1"]),
        (
            ["transformer.blocks.0.attn1", "transformer.vace_blocks.0.attn1"],
            ["blocks", "vace_blocks"],
        ),
        (["transformer.a.0.x", "transformer_2.a.0.x"], ["transformer", "transformer_2"]),
        (["transformer.blocks.0.attn1"], ["attn1"]),
    ],
)
def test_short_names(names: list[str], short: list[str]) -> None:
    assert pictures.short_names(names) == short


def test_replacing(runs: Path, report: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    shutil.copytree(report, out)
    before = files_below(out)
    assert_refused(call("report", runs, "--out", out), "report.html exists", "--overwrite")
    outcome = call("report", runs / "a.mp4", runs / "c.json", "--out", out, "--overwrite")
    assert outcome.code == 0, outcome.err
    assert set(before) - set(files_below(out)) == {"recall-B.png", "heads-B.png"}
    assert list(Page(out / "report.html").pictures) == ["frames", "sparsity"]


def test_recording_is_resumed_and_replaced_with_its_video(
    runs: Path, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(runs, out)
    recording = out / "b.recording.safetensors"
    assert recording.stat().st_mode == (out / "b.mp4").stat().st_mode
    same = ("generate", PROMPT, "--model", tiny_pipeline_dir, *SIZE, *SPARSE, "--resume")
    kept = [call(*same, "--out", out / "b.mp4", *more) for more in ([], ["--record"])]
    assert ["finished by an earlier run" in outcome.err for outcome in kept] == [True, True]
    assert_refused(call(*same, "--record", "--out", out / "c.mp4"), "c.mp4 exists")
    small = ("generate", PROMPT, "--model", tiny_pipeline_dir, "--frames", 5, "--steps", 1)
    small += ("--height", 32, "--width", 32, "--device", "cpu")
    assert call(*small, "--out", out / "b.mp4", "--overwrite").code == 0
    assert not recording.exists()


def break_sidecar(text: str) -> Any:
    return lambda folder: (folder / "b.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "arguments", "words"),
    [
        (None, ["gone.mp4"], ["there is no run gone.mp4"]),
        (None, ["gone"], ["there is no run gone"]),
        (None, [], ["Missing argument", "--help"]),
        (None, ["empty"], ["empty holds no videos of `sla-video generate`"]),
        (None, ["note.txt"], ["note.txt is no run"]),
        (None, ["b.mp4", "--frames", "0"], ["`frames` must be from 1 to 20, got 0"]),
        (None, ["b.mp4", "--out", "note.txt"], ["`out` must be a folder, got the file note.txt"]),
        (None, ["b.mp4", "--out", "note.txt/x"], ["cannot write to note.txt/x"]),
        (lambda f: (f / "b.json").unlink(), ["b.mp4"], ["b.mp4 has no b.json beside it"]),
        (lambda f: (f / "b.mp4").unlink(), ["b.json"], ["b.mp4 is missing"]),
        (
            lambda f: (f / "b.mp4").write_bytes(b"x" * 99),
            ["b.mp4"],
            ["cannot read b.mp4"],
        ),
        (break_sidecar("{"), ["b.mp4"], ["b.json is not what `sla-video generate` writes"]),
        (break_sidecar("[]"), ["b.mp4"], ["b.json is not what"]),
        (break_sidecar('{"prompt": 1}'), ["b.mp4"], ["b.json is not what"]),
        (
            lambda f: (f / "b.recording.safetensors").unlink(),
            ["b.mp4"],
            ["there is no recording b.recording.safetensors"],
        ),
        (
            lambda f: (f / "b.recording.safetensors").write_bytes(b"nonsense"),
            ["b.mp4"],
            ["cannot read the recording"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(
    damage: Any, arguments: list[str], words: list[str], runs: Path, here: Path
) -> None:
    for path in runs.glob("b.*"):
        shutil.copy(path, here)
    (here / "empty").mkdir()
    (here / "note.txt").write_text("")
    if damage is not None:
        damage(here)
    before = files_below(here)
    assert_refused(call("report", *arguments), *words)
    assert files_below(here) == before


def test_a_recording_of_dense_attention_is_refused(here: Path) -> None:
    assert_refused(call("generate", PROMPT, "--dense", "--record"), "`dense`", "`record`")


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named(
    library: str, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    import importlib.util

    find = importlib.util.find_spec

    def find_others(name: str, *rest: Any) -> Any:
        return None if name == library else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    assert_refused(call("report", "x"), library, "pip install 'sla-video[report]'")


def test_a_failure_while_writing_leaves_nothing(
    runs: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sla_video.pipelines.reports.report.os.replace", fail)
    assert_refused(call("report", runs / "c.mp4", "--out", "report"), "No space left")
    assert files_below(here) == []
