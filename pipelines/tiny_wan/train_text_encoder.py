"""Teach the text encoder of `tiny-wan` to read: which shape, size and motion go with which colour.

    python -m sla_video.pipelines.tiny_wan.train_text_encoder --out runs/text

The text encoders of the large models come pre-trained. One that starts from nothing beside the
transformer learns a bag of words, and then the shapes and motions of two objects get mixed up: see
the lab book. Captions are free, so a few minutes on a CPU are enough.

The colours of a scene differ, so the token of a colour stands for its object, and linear read-outs
of that one token must tell the object's shape, size, direction and whether it bounces. `--init`
starts from the encoder of a trained model, and `--keep` holds on to what its transformer knows.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from sla_video.pipelines.tiny_wan import checkpoints
from sla_video.pipelines.tiny_wan.data import token_ids
from sla_video.pipelines.tiny_wan.grammar import caption
from sla_video.pipelines.tiny_wan.models import (
    TEXT_DIM,
    build_text_encoder,
    build_tokenizer,
    load_text_encoder,
    read_locally,
)
from sla_video.pipelines.tiny_wan.scenes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    Motion,
    ObjectSpec,
    Scene,
    sample_scene,
)

LOG_EVERY = 50
PAIRS = 0.8
WAYS = (*DIRECTIONS, "still", "meet")
# What is read from the token of a colour, and the number of its classes.
READINGS = {"shape": len(SHAPES), "size": len(SIZES) + 1, "way": len(WAYS), "bounces": 2}


def classes(obj: ObjectSpec, motion: Motion) -> list[int]:
    """The class of each of `READINGS`."""
    return [
        SHAPES.index(obj.shape),
        (None, *SIZES).index(obj.size),
        WAYS.index(motion.direction or motion.kind),
        int(motion.kind == "bounce"),
    ]


def draw(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, count: int, *, held_out: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Captions, and what is to be read from them.

    Returns:
        ids `[count, TEXT_LENGTH]`; place `[O, 2]`, caption and token of the colour of each of the
        O objects; and its classes `[O, len(READINGS)]`.
    """
    scenes: list[Scene] = [sample_scene(rng, held_out=held_out, pairs=PAIRS) for _ in range(count)]
    ids = token_ids(tokenizer, [caption(scene, rng) for scene in scenes])
    colour_ids = {c: tokenizer.convert_tokens_to_ids(c) for c in COLOURS}
    place, labels = [], []
    for i, scene in enumerate(scenes):
        row = ids[i].tolist()
        for obj, motion in zip(scene.objects, scene.motions, strict=True):
            place.append((i, row.index(colour_ids[obj.colour])))
            labels.append(classes(obj, motion))
    return ids, torch.tensor(place), torch.tensor(labels)


class Reader(nn.Module):
    """The encoder and its linear read-outs."""

    def __init__(self, encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.readout = nn.Linear(TEXT_DIM, sum(READINGS.values()))

    def encode(self, ids: Tensor) -> Tensor:
        mask = (ids > 0).long()
        hidden: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden * mask[..., None]

    def read(self, hidden: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        """Logits of each of `READINGS`, `[O, classes]`."""
        tokens = hidden[place[:, 0], place[:, 1]]
        logits: Tensor = self.readout(tokens)
        return tuple(torch.split(logits, list(READINGS.values()), dim=1))


@torch.no_grad()
def accuracy(
    reader: Reader, tokenizer: PreTrainedTokenizerFast, device: torch.device, count: int
) -> dict[str, float]:
    """Share of held-out objects whose reading is right."""
    drawn = draw(tokenizer, random.Random(0), count, held_out=True)
    ids, place, labels = (x.to(device) for x in drawn)
    logits = reader.read(reader.encode(ids), place)
    right = [(part.argmax(1) == labels[:, i]) for i, part in enumerate(logits)]
    return {name: float(r.float().mean()) for name, r in zip(READINGS, right, strict=True)}


def train(args: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = build_tokenizer()
    encoder = load_text_encoder(args.init) if args.init else build_text_encoder(len(tokenizer))
    kept = copy.deepcopy(encoder).eval().to(device) if args.keep else None
    read_locally(encoder)
    reader = Reader(encoder.train()).to(device)
    places = [p for n, p in reader.named_parameters() if "relative_attention_bias" in n]
    others = [p for n, p in reader.named_parameters() if "relative_attention_bias" not in n]
    groups = [{"params": others, "rate": 1.0}, {"params": places, "rate": 10.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    started = time.monotonic()
    for step in range(args.steps):
        factor = min(1, (step + 1) / 50, (args.steps - step) / (0.3 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * group["rate"] * factor
        ids, place, labels = (x.to(device) for x in draw(tokenizer, rng, args.batch_size))
        hidden = reader.encode(ids)
        parts = reader.read(hidden, place)
        loss = sum(
            (F.cross_entropy(p, labels[:, i]) for i, p in enumerate(parts)), ids.new_zeros(())
        )
        if kept is not None:
            with torch.no_grad():
                mask = (ids > 0).long()
                old = kept(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
            loss = loss + args.keep * (hidden - old).square().sum() / old.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == args.steps:
            right = accuracy(reader, tokenizer, device, 256)
            print(
                f"step {step + 1} loss {loss.item():.4f} {time.monotonic() - started:.0f} s "
                + " ".join(f"{name} {value:.1%}" for name, value in right.items()),
                flush=True,
            )
    weights = {f"text_encoder.{n}": p for n, p in encoder.named_parameters()}
    state = {"steps": args.steps, "held_out": accuracy(reader, tokenizer, device, 1000)}
    checkpoints.save_checkpoint(args.out, {"weights": weights}, state)
    print(f"saved {args.out}: {json.dumps(state)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--init", type=Path, help="pipeline folder or checkpoint to start from")
    parser.add_argument(
        "--keep", type=float, default=0.0, help="weight of staying near the embeddings of --init"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=128, help="captions")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
