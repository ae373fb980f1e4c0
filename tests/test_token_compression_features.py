"""Token compression with other models, copies, caches, compilers and gradients; what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, FirstBlockCacheConfig
from tiny_families_wan import CASES
from token_compression_cases import DENSE, HALF, SMALL, pairs_of, run

from sla_video import SLAConfig, TokenCompression, disable_sla, enable_sla
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.parallel import Ulysses
from tiny_models import build_tiny_pipeline


@pytest.mark.parametrize("model", ["wan2.2 i2v a14b", "vace", "wan2.2 5b i2v", "chronoedit"])
def test_families_of_wan(model):
    case = CASES[model]
    pipe = case.build()
    # More tokens than are kept at least, and steps enough for two transformers.
    size = {} if model in ("wan2.2 i2v a14b", "vace") else {"height": 128, "width": 128}
    call = {**size, "num_inference_steps": 12 if model == "wan2.2 i2v a14b" else 4}
    stock = case.run(pipe, **call)
    compression = TokenCompression(pairs=0.6, quantile=1.0)
    handle = enable_sla(pipe, config=SMALL, compression=compression)
    ours = case.run(pipe, **call)
    pairs = {layer.name: layer.pairs for layer in handle.stats().layers if layer.calls}
    # With two transformers each has its own first steps, and is over before or after the other.
    assert all(value < 1 for value in pairs.values()), pairs
    assert all(layer.cached_bytes == 0 for layer in handle.stats().layers)
    assert not torch.equal(ours, stock) and ours.isfinite().all()
    disable_sla(pipe)
    assert torch.equal(case.run(pipe, **call), stock)


def test_a_copied_pipeline_compresses_by_its_own_steps():
    pipe = build_tiny_pipeline()
    handle = enable_sla(pipe, config=SMALL, compression=TokenCompression(pairs=0.6))
    expected = run(pipe, steps=4)
    handle.reset_stats()
    twin = copy.deepcopy(pipe)
    assert torch.equal(run(twin, steps=4), expected)
    assert pairs_of(handle) == [None] * 3, "the copy runs the layers of the first"


def test_a_cache_of_blocks_and_compression_go_together():
    pipe = build_tiny_pipeline()
    with enable_sla(pipe, config=SMALL, compression=HALF):
        alone = run(pipe)
    # A cache that never skips a block changes nothing.
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with enable_sla(pipe, config=SMALL, compression=HALF):
        torch.testing.assert_close(run(pipe), alone)
    pipe.transformer.disable_cache()
    # This one skips some steps of the later blocks.
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.12))
    handle = enable_sla(pipe, config=SMALL, compression=HALF)
    output = run(pipe)
    assert output.isfinite().all() and not torch.equal(output, alone)
    # A skipped forward counts no call, and a layer that missed the full step runs full.
    first, compressed, _ = handle.stats().layers
    assert first.calls == 16 and 0 < compressed.calls < 16
    assert 1 - 5 / 8 * (1 - 128 / 192) < compressed.pairs < 1


@pytest.mark.parametrize("dense", [False, True], ids=["sla2", "dense"])
def test_compiled_blocks_stay_whole_graphs_that_two_layers_share(dense):
    compression = TokenCompression(mode="qkv", pairs=0.4, layers=[0, 1])
    config = (DENSE if dense else SMALL).replace(dense_layers=[0, 1] if dense else ())
    pipe = build_tiny_pipeline(num_layers=2)
    enable_sla(pipe, config=config, compression=compression)
    expected = run(pipe, steps=4)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(pipe, steps=4), expected)
    torch._dynamo.reset()


def test_layers_to_compress_cannot_be_measured_in_compiled_blocks():
    pipe = build_tiny_pipeline(num_layers=2)
    enable_sla(pipe, config=SMALL, compression=TokenCompression(pairs=0.6))
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(InputError, match=r"name them in `TokenCompression\(layers=…\)`"):
        run(pipe, steps=4)
    torch._dynamo.reset()


def test_no_hook_and_no_memory_stays_behind():
    pipe = build_tiny_pipeline()
    stock = run(pipe, steps=3)

    def hooks():
        modules = list(pipe.transformer.modules())
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before = hooks()
    handle = enable_sla(pipe, config=SMALL, compression=TokenCompression(pairs=0.6))
    # One before and one after the transformer, and one on each of three blocks.
    assert hooks() == before + 5
    run(pipe, steps=3)
    handle.remove()
    assert hooks() == before
    assert torch.equal(run(pipe, steps=3), stock)


def test_what_does_not_go_with_compression_is_refused_and_leaves_the_model_alone(monkeypatch):
    pipe = build_tiny_pipeline()

    def refused(message, model=pipe, config=SMALL, **changes):
        compression = TokenCompression(**{"pairs": 0.6, "layers": [1], **changes})
        with pytest.raises(ValueError, match=message):
            enable_sla(model, config=config, compression=compression)

    refused("`compression` needs the pipeline", model=pipe.transformer)
    refused("names layer 3, but the transformer has 3 layers", layers=[3])
    per_block = SMALL.replace(alpha="per_block", num_query_blocks=12)
    refused("alpha='per_block' has no place", config=per_block)
    refused("which block_q=48 does not divide", config=SMALL.replace(block_q=48))
    refused("is not supported in SkyReels-V2", model=CASES["skyreels t2v"].build())
    counts = build_tiny_pipeline()
    counts.scheduler = DDIMScheduler()
    refused("`compression` needs a scheduler that counts its steps", model=counts)
    with enable_sla(pipe, config=SMALL, compression=HALF) as handle:
        processor = next(iter(handle.processors.values()))
        monkeypatch.setattr(Ulysses, "of", lambda _config: object())
        with pytest.raises(ValueError, match="does not run in context parallelism"):
            processor._parallel_config = "sharded"
    monkeypatch.setattr(Ulysses, "of", lambda config: object() if config == "sharded" else None)
    pipe.transformer._parallel_config = "sharded"
    refused("does not run in context parallelism")
    pipe.transformer._parallel_config = None
    run(pipe, steps=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "q"}, "`mode` must be one of kv, qkv, got 'q'"),
        ({"fill": "last"}, "`fill` must be one of prev, neighbor, linear, zero, got 'last'"),
        ({"pairs": 0}, r"`pairs` must be in \(0, 1\], got 0"),
        ({"tau": 1.0}, r"`tau` must be in \[0, 1\), got 1.0"),
        ({"quantile": 0}, r"`quantile` must be in \(0, 1\], got 0"),
        ({"refresh_every": 1}, "`refresh_every` must be at least 2, got 1"),
        ({"probes": 0}, "`probes` must be at least 1, got 0"),
        ({"full_steps": 0}, "`full_steps` must be at least 1, got 0"),
        ({"full_steps": 1}, "`full_steps` must be at least 2 where tokens are counted"),
        ({"residual": 1}, "`residual` must be a bool, got 1"),
        ({"layers": 3}, "`layers` must be a list of layer numbers"),
        ({"layers": [1.5]}, "`layers` must be an integer, got 1.5"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TokenCompression(**settings)


def test_settings_survive_json():
    compression = TokenCompression(mode="qkv", fill="linear", pairs=0.25, layers=[0, -1])
    config = SLAConfig(compression=compression)
    assert SLAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(SLAConfig.from_dict(config.to_dict()))
    assert compression.share == 0.5
    with pytest.raises(ValueError, match="unknown settings of token compression keep"):
        SLAConfig.from_dict({"compression": {"keep": 0.5}})
    with pytest.raises(TypeError, match="`compression` must be a TokenCompression or None"):
        SLAConfig(compression=0.5)
    with pytest.raises(TypeError, match="must be a mapping, got 3"):
        SLAConfig.from_dict({"compression": 3})


def test_gradients_reach_short_steps():
    pipe = build_tiny_pipeline()
    enable_sla(pipe, config=SMALL, compression=HALF)
    layer = pipe.transformer.blocks[1].attn1
    found = []

    def hook(_module, args, output):
        if layer.processor.compression.role == "short":
            found.append(torch.autograd.grad(output.sum(), layer.to_v.weight, retain_graph=True)[0])

    layer.register_forward_hook(hook)
    run_with_gradients(pipe)
    assert len(found) == 2 and all(gradient.abs().max() > 0 for gradient in found)


def run_with_gradients(pipe):
    """Three steps by hand: pipelines switch gradients off."""
    scheduler, model = pipe.scheduler, pipe.transformer
    scheduler.set_timesteps(4)
    latent = torch.randn(1, model.config.in_channels, 3, 16, 16)
    text = torch.randn(1, 8, model.config.text_dim)
    for time in scheduler.timesteps:
        velocity = model(latent, time.expand(1), text, return_dict=False)[0]
        latent = scheduler.step(velocity.detach(), time, latent, return_dict=False)[0]
