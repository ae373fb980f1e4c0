"""What fine-tuning minimises, against formulas written down anew in float64."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from finetune_cases import make_batch, make_student
from sla_video.calibration import alignment
from sla_video.calibration.alignment import Draw, alignment_loss, draw_blocks, draw_stream
from sla_video.calibration.clip_source import noise_level, uniform_level
from sla_video.calibration.student import guided_error
from sla_video.kernels.api import sla2_attention
from sla_video.kernels.router import Router
from sla_video.pipelines.errors import InputError


def smooth_l1(a: float, b: float) -> float:
    d = abs(a - b)
    return 0.5 * d * d if d < 1 else d - 0.5


@pytest.mark.parametrize(("sides", "terms"), [("both", 2), ("full", 1), ("sparse", 1)])
def test_alignment_is_the_formula_of_the_paper(sides: str, terms: int) -> None:
    generator = torch.Generator().manual_seed(0)
    full, sparse = (torch.randn(2, 5, 3, 4, generator=generator) * 3 for _ in range(2))
    weight = torch.tensor([1.0, 1, 1, 1, 0])
    expected, count = 0.0, 0
    for b in range(2):
        for h in range(3):
            a, c = full[b, :4, h].double(), sparse[b, :4, h].double()
            rms = math.sqrt(float((a * a).mean()))
            for x, y in zip(a.flatten().tolist(), c.flatten().tolist(), strict=True):
                expected += terms * smooth_l1(x / rms, y / rms)
                count += 1
    assert alignment_loss(full, sparse, weight, sides).item() == pytest.approx(
        expected / count, rel=1e-5
    )


@pytest.mark.parametrize(
    ("sides", "moves"), [("both", (True, True)), ("full", (True, False)), ("sparse", (False, True))]
)
def test_the_gradient_stops_where_it_should(sides: str, moves: tuple[bool, bool]) -> None:
    outputs = [torch.randn(1, 3, 2, 4, requires_grad=True) for _ in range(2)]
    alignment_loss(*outputs, torch.ones(3), sides).backward()
    assert tuple(x.grad is not None and bool(x.grad.any()) for x in outputs) == moves


def test_the_scale_is_a_constant() -> None:
    """A full output that is pulled towards itself times two moves along the error alone."""
    full = torch.randn(1, 4, 1, 8, dtype=torch.float64, requires_grad=True)
    sparse = 1.5 * full.detach()
    alignment_loss(full, sparse, torch.ones(4), "full").backward()
    rms = full.detach().square().mean().sqrt()
    error = ((full.detach() - sparse) / rms).clamp(-1, 1) / rms / full.numel()
    torch.testing.assert_close(full.grad, error, rtol=1e-4, atol=1e-8)


def test_streams_are_halves_and_the_same_everywhere() -> None:
    draws = [draw_stream(7, step) for step in range(400)]
    assert draws == [draw_stream(7, step) for step in range(400)]
    assert 150 < draws.count("full") < 250
    assert draws != [draw_stream(8, step) for step in range(400)]
    blocks = draw_blocks(0, 1, 56)
    assert len(set(blocks)) == 14 and max(blocks) < 56
    assert draw_blocks(0, 1, 2) in ([0], [1])


@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_a_layer_hands_on_its_stream_and_its_gradient(
    stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients of one layer are those of both attentions and the loss by autograd."""
    monkeypatch.setattr(alignment, "draw_stream", lambda *_: stream)
    student = make_student(loss="ssa", trainable="lora")
    name, processor = next(iter(student.processors.items()))
    router: Router = processor.router  # type: ignore[assignment]
    draw = student.draw
    assert isinstance(draw, Draw)
    draw.step(0, 0, 192, 128)
    query, key, value = (torch.randn(1, 192, 2, 16, requires_grad=True) for _ in range(3))
    out = processor.attention(processor, query, key, value)  # type: ignore[misc]
    grads = torch.autograd.grad(out.sum(), [query, key, value])

    full = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1) / 4).softmax(-1) @ value.transpose(1, 2)
    full = full.transpose(1, 2)
    sparse = sla2_attention(query, key, value, router, sparsity=0.34, impl="reference")
    wanted = full if stream == "full" else sparse
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    valid = draw.rows[draw.weight > 0]
    assert len(valid) in (64, 128), name
    loss = alignment_loss(full[:, valid], sparse[:, valid], torch.ones(len(valid)), "both")
    expected = torch.autograd.grad(wanted.sum() + draw.factor * loss, [query, key, value])
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_one_draw_serves_the_whole_network(monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student(loss="ssa", trainable="lora")
    assert len({id(layer.draw) for layer in student.alignments}) == 1
    batch = make_batch()
    values = {}
    for stream in ("full", "sparse"):
        monkeypatch.setattr(alignment, "draw_stream", lambda *_, stream=stream: stream)
        student.draw.step(0, 0, 192, 128)  # type: ignore[union-attr]
        values[stream] = student(*batch)["velocity"].item()
    # LoRA is fresh, so that the full stream is the teacher itself.
    assert values["full"] < 1e-9 < 1e-6 < values["sparse"]


@pytest.mark.parametrize("kind", ["distill", "flow"])
@pytest.mark.parametrize("trainable", ["lora", "full", "router"])
def test_velocity_losses_are_mean_squares(kind: str, trainable: str) -> None:
    student = make_student(loss=kind, trainable=trainable)
    latents, noise, sigma, text = batch = make_batch()
    out = student(*batch)["velocity"].item()
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise

    def velocity(network: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = network(noisy, 1000 * sigma, text, return_dict=False)[0]
        return result.double()

    mine = velocity(student.transformer)
    processors = student.handle.processors.values()
    attention = [p.attention for p in processors]
    with student.handle.dense():
        dense = velocity(student.transformer)
    assert attention == [p.attention for p in processors]
    target = dense if kind == "distill" else (noise - latents).double()
    assert out == pytest.approx((mine - target).square().mean().item(), rel=1e-4)


def test_noise_levels_are_logit_normal_and_shifted() -> None:
    for normal in (-2.0, 0.0, 1.5):
        u = 1 / (1 + math.exp(-normal))
        for shift in (1.0, 5.0):
            expected = shift * u / (1 + (shift - 1) * u)
            assert noise_level(normal, shift) == pytest.approx(expected)


def test_ssa_with_frozen_projections_is_refused() -> None:
    for settings in (
        {"trainable": "router"},
        {"trainable": "router+alpha"},
        {"trainable": "lora", "lora_targets": ("attn1.to_out.0",)},
    ):
        with pytest.raises(InputError, match="Q, K and V frozen"):
            make_student(loss="ssa", **settings)


def test_uniform_levels_are_those_of_a_sampler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(8)
    times = torch.linspace(1, scheduler.sigma_min, 8)
    levels = [uniform_level(time.item(), 5.0) for time in times]
    assert levels == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-4)


def test_guided_error_is_that_of_the_guided_velocities() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 6, 2, 3, dtype=torch.float64, generator=generator)

    def guided(velocity: torch.Tensor) -> torch.Tensor:
        captioned, bare = velocity[:3], velocity[3:]
        return bare + 4 * (captioned - bare)

    expected = (guided(student) - guided(teacher)).square().mean() / 16
    assert guided_error(student - teacher, 4.0).item() == pytest.approx(expected.item())
