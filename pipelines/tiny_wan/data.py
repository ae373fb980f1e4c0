"""An endless stream of training clips: scenes and captions from worker processes, drawn later."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from sla_video.pipelines.tiny_wan.grammar import caption
from sla_video.pipelines.tiny_wan.models import build_tokenizer
from sla_video.pipelines.tiny_wan.placement import ClipParams, place
from sla_video.pipelines.tiny_wan.scenes import sample_scene

# Longest caption in tokens, with its `</s>`, rounded up so that one pad slot more makes 32.
TEXT_LENGTH = 31
CAPTIONS_PER_SCENE = 4

Batch = dict[str, Tensor]


class SceneStream(IterableDataset[Batch]):
    """Batches of scenes that are in the training set, each with a few wordings.

    Yields dicts of CPU tensors: the fields of `ClipParams`, and with captions `ids`,
    `[B, CAPTIONS_PER_SCENE, TEXT_LENGTH]`, padded with 0.
    """

    def __init__(
        self, batch_size: int, seed: int, *, with_captions: bool = True, pairs: float = 0.5
    ) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.with_captions = with_captions
        self.pairs = pairs

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        torch.set_num_threads(1)
        tokenizer = build_tokenizer() if self.with_captions else None
        while True:
            yield draw_batch(self.batch_size, rng, tokenizer, self.pairs)


def draw_batch(
    count: int, rng: random.Random, tokenizer: PreTrainedTokenizerFast | None, pairs: float = 0.5
) -> Batch:
    scenes = [sample_scene(rng, pairs=pairs) for _ in range(count)]
    params = place(scenes, rng)
    batch = {f.name: getattr(params, f.name) for f in fields(params)}
    if tokenizer is not None:
        texts = [caption(scene, rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
        ids = token_ids(tokenizer, texts)
        batch["ids"] = ids.view(count, CAPTIONS_PER_SCENE, TEXT_LENGTH)
    return batch


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """`[len(texts), TEXT_LENGTH]` token ids, padded with 0."""
    encoded = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    if ids.shape[1] > TEXT_LENGTH:
        raise ValueError(f"a caption has {ids.shape[1]} tokens, more than {TEXT_LENGTH}")
    return ids


def clip_params(batch: Batch, device: torch.device) -> ClipParams:
    """The drawable part of a batch, on `device`."""
    names = [f.name for f in fields(ClipParams)]
    return ClipParams(**{n: batch[n].to(device, non_blocking=True) for n in names})


def stream(
    batch_size: int, seed: int, workers: int, *, with_captions: bool = True, pairs: float = 0.5
) -> Iterator[Batch]:
    """Batches of `SceneStream` from `workers` processes; `pairs` of the scenes have two objects."""
    loader = DataLoader(
        SceneStream(batch_size, seed, with_captions=with_captions, pairs=pairs),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
