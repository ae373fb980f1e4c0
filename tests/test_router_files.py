"""Routers on disk: round trips, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os

import pytest
import torch

import sla_video
from sla_video import SLAConfig, disable_sla, enable_sla, load_routers, save_routers
from sla_video.pipelines import router_files
from sla_video.pipelines.router_set import ModelIdentity
from tiny_models import (
    build_tiny_pipeline,
    build_tiny_transformer,
    build_tiny_vace_transformer,
    transformer_inputs,
)

SMALL_BLOCKS = SLAConfig(sparsity=0.8, block_q=16, block_k=8)


def run(model):
    with torch.no_grad():
        return model(**transformer_inputs())[0]


def perturb(handle, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in handle.routers.values():
            for parameter in router.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def saved(tmp_path):
    """(folder, output with its routers)"""
    model = build_tiny_transformer()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    perturb(handle)
    return save_routers(tmp_path / "new" / "routers", handle), run(model)


VARIANTS = [
    SMALL_BLOCKS,
    SMALL_BLOCKS.replace(router_per_head=True, phi_k="raw"),
    SMALL_BLOCKS.replace(alpha="per_block", num_query_blocks=5),
    SMALL_BLOCKS.replace(layer_sparsity={0: 0.5, -1: 0.9}, dense_layers=[1]),
]


@pytest.mark.parametrize("config", VARIANTS, ids=["default", "per-head", "table", "by-layer"])
@pytest.mark.parametrize("through", ["path", "text", "object"])
def test_round_trip_gives_the_same_bits(tmp_path, config, through):
    model = build_tiny_transformer()
    handle = enable_sla(model, config=config)
    perturb(handle)
    save_routers(tmp_path, handle, resolution=(25, 256, 256), metrics={"recall": 0.5})
    sparse = run(model)

    loaded = load_routers(tmp_path)
    assert loaded.config == config
    assert loaded.resolution == (25, 256, 256) and loaded.metrics == {"recall": 0.5}
    assert loaded.models == {"transformer": ModelIdentity.of(model)}
    assert loaded.routers.keys() == handle.routers.keys()

    other = build_tiny_transformer()
    assert not torch.equal(run(other), sparse)
    source = {"path": tmp_path, "text": str(tmp_path), "object": loaded}[through]
    again = enable_sla(other, source)
    assert again.config == config
    assert torch.equal(run(other), sparse)


def test_the_files_are_one_safetensors_and_one_json(saved):
    folder, _ = saved
    assert sorted(os.listdir(folder)) == ["routers.json", "routers.safetensors"]
    description = json.loads((folder / "routers.json").read_text())
    model = description["models"]["transformer"]
    assert description["format_version"] == 1
    assert description["library_version"] == sla_video.__version__
    assert model["family"] == "WanTransformer3DModel" and len(model["config_hash"]) == 16
    assert model["config"]["num_layers"] == 3
    assert description["sla"]["block_q"] == 16 and description["sla"]["alpha"] == "adaptive"
    assert description["sla"]["phi_k"] == "smoothed" and description["sla"]["sparsity"] == 0.8
    assert description["layers"] == [f"transformer.blocks.{i}.attn1" for i in range(3)]


def test_saved_files_are_as_readable_as_any_other(saved):
    folder, _ = saved
    (folder / "plain").write_text("")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1


def test_two_transformers_have_their_own_routers(tmp_path):
    pipe = build_tiny_pipeline(two_transformers=True)
    perturb(enable_sla(pipe, config=SMALL_BLOCKS))
    first, second = run(pipe.transformer), run(pipe.transformer_2)
    assert not torch.equal(first, second)
    save_routers(tmp_path, load_and_keep := pipe_handle(pipe))
    assert len(load_and_keep.routers) == 6

    other = build_tiny_pipeline(two_transformers=True)
    enable_sla(other, tmp_path)
    assert torch.equal(run(other.transformer), first)
    assert torch.equal(run(other.transformer_2), second)

    disable_sla(other)
    enable_sla(other.transformer_2, tmp_path, component="transformer_2")
    assert torch.equal(run(other.transformer_2), second)
    enable_sla(other.transformer, tmp_path)
    assert torch.equal(run(other.transformer), first)


def pipe_handle(pipe):
    """A handle that holds what is in place, by way of the processors."""
    old = {
        f"{name}.{layer}": processor.router
        for name in ("transformer", "transformer_2")
        for layer, processor in getattr(pipe, name)._sla_patch.processors.items()
    }
    disable_sla(pipe)
    handle = enable_sla(pipe, config=SMALL_BLOCKS)
    for name, router in handle.routers.items():
        router.load_state_dict(old[name].state_dict())
    return handle


def test_routers_of_one_transformer_do_not_do_for_two(saved):
    pipe = build_tiny_pipeline(two_transformers=True)
    with pytest.raises(ValueError, match="has a 'transformer_2', but these routers are for 'trans"):
        enable_sla(pipe, saved[0])
    with pytest.raises(ValueError, match="not enabled"):
        disable_sla(pipe)


def test_some_settings_may_change_after_training(saved):
    folder, sparse = saved
    model = build_tiny_transformer()
    handle = enable_sla(model, folder, sparsity=0.5, dense_layers=[0], impl="torch")
    assert (handle.config.sparsity, handle.config.dense_layers) == (0.5, (0,))
    assert handle.config.block_q == 16  # from the file
    assert not torch.equal(run(model), sparse)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_q": 128}, "block_q 16 against 128 here"),
        ({"block_k": 64, "phi_k": "raw"}, "block_k 8 against 64 here, phi_k 'smoothed' against"),
        ({"router_per_head": True}, "router_per_head False against True here"),
        ({"alpha": "per_block", "num_query_blocks": 5}, "alpha 'adaptive' against 'per_block'"),
        ({"token_order": "hilbert"}, "token_order 'raster' against 'hilbert' here"),
    ],
    ids=["block_q", "block_k", "per_head", "alpha", "order"],
)
def test_settings_that_were_trained_for_may_not_change(saved, changes, message):
    with pytest.raises(ValueError, match="trained with other settings") as error:
        enable_sla(build_tiny_transformer(), saved[0], config=SMALL_BLOCKS.replace(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("build", "differs"),
    [
        (lambda: build_tiny_transformer(num_layers=4), "num_layers: 3 / 4"),
        (lambda: build_tiny_transformer(num_attention_heads=4), "num_attention_heads: 2 / 4"),
        (lambda: build_tiny_transformer(ffn_dim=32), "ffn_dim: 48 / 32"),
        (build_tiny_vace_transformer, "WanVACETransformer3DModel of 3 layers"),
    ],
    ids=["layers", "heads", "ffn", "family"],
)
def test_routers_of_another_model_name_both_sides(saved, build, differs):
    with pytest.raises(ValueError) as error:
        enable_sla(build(), saved[0])
    message = str(error.value)
    assert "made for WanTransformer3DModel of 3 layers with 2 heads x 16" in message
    assert differs in message and "\n" not in message


def test_a_layer_without_a_router_is_named(tmp_path):
    handle = enable_sla(build_tiny_transformer(), config=SMALL_BLOCKS, dense_layers=[1])
    save_routers(tmp_path, handle)
    with pytest.raises(ValueError, match=r"no router for transformer.blocks.1.attn1: it was dense"):
        enable_sla(build_tiny_transformer(), tmp_path, dense_layers=[0])


def test_nothing_to_save(tmp_path):
    handle = enable_sla(build_tiny_transformer(), dense_layers=[0, 1, 2])
    with pytest.raises(ValueError, match="nothing to save"):
        save_routers(tmp_path / "x", handle)
    assert not (tmp_path / "x").exists()


def test_loaded_routers_are_copied_into_the_model(saved):
    loaded = load_routers(saved[0])
    perturb(enable_sla(build_tiny_transformer(), loaded), seed=9)
    model = build_tiny_transformer()
    enable_sla(model, loaded)
    assert torch.equal(run(model), saved[1])


def test_saving_again_replaces(saved):
    folder, sparse = saved
    model = build_tiny_transformer()
    perturb(handle := enable_sla(model, config=SMALL_BLOCKS), seed=8)
    save_routers(folder, handle)
    again = build_tiny_transformer()
    enable_sla(again, folder)
    assert torch.equal(run(again), run(model)) and not torch.equal(run(again), sparse)


def test_metrics_have_to_fit_into_json(tmp_path):
    handle = enable_sla(build_tiny_transformer(), config=SMALL_BLOCKS)
    with pytest.raises(TypeError):
        save_routers(tmp_path / "x", handle, metrics={"bad": object()})
    assert not (tmp_path / "x").exists()


def test_routers_in_bf16_models_are_saved_in_fp32(tmp_path):
    model = build_tiny_transformer()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    perturb(handle)
    exact = {name: router.query_proj.clone() for name, router in handle.routers.items()}
    model.to(torch.bfloat16)
    save_routers(tmp_path, handle)
    for name, router in load_routers(tmp_path).routers.items():
        assert torch.equal(router.query_proj, exact[name])


def test_the_identity_ignores_what_releases_of_diffusers_add():
    model = build_tiny_transformer()
    before = ModelIdentity.of(model)
    model.register_to_config(some_new_option=True)
    assert ModelIdentity.of(model) == before
    assert router_files.FORMAT_VERSIONS[0] == 1


def test_hub_ids_go_through_huggingface_hub(saved, monkeypatch, tmp_path):
    import huggingface_hub

    folder, sparse = saved
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        return str(folder / file)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = build_tiny_transformer()
    enable_sla(model, "someone/wan-routers")
    assert torch.equal(run(model), sparse)
    assert asked == [("someone/wan-routers", f"routers.{kind}") for kind in ("json", "safetensors")]

    def fail(repo, file):
        raise OSError("no such\nhost")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"the hub did not give .*no such host") as error:
        load_routers("someone/wan-routers")
    assert "\n" not in str(error.value)
