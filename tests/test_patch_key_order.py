"""Key orders in a patched model: exact, measured when they should be, refused when they must."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from operator_inputs import random_qkv

import sla_video.pipelines.key_order as key_order_module
from sla_video import SLAConfig, disable_sla, enable_sla, load_routers, save_routers, sla2_attention
from sla_video.config import KeyOrderKind as ConfigKind
from sla_video.kernels.key_order import (
    KeyOrderKind,
    hot_blocks,
    join_key_orders,
    key_importance,
    make_key_order,
)
from sla_video.kernels.key_places import take_tokens
from sla_video.pipelines.key_order import LayerKeyOrder
from sla_video.pipelines.pipeline_steps import PipelineSteps
from tiny_models import TINY_CALL, build_tiny_pipeline, build_tiny_transformer, transformer_inputs

LAYERS = [f"transformer.blocks.{n}.attn1" for n in range(3)]
# Two heads in each layer, 192 tokens.
KINDS = {LAYERS[0]: ("hot_peel", "segment_sort"), LAYERS[2]: ("identity", "hot_peel")}
SPARSE = SLAConfig(sparsity=0.75, block_q=16, block_k=8, impl="torch", key_orders=KINDS)


def run(model, **inputs):
    with torch.no_grad():
        return model(**transformer_inputs(**inputs))[0]


def make_video(pipe, **changes):
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**TINY_CALL, "output_type": "latent", **changes}, generator=generator).frames


@pytest.fixture
def measured(monkeypatch):
    """What `key_importance` was asked for: how many times."""
    calls = []

    def counting(query, key, *more):
        calls.append(key.clone())
        return key_importance(query, key, *more)

    monkeypatch.setattr(key_order_module, "key_importance", counting)
    return calls


def test_full_selection_gives_the_stock_output():
    model = build_tiny_transformer()
    stock = run(model, batch=2)
    with enable_sla(model, config=SPARSE.replace(sparsity=0.0)):
        torch.testing.assert_close(run(model, batch=2), stock, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(model, batch=2), stock)


def test_heads_that_keep_their_keys_in_place_change_no_bit():
    model = build_tiny_transformer()
    in_place = {name: ("identity", "identity") for name in LAYERS}
    with enable_sla(model, config=SPARSE.replace(key_orders={})):
        expected = run(model)
    with enable_sla(model, config=SPARSE.replace(key_orders=in_place)) as handle:
        assert torch.equal(run(model), expected)
        assert [processor.key_order for processor in handle.processors.values()] == [None] * 3
    with enable_sla(model, config=SPARSE):
        assert (run(model) - expected).abs().max() > 1e-3, "the order makes no difference"


@pytest.mark.parametrize("top_p", [None, 0.8])
def test_layers_attend_to_keys_in_the_order_of_each_head(top_p):
    selection = {} if top_p is None else {"selection": "top_p", "top_p": top_p}
    model = build_tiny_transformer()

    def attend(processor, query, key, value):
        """With all keys and values moved, leading blocks and all."""
        kinds = KINDS.get(names[id(processor)], ("identity", "identity"))
        importance = key_importance(query, key)
        orders = {kind: make_key_order(kind, importance, block_k=8) for kind in set(kinds)}
        order = join_key_orders(kinds, orders)
        assert order.always.tolist() == [int(kind == "hot_peel") for kind in kinds]
        moved = (take_tokens(part, order.places) for part in (key, value))
        in_place = torch.arange(192).expand(1, 2, 192)
        return sla2_attention(
            query, *moved, processor.router, sparsity=0.75, block_q=16, block_k=8,
            key_order=order._replace(places=in_place), impl="reference", **selection,
        )  # fmt: skip

    with enable_sla(model, config=SPARSE.replace(**selection)) as handle:
        found = run(model)
        names = {id(processor): name for name, processor in handle.processors.items()}
        for processor in handle.processors.values():
            processor.attention = attend
        torch.testing.assert_close(found, run(model), rtol=1e-4, atol=1e-5)


def test_orders_are_kept_for_some_steps_and_for_each_branch(measured):
    pipe = build_tiny_pipeline()
    with enable_sla(pipe, config=SPARSE.replace(key_order_refresh=2)):
        make_video(pipe, num_inference_steps=4)
        # Steps 0 and 2, two branches, two kinds in one layer and one in the other.
        assert len(measured) == 2 * 2 * 3
        make_video(pipe, num_inference_steps=2)
        # Another video does not see the orders of the last.
        assert len(measured) == (2 + 1) * 2 * 3
        make_video(pipe, num_inference_steps=2, guidance_scale=1.0)
        assert len(measured) == (2 + 1) * 2 * 3 + 3
        make_video(pipe, num_inference_steps=1, height=32)
        assert measured[-1].shape[1] == 96
    # Both branches have orders of their own: the last layer's were measured on other keys.
    assert not torch.equal(measured[2], measured[5])


def test_dense_first_steps_are_not_measured(measured):
    pipe = build_tiny_pipeline()
    with enable_sla(pipe, config=SPARSE.replace(dense_steps=2)):
        make_video(pipe, num_inference_steps=3)
        assert len(measured) == 2 * 3


def test_without_a_pipeline_every_call_is_measured(measured):
    model = build_tiny_transformer()
    with enable_sla(model, config=SPARSE):
        for seed in (1, 2, 1):
            run(model, seed=seed)
        assert len(measured) == 3 * 3


def test_what_is_differentiated_is_measured_each_time(measured):
    steps = PipelineSteps()
    order = LayerKeyOrder(KINDS[LAYERS[0]], SPARSE, 0.75, steps)
    query, key, _ = random_qkv(40, batch=1, heads=2, head_dim=16)
    steps(None, None)
    for _ in range(2):
        order(query, key)
    assert len(measured) == 2
    order(query, key.requires_grad_())
    assert len(measured) == 4


def test_some_heads_have_the_order_that_they_have_among_all():
    query, key, _ = random_qkv(200, batch=2, heads=4, head_dim=16)
    kinds = ("identity", "hot_peel", "segment_sort", "hot_peel")
    order = LayerKeyOrder(kinds, SPARSE, 0.75, PipelineSteps())
    whole = order(query, key)
    part = order(query[:, :, 1:3], key[:, :, 1:3], (1, 3))
    assert torch.equal(part.places, whole.places[:, 1:3])
    assert torch.equal(part.always, whole.always[1:3])


def test_hot_keys_leave_half_of_the_selection_to_the_router():
    query, key, _ = random_qkv(6400, batch=1, heads=1, head_dim=4)
    settings = SLAConfig(block_k=64)
    for sparsity, blocks in [(0.9, 2), (0.97, 1), (0.99, 0)]:
        order = LayerKeyOrder(("hot_peel",), settings, sparsity, PipelineSteps())(query, key)
        assert order.always.tolist() == [blocks]
        assert (order.places.sort(-1).values == torch.arange(6400)).all()
        assert (order.places[..., 0] != 0).all() == (blocks > 0)
    assert hot_blocks(6400, 64, 0.02) == 2


def test_compiled_blocks_give_what_eager_ones_give():
    torch.compiler.reset()
    pipe = build_tiny_pipeline()
    with enable_sla(pipe, config=SPARSE.replace(key_order_refresh=2)):
        expected = make_video(pipe, num_inference_steps=3)
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(make_video(pipe, num_inference_steps=3), expected)
    torch.compiler.reset()


def test_copies_follow_their_own_steps(measured):
    pipe = build_tiny_pipeline()
    enable_sla(pipe, config=SPARSE.replace(key_order_refresh=2))
    expected = make_video(pipe, num_inference_steps=2)
    twin = copy.deepcopy(pipe)
    disable_sla(pipe)
    del pipe
    count = len(measured)
    assert torch.equal(make_video(twin, num_inference_steps=2), expected)
    assert len(measured) - count == 2 * 3


def test_videos_that_end_in_their_first_step_are_told_apart():
    pipe = build_tiny_pipeline()
    steps, seen = PipelineSteps(pipe), []
    pipe.transformer.register_forward_pre_hook(steps)
    pipe.transformer.register_forward_pre_hook(
        lambda *_: seen.append((steps.video, steps.step, steps.branch))
    )

    def fail(*_):
        raise ZeroDivisionError

    make_video(pipe, num_inference_steps=1)
    with pytest.raises(ZeroDivisionError):
        make_video(pipe, num_inference_steps=2, callback_on_step_end=fail)
    hook = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        make_video(pipe, num_inference_steps=2)
    hook.remove()
    make_video(pipe, num_inference_steps=2)
    first_step = [(1, 0, 0), (1, 0, 1), (2, 0, 0), (2, 0, 1), (3, 0, 0)]
    assert seen == [*first_step, (4, 0, 0), (4, 0, 1), (4, 1, 0), (4, 1, 1)]


def test_measuring_recall_sees_the_order():
    model = build_tiny_transformer()
    with enable_sla(model, config=SPARSE.replace(sparsity=0.5)) as handle:
        with handle.recording(exact_recall=True, per_step=True):
            run(model)
        with_order = handle.stats().layers[0]
    with enable_sla(model, config=SPARSE.replace(sparsity=0.5, key_orders={})) as handle:
        with handle.recording(exact_recall=True, per_step=True):
            run(model)
        without = handle.stats().layers[0]
    for name in ("recall", "router_recall", "oracle_density", "router_density"):
        assert 0 < getattr(with_order, name) <= 1
        assert getattr(with_order, name) != getattr(without, name), name


def test_settings_survive_files(tmp_path):
    config = SPARSE.replace(key_order_refresh=3)
    assert SLAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ConfigKind == KeyOrderKind
    model = build_tiny_transformer()
    with enable_sla(model, config=config) as handle:
        expected = run(model)
        save_routers(tmp_path / "routers", handle)
    assert load_routers(tmp_path / "routers").config == config
    with enable_sla(model, tmp_path / "routers", impl="torch"):
        assert torch.equal(run(model), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_orders": {LAYERS[0]: ("sorted", "identity")}}, r"must have identity, segment_sort,"),
        ({"key_orders": {LAYERS[0]: "identity"}}, "got 'identity' for 'transformer.blocks.0.attn1"),
        ({"key_orders": {LAYERS[0]: ()}}, r"got \(\) for"),
        ({"key_orders": ["identity"]}, "must map names of layers to a kind for each head"),
        ({"key_order_refresh": 0}, "`key_order_refresh` must be at least 1, got 0"),
        ({"key_order_refresh": 1.5}, "`key_order_refresh` must be an integer"),
        (
            {"key_orders": {"transformer.blocks.9.attn1": ("identity",)}},
            "transformer.blocks.9.attn1, which is not there: names are like transformer.blocks.0.a",
        ),
        ({"key_orders": {LAYERS[1]: ("hot_peel",)}}, "has 1 kinds for .*, which has 2 heads"),
        ({"dense_layers": [0]}, r"the layer transformer.blocks.0.attn1, which runs dense"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    model = build_tiny_transformer()
    with pytest.raises((ValueError, TypeError), match=message):
        enable_sla(model, config=SPARSE.replace(**changes))
    assert not hasattr(model, "_sla_patch")
