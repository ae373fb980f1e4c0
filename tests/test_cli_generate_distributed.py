"""`sla-video generate` in several processes, and going on with what an earlier run has made."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from cli_tools import SMALL, assert_refused, call, files_below, program, program_environment
from torch.distributed import HashStore

from sla_video.pipelines import generation, generation_share
from sla_video.pipelines.errors import InputError, ReportedElsewhere
from sla_video.pipelines.generation_plan import VideoPlan
from sla_video.pipelines.generation_request import GenerationRequest
from sla_video.pipelines.processes import Team

PROMPTS = ("a red circle", "a blue square", "the circle moves right")
NAMES = [
    "a-red-circle-seed7.mp4",
    "a-blue-square-seed8.mp4",
    "the-circle-moves-right-seed9.mp4",
]


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture
def command(prompts_file: Path, tiny_pipeline_dir: Path) -> tuple[object, ...]:
    return ("generate", "--prompts", prompts_file, "--model", tiny_pipeline_dir, *SMALL)


def team(store: HashStore, rank: int, size: int = 2) -> Team:
    """What `Team.join` returns in one of `size` processes, which here are threads."""
    return Team(rank, size, local_rank=rank, store=store)


def small_request(model: Path, out: Path, **settings: Any) -> GenerationRequest:
    size = {"frames": 5, "height": 32, "width": 32}
    return GenerationRequest(prompts=PROMPTS, model=str(model), out=out, **size, **settings)


def frames_of(path: Path) -> np.ndarray[Any, Any]:
    return np.stack(imageio.mimread(path))


def test_processes_make_what_one_makes(command: tuple[object, ...], tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert call(*command, "--seed", 7, "--out", alone).code == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(free_port())]
    words = program(*command, "--seed", 7, "--out", shared)[1:]
    done = subprocess.run(
        [*launcher, *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=program_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(str(shared / name) for name in NAMES)
    assert files_below(shared) == files_below(alone)
    for name in NAMES:
        np.testing.assert_array_equal(frames_of(shared / name), frames_of(alone / name))
    lines = done.stderr.splitlines()
    assert sum("3 made by 2 processes in" in line for line in lines) == 1, done.stderr
    assert "3 made by 2 processes in" in lines[-1]


def test_bad_input_is_said_once_and_ends_all(command: tuple[object, ...], tmp_path: Path) -> None:
    port = str(free_port())
    processes = [
        subprocess.Popen(
            program(*command, "--out", tmp_path / "out", "--frames", 6),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=program_environment(
                RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert "`frames` must be 4k+1" in said[0][1] and len(said[0][1].splitlines()) == 1
    assert said[1] == ("", "")
    assert not (tmp_path / "out").exists()


def test_a_launch_that_is_not_complete_is_refused(
    command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert_refused(call(*command), "WORLD_SIZE=2", "torchrun or accelerate launch")


def test_names_and_seeds_come_from_the_first_process(
    tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draws a seed of its own, and each but the first finds files of the others."""
    monkeypatch.setattr(generation_share, "plan_generation", planner := Planner())
    store = HashStore()
    plans = []
    for rank in range(3):
        request = small_request(tiny_pipeline_dir, tmp_path, num_videos=2)
        plan, finished = generation_share.plan_share(request, team(store, rank, 3))
        assert finished == ()
        plans.append(plan.videos)
        for video in plan.videos:
            video.path.write_bytes(b"taken")
    assert planner.named == [True, False, False]
    seeds = [[video.seed - plans[0][0].seed for video in videos] for videos in plans]
    assert seeds == [[0, 3], [1, 4], [2, 5]]
    assert [video.prompt for video in plans[1]] == [PROMPTS[0], PROMPTS[2]]
    assert len({video.path for videos in plans for video in videos}) == 6


class Planner:
    """`plan_generation`, which notes whether it was asked for files."""

    def __init__(self) -> None:
        self.named: list[bool] = []
        self._plan = generation_share.plan_generation

    def __call__(self, request: GenerationRequest, *, name_files: bool = True) -> Any:
        self.named.append(name_files)
        return self._plan(request, name_files=name_files)


