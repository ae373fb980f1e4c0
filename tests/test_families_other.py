"""LTX-Video, LTX-2 and Allegro, each through its own pipeline class, against Diffusers itself."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from family_checks import EVERYTHING, SPARSE, FamilyChecks, Stock, processors_of
from tiny_families_other import CASES

from sla_video import enable_sla
from sla_video.pipelines.families.registry import FAMILIES, find_family, supported_transformers
from sla_video.pipelines.processor import SLAAttnProcessor


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def stock(request):
    return Stock(CASES[request.param])


class TestOther(FamilyChecks):
    """Each case."""


@pytest.mark.parametrize("name", CASES)
def test_only_self_attention_of_video_tokens_is_replaced(name):
    transformer = CASES[name].build().transformer
    before = processors_of(transformer)
    enable_sla(transformer, config=SPARSE)
    replaced = [
        path
        for path, processor in processors_of(transformer).items()
        if type(processor) is SLAAttnProcessor
    ]
    assert replaced == [f"transformer_blocks.{index}.attn1" for index in range(3)]
    for path, processor in processors_of(transformer).items():
        if path in replaced:
            # Attention modules pass on what this signature names, and drop all else.
            assert inspect.signature(processor.__call__) == inspect.signature(before[path].__call__)
        else:
            assert processor is before[path]


@pytest.mark.parametrize("name", ["ltx t2v", "ltx2 perturbed", "allegro"])
def test_self_attention_compiles_whole(name):
    """Attention modules of these families look at the signature of their processor."""
    transformer = CASES[name].build().transformer
    family = find_family(transformer)
    assert family is not None
    enable_sla(transformer, config=EVERYTHING, impl="torch")
    attn = family.layers(transformer)["transformer_blocks.0.attn1"]
    hidden = torch.randn(1, 192, attn.inner_dim)
    with torch.no_grad():
        compiled = torch.compile(attn, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(hidden), attn(hidden))


@pytest.mark.parametrize("kept", [None, [0.0, 0.0], [1.0, 0.0]], ids=repr)
def test_perturbed_samples_get_the_values_of_ltx2(kept):
    transformer = CASES["ltx2 perturbed"].build().transformer
    attn = transformer.transformer_blocks[0].attn1
    hidden = torch.randn(2, 70, attn.inner_dim)
    more = {} if kept is None else {"perturbation_mask": torch.tensor(kept)[:, None, None]}
    with torch.no_grad():
        stock = attn(hidden, **more)
        with enable_sla(transformer, config=EVERYTHING):
            torch.testing.assert_close(attn(hidden, **more), stock)
        with enable_sla(transformer, config=SPARSE):
            sparse = attn(hidden, **more)
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(sparse, stock, strict=True)]
    assert same == [share == 0 for share in kept or [1.0, 1.0]]


def test_the_example_of_a_new_family_computes_what_diffusers_does():
    text = (Path(__file__).parent.parent / "pipelines" / "README.md").read_text(encoding="utf-8")
    example: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], example)
    torch.manual_seed(0)
    attn = Attention(32, heads=2, dim_head=16, qk_norm="rms_norm", processor=AttnProcessor2_0())
    hidden = torch.randn(2, 33, 32)

    def operate(*parts):
        query, key, value = (part.transpose(1, 2) for part in parts)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    family = example["MINE"]
    torch.testing.assert_close(family.attend(attn, operate, hidden), attn(hidden))
    assert family.why_dense(attn, hidden) is None
    assert family.why_dense(attn, hidden, attention_mask=hidden) == "an attention mask"
    assert all(f"`{name}`" in text for name in supported_transformers())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_are_described_alike(family):
    """`attend` and `why_dense` take what the stock processor takes."""
    attend = list(inspect.signature(family.attend).parameters)
    assert attend[:3] == ["attn", "operate", "hidden_states"]
    dense = list(inspect.signature(family.why_dense).parameters)
    assert dense[:2] == ["attn", "hidden_states"]
    assert len({other.name for other in FAMILIES}) == len(FAMILIES)
    assert set(family.identity_fields) >= {
        "num_layers", "num_attention_heads", "attention_head_dim", "in_channels"
    }  # fmt: skip
