"""Dense layers, dense steps and sparsity by layer, proven by the values that come out."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler

from sla_video import SLAConfig, disable_sla, enable_sla, save_routers
from tiny_models import TINY_CALL, build_tiny_pipeline, build_tiny_transformer, transformer_inputs

SMALL_BLOCKS = SLAConfig(sparsity=0.8, block_q=16, block_k=8)


def layer_outputs(model, inputs):
    """Input and output of each self-attention in one forward."""
    seen = []
    hooks = [
        block.attn1.register_forward_hook(lambda _, args, out: seen.append((args, out)))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def replay(model, layer, args):
    with torch.no_grad():
        return model.blocks[layer].attn1(*args)


@pytest.mark.parametrize("dense", [(0,), (1, 2), (-1,), (0, 1, 2), (-3, 1)], ids=str)
def test_dense_layers_compute_what_diffusers_computes(dense):
    model, stock, inputs = build_tiny_transformer(), build_tiny_transformer(), transformer_inputs()
    handle = enable_sla(model, config=SMALL_BLOCKS, dense_layers=dense)
    expected = {layer % 3 for layer in dense}
    for layer, (args, output) in enumerate(layer_outputs(model, inputs)):
        assert torch.equal(output, replay(stock, layer, args)) == (layer in expected)
    for layer, stats in enumerate(handle.stats().layers):
        assert (stats.sparsity == 0.0) == (layer in expected)
    assert len(handle.routers) == 3 - len(expected)


@pytest.mark.parametrize(
    "sparsity", [[0.5, 0.0, 0.9], (0.5, 0.0, 0.9), {0: 0.5, 1: 0.0, -1: 0.9}], ids=repr
)
def test_sparsity_by_layer_equals_models_of_one_sparsity(sparsity):
    model, inputs = build_tiny_transformer(), transformer_inputs()
    handle = enable_sla(model, config=SMALL_BLOCKS, sparsity=sparsity)
    outputs = layer_outputs(model, inputs)
    # 192 tokens are 24 key blocks, of which 12, 24 and 2 are kept.
    achieved = [layer.sparsity for layer in handle.stats().layers]
    assert achieved == pytest.approx([12 / 24, 0.0, 22 / 24])
    for layer, value in enumerate([0.5, 0.0, 0.9]):
        uniform = build_tiny_transformer()
        enable_sla(uniform, config=SMALL_BLOCKS, sparsity=value)
        args, output = outputs[layer]
        assert torch.equal(output, replay(uniform, layer, args))


def test_one_sparsity_takes_back_those_of_single_layers():
    config = SMALL_BLOCKS.replace(layer_sparsity={0: 0.5})
    assert enable_sla(build_tiny_transformer(), config=config).config.layer_sparsity == {0: 0.5}
    handle = enable_sla(build_tiny_transformer(), config=config, sparsity=0.9)
    assert handle.config.layer_sparsity == {} and handle.config.sparsity == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dense_layers": [3]}, "`dense_layers` names layer 3, but the transformer has 3 layers"),
        ({"dense_layers": [-4]}, "names layer -4"),
        ({"dense_layers": [0, -3]}, "names layer 0 twice, as 0 and -3"),
        ({"sparsity": {5: 0.5}}, "`layer_sparsity` names layer 5"),
        ({"sparsity": [0.5, 0.5]}, "one value for each of the 3 layers of 'transformer', got 2"),
        ({"sparsity": [0.5] * 4}, "got 4"),
        ({"sparsity": 1.0}, r"`sparsity` must be in \[0, 1\), got 1.0"),
        ({"sparsity": {0: -0.1}}, r"`layer_sparsity\[0\]` must be in \[0, 1\), got -0.1"),
        ({"dense_steps": -1}, "`dense_steps` must be at least 0, got -1"),
        ({"dense_steps": 2}, "`dense_steps`=2 needs the pipeline"),
    ],
)
def test_wrong_layers_and_steps_are_refused_and_leave_the_model_alone(arguments, message):
    model = build_tiny_transformer()
    with pytest.raises(ValueError, match=message):
        enable_sla(model, config=SMALL_BLOCKS, **arguments)
    with pytest.raises(ValueError, match="not enabled"):
        disable_sla(model)


def test_routers_with_dense_steps_say_how_a_bare_transformer_takes_them(tmp_path):
    settings = SMALL_BLOCKS.replace(dense_steps=1)
    folder = save_routers(tmp_path, enable_sla(build_tiny_pipeline(), config=settings))
    model = build_tiny_transformer()
    with pytest.raises(ValueError, match=r"`dense_steps`=1 \(as the routers ask\).*dense_steps=0"):
        enable_sla(model, folder)
    enable_sla(model, folder, dense_steps=0)


def generate(pipe, **changes):
    """Latents after each step."""
    latents = []

    def keep(_pipe, _step, _time, kwargs):
        latents.append(kwargs["latents"].clone())
        return {}

    call = {**TINY_CALL, "num_inference_steps": 4, "output_type": "latent", **changes}
    pipe(**call, generator=torch.Generator().manual_seed(0), callback_on_step_end=keep)
    return latents


@pytest.mark.parametrize("two", [False, True], ids=["one transformer", "two transformers"])
@pytest.mark.parametrize("scheduler", ["FlowMatchEuler", "UniPC"])
def test_dense_steps_are_the_first_of_every_generation(scheduler, two):
    pipe = build_tiny_pipeline(two_transformers=two)
    if scheduler == "UniPC":
        pipe.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    stock = generate(pipe)
    for dense_steps in range(5):
        with enable_sla(pipe, config=SMALL_BLOCKS, dense_steps=dense_steps) as handle:
            # The second run starts with the counter that the first one left behind.
            for _ in range(2):
                same = [torch.equal(a, b) for a, b in zip(generate(pipe), stock, strict=True)]
                assert same == [step < dense_steps for step in range(4)]
            layers = handle.stats().layers
            first = {name: 0 for name in ("transformer", "transformer_2")}
            for layer in layers:
                first[layer.name.split(".")[0]] = layer.dense_calls
            # Two runs of two forwards (guidance) a step, in whichever transformer the step fell.
            assert sum(first.values()) == 2 * 2 * dense_steps
    assert all(torch.equal(a, b) for a, b in zip(generate(pipe), stock, strict=True))


def test_dense_steps_follow_a_scheduler_that_is_exchanged_later():
    pipe = build_tiny_pipeline()
    enable_sla(pipe, config=SMALL_BLOCKS, dense_steps=4)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=5.0)
    sparse_free = generate(pipe)
    disable_sla(pipe)
    assert all(torch.equal(a, b) for a, b in zip(generate(pipe), sparse_free, strict=True))


def test_dense_steps_count_from_where_the_schedule_begins():
    """Video to video sets `begin_index`; its first steps are dense all the same."""
    pipe = build_tiny_pipeline()
    handle = enable_sla(pipe, config=SMALL_BLOCKS, dense_steps=1)
    scheduler, inputs = pipe.scheduler, transformer_inputs()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    sample = inputs["hidden_states"]
    for step in (2, 3):
        with torch.no_grad():
            velocity = pipe.transformer(**inputs)[0]
        sample = scheduler.step(velocity, scheduler.timesteps[step], sample)[0]
    assert [(layer.calls, layer.dense_calls) for layer in handle.stats().layers] == [(2, 1)] * 3


def test_dense_steps_need_a_scheduler_that_counts():
    pipe = build_tiny_pipeline()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="scheduler that counts its steps, got DDIMScheduler"):
        enable_sla(pipe, dense_steps=1)


def test_dense_steps_of_a_pipeline_that_is_gone():
    pipe = build_tiny_pipeline()
    transformer = pipe.transformer
    enable_sla(pipe, config=SMALL_BLOCKS, dense_steps=1)
    del pipe
    with pytest.raises(RuntimeError, match="keep the pipeline"):
        transformer(**transformer_inputs())


def test_dense_context_is_the_stock_model_within_and_sparse_after():
    model, inputs = build_tiny_transformer(), transformer_inputs()
    with torch.no_grad():
        stock = model(**inputs)[0]
        handle = enable_sla(model, config=SMALL_BLOCKS)
        with handle.dense(), handle.dense():
            assert torch.equal(model(**inputs)[0], stock)
        assert not torch.equal(model(**inputs)[0], stock)
