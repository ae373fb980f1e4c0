"""All that was built on Wan, each through its own pipeline class, against Diffusers itself."""

from __future__ import annotations

import copy
import logging

import diffusers
import pytest
import torch
from tiny_families_wan import CASES, Case, skyreels

from sla_video import SLAConfig, disable_sla, enable_sla, load_routers, save_routers
from sla_video.pipelines.families.registry import supported_transformers
from sla_video.pipelines.processor import SLAAttnProcessor
from tiny_models import transformer_inputs

SPARSE = SLAConfig(sparsity=0.9, block_q=16, block_k=8)
EVERYTHING = SPARSE.replace(sparsity=0.0)


class Stock:
    """A pipeline of one case and what it makes without SLA."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.pipe = case.build()
        self.calls: dict[str, int] = {}
        hooks = [
            transformer.register_forward_pre_hook(self._count(name))
            for name, transformer in self.transformers.items()
        ]
        self.output = case.run(self.pipe)
        for hook in hooks:
            hook.remove()

    def _count(self, name):
        def hook(_module, _args):
            self.calls[name] = self.calls.get(name, 0) + 1

        return hook

    @property
    def transformers(self):
        names = ("transformer", "transformer_2")
        return {n: m for n in names if (m := getattr(self.pipe, n, None)) is not None}

    def run(self, **changes):
        return self.case.run(self.pipe, **changes)


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def stock(request):
    found = Stock(CASES[request.param])
    assert found.calls.keys() == found.transformers.keys()
    return found


def layers_of(handle, component):
    return [layer for layer in handle.stats().layers if layer.name.startswith(f"{component}.")]


def test_full_selection_equals_the_stock_output(stock):
    with enable_sla(stock.pipe, config=EVERYTHING) as handle:
        output = stock.run()
        torch.testing.assert_close(output, stock.output, rtol=1e-3, atol=1e-4)
        for component, calls in stock.calls.items():
            layers = layers_of(handle, component)
            assert len(layers) == stock.case.layers
            for layer in layers:
                assert layer.calls == calls
                assert layer.dense_calls == (calls if stock.case.all_dense else 0)


def test_sparse_attention_runs_and_is_gone_afterwards(stock, caplog):
    processors = {
        (component, name): processor
        for component, transformer in stock.transformers.items()
        for name, processor in transformer.attn_processors.items()
    }
    with caplog.at_level(logging.WARNING, logger="sla_video"):
        handle = enable_sla(stock.pipe, config=SPARSE)
        output = stock.run()
    assert output.isfinite().all()
    warnings = [record.getMessage() for record in caplog.records]
    if stock.case.all_dense:
        assert torch.equal(output, stock.output)
        assert handle.stats().sparsity == 0
        assert len(warnings) == 1 and stock.case.all_dense in warnings[0]
    else:
        error = (output - stock.output).norm() / stock.output.norm()
        assert 1e-3 < error < 1
        # The shortest sequence is 48 tokens: 1 of 6 key blocks is kept.
        assert all(0.8 < layer.sparsity <= 0.92 for layer in handle.stats().layers)
        assert all(layer.dense_calls == 0 for layer in handle.stats().layers)
        assert warnings == []

    disable_sla(stock.pipe)
    for component, transformer in stock.transformers.items():
        for name, processor in transformer.attn_processors.items():
            assert processor is processors[component, name]
    assert torch.equal(stock.run(), stock.output)


def test_routers_are_saved_and_loaded_for_each_transformer(stock, tmp_path):
    generator = torch.Generator().manual_seed(3)
    with enable_sla(stock.pipe, config=SPARSE) as handle:
        untrained = stock.run()
        with torch.no_grad():
            for router in handle.routers.values():
                for parameter in router.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
        trained = stock.run()
        save_routers(tmp_path, handle)
        expected = {
            name: router.query_proj.detach().clone() for name, router in handle.routers.items()
        }
    routers = load_routers(tmp_path)
    assert routers.models.keys() == stock.transformers.keys()
    with enable_sla(stock.pipe, tmp_path) as handle:
        assert len(handle.routers) == stock.case.layers * len(stock.transformers)
        for name, router in handle.routers.items():
            assert torch.equal(router.query_proj, expected[name])
        assert torch.equal(stock.run(), trained)
    assert torch.equal(trained, untrained) == (stock.case.all_dense is not None)


def test_dense_steps_are_the_first_ones(stock):
    if "DiffusionForcing" in type(stock.pipe).__name__:
        with pytest.raises(ValueError, match="each frame has its own: use dense_steps=0"):
            enable_sla(stock.pipe, config=SPARSE, dense_steps=1)
        return
    # Video to video enters the schedule in the middle.
    half = "strength" in stock.case.call
    steps = []

    def see(_pipe, _step, _time, values):
        steps.append({name: layers_of(handle, name)[0].dense_calls for name in stock.calls})
        return values

    with enable_sla(stock.pipe, config=SPARSE, dense_steps=2) as handle:
        stock.run(num_inference_steps=6 if half else 4, callback_on_step_end=see)
    # Two forwards a step, for guidance, in whichever transformer the step belongs to.
    dense = [sum(seen.values()) for seen in steps]
    each = len(dense) // stock.case.segments
    assert each == (3 if half else 4)
    assert dense == [
        4 * segment + 2 * min(step + 1, 2)
        for segment in range(stock.case.segments)
        for step in range(each)
    ]


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
