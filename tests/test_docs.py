"""Every code block of the documentation runs, and what it says of options and models is so.

The blocks of a page are executed in their order, in one folder, Python blocks in one namespace.
Small models stand in for the big ones (`docs_stand_ins.py`), CPUs for GPUs; `docs_commands.py`
says how shell commands are checked. A block in any other language fails, but for `text`, which
has to be what the Python block before it prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from docs_commands import Commands, names_of_commands, options_of, parse
from docs_pages import (
    PAGES,
    ROOT,
    Block,
    anchors_of,
    blocks_of,
    commands_of,
    links_of,
    options_in,
    spans_of,
    tables_of,
    text_of,
)
from docs_program import execute
from docs_stand_ins import MODELS, SIZES, build, sparse_calls, stand_in
from family_cases import clip, picture

import sla_video
from finetune_cases import write_videos
from sla_video.pipelines.families.registry import supported_transformers

# Names that a page uses without saying where they come from.
GIVEN = {
    "README.md": {
        name: torch.randn(1, 200, 2, 16, generator=torch.Generator().manual_seed(seed))
        for seed, name in enumerate(("query", "key", "value"))
    }
}
# Where programs of ours are that are not commands of `sla-video`.
SCRIPTS = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("pipelines/tiny_wan/*.py")]
PROCESSES = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def files(here: Path) -> Path:
    """A folder with the files that pages speak of."""
    picture(0).save(here / "first.png")
    picture(1).save(here / "last.png")
    for name in ("clip", "mask", "pose", "face"):
        diffusers.utils.export_to_video(clip(9), str(here / f"{name}.mp4"), fps=8)
    (here / "prompts.txt").write_text("a red circle moves left\na blue square\n")
    write_videos(here / "VIDEOS", 3)
    return here


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of many small operations mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def launch(blocks: list[Block], folder: Path) -> None:
    """Run the programs of a page one after the other, in the same few processes."""
    words = [sys.executable, str(ROOT / "tests" / "docs_program.py"), str(PROCESSES)]
    for block in blocks:
        (file := folder / block.title).write_text(block.text)
        words += [str(file), str(block.line), block.page]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_every_block_runs(
    page: str, files: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    programs = {b.title: b for b in blocks_of(page) if "init_process_group" in b.text}
    commands = Commands(models, programs, monkeypatch)
    names: dict[str, Any] = {**GIVEN.get(page, {}), "__name__": "docs"}
    printed = None
    for block in blocks_of(page):
        try:
            if block.language == "text":
                assert block.text == printed, f"printed was {printed!r}"
            elif block.language == "python" and block.title not in programs:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    execute(block.text, block.page, block.line, names)
                printed = out.getvalue()
            elif block.language == "bash":
                for words in commands_of(block):
                    commands.run(words)
            else:
                assert block.language == "python", f"{block.language!r} is not run"
        except Exception as error:
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error
    assert commands.started == programs.keys(), "a program that no command starts"
    if programs:
        launch(list(programs.values()), files)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_in_the_prose_exist(page: str) -> None:
    known = {"--help"} | {flag for name in names_of_commands() for flag in options_of(name)}
    known |= {flag for path in SCRIPTS for flag in options_in(path.read_text(encoding="utf-8"))}
    for span in spans_of(page):
        if span.startswith("sla-video "):
            words = span.replace('"', "").split()[1:]
            parse([word for word in words if word not in ("|", "--help")])
        elif span.startswith("--"):
            assert set(options_in(span)) <= known, f"{page}: `{span}`"


MODEL_ROWS = [
    (kind.strip("` "), row[1].strip("`"))
    for row in tables_of("docs/quickstart.md")
    if row[1].strip("`") in MODELS
    for kind in row[0].split(",")
]


@pytest.mark.parametrize(("kind", "name"), MODEL_ROWS, ids=[kind for kind, _ in MODEL_ROWS])
def test_models_in_the_table_run(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(diffusers, kind):
        pytest.skip(f"this Diffusers has no {kind}")
    handles = stand_in(monkeypatch)
    pipe = getattr(diffusers, kind).from_pretrained(name)
    sla_video.enable_sla(pipe, sparsity=0.9)
    call = {"prompt": "a cat surfing", **pipe.stands_in.call, "output_type": "latent"}
    pipe(**{name: value for name, value in call.items() if name not in SIZES and value is not None})
    assert sparse_calls(handles[0]) > 0


def test_the_quick_start_names_all_supported_models() -> None:
    text = text_of("docs/quickstart.md")
    used = {type(build(name).transformer).__name__ for name in MODELS if name in text}
    missing = [name for name in supported_transformers() if name not in used and name not in text]
    assert not missing


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        folder = (ROOT / page).parent
        headings = {}
        for target, anchor in links_of(page):
            file = (folder / target).resolve() if target else (ROOT / page).resolve()
            assert file.exists(), f"{page}: {target}"
            if anchor:
                headings.setdefault(file, anchors_of(file.read_text(encoding="utf-8")))
                assert anchor in headings[file], f"{page}: {target}#{anchor}"


@pytest.mark.parametrize(
    "line",
    [
        "sla-video generate a --no-such-option 1",
        "sla-video generate a --frames many",
        "sla-video generate a --frames 6",
        "sla-video generate a --model Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "sla-video generate a --model some/where",
        "sla-video finetune --out run",
        "sla-video paint",
        "torchrun --no-such-option 4 -m sla_video.cli generate a",
        "torchrun --nproc_per_node 4 missing.py",
        "accelerate launch -m sla_video.calibration.finetune --no-such-option 1",
        'pip install ".[no-such-extra]"',
        "pip install no-such-package",
        "python -m this",
    ],
)
def test_a_wrong_command_is_found(
    line: str, files: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block("page", 1, "bash", line)
    with pytest.raises((Exception, SystemExit)):
        for words in commands_of(block):
            Commands(models, (), monkeypatch).run(words)


@pytest.mark.parametrize(
    "code",
    [
        "pipe(PROMPT, no_such_argument=1)",
        "pipe(PROMPT, height=470)",
        "pipe(PROMPT, num_frames=80)",
        "sla_video.enable_sla(pipe, dense_steps=1000); pipe(PROMPT)",
        "WanImageToVideoPipeline.from_pretrained(NAME)",
        "WanPipeline.from_pretrained('some/where')",
    ],
)
def test_wrong_python_is_found(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    name = next(iter(MODELS))
    names: dict[str, Any] = {
        "sla_video": sla_video,
        "PROMPT": "a cat",
        "NAME": name,
        "WanPipeline": diffusers.WanPipeline,
        "WanImageToVideoPipeline": diffusers.WanImageToVideoPipeline,
        "pipe": diffusers.WanPipeline.from_pretrained(name),
    }
    with pytest.raises((AssertionError, TypeError)):
        execute(code, "page", 1, names)
