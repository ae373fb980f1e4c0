"""The text encoder: it knows who stands where, and learns which words belong together."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from sla_video.pipelines.tiny_wan import checkpoints, train_text_encoder
from sla_video.pipelines.tiny_wan.data import token_ids
from sla_video.pipelines.tiny_wan.models import (
    build_text_encoder,
    build_tokenizer,
    load_text_encoder,
)
from sla_video.pipelines.tiny_wan.scenes import Motion, ObjectSpec
from sla_video.pipelines.tiny_wan.train_text_encoder import READINGS, classes, draw


def test_a_fresh_encoder_tells_who_owns_what() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(len(tokenizer)).eval()
    red = tokenizer.convert_tokens_to_ids("red")
    # The same words, so that a bag of them could not tell the difference.
    texts = ["a red circle moves left and a blue square moves right"]
    texts += ["a red square moves left and a blue circle moves right"]
    ids = token_ids(tokenizer, texts)
    with torch.no_grad():
        hidden = encoder(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state
    first, second = (h[row.tolist().index(red)] for h, row in zip(hidden, ids, strict=True))
    assert (first - second).norm() > 0.1 * first.norm()


def test_readings_of_a_known_scene() -> None:
    star = ObjectSpec(colour="pink", shape="star", size="large")
    assert classes(star, Motion(kind="bounce", direction="up")) == [3, 2, 2, 1]
    assert classes(star, Motion(kind="still")) == [3, 2, 8, 0]
    assert classes(ObjectSpec(colour="red", shape="cross"), Motion(kind="meet")) == [4, 0, 9, 0]


def test_the_read_token_is_the_colour() -> None:
    tokenizer = build_tokenizer()
    ids, place, labels = draw(tokenizer, random.Random(0), 16)
    words = {tokenizer.decode([ids[i, t]]) for i, t in place.tolist()}
    assert words <= {"red", "orange", "yellow", "green", "blue", "purple", "pink"}
    assert labels.shape == (len(place), len(READINGS))
    assert (labels < torch.tensor(list(READINGS.values()))).all()


def test_it_learns_to_bind_and_resumes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--out", tmp_path / "text", "--steps", 40, "--batch-size", 64]
    arguments += ["--learning-rate", 2e-3]
    monkeypatch.setattr(sys, "argv", ["train_text_encoder", *map(str, arguments)])
    train_text_encoder.main()
    state = json.loads((tmp_path / "text" / checkpoints.JSON_NAME).read_text())
    # A bag of words gets about 60% of the shapes right: half of the pairs at random.
    assert state["held_out"]["shape"] > 0.85
    saved = checkpoints.load_group(tmp_path / "text", "weights")
    encoder = load_text_encoder(tmp_path / "text")
    assert torch.equal(encoder.shared.weight, saved["text_encoder.shared.weight"])


def test_a_missing_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no checkpoint and no pipeline"):
        load_text_encoder(tmp_path)
