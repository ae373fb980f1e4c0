"""Token compression in pipelines: which layers and steps are short, and what these compute.

The tiny pipeline has 3 x 8 x 8 = 192 tokens, of which `pairs=0.6` keeps 128.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, FirstBlockCacheConfig
from family_cases import CALL
from tiny_families_wan import CASES

from sla_video import SLAConfig, TokenCompression, disable_sla, enable_sla
from sla_video.kernels.token_compression import (
    compressed_attention,
    gather_tokens,
    nearest_kept,
    select_tokens,
    short_attention,
)
from sla_video.kernels.token_scores import (
    always_kept,
    coverage_count,
    rank_tokens,
    token_scores,
)
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.families.wan import project_in, project_out
from sla_video.pipelines.parallel import Ulysses
from tiny_models import build_tiny_pipeline, build_tiny_transformer

GRID = (3, 8, 8)
SMALL = SLAConfig(sparsity=0.8, block_q=16, block_k=8, impl="torch")
DENSE = SMALL.replace(dense_layers=[0, 1, 2])
HALF = TokenCompression(pairs=0.6, layers=[1])


def run(pipe, steps=8, **changes):
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "num_inference_steps": steps, "output_type": "latent", **changes}
    return pipe(**call, generator=torch.Generator().manual_seed(0)).frames


def sdpa(query, key, value):
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)


def pairs_of(handle):
    return [layer.pairs for layer in handle.stats().layers]


def watched(pipe, layer=1, **keywords):
    """Of each forward of a layer: query, key, value and its output; and the module."""
    attn, seen = pipe.transformer.blocks[layer].attn1, []

    def hook(module, args, kwargs, output):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        rotary = kwargs.get("rotary_emb", args[3] if len(args) > 3 else None)
        with torch.no_grad():
            seen.append((*project_in(module, hidden_states, rotary), output))

    handle = attn.register_forward_hook(hook, with_kwargs=True)
    run(pipe, **keywords)
    handle.remove()
    return attn, seen


@pytest.mark.parametrize("dense", [False, True], ids=["sla2", "dense"])
@pytest.mark.parametrize(("mode", "fill"), [("kv", "zero"), ("qkv", "neighbor"), ("qkv", "prev")])
def test_keeping_everything_changes_no_bit(mode, fill, dense):
    pipe = build_tiny_pipeline()
    with enable_sla(pipe, config=DENSE if dense else SMALL):
        expected = run(pipe, steps=4)
    everything = TokenCompression(mode=mode, fill=fill, pairs=1.0, layers=[0, 1, 2])
    with enable_sla(pipe, config=DENSE if dense else SMALL, compression=everything) as handle:
        assert torch.equal(run(pipe, steps=4), expected)
        assert pairs_of(handle) == [1.0] * 3


@pytest.mark.parametrize(
    ("changes", "dense_steps", "short"),
    [
        ({}, 0, [2, 3, 4, 6, 7]),
        ({"full_steps": 1, "refresh_every": 3}, 0, [1, 2, 4, 5, 7]),
        ({"full_steps": 3, "refresh_every": 2}, 0, [3, 5, 7]),
        # The first step that is not dense is full; what follows the last short one is the end.
        ({}, 3, [4, 5, 6]),
    ],
)
def test_steps_are_full_short_and_refreshed_in_both_branches(changes, dense_steps, short):
    pipe = build_tiny_pipeline()
    compression = TokenCompression(pairs=0.6, layers=[1], **changes)
    config = SMALL.replace(compression=compression)
    with enable_sla(pipe, config=config, dense_steps=dense_steps) as handle:
        roles = []
        layer = handle.processors["transformer.blocks.1.attn1"]
        pipe.transformer.register_forward_hook(
            lambda *_: roles.append(layer.compression.role)  # after the forward
        )
        run(pipe)
        assert [s for s in range(8) if roles[2 * s] == "short"] == short
        assert roles[::2] == roles[1::2]
        share = (8 - len(short) + len(short) * 128 / 192) / 8
        assert pairs_of(handle) == pytest.approx([1.0, share, 1.0])


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(
    ("mode", "fill"), [("kv", "prev"), ("qkv", "prev"), ("qkv", "neighbor"), ("qkv", "zero")]
)
def test_short_steps_compute_what_is_said_from_the_full_step_of_their_branch(mode, fill, residual):
    pipe = build_tiny_pipeline()
    pairs = 0.6 if mode == "kv" else 0.4
    compression = TokenCompression(mode=mode, fill=fill, residual=residual, pairs=pairs, layers=[1])
    enable_sla(pipe, config=DENSE, compression=compression)
    attn, seen = watched(pipe)
    # Step 5 is full, 7 is short; the second of each is the branch without the prompt.
    for branch in (0, 1):
        *earlier, _ = seen[2 * 5 + branch]
        *parts, output = seen[2 * 7 + branch]
        full = sdpa(*earlier)
        selection = select_tokens(
            rank_tokens(token_scores(*earlier[:2], GRID), always_kept(GRID)), 128
        )
        extra = {}
        if residual:
            whole = full if mode == "kv" else gather_tokens(full, selection.kept)
            extra["residual"] = whole - short_attention(*earlier, selection, sdpa, mode=mode)
        expected = compressed_attention(
            *parts, selection, sdpa, mode=mode, fill=fill, **extra,
            dropped_output=gather_tokens(full, selection.dropped),
            nearest=nearest_kept(selection, GRID),
        )  # fmt: skip
        torch.testing.assert_close(output, project_out(attn, expected), rtol=1e-4, atol=1e-6)
        stock = project_out(attn, sdpa(*parts))
        assert (output - stock).abs().max() > 1e-4 * stock.abs().max(), "nothing was left out"


def test_the_count_is_that_of_the_first_branch_in_the_full_step_before():
    pipe = build_tiny_pipeline()
    tau = 0.4
    handle = enable_sla(
        pipe, config=DENSE, compression=TokenCompression(tau=tau, layers=[1], residual=False)
    )
    kept = []
    layer = handle.processors["transformer.blocks.1.attn1"]
    pipe.transformer.register_forward_hook(
        lambda *_: kept.append([a.selection.kept for a in layer.compression._aside.values()])
    )
    _, seen = watched(pipe, steps=4)
    scores = token_scores(*seen[0][:2], GRID)
    ranking = rank_tokens(scores, always_kept(GRID))
    count = int(coverage_count(scores, ranking, always_kept(GRID), tau))
    assert count == 128
    # During step 2 there are the tokens of two branches: as many, but not the same.
    one, other = kept[4]
    assert one.shape == other.shape == (1, 2, count)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("sla", [False, True], ids=["dense", "sla2"])
def test_the_order_of_the_tokens_and_compression_go_together(sla):
    outputs = []
    for order in ("raster", "hilbert"):
        pipe = build_tiny_pipeline()
        config = SMALL.replace(sparsity=0.0) if sla else DENSE
        enable_sla(pipe, config=config, token_order=order, compression=HALF)
        outputs.append(run(pipe, steps=4))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_layers_that_change_least_are_taken():
    pipe = build_tiny_pipeline()
    drifts = {}

    def hook(index):
        def note(_block, args, kwargs, output):
            before = (args[0] if args else kwargs["hidden_states"])[:, ::8].double()
            drifts.setdefault(index, (output[:, ::8] - before).norm() / before.norm())

        return note

    for index, block in enumerate(pipe.transformer.blocks):
        block.register_forward_hook(hook(index), with_kwargs=True)
    compression = TokenCompression(pairs=0.6, quantile=0.67)
    handle = enable_sla(pipe, config=SMALL, compression=compression)
    run(pipe, steps=4)
    quiet = sorted(drifts, key=lambda index: drifts[index])[:2]
    assert [index for index, pairs in enumerate(pairs_of(handle)) if pairs < 1] == sorted(quiet)


def test_each_video_begins_anew_and_nothing_is_left_of_it():
    pipe = build_tiny_pipeline()
    compression = TokenCompression(mode="qkv", pairs=0.4, layers=[0, 1])
    handle = enable_sla(pipe, config=SMALL, compression=compression)
    held = []
    pipe.transformer.register_forward_hook(
        lambda *_: held.append([layer.cached_bytes for layer in handle.stats().layers])
    )
    first = run(pipe, steps=4)
    # Two branches in float32: 192 x 32 numbers each, and 8 bytes a token and head (2).
    assert held[4] == [2 * (192 * 32 * 4 + 192 * 2 * 8)] * 2 + [0]
    assert held[-1] == [0, 0, 0]
    assert torch.equal(run(pipe, steps=4), first)
    with pytest.raises(RuntimeError, match="interrupted"):
        run(pipe, steps=6, callback_on_step_end=interrupt)
    assert torch.equal(run(pipe, steps=4), first)


def interrupt(_pipe, step, _time, values):
    if step == 3:
        raise RuntimeError("interrupted")
    return values


def test_a_batch_is_that_of_its_videos_but_for_the_count():
    prompts = ["a red circle moves left", "a blue square"]
    pipe = build_tiny_pipeline()
    enable_sla(pipe, config=DENSE, compression=HALF)
    latents = torch.randn(2, pipe.transformer.config.in_channels, 3, 16, 16)
    both = run(pipe, steps=4, prompt=prompts, latents=latents)
    for index, prompt in enumerate(prompts):
        alone = run(pipe, steps=4, prompt=prompt, latents=latents[index : index + 1])
        torch.testing.assert_close(both[index : index + 1], alone, rtol=1e-4, atol=1e-5)


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
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    handle = enable_sla(pipe, config=SMALL, compression=HALF)
    assert run(pipe).isfinite().all()
    # A skipped forward counts no call, and a layer that missed the full step runs full.
    layer = handle.stats().layers[1]
    assert layer.pairs is not None and layer.pairs <= 1


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


def test_bare_transformers_run_full_where_no_pipeline_counts():
    model = build_tiny_transformer()
    enable_sla(model, config=SMALL)
    assert all(block.attn1.processor.compression is None for block in model.blocks)
