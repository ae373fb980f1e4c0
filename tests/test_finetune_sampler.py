"""Which clips a step of fine-tuning takes: the same however it is cut into passes and processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sla_video.calibration.clip_source import ClipBatch, NoisyBatch, Sampler
from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.pipelines.errors import InputError


class Recorded:
    """A source that keeps what it was asked for; a clip's latents are its number."""

    validation_prompts = ()

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[bool], str]] = []

    def __len__(self) -> int:
        return 10

    def load(self, clips, captioned, seed):  # type: ignore[no-untyped-def]
        self.asked.append((list(clips), list(captioned), seed))
        latents = torch.tensor(clips).float().view(-1, 1, 1, 1, 1).expand(-1, 1, 1, 2, 2)
        return ClipBatch(latents, torch.tensor(captioned).float().view(-1, 1, 1))


def sampler(source: Any = None, **changes: Any) -> Sampler:
    settings = {"seed": 0, "batch_size": 4, "processes": 1, "process": 0, "accumulate": 1}
    settings |= {"shift": 5.0, "caption_dropout": 0.5, **changes}
    return Sampler(source or Recorded(), **settings)


def rows(batches: list[NoisyBatch]) -> list[tuple[float, ...]]:
    """Each clip of the batches with its noise, level and caption, in an order of its own."""
    return sorted(
        (*latents.flatten().tolist(), *noise.flatten().tolist(), sigma.item(), text.item())
        for batch in batches
        for latents, noise, sigma, text in zip(*batch.tensors(), strict=True)
    )


@pytest.mark.parametrize("paired", [False, True], ids=["alone", "paired"])
@pytest.mark.parametrize(
    ("batch_size", "processes", "accumulate"), [(4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2)]
)
def test_a_step_takes_the_same_clips_however_it_is_cut(
    batch_size: int, processes: int, accumulate: int, paired: bool
) -> None:
    whole = sampler(one := Recorded(), batch_size=8, paired=paired)
    source = Recorded()
    parts = [
        sampler(
            source,
            batch_size=batch_size,
            processes=processes,
            process=process,
            accumulate=accumulate,
            paired=paired,
        )
        for process in range(processes)
    ]
    taken = []
    for step in range(4):
        expected = rows([whole.batch(step, 0)])
        cut = [part.batch(step, i) for part in parts for i in range(accumulate)]
        assert rows(cut) == expected and len(expected) == 8
        taken.append(expected)
    # What the source draws for itself is of the step, too.
    seeds = [seed for *_, seed in one.asked]
    assert len(set(seeds)) == 4 and {seed for *_, seed in source.asked} == set(seeds)
    assert len({tuple(map(tuple, step)) for step in taken}) == 4


@pytest.mark.parametrize("paired", [False, True], ids=["alone", "paired"])
def test_places_follow_each_other_and_nothing_is_left_out(paired: bool) -> None:
    parts = [
        sampler(processes=2, process=process, accumulate=2, paired=paired) for process in (0, 1)
    ]
    places = [
        place
        for step in range(3)
        for part in range(2)
        for process in parts
        for place in process.places(step, part)
    ]
    assert places == list(range(3 * 2 * 2 * (2 if paired else 4)))
    # Ten clips: each pass over the data takes every one once, in an order of its own.
    one = sampler()
    first, second = ([one.clip_at(place) for place in range(s, s + 10)] for s in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


@pytest.mark.parametrize("levels", ["logit-normal", "uniform"])
def test_pairs_share_clip_noise_and_level(levels: str) -> None:
    source = Recorded()
    batch = sampler(source, batch_size=6, levels=levels, paired=True).batch(2, 0)
    ((clips, captioned, _),) = source.asked
    assert clips[:3] == clips[3:] and len(set(clips[:3])) == 3
    assert captioned == 3 * [True] + 3 * [False]
    assert torch.equal(batch.noise[:3], batch.noise[3:])
    assert torch.equal(batch.sigma[:3], batch.sigma[3:]) and len(set(batch.sigma.tolist())) == 3


@pytest.mark.parametrize(
    "settings", [{"batch_size": 3}, {"loss": "flow"}, {"loss": "ssa", "base_loss": "flow"}]
)
def test_guidance_needs_pairs_and_a_teacher(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match="guidance"):
        FinetuneConfig(**{"max_steps": 1, "batch_size": 2, "guidance": 3.0, **settings})
