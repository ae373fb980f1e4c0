"""Bad input: one line on stderr, exit code 2, nothing written, never a traceback."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import (
    SMALL,
    assert_refused,
    call,
    files_below,
    heed_interrupts,
    run,
    seconds_of_programs,
)

from sla_video.console import run_command
from sla_video.pipelines.errors import is_out_of_memory, one_line

PROMPT = "a red circle"


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no prompt", "for instance"]),
        ([""], ["`prompt` is empty"]),
        (["  \n "], ["`prompt` is empty"]),
        ([PROMPT, ""], ["`prompt` is empty"]),
        ([PROMPT, "--prompts", "missing.txt"], ["not both"]),
        (["--prompts", "missing.txt"], ["missing.txt", "No such file"]),
        (["--prompts", "."], ["Is a directory"]),
        ([PROMPT, "--sparsity", "1"], ["`sparsity` must be in [0, 1), got 1"]),
        ([PROMPT, "--sparsity", "-0.1"], ["`sparsity` must be in [0, 1), got -0.1"]),
        ([PROMPT, "--token-order", "spiral"], ["`token_order` must be raster, ", "got 'spiral'"]),
        ([PROMPT, "--dense", "--token-order", "hilbert"], ["takes no `token_order`"]),
        ([PROMPT, "--compress", "0"], ["`compress` must be above 0 and at most 1, got 0"]),
        ([PROMPT, "--dense", "--compress", "1.5"], ["`compress` must be", "got 1.5"]),
        ([PROMPT, "--sparse-dtype", "int4"], ["must be one of bf16, int8, int8_fp8", "got 'int4'"]),
        ([PROMPT, "--dense", "--sparse-dtype", "int8"], ["takes no `sparse_dtype`"]),
        ([PROMPT, "--sparsity", "nan"], ["`sparsity` must be in [0, 1), got nan"]),
        ([PROMPT, "--sparsity", "0.5", "--dense"], ["`dense`", "`sparsity`"]),
        ([PROMPT, "--dense-steps", "1", "--dense"], ["`dense`", "`dense_steps`"]),
        ([PROMPT, "--dense-steps", "-1"], ["`dense_steps` must be from 0 to 1000, got -1"]),
        ([PROMPT, "--routers", "x", "--dense"], ["`dense`", "`routers`"]),
        ([PROMPT, "--steps", "0"], ["`steps` must be from 1 to 1000, got 0"]),
        ([PROMPT, "--steps", "1001"], ["`steps` must be from 1 to 1000, got 1001"]),
        ([PROMPT, "--num-videos", "0"], ["`num_videos` must be at least 1, got 0"]),
        ([PROMPT, "--seed", "-1"], ["`seed` must be from 0", "got -1"]),
        ([PROMPT, "--guidance-scale", "-1"], ["`guidance_scale`", "got -1"]),
        ([PROMPT, "--guidance-scale", "inf"], ["`guidance_scale`", "got inf"]),
        ([PROMPT, "--fps", "0"], ["`fps` must be from 0.01 to 240", "got 0"]),
        ([PROMPT, "--fps", "0.004"], ["`fps` must be from 0.01 to 240", "got 0.004"]),
        ([PROMPT, "--frames", "6"], ["`frames` must be 4k+1", "got 6", "nearest", "is 5"]),
        ([PROMPT, "--frames", "0"], ["`frames` must be at least 1, got 0"]),
        ([PROMPT, "--frames", "999"], ["at most 125", "is 125"]),
        ([PROMPT, "--height", "40"], ["multiples of 16", "got 40", "--height 48 --width 32"]),
        ([PROMPT, "--width", "1"], ["nearest valid size is --height 32 --width 16"]),
        ([PROMPT, "--width", "5000"], ["at most 256", "--height 32 --width 256"]),
        ([PROMPT, "--device", "cuda:99"], ["`device` is 'cuda:99'"]),
        ([PROMPT, "--device", "toaster"], ["`device` must be cpu, cuda", "got 'toaster'"]),
        ([PROMPT, "--dtype", "int4"], ["`dtype` must be one of fp32, bf16, fp16, got 'int4'"]),
        ([PROMPT, "--device", "cpu", "--offload"], ["`offload`", "needs a GPU"]),
        ([PROMPT, "--routers", "nowhere"], ["no routers at 'nowhere'"]),
        ([PROMPT, PROMPT, "--out", "one.mp4"], ["one.mp4", "2 videos", "folder"]),
        ([PROMPT, "--steps", "many"], ["--steps", "(see sla-video generate --help)"]),
        ([PROMPT, "--stepps", "3"], ["--stepps", "(see sla-video generate --help)"]),
        ([PROMPT, "--seed"], ["--seed", "requires an argument"]),
    ],
    ids=lambda value: " ".join(map(repr, value)) if isinstance(value, list) else None,
)
def test_settings(
    arguments: list[str], words: list[str], tiny_pipeline_dir: Path, here: Path
) -> None:
    outcome = call("generate", "--model", tiny_pipeline_dir, *SMALL, *arguments)
    assert_refused(outcome, *words)
    assert files_below(here) == []


def test_unknown_command() -> None:
    assert_refused(call("generat"), "generat", "(see sla-video --help)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_no_gpu(tiny_pipeline_dir: Path, here: Path) -> None:
    outcome = call("generate", PROMPT, "--model", tiny_pipeline_dir, *SMALL, "--device", "cuda")
    assert_refused(outcome, "`device` is 'cuda'", "finds no GPU", "--device cpu")
    assert files_below(here) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "holds no prompts"), (b"\n \n", "holds no prompts"), (b"\xff\xfe\xff", "not UTF-8")],
    ids=["empty", "blank lines", "binary"],
)
def test_prompts_file(content: bytes, words: str, here: Path) -> None:
    (here / "prompts.txt").write_bytes(content)
    assert_refused(call("generate", "--prompts", "prompts.txt"), "prompts.txt", words)


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("out", ["file/clip.mp4", "file/folder", "file"])
def test_output_that_cannot_be_written(out: str, tiny_pipeline_dir: Path, here: Path) -> None:
    (here / "file").write_text("")
    outcome = call("generate", PROMPT, "--model", tiny_pipeline_dir, *SMALL, "--out", out)
    assert_refused(outcome, "file")
    assert files_below(here) == ["file"]


def test_a_disk_that_fills_up(
    tiny_pipeline_dir: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sla_video.pipelines import video_files

    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video_files, "_encode", full)
    outcome = call("generate", PROMPT, "--model", tiny_pipeline_dir, *SMALL)
    assert_refused(outcome, "cannot write", "No space left on device")
    assert files_below(here) == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee docs"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_out_of_memory_says_what_helps(
    error: Exception, tiny_pipeline_dir: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import WanPipeline

    def exhausted(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(WanPipeline, "__call__", exhausted)
    arguments = ("--model", tiny_pipeline_dir, *SMALL, "--dense")
    outcome = call("generate", PROMPT, *arguments)
    words = ("out of memory on cpu at 5 frames of 32x32", "fewer --frames", "--height", "--dense")
    assert_refused(outcome, *words)
    assert files_below(here) == []


def test_out_of_memory_while_loading(
    tiny_pipeline_dir: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import WanPipeline

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(WanPipeline, "to", exhausted)
    outcome = call("generate", PROMPT, "--model", tiny_pipeline_dir, *SMALL)
    assert_refused(outcome, "out of memory while loading", "--offload")
    assert files_below(here) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--length", "0"], "`length` must be at least 1, got 0"),
        (["--heads", "0"], "`heads` must be at least 1, got 0"),
        (["--repeats", "0"], "`repeats` must be at least 1, got 0"),
        (["--sparsity", "1.5"], "`sparsity` must be in [0, 1), got 1.5"),
        (["--device", "cuda:99"], "`device` is 'cuda:99'"),
        (["--dtype", "int4"], "`dtype` must be one of"),
    ],
)
def test_bench_settings(arguments: list[str], words: str) -> None:
    assert_refused(call("bench", *arguments), words)


# The same as programs: what a person sees, with everything that the libraries print.


def test_program_with_an_empty_prompt_fails_at_once(tmp_path: Path) -> None:
    before = seconds_of_programs()
    outcome = run("generate", "", cwd=tmp_path)
    assert_refused(outcome, "`prompt` is empty")
    assert seconds_of_programs() - before < 2, "nothing heavy may be imported first"


def test_program_without_a_network_fails_quickly(tmp_path: Path) -> None:
    # Names under .invalid never resolve, so this is offline wherever the tests run.
    settings = {"HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path / "cache")}
    start = time.perf_counter()
    outcome = run("generate", PROMPT, "--model", "nobody/nothing", cwd=tmp_path, **settings)
    assert_refused(outcome, "'nobody/nothing' is not a folder here", "cannot be reached")
    # Of a few seconds most are spent on imports; without this limit it would try for minutes.
    assert time.perf_counter() - start < 60


# What is no bad input, and what the messages are made of.


def test_a_defect_is_one_line_too_and_says_where_to_look(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect() -> None:
        raise KeyError("lost")

    monkeypatch.delenv("SLA_VIDEO_TRACEBACK", raising=False)
    assert run_command(defect) == 1
    line = "sla-video: unexpected KeyError: 'lost' (SLA_VIDEO_TRACEBACK=1 shows where)\n"
    assert capsys.readouterr().err == line
    monkeypatch.setenv("SLA_VIDEO_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run_command(defect)


def test_commands_run_in_other_threads_too() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(call("--version").code))
    thread.start()
    thread.join()
    assert codes == [0]


def test_one_line() -> None:
    assert one_line("two\n  lines") == "two lines"
    assert one_line(MemoryError()) == "MemoryError"
    assert one_line("x" * 50, limit=10) == "x" * 9 + "…"


def test_is_out_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_inside_a_destructor_is_not_lost(name: str, code: int) -> None:
    program = f"""
import os, signal, sys, time
from sla_video.console import run_command

class Component:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.01)

def work():
    component = Component()
    del component
    time.sleep(20)

sys.exit(run_command(work))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
