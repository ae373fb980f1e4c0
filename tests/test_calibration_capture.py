"""Captures: what the attention sees, of the right calls, and nothing left behind."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cli_tools import files_below
from operator_inputs import dense_attention

from sla_video.calibration import capture_store
from sla_video.calibration.capture import CallKey, CapturePlan, plan_calls, run_captures
from sla_video.calibration.capture_store import CaptureSource, MemoryStore, SpillStore
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.progress import NoProgress
from sla_video.pipelines.token_order import make_order
from tiny_models import TINY_CALL, build_tiny_pipeline

PLAN = CapturePlan(
    prompts=("a red circle moves left", "a blue square"),
    capture_steps=2,
    denoising_steps=4,
    guidance_scale=3.0,
    negative_prompt=None,
    frames=9,
    height=64,
    width=64,
    max_sequence_length=16,
    dense_steps=1,
    seed=7,
)
LENGTH, CALL_BYTES = 192, 3 * 192 * 2 * 16 * 4


def layers_of(pipe):
    return {
        f"{component}.blocks.{i}.attn1": block.attn1
        for component in ("transformer", "transformer_2")
        if getattr(pipe, component) is not None
        for i, block in enumerate(getattr(pipe, component).blocks)
    }


def source_of(pipe, *, plan=PLAN, memory=2**30, spill=None):
    layers = layers_of(pipe)
    return CaptureSource(pipe, layers, plan, memory=memory, spill=spill, progress=NoProgress())


def hooks_of(pipe):
    return [
        len(module._forward_pre_hooks) + len(module._forward_hooks)
        for component in (pipe.transformer, pipe.transformer_2)
        if component is not None
        for module in component.modules()
    ]


@pytest.fixture(scope="module")
def captured(tiny_pipeline):
    """All captures in memory, and the attention's own output (before `to_out`) of every call."""
    seen = []
    hooks = [
        attn.to_out[0].register_forward_pre_hook(
            lambda _, args, name=name: seen.append((name, args[0].unflatten(2, (2, 16)).clone()))
        )
        for name, attn in layers_of(tiny_pipeline).items()
    ]
    try:
        calls = dict(iter(source := source_of(tiny_pipeline)))
    finally:
        for hook in hooks:
            hook.remove()
    return source, calls, seen


def test_captures_are_what_the_attention_sees(captured):
    source, calls, seen = captured
    # Every step runs three layers for the prompt and then three for the negative one. Both runs
    # end after the last step that is wanted.
    last = [max(key.step for key in source.calls["transformer"] if key.prompt == p) for p in (0, 1)]
    assert len(seen) == 6 * (last[0] + 1 + last[1] + 1)
    for layer, (name, captures) in enumerate(calls.items()):
        assert len(captures) == 4
        for key, capture in zip(source.calls_of(name), captures, strict=True):
            assert capture.query.shape == (1, LENGTH, 2, 16)
            first = 6 * (last[0] + 1) if key.prompt else 0
            seen_name, output = seen[first + 6 * key.step + 3 * key.branch + layer]
            assert seen_name == name
            torch.testing.assert_close(dense_attention(*capture), output, rtol=1e-4, atol=1e-5)


def test_captures_are_in_the_order_that_routers_will_see():
    pipe = build_tiny_pipeline()
    plain = run_one(pipe, "raster")
    order = make_order("hilbert", (3, 8, 8))
    for name, capture in run_one(pipe, "hilbert").items():
        for part, other in zip(capture, plain[name], strict=True):
            torch.testing.assert_close(part, other[:, order], rtol=1e-4, atol=1e-5)
    assert sum(hooks_of(pipe)) == 0


def run_one(pipe, token_order):
    """Captures of one call of each layer, by name."""
    plan = dataclasses.replace(
        PLAN, prompts=PLAN.prompts[:1], capture_steps=1, token_order=token_order
    )
    return {name: captures[0] for name, captures in source_of(pipe, plan=plan)}


def test_calls_are_spread_and_take_turns(captured):
    calls = captured[0].calls["transformer"]
    assert len(calls) == len(set(calls)) == 4
    assert all(key.step >= PLAN.dense_steps for key in calls)
    assert {key.branch for key in calls} == {0, 1}
    steady = dataclasses.replace(PLAN, guidance_scale=1.0)
    assert {
        key.branch for key in source_of(build_tiny_pipeline(), plan=steady).calls["transformer"]
    } == {0}


def test_both_transformers_are_captured_at_their_own_steps():
    pipe = build_tiny_pipeline(two_transformers=True)
    plan = dataclasses.replace(PLAN, denoising_steps=8, dense_steps=0, prompts=PLAN.prompts[:1])
    calls = plan_calls(pipe, plan)
    first, second = ({key.step for key in calls[name]} for name in ("transformer", "transformer_2"))
    assert max(first) < min(second)
    captures = dict(source_of(pipe, plan=plan))
    assert len(captures) == 6 and all(len(found) == 2 for found in captures.values())


def test_the_pipeline_is_left_as_it_was(captured, tiny_pipeline):
    untouched = build_tiny_pipeline()
    before = [
        pipe(**TINY_CALL, output_type="latent", generator=torch.Generator().manual_seed(0)).frames
        for pipe in (tiny_pipeline, untouched)
    ]
    assert torch.equal(*before)
    assert hooks_of(tiny_pipeline) == hooks_of(untouched)
    processors = {type(attn.processor) for attn in layers_of(tiny_pipeline).values()}
    assert [kind.__name__ for kind in processors] == ["WanAttnProcessor"]


