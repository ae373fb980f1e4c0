"""Token compression in pipelines: which layers and steps are short, and what these compute."""

from __future__ import annotations

import pytest
import torch
from token_compression_cases import DENSE, HALF, SMALL, pairs_of, run

from sla_video import TokenCompression, enable_sla
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
from sla_video.pipelines.families.wan import project_in, project_out
from tiny_models import build_tiny_pipeline

GRID = (3, 8, 8)


def sdpa(query, key, value):
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)


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
