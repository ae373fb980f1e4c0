"""Recordings of every call: steps, numbers, files, and that nothing changes or waits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_families_joint import CASES

import sla_video.pipelines.layer_recorder as layer_recorder
import sla_video.pipelines.recording as recording_module
from sla_video import SLAConfig, enable_sla
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.recording import Recording
from tiny_models import TINY_CALL, build_tiny_pipeline, build_tiny_transformer, transformer_inputs

SMALL_BLOCKS = SLAConfig(sparsity=0.8, block_q=16, block_k=8)


def record(pipe, handle, **settings):
    with handle.recording(per_step=True, **settings):
        frames = pipe(**TINY_CALL, generator=torch.Generator().manual_seed(0), output_type="latent")
    return handle.recorded(), frames.frames


@pytest.fixture
def losses_seen(monkeypatch):
    """What is measured, call by call."""
    seen = []
    measure = layer_recorder.measure_losses

    def spy(*args, **options):
        seen.append(measure(*args, **options))
        return seen[-1]

    monkeypatch.setattr(layer_recorder, "measure_losses", spy)
    return seen


def test_steps_layers_and_heads(losses_seen):
    pipe = build_tiny_pipeline()
    handle = enable_sla(pipe, config=SMALL_BLOCKS.replace(dense_steps=1, dense_layers=(1,)))
    recording, _ = record(pipe, handle)

    assert recording.timesteps == pytest.approx(pipe.scheduler.timesteps.tolist(), rel=1e-6)
    assert [layer.name for layer in recording.layers] == [
        f"transformer.blocks.{i}.attn1" for i in range(3)
    ]
    first, dense, last = recording.layers
    assert first.sparsity.tolist() == pytest.approx([0, 19 / 24, 19 / 24])
    assert dense.sparsity.tolist() == [0, 0, 0]
    assert dense.recall.shape == (3, 0) and dense.recall_by_block.numel() == 0
    # Steps 2 and 3, each with and without the prompt, in layers 0 and 2.
    assert len(losses_seen) == 2 * 2 * 2
    for layer, start in ((first, 0), (last, 1)):
        mine = losses_seen[start::2]
        assert layer.recall.shape == (3, 2) and layer.recall[0].isnan().all()
        for step, pair in ((1, mine[:2]), (2, mine[2:])):
            for name in ("recall", "oracle_density", "router_density"):
                wanted = sum(getattr(x, name).mean((0, 2)) for x in pair) / 2
                torch.testing.assert_close(getattr(layer, name)[step], wanted)
            wrong, size = (
                sum(getattr(x, name).mean(0) for x in pair) / 2 for name in ("error", "magnitude")
            )
            torch.testing.assert_close(layer.relative_l1[step], wrong / size)
            torch.testing.assert_close(layer.relative_l1_by_step[step], wrong.sum() / size.sum())
        wanted = sum(x.recall.mean(0) for x in mine) / 4
        torch.testing.assert_close(layer.recall_by_block, wanted)

    stats = handle.stats().layers
    assert stats[0].recall == pytest.approx(float(first.recall[1:].mean()))
    assert stats[0].relative_l1 == pytest.approx(
        sum(float(x.error.sum() / x.magnitude.sum()) for x in losses_seen[::2]) / 4
    )
    assert stats[0].oracle_density == pytest.approx(float(first.oracle_density[1:].mean()))
    assert stats[0].router_density == pytest.approx(float(first.router_density[1:].mean()))
    assert stats[1].relative_l1 is None and stats[1].recall is None


def test_two_transformers_share_the_steps():
    pipe = build_tiny_pipeline(two_transformers=True)
    handle = enable_sla(pipe, config=SMALL_BLOCKS)
    recording, _ = record(pipe, handle, most_blocks=2)
    assert len(recording.timesteps) == 3
    high, low = recording.layers[0], recording.layers[3]
    assert low.name == "transformer_2.blocks.0.attn1"
    ran = ~high.recall[:, 0].isnan()
    assert ran.any() and torch.equal(ran, low.recall[:, 0].isnan())
    assert torch.equal(high.sparsity.isnan(), ~ran)
    assert high.recall_by_block.shape == (2, 2)


def test_text_that_video_attends_to_is_no_error():
    case = CASES["hunyuan"]
    pipe = case.build()
    for sparsity in (0.0, 0.8):
        with enable_sla(pipe, config=SMALL_BLOCKS, sparsity=sparsity) as handle:
            with handle.recording(per_step=True):
                case.run(pipe)
            for layer in handle.recorded().layers:
                error = layer.relative_l1_by_step
                assert len(error) == 2 and not error.isnan().any()
                assert (error < 1e-5).all() if sparsity == 0 else (error > 1e-3).all()


def test_no_bit_of_the_video_changes():
    pipe = build_tiny_pipeline()
    handle = enable_sla(pipe, config=SMALL_BLOCKS)
    plain = pipe(
        **TINY_CALL, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).frames
    _, recorded = record(pipe, handle)
    assert (plain == recorded).all()
    assert pipe.transformer._forward_pre_hooks == {}


def test_numbers_stay_on_the_device_until_they_are_read(monkeypatch):
    model, inputs = build_tiny_transformer(), transformer_inputs()
    handle = enable_sla(model, config=SMALL_BLOCKS, impl="torch")
    for name in ("item", "__float__", "__bool__", "__index__", "tolist", "numpy", "cpu"):

        def refuse(self, *_, name=name):
            raise AssertionError(f"the forward called Tensor.{name}")

        monkeypatch.setattr(torch.Tensor, name, refuse)
    with torch.no_grad(), handle.recording(per_step=True, most_blocks=3):
        model(**inputs)
        inputs["timestep"] = torch.full((1,), 400)
        positional = [inputs.pop(name) for name in ("hidden_states", "timestep")]
        model(*positional, **inputs)
    monkeypatch.undo()
    assert handle.recorded().timesteps == (500, 400)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_a_gpu():
    model = build_tiny_transformer().cuda()
    inputs = {k: v.cuda() if torch.is_tensor(v) else v for k, v in transformer_inputs().items()}
    handle = enable_sla(model, config=SMALL_BLOCKS)
    with torch.no_grad(), handle.recording(per_step=True, exact_recall=True):
        model(**inputs)  # kernels are compiled
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert handle.recorded().timesteps == (500,)


def test_memory_is_bounded(monkeypatch, caplog):
    monkeypatch.setattr(recording_module, "_MOST_CALLS", 2)
    model, inputs = build_tiny_transformer(num_layers=1), transformer_inputs()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    with torch.no_grad(), handle.recording(per_step=True):
        for timestep in (900, 500, 100, 50):
            model(**{**inputs, "timestep": torch.tensor([timestep])})
    with torch.no_grad():
        model(**inputs)  # not recorded any more
    assert handle.recorded().timesteps == (900, 500)
    assert handle.stats().layers[0].calls == 5
    assert [record.getMessage() for record in caplog.records] == [
        "the recording is full: it holds the first 2 calls"
    ]


def test_a_file_holds_it_all(tmp_path):
    pipe = build_tiny_pipeline()
    handle = enable_sla(pipe, config=SMALL_BLOCKS.replace(dense_steps=1, dense_layers=(1,)))
    recording, _ = record(pipe, handle, coverage=0.9, most_blocks=4)
    recording.save(tmp_path / "a.safetensors")
    read = Recording.load(tmp_path / "a.safetensors")
    assert (read.timesteps, read.coverage, read.most_blocks) == (recording.timesteps, 0.9, 4)
    for one, other in zip(recording.layers, read.layers, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if field.name == "name":
                assert a == b
            else:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_damaged_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match=r"there is no recording .*a\.safetensors"):
        Recording.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot read the recording"):
        Recording.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="format is None"):
        Recording.load(path)
    about = '{"coverage": 0.9, "most_blocks": null, "layers": ["gone"]}'
    save_file({"timesteps": torch.zeros(1)}, path, {"format": "1", "recording": about})
    with pytest.raises(InputError, match="sparsity/gone"):
        Recording.load(path)


def test_misuse():
    model = build_tiny_transformer()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    with pytest.raises(ValueError, match="nothing has been recorded"):
        handle.recorded()
    with (
        pytest.raises(ValueError, match="`coverage` must be"),
        handle.recording(per_step=True, coverage=2),
    ):
        pass
    with handle.recording(per_step=True), pytest.raises(ValueError, match="running already"):
        handle.recording(per_step=True).__enter__()
    assert model._forward_pre_hooks == {}
