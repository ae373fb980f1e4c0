"""All that was built on Wan, each through its own pipeline class, against Diffusers itself."""

from __future__ import annotations

import copy
import logging

import diffusers
import pytest
import torch
from family_checks import SPARSE, FamilyChecks, Stock
from tiny_families_wan import CASES, skyreels

from sla_video import enable_sla, save_routers
from sla_video.pipelines.families.registry import supported_transformers
from sla_video.pipelines.processor import SLAAttnProcessor
from tiny_models import transformer_inputs


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def stock(request):
    return Stock(CASES[request.param])


class TestWan(FamilyChecks):
    """Each case."""


@pytest.mark.parametrize("causal", [False, True])
def test_a_causal_mask_is_dense_and_said_once(causal, caplog):
    model = skyreels("SkyReelsV2Pipeline", num_frame_per_block=3 if causal else 1).transformer
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="sla_video"):
        inputs = transformer_inputs(grid=(6, 4, 4))
        stock = model(**inputs)[0]
        enable_sla(model, config=SPARSE)
        assert torch.equal(model(**inputs)[0], stock) == causal
        model(**inputs)
    assert caplog.text.count("attention mask") == causal


def test_routers_of_another_family_are_refused(tmp_path):
    wan, sky = (CASES[name].build() for name in ("wan2.1 t2v", "skyreels t2v"))
    save_routers(tmp_path, enable_sla(wan, config=SPARSE))
    with pytest.raises(ValueError, match=r"made for WanTransformer3DModel.*SkyReelsV2Transformer"):
        enable_sla(sky, tmp_path)


def test_an_unsupported_class_is_refused_with_the_list():
    model = diffusers.SanaTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=4, num_cross_attention_heads=1,
        cross_attention_head_dim=4, cross_attention_dim=4, caption_channels=4, sample_size=8,
    )  # fmt: skip
    with pytest.raises(TypeError, match="got SanaTransformer2DModel") as error:
        enable_sla(model)
    for name in supported_transformers():
        assert name in str(error.value)
        assert hasattr(diffusers, name)


def test_every_supported_class_is_tested():
    tested = {type(CASES[name].build().transformer).__name__ for name in CASES}
    assert tested >= {name for name in supported_transformers() if "Wan" in name}
    assert {"ChronoEditTransformer3DModel", "SkyReelsV2Transformer3DModel"} <= tested


@pytest.mark.parametrize("name", ["animate", "chronoedit", "skyreels t2v"])
def test_only_self_attention_is_replaced(name):
    transformer = CASES[name].build().transformer
    before = copy.copy(transformer.attn_processors)
    enable_sla(transformer, config=SPARSE)
    for path, processor in transformer.attn_processors.items():
        if "attn1" in path:
            assert type(processor) is SLAAttnProcessor
        else:
            assert processor is before[path]