def same(first, second):
    return all(
        torch.equal(a, b)
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_a_small_memory_runs_the_pipeline_for_each_group(captured, tiny_pipeline):
    # Four calls of a layer: two layers at a time.
    source = source_of(tiny_pipeline, memory=9 * CALL_BYTES)
    assert source.passes == 2
    for name, captures in source:
        assert same(captures, captured[1][name])


@pytest.mark.parametrize("sequential", [False, True], ids=["by-model", "by-layer"])
def test_hooks_of_offloading_are_honoured(captured, sequential):
    from accelerate import cpu_offload, cpu_offload_with_hook

    pipe = build_tiny_pipeline()
    if sequential:
        cpu_offload(pipe.transformer, execution_device="cpu")
        assert pipe.transformer.blocks[0].attn1.to_q.weight.is_meta
    else:
        cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
    for name, captures in source_of(pipe):
        assert same(captures, captured[1][name])


def test_a_memory_too_small_for_one_layer_is_refused(tiny_pipeline):
    with pytest.raises(InputError, match=r"4 captured calls of one layer take .* --spill FOLDER"):
        source_of(tiny_pipeline, memory=3 * CALL_BYTES)


def test_memory_counts_what_it_holds(tiny_pipeline):
    store = MemoryStore()
    plan = dataclasses.replace(PLAN, prompts=PLAN.prompts[:1])
    run_captures(
        tiny_pipeline,
        layers_of(tiny_pipeline),
        plan,
        plan_calls(tiny_pipeline, plan),
        store,
        NoProgress(),
    )
    assert store.nbytes == 3 * 2 * CALL_BYTES


def test_a_spill_goes_on_where_it_stopped_and_is_cleaned_up(
    captured, tiny_pipeline, tmp_path, monkeypatch
):
    folder = tmp_path / "spill"
    runs = []
    real = type(tiny_pipeline).__call__

    def run(pipe, **settings):
        runs.append(settings["prompt"])
        if len(runs) == 2:
            raise KeyboardInterrupt
        return real(pipe, **settings)

    monkeypatch.setattr(type(tiny_pipeline), "__call__", run)
    with pytest.raises(KeyboardInterrupt):
        dict(source_of(tiny_pipeline, spill=SpillStore(folder, PLAN.to_dict())))
    assert len([name for name in files_below(folder) if name.endswith(".safetensors")]) == 6

    store = SpillStore(folder, PLAN.to_dict())
    for name, captures in source_of(tiny_pipeline, spill=store):
        assert same(captures, captured[1][name])
    assert runs == [PLAN.prompts[0], PLAN.prompts[1], PLAN.prompts[1]]
    (folder / "mine.txt").write_text("kept")
    store.remove()
    assert files_below(folder) == ["mine.txt"]


def test_a_spill_of_other_settings_is_refused(tmp_path):
    SpillStore(tmp_path / "spill", PLAN.to_dict())
    other = dataclasses.replace(PLAN, seed=8)
    with pytest.raises(InputError, match=r"captures of another run: seed 7 against 8 here"):
        SpillStore(tmp_path / "spill", other.to_dict())


def test_a_spill_into_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is not empty and holds no captures"):
        SpillStore(tmp_path, PLAN.to_dict())
    assert files_below(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_description_of_a_spill_is_refused(tmp_path, content):
    (tmp_path / capture_store.DESCRIPTION_FILE).write_text(content)
    with pytest.raises(InputError, match=r"captures\.json is corrupt"):
        SpillStore(tmp_path, PLAN.to_dict())


def test_a_damaged_shard_is_named(captured, tmp_path):
    store = SpillStore(tmp_path / "spill", PLAN.to_dict())
    key = CallKey(0, 1, 0)
    store.put("layer", key, captured[1]["transformer.blocks.0.attn1"][0])
    (shard,) = (tmp_path / "spill").glob("*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=shard.name):
        store.get("layer", key)


def test_a_disk_that_fills_up_leaves_whole_shards_only(tiny_pipeline, tmp_path, monkeypatch):
    writes = []
    real = capture_store.Path.write_bytes

    def write(path, content):
        writes.append(path)
        if len(writes) > 3:
            real(path, content[:10])
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(capture_store.Path, "write_bytes", write)
    with pytest.raises(InputError, match=r"No space left on device.*goes on from it"):
        dict(source_of(tiny_pipeline, spill=SpillStore(tmp_path / "s", PLAN.to_dict())))
    left = [name for name in files_below(tmp_path / "s") if "prompt" in name]
    # The description was the first of the three.
    assert len(left) == 2 and all(name.endswith(".safetensors") for name in left)
    assert hooks_of(tiny_pipeline) == hooks_of(build_tiny_pipeline())


def test_values_that_are_not_numbers_name_the_layer():
    pipe = build_tiny_pipeline()
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_k.bias[3] = float("nan")
    message = r"the keys of transformer\.blocks\.1\.attn1 hold values that are not numbers"
    with pytest.raises(InputError, match=message):
        dict(source_of(pipe))


@pytest.mark.parametrize("changes", [{"capture_steps": 4}, {"dense_steps": 4}])
def test_more_captures_than_steps_are_refused(tiny_pipeline, changes):
    with pytest.raises(InputError, match=r"of the 4 denoising steps are sparse steps"):
        plan_calls(tiny_pipeline, dataclasses.replace(PLAN, **changes))


def test_pieces_of_the_tokens_are_not_captured():
    """In context parallelism the hooks would see what one device has."""
    pipe = build_tiny_pipeline()
    pipe.transformer.blocks[1].attn1.processor._parallel_config = object()
    with pytest.raises(InputError, match=r"blocks\.1\.attn1 sees a piece.*on one device"):
        dict(source_of(pipe))
