"""What fine-tuning refuses, skips, or stops at."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from cli_tools import assert_refused, call
from safetensors.torch import load_file, save_file

from finetune_cases import SMALL_SIZE, make_student, write_videos
from sla_video.calibration import training_checkpoint
from sla_video.calibration.finetune import finetune
from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.calibration.results import save_results
from sla_video.calibration.video_clips import SHARD_SIZE
from sla_video.calibration.video_list import find_videos
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.router_files import load_routers


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos") / "data"
    write_videos(folder, 3)
    return folder


@pytest.fixture
def settings(tiny_pipeline_dir: Path, videos: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_pipeline_dir),
        "data": str(videos),
        "out": tmp_path / "run",
        **SMALL_SIZE,
        "sparsity": (0.34,),
        "validation_clips": 1,
        "max_steps": 2,
        "log_every": 1,
        "lora_rank": 2,
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainable", "loar", "--max-steps", "1"], "`trainable` must be one of router"),
        ([], "--max-steps or --minutes"),
        (["--max-steps", "1", "--loss", "ssa", "--trainable", "router"], "Q, K and V frozen"),
        (["--max-steps", "1", "--sparsity", "1.5"], "`sparsity` must be in [0, 1)"),
        (["--max-steps", "1", "--ema", "2"], "`ema` must be in [0, 1]"),
        (["--max-steps", "1", "--model", "no-such-model"], "unknown model"),
        (["--max-steps", "1", "--data", "no-such-folder"], "no data at"),
        (["--max-steps", "1", "--height", "100"], "nearest valid size"),
        (["--max-steps", "1", "--resume"], "nothing to resume"),
        (["--max-steps", "1", "--impl", "torch", "--trainable", "router"], "selects softly"),
        (["--max-steps", "1", "--optimizer", "adamw8bit"], "pip install bitsandbytes"),
        (["--max-steps", "1", "--tracker", "comet_ml"], "'comet_ml' is not installed"),
        (["--max-steps", "1", "--tracker", "paper"], "cannot set up Accelerate"),
        (["--max-steps", "1", "--frames", "0"], "`frames` must be at least 1, got 0"),
        (["--max-steps", "1", "--seed", "-1"], "`seed` must be from 0 to 4294967295, got -1"),
        (["--max-steps", "1", "--lora-alpha", "nan"], "`lora_alpha` must be in"),
        (["--max-steps", "1", "--trainable", "full", "--weights", "bf16"], "is for frozen weights"),
        (["--max-steps", "1", "--weights", "bf16", "--mixed-precision", "no"], "mixed precision"),
        (["--max-steps", "1", "--trainable", "router+alpha", "--no-train-alpha"], "take 'router'"),
        (["--max-steps", "1", "--routers", "nowhere"], "no routers at 'nowhere'"),
        (["--max-steps", "1", "--routers", "a" * 300], "File name too long"),
        (["--max-steps", "1", "--lora-targets", "attn9.to_q"], "name ends with 'attn9.to_q'"),
        (["--max-steps", "1", "--lora-targets", "attn1.norm_q"], "'attn1.norm_q' is a"),
        (["--max-steps", "1", "--frames", "9"], "clips of the world are square and have 25"),
    ],
)
def test_bad_settings_are_one_line(
    words: list[str], said: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert_refused(call("finetune", "--out", here / "run", *words), said)
    assert not (here / "run" / "routers").exists()


def test_bad_files_are_skipped_and_listed(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    write_videos(data, 2)
    (data / "noise.mp4").write_bytes(b"this is no video")
    (data / "noise.txt").write_text("a red circle")
    write_videos(data / "short", 1, frames=5)
    write_videos(data / "mute", 2)
    (data / "mute" / "clip0.txt").write_text(" \n")
    (data / "mute" / "clip1.txt").unlink()
    finetune(FinetuneConfig(**{**settings, "data": str(data)}))
    said = capsys.readouterr().out
    assert "4 files were not used:" in said
    for reason in (
        "noise.mp4: it cannot be decoded",
        "short/clip0.mp4: it has 5 frames, fewer than 9",
        "mute/clip0.mp4: the caption is empty",
        "mute/clip1.mp4: no caption: clip1.txt is missing",
    ):
        assert reason in said


def test_no_good_file_is_an_error(settings: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(InputError, match="holds no videos"):
        finetune(FinetuneConfig(**{**settings, "data": str(data)}))
    table = data / "list.csv"
    table.write_text("video,caption\nmissing.mp4,a red circle\n")
    with pytest.raises(InputError, match=r"none of the videos .* there is no such file"):
        finetune(FinetuneConfig(**{**settings, "data": str(table)}))
    table.write_text("file,caption\nmissing.mp4,a red circle\n")
    with pytest.raises(InputError, match="row 1 has no `video` and `caption`"):
        finetune(FinetuneConfig(**{**settings, "data": str(table)}))


def test_clips_are_encoded_once(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    write_videos(data, 3)
    rows = [{"video": f"clip{i}.mp4", "caption": f"a red circle {i}"} for i in range(2)]
    table = data / "list.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from sla_video.calibration import video_clips

    read: list[str] = []
    original = video_clips.read_clip

    def spy(path: Path, **size: int) -> torch.Tensor:
        read.append(path.name)
        return original(path, **size)

    monkeypatch.setattr(video_clips, "read_clip", spy)
    config = FinetuneConfig(**{**settings, "data": str(table)})
    finetune(config)
    assert read == ["clip0.mp4", "clip1.mp4"] and SHARD_SIZE > 2
    # One caption changes: only that clip is encoded again.
    rows[1]["caption"] = "a blue square"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finetune(dataclasses.replace(config, out=tmp_path / "other"))
    assert read == ["clip0.mp4", "clip1.mp4", "clip1.mp4"]


def test_a_caption_may_go_over_lines(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text('video,caption\na.mp4,"a red circle\nmoves left"\n')
    ((video,), _) = find_videos(str(table))
    assert video.caption == "a red circle moves left"
    table.write_text("video,caption\na.mp4," + "red " * 50000 + "\n")
    with pytest.raises(InputError, match=r"cannot read .*list.csv: field larger"):
        find_videos(str(table))
    # A separator of lines to Python, but not to JSON.
    table = table.with_suffix(".jsonl")
    table.write_text('{"video": "a.mp4", "caption": "a red\u2028circle"}\n', encoding="utf-8")
    ((video,), _) = find_videos(str(table))
    assert video.caption == "a red circle"


def test_resuming_with_other_settings_names_them(settings: dict[str, Any]) -> None:
    finetune(FinetuneConfig(**settings))
    changed = {**settings, "lora_rank": 4, "seed": 1, "resume": True, "log_every": 5}
    with pytest.raises(InputError) as caught:
        finetune(FinetuneConfig(**changed))
    said = str(caught.value)
    assert "lora_rank: 2 there, 4 here; seed: 0 there, 1 here" in said
    assert "log_every" not in said
    with pytest.raises(InputError, match="add --resume"):
        finetune(FinetuneConfig(**settings))


def test_routers_of_another_model_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    finetune(FinetuneConfig(**settings))
    other = tmp_path / "model"
    shutil.copytree(settings["model"], other)
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps({**config, "eps": 1e-5}))
    changed = {"model": str(other), "out": tmp_path / "b", "cache": tmp_path / "cache"}
    routers = str(settings["out"] / "routers")
    with pytest.raises(InputError, match="eps: 1e-06 / 1e-05"):
        finetune(FinetuneConfig(**{**settings, **changed, "routers": routers}))
    # Nothing was encoded for it.
    assert not (tmp_path / "cache").exists()


def test_lora_that_routers_bring_has_to_fit_the_settings(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    finetune(FinetuneConfig(**settings))
    again = {**settings, "out": tmp_path / "b", "routers": str(settings["out"] / "routers")}
    with pytest.raises(InputError, match="give --lora-rank 2 --lora-alpha 2 --lora-targets attn1"):
        finetune(FinetuneConfig(**{**again, "lora_rank": 4}))
    with pytest.raises(InputError, match="start from routers without LoRA"):
        finetune(FinetuneConfig(**{**again, "trainable": "full"}))
    assert finetune(FinetuneConfig(**again))["finished"]
    before, after = (load_routers(run["out"] / "routers") for run in (settings, again))
    for name, tensor in after.lora["transformer"].tensors.items():
        assert not torch.equal(tensor, before.lora["transformer"].tensors[name]), name


@pytest.mark.parametrize("trainable", ["lora", "router"])
def test_a_loss_that_is_not_finite_stops_and_names_the_layer(
    trainable: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third step on, a layer in the middle overflows."""
    from sla_video.calibration import clip_source

    original = clip_source.Sampler.batch
    loaded: list[torch.nn.Module] = []
    from sla_video.calibration import finetune_run

    class Spy(finetune_run.Student):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            loaded.append(self)

    def batch(self: Any, step: int, part: int) -> Any:
        if step == 2:
            block: Any = loaded[0].get_submodule("transformer.blocks.1.ffn.net.2")
            block.register_forward_hook(lambda *a: a[2] * float("inf"))
        return original(self, step, part)

    monkeypatch.setattr(finetune_run, "Student", Spy)
    monkeypatch.setattr(clip_source.Sampler, "batch", batch)
    config = FinetuneConfig(
        **{**settings, "max_steps": 40, "save_every": 2, "trainable": trainable}
    )
    with pytest.raises(InputError, match=r"step 2 is not finite: transformer.blocks.1.ffn"):
        finetune(config)
    saved = training_checkpoint.find_all(config.out)
    assert [path.name for path in saved] == ["step-00000002"]
    weights = load_file(saved[0] / "trainable.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    # Not a step was taken with what is not finite.
    for name, parameter in loaded[0].trainable().items():  # type: ignore[operator]
        assert torch.equal(parameter.detach(), weights[name]), name


def test_weights_that_are_not_finite_are_named(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(settings["model"], model)
    (path,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    tensors["blocks.2.attn1.to_k.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"the weights transformer.blocks.2.attn1.to_k"):
        finetune(FinetuneConfig(**{**settings, "model": str(model)}))


@pytest.fixture
def small_files() -> Iterator[Any]:
    """Limits the size of files, as a disk does that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_the_old_checkpoint(settings: dict[str, Any], small_files: Any) -> None:
    config = FinetuneConfig(**{**settings, "stop_after": 1})
    finetune(config)
    (old,) = training_checkpoint.find_all(config.out)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    small_files(4096)
    again = dataclasses.replace(config, resume=True, stop_after=0)
    with pytest.raises(InputError, match=r"cannot save the checkpoint .* is intact"):
        finetune(again)
    small_files(resource.RLIM_INFINITY)
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == [old.name]
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert finetune(again)["finished"]
    assert load_routers(config.out / "routers").metrics["steps"] == 2


def test_a_full_disk_leaves_the_old_transformer(tmp_path: Path, small_files: Any) -> None:
    student = make_student(trainable="full", loss="flow")

    def save() -> None:
        save_results(Accelerator(cpu=True), student, tmp_path, resolution=(9, 64, 64), metrics={})

    save()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert {path.parent.name for path in before} == {"routers", "transformer"}
    with torch.no_grad():
        next(iter(student.trainable().values())).add_(1)
    small_files(4096)
    with pytest.raises(InputError, match=r"cannot write .*transformer: .*--resume"):
        save()
    small_files(resource.RLIM_INFINITY)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["routers", "transformer"]


def test_a_run_that_ends_by_the_clock_saves_its_last_step(settings: dict[str, Any]) -> None:
    config = FinetuneConfig(**{**settings, "max_steps": 0, "minutes": 1e-7})
    done = finetune(config)
    (last,) = training_checkpoint.find_all(config.out)
    assert last.name == f"step-{done['step']:08d}"


@pytest.mark.parametrize("content", ["{", "[1]", "3", "null", "{}", '{"step": 1}'])
def test_checkpoints_with_the_state_of_something_else_are_refused(
    content: str, settings: dict[str, Any]
) -> None:
    checkpoint = settings["out"] / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"cannot read the checkpoint .*step-00000001"):
        finetune(FinetuneConfig(**settings, resume=True))


def test_an_optimizer_of_another_network_is_refused(settings: dict[str, Any]) -> None:
    config = FinetuneConfig(**settings, stop_after=1)
    finetune(config)
    (checkpoint,) = training_checkpoint.find_all(config.out)
    path = checkpoint / "optimizer.safetensors"
    tensors = load_file(path)
    tensors["blocks.9.attn1.to_q:exp_avg"] = torch.zeros(2)
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"cannot read the checkpoint .*blocks.9.attn1.to_q"):
        finetune(dataclasses.replace(config, resume=True, stop_after=0))
