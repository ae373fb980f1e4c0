"""The training scripts of the embedded model: optimizer, clock, checkpoints, resuming."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel

from sla_video.pipelines.handle import SLAHandle
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.processor import SLAAttnProcessor
from sla_video.pipelines.stats import LayerStats
from sla_video.pipelines.tiny_wan import checkpoints, schedule, train_transformer, train_vae
from sla_video.pipelines.tiny_wan.muon import BatchedMuon
from sla_video.pipelines.tiny_wan.schedule import Schedule

SMALL_VAE = ["--no-compile", "--crop-size", "16", "--size", "16", "--eval-clips", "2"]
SMALL_VAE += ["--batch-size", "1", "--workers", "0"]
SMALL = ["--no-compile", "--bank", "8", "--encode-batch", "1", "--workers", "0", "--reuse", "2"]


def run(module: object, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    module.main()  # type: ignore[attr-defined]


def state_of(folder: Path) -> dict:
    return json.loads((folder / checkpoints.JSON_NAME).read_text())


def test_batched_muon_takes_the_steps_of_torch() -> None:
    torch.manual_seed(0)
    shapes = [(16, 16), (16, 16), (48, 16), (16, 48), (48, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    muon = BatchedMuon(ours, lr=1e-2, momentum=0.9, weight_decay=0.1)
    reference = torch.optim.Muon(
        theirs, lr=1e-2, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        # torch iterates in bfloat16, ours in float32 on CPUs.
        assert (a - b).norm() < 0.02 * (b - s).norm()


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"\(3,\)"):
        BatchedMuon([torch.nn.Parameter(torch.zeros(3))])


def test_an_interrupted_save_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    checkpoints.save_checkpoint(folder, {"a": {"x": torch.zeros(2)}}, {"step": 1})
    monkeypatch.setattr(checkpoints.os, "replace", _interrupt_second(checkpoints.os.replace))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_checkpoint(folder, {"a": {"x": torch.ones(2)}}, {"step": 2})
    found = checkpoints.newest(folder)
    assert found is not None
    assert checkpoints.load_state(found) == {"step": 1}
    assert checkpoints.load_group(found, "a")["x"].tolist() == [0, 0]


def _interrupt_second(replace):  # type: ignore[no-untyped-def]
    calls = []

    def interrupted(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*arguments)

    return interrupted


def test_optimizer_state_survives_a_checkpoint(tmp_path: Path) -> None:
    p = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.randn_like(p)
    optimizer.step()
    tensors = checkpoints.optimizer_tensors(optimizer)
    checkpoints.save_checkpoint(tmp_path / "run", {"adam": tensors}, {})
    fresh = torch.optim.AdamW([p], lr=0.1)
    checkpoints.restore_optimizer(fresh, checkpoints.load_group(tmp_path / "run", "adam"))
    for name, value in optimizer.state[p].items():
        torch.testing.assert_close(fresh.state[p][name], value)


# The first step compiles; its time is not taken off the training time.
FIRST_STEP_SECONDS = 15.0


def factors_of(clock: Schedule, now: list[float], seconds_a_step: float = 1) -> list[float]:
    factors = []
    going = True
    while going:
        factors.append(clock.factor)
        now[0] += seconds_a_step if len(factors) > 1 else FIRST_STEP_SECONDS
        going = clock.advance()
    return factors


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock to be set by hand, on which this process began at 5 seconds."""
    seconds = [10.0]
    monkeypatch.setattr(schedule.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(schedule, "process_seconds", lambda: seconds[0] - 5)
    return seconds


def test_rates_warm_up_hold_and_cool_down(now: list[float]) -> None:
    clock = Schedule(Accelerator(cpu=True), 100 / 60, warmup_steps=4, cooldown=0.5)
    factors = factors_of(clock, now)
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[59] == 1.0
    # The processes agree on the time every 20 steps; in between nothing moves.
    assert factors[60] == factors[79] == pytest.approx(0.82)
    assert factors[80] == pytest.approx(0.42)
    assert len(factors) == 120
    assert clock.finished and not clock.out_of_time


def test_the_wall_clock_stops_a_run_and_another_ends_it(now: list[float]) -> None:
    first = Schedule(Accelerator(cpu=True), 2.0, wall_minutes=1.0, cooldown=0.5)
    assert len(factors_of(first, now)) == 40
    assert first.elapsed == pytest.approx(39 / 60)
    assert first.out_of_time and not first.finished
    second = Schedule(Accelerator(cpu=True), 2.0, before=first.elapsed, warmup_steps=1)
    assert len(factors_of(second, now)) == 100
    assert second.finished


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run(train_vae, patch, "--out", folder, "--max-steps", 2, *SMALL_VAE)
    return folder


def test_vae_training_resumes_and_can_keep_its_latents(
    vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = state_of(vae_run)
    assert first["progress"]["clips"] == 2
    arguments = ["--init", vae_run, "--out", tmp_path / "b", "--max-steps", 1, *SMALL_VAE]
    run(train_vae, monkeypatch, *arguments, "--decoder-only", "--learning-rate", 1e-2)
    a, b = (checkpoints.load_group(f, "vae") for f in (vae_run, tmp_path / "b"))
    changed = {k.split(".")[0] for k in a if not torch.equal(a[k], b[k])}
    assert changed == {"decoder", "post_quant_conv"}
    assert state_of(tmp_path / "b")["latents_mean"] == first["latents_mean"]
    run(train_vae, monkeypatch, *arguments)
    assert state_of(tmp_path / "b")["progress"]["clips"] == 2


def test_transformer_training_goes_on_where_it_was(
    vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    common = ["--vae", vae_run, "--out", out, "--max-steps", 2, *SMALL]
    stages = ["16:2:1:2:1e-3", "32:1:1:3:1e-3"]
    run(train_transformer, monkeypatch, *common, "--stages", stages[0])
    before = checkpoints.load_group(out, "weights")
    assert [s["clips"] for s in state_of(out)["stages"]] == [4]
    run(train_transformer, monkeypatch, *common, "--stages", *stages)
    assert [(s["size"], s["clips"], s["finished"]) for s in state_of(out)["stages"]] == [
        (16, 4, True),
        (32, 2, True),
    ]
    after = checkpoints.load_group(out, "weights")
    frozen = [k for k in after if torch.equal(after[k], before[k])]
    assert frozen == []
    assert state_of(out)["ema_steps"] == 4, "the average goes on across runs"
    assert all(torch.isfinite(v).all() for v in after.values())


def test_a_stage_with_a_sparsity_trains_both_kinds_of_attention(
    vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles, layers = [], []

    def spy(transformer: WanTransformer3DModel, **settings: Any) -> SLAHandle:
        handles.append(enable_sla(transformer, **settings))
        layers.extend(block.attn1 for block in transformer.blocks)
        return handles[-1]

    monkeypatch.setattr(train_transformer, "enable_sla", spy)
    arguments = ["--vae", vae_run, "--out", tmp_path / "run", "--max-steps", 8, *SMALL]
    stats: list[LayerStats] = []
    monkeypatch.setattr(
        train_transformer, "save", lambda *_: stats.extend(handles[0].stats().layers)
    )
    run(train_transformer, monkeypatch, *arguments, "--stages", "64:1:1:2:1e-3:0.6")
    assert len(stats) == len(layers) == 8
    # The whole network runs one kind in a step.
    assert {(layer.calls, layer.dense_calls) for layer in stats} == {(8, stats[0].dense_calls)}
    assert 0 < stats[0].dense_calls < 8
    assert not handles[0].active
    assert not any(isinstance(attn.processor, SLAAttnProcessor) for attn in layers)


def test_a_checkpoint_of_other_networks_is_refused(
    vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"weights": {"transformer.blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}}
    checkpoints.save_checkpoint(tmp_path / "other", other, {"stages": [], "ema_steps": 0})
    arguments = ["--init", tmp_path / "other", "--out", tmp_path / "run", *SMALL]
    with pytest.raises(SystemExit, match="does not fit transformer"):
        run(
            train_transformer,
            monkeypatch,
            "--vae",
            vae_run,
            "--stages",
            "16:2:1:2:1e-3",
            *arguments,
        )


def test_without_a_checkpoint_training_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="no checkpoint and no pipeline"):
        run(
            train_transformer,
            monkeypatch,
            *["--vae", tmp_path, "--out", tmp_path / "run", "--stages", "16:2:1:2:1e-3", *SMALL],
        )
