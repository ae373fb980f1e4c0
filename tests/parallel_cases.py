"""A program of `test_parallel`: each case compares several processes with one; see `work`."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from tiny_families_wan import CASES as MODELS

import parallel_gradients  # noqa: F401
from parallel_tools import (
    BLOCKS,
    HEADS,
    assert_same,
    case,
    parallelize,
    patched,
    refusal,
    run,
    scramble,
    work,
)
from sla_video import SLAConfig, disable_sla, enable_sla
from sla_video.pipelines.parallel import context_parallel_plan
from tiny_models import (
    TINY_CALL,
    build_tiny_pipeline,
    build_tiny_transformer,
)


@case
def nine_tenths_sparse() -> None:
    assert_same(SLAConfig(sparsity=0.9, **BLOCKS))


@case
def everything_selected_is_stock_attention() -> None:
    config = SLAConfig(sparsity=0, **BLOCKS)
    stock = run(build_tiny_transformer(num_attention_heads=HEADS))
    for order in ("before", "after"):
        output = run(patched(config, parallel=order)[0])
        torch.testing.assert_close(output, stock, rtol=1e-4, atol=1e-5)


@case
def routers_of_each_head() -> None:
    assert_same(SLAConfig(sparsity=0.9, router_per_head=True, **BLOCKS))


@case
def mix_weights_of_each_block() -> None:
    config = SLAConfig(sparsity=0.9, alpha="per_block", num_query_blocks=12, **BLOCKS)
    assert_same(config)


@case
def low_bit_and_top_p() -> None:
    assert_same(
        SLAConfig(sparsity=0.8, selection="top_p", top_p=0.3, sparse_dtype="int8_fp8", **BLOCKS)
    )


@case
def an_order_of_keys_for_each_head() -> None:
    kinds = ["hot_peel", "segment_sort", "identity", "hot_peel"] * (HEADS // 4)
    config = SLAConfig(sparsity=0.8, key_orders={"transformer.blocks.1.attn1": kinds}, **BLOCKS)
    assert_same(config)


@case
def several_videos_at_once() -> None:
    assert_same(SLAConfig(sparsity=0.9, **BLOCKS), inputs={"batch": 3})


@case
def a_last_block_that_is_not_full() -> None:
    # 3 x 4 x 7 = 84 tokens: 5.25 x 10.5 blocks, and pieces that end within a block.
    assert_same(SLAConfig(sparsity=0.8, **BLOCKS), inputs={"grid": (3, 4, 7)})


@case
def pieces_of_different_lengths() -> None:
    # 5 x 7 = 35 tokens; batch 2, so that the order of tokens and videos matters.
    assert_same(
        SLAConfig(sparsity=0.5, **BLOCKS),
        inputs={"grid": (1, 5, 7), "batch": 2},
        ulysses_anything=True,
    )


@case
def heads_of_different_counts() -> None:
    config = SLAConfig(sparsity=0.5, router_per_head=True, **BLOCKS)
    assert_same(config, inputs={"grid": (1, 5, 7)}, heads=5, ulysses_anything=True)


@case
def dense_layers_and_dense_calls() -> None:
    config = SLAConfig(sparsity=0.9, dense_layers=(1,), **BLOCKS)
    assert_same(config)
    stock = run(build_tiny_transformer(num_attention_heads=HEADS))
    model, handle = patched(config, parallel="after")
    with handle.dense():
        torch.testing.assert_close(run(model), stock, rtol=1e-5, atol=1e-6)
    disable_sla(model)
    torch.testing.assert_close(run(model), stock, rtol=1e-5, atol=1e-6)


@case
def every_layer_is_counted_once() -> None:
    model, handle = patched(SLAConfig(sparsity=0.75, **BLOCKS), parallel="after")
    with handle.recording(exact_recall=True):
        run(model)
    stats = handle.stats()
    assert [layer.calls for layer in stats.layers] == [1, 1, 1]
    assert stats.sparsity is not None and abs(stats.sparsity - 0.75) < 1e-6
    # The mean over a rank's heads; over all ranks it is that of one process.
    recall = torch.tensor(stats.recall)
    dist.all_reduce(recall)
    one, one_handle = patched(SLAConfig(sparsity=0.75, **BLOCKS))
    with one_handle.recording(exact_recall=True):
        run(one)
    torch.testing.assert_close(
        recall / dist.get_world_size(), torch.tensor(one_handle.stats().recall)
    )


@case
def a_pipeline_with_dense_steps() -> None:
    frames = []
    for parallel in (False, True):
        pipe = build_tiny_pipeline(num_attention_heads=HEADS)
        handle = enable_sla(pipe, sparsity=0.8, dense_steps=1, config=SLAConfig(**BLOCKS))
        scramble(handle)
        if parallel:
            parallelize(pipe.transformer)
        call = {**TINY_CALL, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        frames.append(pipe(**call).frames)
        assert handle.stats().layers[0].dense_calls == 2, "the first of three steps, with guidance"
    torch.testing.assert_close(frames[1], frames[0], rtol=1e-4, atol=1e-5)


@case
def lora_beside_the_routers() -> None:
    from peft import LoraConfig

    outputs = []
    for order in ("", "after"):
        model = build_tiny_transformer(num_attention_heads=HEADS)
        torch.manual_seed(0)
        model.add_adapter(
            LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
        )
        scramble(enable_sla(model, config=SLAConfig(sparsity=0.9, **BLOCKS)))
        if order:
            parallelize(model)
        outputs.append(run(model))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


@case
def other_models_of_the_wan_line() -> None:
    """Pictures in cross-attention, a timestep for each token, control blocks; whole pipelines."""
    if dist.get_world_size() > 2:
        return  # they have two heads
    for name in ("wan2.1 i2v", "wan2.2 5b i2v", "vace", "chronoedit"):
        outputs = []
        for parallel in (False, True):
            pipe = MODELS[name].build()
            scramble(enable_sla(pipe, config=SLAConfig(sparsity=0.8, **BLOCKS)))
            if parallel:
                pipe.transformer.enable_parallelism(
                    config=ContextParallelConfig(ulysses_degree=2),
                    cp_plan=context_parallel_plan(pipe.transformer),
                )
            outputs.append(MODELS[name].run(pipe))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5, msg=name)


@case
def tokens_in_another_order() -> None:
    assert_same(SLAConfig(sparsity=0.9, token_order="hilbert", **BLOCKS))
    odd = SLAConfig(sparsity=0.5, token_order="tile:1,2,3", **BLOCKS)
    assert_same(odd, inputs={"grid": (1, 5, 7), "batch": 2}, ulysses_anything=True)
    if dist.get_world_size() > 2:
        return  # the others have two heads
    config = SLAConfig(sparsity=0.8, token_order="tile:2,4,4", **BLOCKS)
    for name in ("wan2.2 5b i2v", "vace"):
        outputs = []
        for parallel in (False, True):
            pipe = MODELS[name].build()
            if parallel:
                pipe.transformer.enable_parallelism(
                    config=ContextParallelConfig(ulysses_degree=2),
                    cp_plan=context_parallel_plan(pipe.transformer),
                )
            scramble(enable_sla(pipe, config=config))
            outputs.append(MODELS[name].run(pipe))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5, msg=name)


@case
def models_whose_tokens_cannot_be_spread_are_refused() -> None:
    for name, kind in (("animate", "Wan Animate"), ("skyreels t2v", "SkyReels-V2")):
        for order in ("before", "after"):
            model = MODELS[name].build().transformer
            if order == "after":
                enable_sla(model)
            plan = {"cp_plan": context_parallel_plan(build_tiny_transformer())}
            config = ContextParallelConfig(ulysses_degree=dist.get_world_size())

            def enable(model=model, plan=plan, config=config) -> None:
                model.enable_parallelism(config=config, **plan)
                enable_sla(model)

            assert f"context parallelism in {kind}" in refusal(enable)
        message = refusal(lambda model=model: context_parallel_plan(model))
        assert f"no plan is known for context parallelism of a {type(model).__name__}" in message


@case
def compiled_as_one_graph() -> None:
    if dist.get_world_size() > 2:
        return  # the graph is the same, and four processes take long to make it
    config = SLAConfig(sparsity=0.9, router_per_head=True, **BLOCKS)
    expected = run(patched(config, layers=1)[0])
    model, _ = patched(config, layers=1, parallel="after")
    # Diffusers' hook that cuts the tokens reads a signature once, which compiled code cannot do.
    run(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


@case
def ring_attention_is_refused() -> None:
    ranks = dist.get_world_size()
    kinds = [{"ring_degree": ranks, "ulysses_degree": 1}]
    if ranks == 4:
        kinds.append({"ring_degree": 2, "ulysses_degree": 2})
    for kind in kinds:
        for order in ("before", "after"):
            message = refusal(lambda o=order, k=kind: patched(SLAConfig(), parallel=o, **k))
            assert f"ring_degree={kind['ring_degree']}" in message
            assert "ulysses_degree=N" in message


@case
def heads_that_cannot_be_spread_are_refused() -> None:
    ranks = dist.get_world_size()
    for order in ("before", "after"):
        message = refusal(lambda o=order: patched(SLAConfig(), parallel=o, heads=5))
        assert f"5 attention heads cannot be spread evenly over {ranks} devices" in message
        few = {"heads": ranks - 1, "ulysses_anything": True}
        message = refusal(lambda o=order, f=few: patched(SLAConfig(), parallel=o, **f))
        assert f"a ulysses_degree of at most {ranks - 1}" in message


if __name__ == "__main__":
    count, where = int(sys.argv[1]), Path(sys.argv[2])
    # Forked, so that the libraries are imported once. No thread has been started yet.
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank, count, where)) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(any(worker.exitcode for worker in workers))