def test_one_process_that_fails_leaves_the_others_alone(
    tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(request: Any, plan: Any, video: VideoPlan, *_: Any) -> Any:
        if video.path.name == NAMES[1]:
            raise InputError("no room")
        return video

    # Two threads cannot load models at a time.
    monkeypatch.setattr(generation, "_load", lambda *_: None)
    monkeypatch.setattr(generation, "_make_video", make)
    store = HashStore()

    def work(rank: int) -> list[str]:
        request = small_request(tiny_pipeline_dir, tmp_path / "out", seed=7)
        with team(store, rank) as mine:
            made = [video.path.name for video in generation.generate(request, team=mine)]
            results, failed = mine.end(made)
            return [*map(str, results), *failed]

    with ThreadPoolExecutor() as pool:
        first, second = pool.submit(work, 0), pool.submit(work, 1)
        with pytest.raises(InputError, match=r"^process 2 of 2: no room$"):
            second.result(timeout=240)
        assert first.result(timeout=240) == [
            str([NAMES[0], NAMES[2]]),
            "process 2 of 2: no room",
        ]
    assert (tmp_path / "out").is_dir(), "the others may be about to write there"


def test_the_first_tells_why_it_could_not_begin() -> None:
    store = HashStore()

    def first() -> None:
        with team(store, 0):
            raise InputError("no such model")

    def other() -> None:
        with team(store, 1):
            raise InputError("no such model")

    with ThreadPoolExecutor() as pool:
        ends = [pool.submit(first), pool.submit(other)]
        with pytest.raises(InputError, match=r"^no such model$") as said:
            ends[0].result(timeout=240)
        assert not isinstance(said.value, ReportedElsewhere)
        with pytest.raises(ReportedElsewhere):
            ends[1].result(timeout=240)


def test_each_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    store = HashStore()
    assert team(store, 1, 3).own_device(torch.device("cuda")) == torch.device("cuda:1")
    for name in ("cpu", "cuda:0"):
        assert team(store, 1, 3).own_device(torch.device(name)) == torch.device(name)
    assert Team().own_device(torch.device("cuda")) == torch.device("cuda")
    with pytest.raises(InputError, match=r"2 GPUs.*at most 2"):
        team(store, 2, 3).own_device(torch.device("cuda"))


def test_resume_makes_what_is_missing(command: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    again = (*command, "--seed", 7, "--out", out, "--resume")
    first = call(*again)
    assert [Path(line).name for line in first.out.splitlines()] == NAMES
    stamps = {name: (out / name).stat().st_mtime_ns for name in NAMES}
    # Interrupted between the two files of a video, and before both.
    (out / NAMES[0]).unlink()
    for suffix in (".mp4", ".json"):
        (out / NAMES[2]).with_suffix(suffix).unlink()
    second = call(*again)
    assert second.code == 0, second.err
    assert sorted(second.out.splitlines()) == sorted(first.out.splitlines())
    assert "2 made by 1 process" in second.err and "1 finished by an earlier run" in second.err
    assert (out / NAMES[1]).stat().st_mtime_ns == stamps[NAMES[1]]
    assert len(files_below(out)) == 6


@pytest.mark.usefixtures("nothing_is_loaded")
def test_nothing_is_loaded_when_all_is_finished(
    command: tuple[object, ...], tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    settings = {"model": str(tiny_pipeline_dir), "steps": 2, "frames": 5, "height": 32}
    settings |= {"width": 32, "guidance_scale": 5.0, "fps": 16, "sparsity": 0.9, "dense": False}
    settings |= {"dense_steps": 0, "max_sequence_length": 512, "dtype": "float32"}
    for index, (name, prompt) in enumerate(zip(NAMES, PROMPTS, strict=True)):
        (out / name).write_bytes(b"a video")
        record = {"prompt": prompt, "seed": 7 + index, "settings": settings}
        (out / name).with_suffix(".json").write_text(json.dumps(record))
    outcome = call(*command, "--seed", 7, "--out", out, "--resume", "--sparsity", 0.9,
                   "--dense-steps", 0)  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert [Path(line).name for line in outcome.out.splitlines()] == NAMES


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": {"steps": 3}},
        {"settings": {"dtype": "bfloat16"}},
        {"prompt": "a green circle"},
        {"seed": 8},
        None,
        "not a record",
    ],
    ids=["steps", "dtype", "prompt", "seed", "damaged", "foreign"],
)
def test_what_another_run_made_is_left_alone(
    changed: Any, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    made = ("generate", PROMPTS[0], "--model", tiny_pipeline_dir, *SMALL, "--seed", 7)
    file = tmp_path / NAMES[0]
    assert call(*made, "--out", tmp_path).code == 0
    sidecar = file.with_suffix(".json")
    record = json.loads(sidecar.read_text())
    if isinstance(changed, dict):
        record = {**record, **changed}
        record["settings"] = {**json.loads(sidecar.read_text())["settings"],
                              **changed.get("settings", {})}  # fmt: skip
        sidecar.write_text(json.dumps(record))
    else:
        sidecar.write_text("{" if changed is None else json.dumps(changed))
    before = file.read_bytes()
    outcome = call(*made, "--out", tmp_path, "--resume")
    assert outcome.code == 0, outcome.err
    assert [Path(line).name for line in outcome.out.splitlines()] == ["a-red-circle-seed7-2.mp4"]
    assert file.read_bytes() == before
    # A file that was asked for by name is refused instead.
    assert_refused(call(*made, "--out", file, "--resume"), NAMES[0], "exists", "--out")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_resume_needs_a_seed_and_replaces_nothing(command: tuple[object, ...]) -> None:
    assert_refused(call(*command, "--resume"), "`resume`", "--seed")
    outcome = call(*command, "--resume", "--seed", 1, "--overwrite")
    assert_refused(outcome, "`resume`", "`overwrite`")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
