"""Whole runs of fine-tuning as programs: several processes, kills, resuming, results."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import imageio.v2 as imageio
import pytest
import torch
from diffusers import WanTransformer3DModel

from finetune_cases import SMALL_SIZE, command, losses_of, run_program, write_videos
from sla_video.calibration.finetune import finetune
from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.router_files import load_routers

STEPS = 6


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos") / "data"
    write_videos(folder, 5)
    return folder


@pytest.fixture(scope="module")
def words(tiny_pipeline_dir: Path, videos: Path) -> Callable[..., list[str]]:
    def make(out: Path, **settings: object) -> list[str]:
        settings = {"max_steps": STEPS, "save_every": 1, "batch_size": 4, **settings}
        settings = {"loss": "ssa", "guidance": 3, "ema": 0.9, "sparse_dtype": "int8", **settings}
        return command(out, tiny_pipeline_dir, videos, **settings)

    return make


@pytest.fixture(scope="module")
def whole_run(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run_program(words(out))
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_leaves_routers_that_enable_sla_takes(whole_run: Path, tiny_pipeline: object) -> None:
    losses = losses_of(whole_run)
    assert len(losses) == STEPS and all(loss > 0 for loss in losses)
    routers = load_routers(whole_run / "routers")
    assert routers.config.sparse_dtype == "int8" and routers.resolution == (9, 64, 64)
    assert routers.metrics["settings"]["loss"] == "ssa"
    assert "torch" in routers.metrics["versions"]
    first, last = (r["validation"] for r in routers.metrics["history"] if "validation" in r)
    assert set(first) == {"velocity_error@0.34", "flow_loss@0.34", "flow_loss@dense"}
    assert last["flow_loss@dense"] == pytest.approx(first["flow_loss@dense"])
    lora = routers.lora["transformer"]
    assert lora.rank == 2
    assert any(t.any() for name, t in lora.tensors.items() if "lora_B" in name)
    with enable_sla(tiny_pipeline, routers) as handle:
        assert handle.router_set().lora["transformer"].rank == 2
    kept = sorted(path.name for path in (whole_run / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (STEPS - 1, STEPS)]


# A run whose fourth save takes for ever, just before its renaming, which would complete it.
STUCK = """
import time
from sla_video.pipelines.tiny_wan import checkpoints

def replace(old, new, rename=checkpoints.os.replace):
    if new.name == "step-00000004":
        time.sleep(600)
    rename(old, new)

checkpoints.os.replace = replace
from sla_video.calibration.finetune import main
main()
"""


def kill_at(words: list[str], there: Callable[[], bool]) -> None:
    """Run a program and kill it as soon as something is `there`."""
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ends = time.monotonic() + 240
    while not there() and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def test_killed_in_a_step_and_in_a_save_it_takes_the_same_steps(
    words: Callable[..., list[str]], whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    folder = out / "checkpoints"
    kill_at(words(out), lambda: (folder / "step-00000002").is_dir())
    unfinished = folder / "step-00000004.new" / "state.json"
    # Without "-m" and the module, which `STUCK` stands for.
    kill_at(["-c", STUCK, *words(out, resume=True)[2:]], unfinished.is_file)
    assert unfinished.is_file()
    done = run_program(words(out, resume=True))
    assert done.returncode == 0, done.stderr
    assert losses_of(out) == losses_of(whole_run)
    mine, theirs = (load_routers(run / "routers") for run in (out, whole_run))
    for name, tensor in mine.lora["transformer"].tensors.items():
        assert torch.equal(tensor, theirs.lora["transformer"].tensors[name])
    assert not list(folder.glob("*.new"))


def test_two_processes_take_the_steps_of_one(
    words: Callable[..., list[str]], whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = run_program([*launch, *words(out, batch_size=2)], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((out / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
    assert state["processes"] == 2
    assert losses_of(out) == pytest.approx(losses_of(whole_run), rel=2e-4)


def test_shards_have_the_gradients_of_the_whole() -> None:
    program = Path(__file__).with_name("finetune_sharded.py")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(program)]
    done = run_program(launch, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_stopped_run_goes_on(tiny_pipeline_dir: Path, videos: Path, tmp_path: Path) -> None:
    """All weights trained, several sparsities, accumulation: stopped in the middle or not."""
    config = FinetuneConfig(
        model=str(tiny_pipeline_dir),
        data=str(videos),
        out=tmp_path / "a",
        **SMALL_SIZE,
        trainable="full",
        loss="flow",
        sparsity=(0.34, 0.67),
        accumulate=2,
        max_steps=4,
        log_every=1,
        validation_clips=1,
    )
    whole = finetune(config)
    part = dataclasses.replace(config, out=tmp_path / "b", stop_after=2)
    assert not finetune(part)["finished"]
    assert not (part.out / "routers").exists()
    assert finetune(dataclasses.replace(part, resume=True, stop_after=0))["finished"]
    assert losses_of(config.out) == losses_of(part.out)
    assert len(losses_of(config.out)) == 4 and whole["finished"]
    mine, theirs = (
        WanTransformer3DModel.from_pretrained(run.out / "transformer") for run in (part, config)
    )
    original = WanTransformer3DModel.from_pretrained(tiny_pipeline_dir / "transformer")
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
        assert not torch.equal(tensor, original.state_dict()[name]), name


def test_routers_learn_on_the_world_of_the_embedded_model(tmp_path: Path) -> None:
    config = FinetuneConfig(
        out=tmp_path / "run",
        trainable="router+alpha",
        height=32,
        width=32,
        sparsity=(0.5,),
        world_clips=4,
        encode_batch=2,
        validation_clips=2,
        max_steps=3,
        log_every=1,
        warmup_steps=0,
        cooldown=0.0,
        router_rate=0.02,
    )
    finetune(config)
    history = load_routers(config.out / "routers").metrics["history"]
    before, after = (r["validation"]["velocity_error@0.5"] for r in history if "validation" in r)
    assert 0 < after != before
    trained = load_routers(config.out / "routers").routers
    assert len(trained) == 8
    assert all(not torch.equal(r.query_proj, torch.eye(64)) for r in trained.values())
    # The same seed makes the same world, and the same steps.
    finetune(dataclasses.replace(config, out=tmp_path / "again"))
    assert losses_of(tmp_path / "again") == losses_of(config.out)


def test_validation_videos_are_written(
    tiny_pipeline_dir: Path, videos: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline_dir, model)
    (model / "defaults.json").write_text(
        '{"num_inference_steps": 2, "fps": 8, "max_sequence_length": 16}'
    )
    config = FinetuneConfig(
        model=str(model),
        data=str(videos),
        cache=tmp_path / "cache",
        out=tmp_path / "run",
        **SMALL_SIZE,
        sparsity=(0.34,),
        validation_clips=2,
        validation_videos=2,
        validate_every=1,
        max_steps=2,
        lora_rank=2,
    )
    finetune(config)
    for step in range(3):
        folder = config.out / "validation" / f"step-{step:08d}"
        written = sorted(path.name for path in folder.iterdir())
        stems = [f"{i:02d}-a-red-circle-moves-left" for i in range(2)]
        assert written == [f"{stem}{end}" for stem in stems for end in (".json", ".mp4")]
        with imageio.get_reader(folder / f"{stems[0]}.mp4") as reader:
            assert reader.count_frames() == 9
