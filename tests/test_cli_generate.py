"""`sla-video generate` on a tiny random pipeline: files, sidecar, seeds, and agreement."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from cli_tools import (
    SMALL,
    call,
    files_below,
    heed_interrupts,
    program,
    program_environment,
    run,
)

import sla_video
from sla_video.pipelines import video_files
from sla_video.pipelines.generation_request import GenerationRequest

PROMPT = "a red circle moves left"


def generate(model: Path, out: Path, *arguments: object, prompt: str = PROMPT) -> dict[str, Any]:
    """Generate one video with `call`, and read its sidecar."""
    outcome = call("generate", prompt, "--model", model, *SMALL, "--out", out, *arguments)
    assert outcome.code == 0, outcome.err
    video = Path(outcome.out.splitlines()[-1])
    record: dict[str, Any] = json.loads(video.with_suffix(".json").read_text())
    return {**record, "path": video}


def test_program_writes_a_video_and_its_sidecar(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    arguments = ("--model", tiny_pipeline_dir, *SMALL, "--seed", "7", "--fps", "12")
    outcome = run("generate", PROMPT, *arguments, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert outcome.out == "a-red-circle-moves-left-seed7.mp4\n"
    assert len(outcome.err.splitlines()) == 1, "only the line of times"
    assert files_below(tmp_path) == [
        "a-red-circle-moves-left-seed7.json",
        "a-red-circle-moves-left-seed7.mp4",
    ]
    reader = imageio.get_reader(tmp_path / "a-red-circle-moves-left-seed7.mp4")
    about = reader.get_meta_data()
    assert (about["codec"], about["fps"], about["size"]) == ("h264", 12, (32, 32))
    assert about["pix_fmt"].startswith("yuv420p")
    assert sum(1 for _ in reader) == 5


def test_sidecar_holds_all_settings(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    record = generate(
        tiny_pipeline_dir, tmp_path, "--seed", "5", "--sparsity", "0.5", "--negative-prompt", "blue"
    )
    assert record["prompt"] == PROMPT
    assert record["seed"] == 5
    settings = record["settings"]
    wanted = {"steps": 2, "frames": 5, "height": 32, "width": 32, "sparsity": 0.5, "dense": False}
    wanted |= {"guidance_scale": 5.0, "negative_prompt": "blue", "device": "cpu"}
    wanted |= {"dtype": "float32", "model": str(tiny_pipeline_dir), "fps": 16, "routers": None}
    assert {name: settings[name] for name in wanted} == wanted
    options = {p.name for p in GenerationRequest.__dataclass_fields__.values()}
    assert set(settings) >= options - {"prompts", "seed", "out"}
    assert set(record["seconds"]) == {"load", "text", "denoise", "decode", "write"}
    assert all(value >= 0 for value in record["seconds"].values())
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["sla-video"] == sla_video.__version__
    # 2 x 4 x 4 = 32 tokens are a single key block, and one block is always kept.
    assert record["attention"]["kind"] == "sla2"
    assert record["attention"]["achieved_sparsity"] == 0
    assert record["attention"]["config"]["sparsity"] == 0.5
    assert len(record["attention"]["layers"]) == 3


def test_achieved_sparsity_is_measured(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    # 3 x 8 x 8 = 192 tokens are three key blocks, of which one is kept.
    size = ("--frames", 9, "--height", 64, "--width", 64)
    record = generate(tiny_pipeline_dir, tmp_path, *size, "--sparsity", 0.6)
    assert record["attention"]["achieved_sparsity"] == pytest.approx(2 / 3)
    calls = {layer["calls"] for layer in record["attention"]["layers"]}
    assert calls == {2 * 2}, "two steps with guidance"


def test_dense_equals_the_stock_pipeline(
    tiny_pipeline: Any,
    tiny_pipeline_dir: Path,
    tmp_path: Path,
    frames_written: list[np.ndarray[Any, Any]],
) -> None:
    arguments = ("--dense", "--seed", 3, "--negative-prompt", "a blue square")
    record = generate(tiny_pipeline_dir, tmp_path, *arguments)
    assert record["attention"] == {"kind": "dense"}
    expected = tiny_pipeline(
        prompt=PROMPT,
        negative_prompt="a blue square",
        num_frames=5,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    np.testing.assert_array_equal(frames_written[0], (expected * 255).round().astype(np.uint8))


def test_sparse_differs_from_dense_and_nothing_else_does(
    tiny_pipeline_dir: Path, tmp_path: Path, frames_written: list[np.ndarray[Any, Any]]
) -> None:
    size = ("--frames", 9, "--height", 64, "--width", 64, "--seed", 3)
    generate(tiny_pipeline_dir, tmp_path, *size, "--dense")
    generate(tiny_pipeline_dir, tmp_path, *size, "--sparsity", 0)
    generate(tiny_pipeline_dir, tmp_path, *size, "--sparsity", 0.6)
    tiles = generate(
        tiny_pipeline_dir, tmp_path, *size, "--sparsity", 0.6, "--token-order", "tile:3,4,4"
    )
    dense, everything_selected, sparse, tiled = (f.astype(int) for f in frames_written)
    assert abs(dense - everything_selected).max() <= 1, "rounding to 8 bits may tip over"
    assert abs(dense - sparse).max() > 1
    assert abs(dense - tiled).max() > 1 and abs(sparse - tiled).max() > 1
    assert tiles["settings"]["token_order"] == "tile:3,4,4"
    assert tiles["attention"]["config"]["token_order"] == "tile:3,4,4"


def test_compression_is_on_its_own_and_in_dense_attention(
    tiny_pipeline_dir: Path, tmp_path: Path, frames_written: list[np.ndarray[Any, Any]]
) -> None:
    size = ("--frames", 9, "--height", 64, "--width", 64, "--seed", 3, "--steps", 3)
    generate(tiny_pipeline_dir, tmp_path, *size, "--dense")
    dense = generate(tiny_pipeline_dir, tmp_path, *size, "--dense", "--compress", 0.6)
    sparse = generate(tiny_pipeline_dir, tmp_path, *size, "--sparsity", 0.6, "--compress", 0.6)
    for record, kind in ((dense, "compressed"), (sparse, "sla2")):
        assert record["attention"]["kind"] == kind
        assert record["attention"]["config"]["compression"]["pairs"] == 0.6
        assert record["settings"]["compress"] == 0.6
        # One of three layers, in the last of three steps, at 128 of 192 tokens.
        pairs = sorted(layer["pairs"] for layer in record["attention"]["layers"])
        assert pairs == pytest.approx([8 / 9, 1, 1])
    stock, compressed, _ = (f.astype(int) for f in frames_written)
    assert 0 < abs(stock - compressed).max() < 30


def test_seeds_make_videos_and_are_counted_on(
    tiny_pipeline_dir: Path, tmp_path: Path, frames_written: list[np.ndarray[Any, Any]]
) -> None:
    arguments = ("--model", tiny_pipeline_dir, *SMALL, "--out", tmp_path)
    outcome = call("generate", PROMPT, "a blue square", "--num-videos", 2, "--seed", 8, *arguments)
    names = [Path(line).name for line in outcome.out.splitlines()]
    assert names == [
        "a-red-circle-moves-left-seed8.mp4",
        "a-red-circle-moves-left-seed9.mp4",
        "a-blue-square-seed10.mp4",
        "a-blue-square-seed11.mp4",
    ]
    call("generate", PROMPT, "--seed", 9, *arguments)
    np.testing.assert_array_equal(frames_written[1], frames_written[4])
    assert (frames_written[0] != frames_written[1]).any()


def test_a_random_seed_is_printed_and_recorded(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    arguments = ("--model", tiny_pipeline_dir, *SMALL, "--out", tmp_path / "clip.mp4")
    outcome = call("generate", PROMPT, *arguments)
    seed = json.loads((tmp_path / "clip.json").read_text())["seed"]
    assert f"seed {seed}" in outcome.err
    assert GenerationRequest(prompts=("a",)).seed != GenerationRequest(prompts=("a",)).seed


def test_files_are_not_replaced_unless_asked(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    first = generate(tiny_pipeline_dir, tmp_path, "--seed", 1)["path"]
    before = first.read_bytes()
    second = generate(tiny_pipeline_dir, tmp_path, "--seed", 1, "--fps", 5)["path"]
    assert second.name == "a-red-circle-moves-left-seed1-2.mp4"
    assert first.read_bytes() == before
    arguments = ("--model", tiny_pipeline_dir, *SMALL, "--out", first)
    refused = call("generate", PROMPT, *arguments)
    assert refused.code == 2
    assert "--overwrite" in refused.err
    assert first.read_bytes() == before
    assert call("generate", PROMPT, *arguments, "--overwrite", "--fps", 5).code == 0
    assert first.read_bytes() != before


def test_prompts_come_from_a_file(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  a green square  \n", encoding="utf-8")
    out = tmp_path / "new" / "folder"
    outcome = call(
        "generate", "--prompts", file, "--model", tiny_pipeline_dir, *SMALL, "--out", out
    )
    assert outcome.code == 0, outcome.err
    assert [p.name.split("-seed")[0] for p in map(Path, outcome.out.splitlines())] == [
        "a-red-circle",
        "a-green-square",
    ]


def test_defaults_of_a_model_are_used(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline_dir, model)
    defaults = {"num_inference_steps": 3, "guidance_scale": 1, "sparsity": 0.25, "fps": 10}
    defaults |= {"num_frames": 5, "height": 32, "width": 48, "max_sequence_length": 16}
    defaults |= {"dense_steps": 2}
    (model / "defaults.json").write_text(json.dumps(defaults))
    outcome = call("generate", PROMPT, "--model", model, "--out", tmp_path / "clip.mp4")
    assert outcome.code == 0, outcome.err
    settings = json.loads((tmp_path / "clip.json").read_text())["settings"]
    wanted = {"steps": 3, "guidance_scale": 1, "sparsity": 0.25, "fps": 10, "frames": 5}
    wanted |= {"height": 32, "width": 48, "max_sequence_length": 16, "dense_steps": 2}
    assert {name: settings[name] for name in wanted} == wanted


def test_routers_bring_their_settings(
    tiny_pipeline_dir: Path, tmp_path: Path, tiny_pipeline: Any
) -> None:
    with sla_video.enable_sla(tiny_pipeline, sparsity=0.75, dense_steps=1) as handle:
        sla_video.save_routers(tmp_path / "routers", handle)
    record = generate(tiny_pipeline_dir, tmp_path, "--routers", tmp_path / "routers")
    assert record["settings"]["routers"] == str(tmp_path / "routers")
    assert record["attention"]["config"]["sparsity"] == 0.75
    assert record["attention"]["config"]["dense_steps"] == 1


def test_a_model_may_come_with_routers(
    tiny_pipeline_dir: Path, tmp_path: Path, tiny_pipeline: Any
) -> None:
    folder = Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "model"))
    with sla_video.enable_sla(tiny_pipeline, sparsity=0.75) as handle:
        sla_video.save_routers(folder / "fitted", handle)
    (folder / "defaults.json").write_text(
        '{"routers": "fitted", "routers_sparsity": 0.5, "sparsity": 0.6}'
    )
    found = generate(folder, tmp_path)["settings"]
    assert (found["routers"], found["sparsity"]) == (str(folder / "fitted"), 0.6)
    assert generate(folder, tmp_path, "--sparsity", "0.4")["settings"]["routers"] is None
    assert generate(folder, tmp_path, "--routers", "none")["settings"]["routers"] is None
    assert generate(folder, tmp_path, "--dense")["settings"]["routers"] is None


def test_dense_steps_are_dense(
    tiny_pipeline_dir: Path, tmp_path: Path, frames_written: list[np.ndarray[Any, Any]]
) -> None:
    size = ("--frames", 9, "--height", 64, "--width", 64, "--seed", 3)
    sparse = ("--sparsity", 0.6, "--dense-steps")
    dense_calls = []
    for options in ((*sparse, 2), (*sparse, 1), (*sparse, 0)):
        layer = generate(tiny_pipeline_dir, tmp_path, *size, *options)["attention"]["layers"][0]
        dense_calls.append((layer["dense_calls"], layer["calls"]))
    assert dense_calls == [(4, 4), (2, 4), (0, 4)], "two steps, each with and without the prompt"
    generate(tiny_pipeline_dir, tmp_path, *size, "--dense")
    both, first, none, dense = frames_written
    np.testing.assert_array_equal(both, dense)
    assert (first != none).any() and (first != dense).any()


def interrupt_encoding(path: Path, *_: Any) -> None:
    path.write_bytes(b"half a file")
    raise KeyboardInterrupt


class InterruptedRenaming:
    """`os`, in which a renaming is interrupted."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @staticmethod
    def replace(*_: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "replacement"),
    [("_encode", interrupt_encoding), ("os", InterruptedRenaming())],
    ids=["encoding", "renaming"],
)
def test_interruption_while_writing_leaves_nothing(
    name: str,
    replacement: Any,
    tiny_pipeline_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(video_files, name, replacement)
    out = tmp_path / "out"
    outcome = call("generate", PROMPT, "--model", tiny_pipeline_dir, *SMALL, "--out", out)
    assert outcome.code == 130
    assert outcome.err == "sla-video: interrupted; nothing unfinished is left\n"
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "kill"]
)
def test_signals_end_the_program_cleanly(
    number: signal.Signals, code: int, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("--model", tiny_pipeline_dir, *SMALL, "--steps", "1000", "--out", out)
    with subprocess.Popen(
        program("generate", PROMPT, *arguments),
        env=program_environment(),
        preexec_fn=heed_interrupts,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 240
        while not out.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        output, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    assert output == ""
    assert len(errors.splitlines()) == (1 if number == signal.SIGINT else 0), errors
    assert files_below(tmp_path) == []
