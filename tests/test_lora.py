"""LoRA that comes with routers: what it adds, where it is off, and that nothing of it stays."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

from sla_video import disable_sla, enable_sla, load_routers, save_routers
from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.lora import add_lora, lora_of, lora_parameters
from tiny_models import TINY_CALL, build_tiny_pipeline, build_tiny_transformer, transformer_inputs

SMALL_BLOCKS = SLAConfig(block_q=16, block_k=8, sparsity=0.5)


def run(model):
    with torch.no_grad():
        return model(**transformer_inputs())[0]


def train(model, scale=0.5):
    """Give our adapter an effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def merged(model, adapter):
    """A copy of the stock weights with the corrections multiplied out."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, up in adapter.tensors.items():
        if "lora_B" in name:
            down = adapter.tensors[name.replace("lora_B", "lora_A")]
            layer = name.removesuffix(".lora_B.weight")
            state[f"{layer}.weight"] += adapter.alpha / adapter.rank * up @ down
    copy = build_tiny_transformer()
    copy.load_state_dict(state)
    return copy


@pytest.fixture
def trained(tmp_path):
    """(folder of routers with LoRA, output of a stock model patched with them)"""
    model = build_tiny_transformer()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    add_lora(model, rank=2, alpha=3)
    train(model)
    return save_routers(tmp_path / "routers", handle), run(model)


def test_a_fresh_adapter_changes_nothing_and_is_what_is_trained():
    model = build_tiny_transformer().requires_grad_(False)
    before = run(model)
    add_lora(model, rank=2)
    assert torch.equal(run(model), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * 4 * 2 == len(lora_parameters(model))
    assert all("attn1" in name and ".sla." in name for name in trainable)


def test_it_adds_the_product_of_its_matrices(trained):
    folder, sparse = trained
    model = build_tiny_transformer()
    enable_sla(
        other := merged(model, load_routers(folder).lora["transformer"]), config=SMALL_BLOCKS
    )
    torch.testing.assert_close(run(other), sparse, rtol=1e-4, atol=1e-5)


def test_a_saved_adapter_gives_the_same_bits_and_goes_without_a_trace(trained):
    folder, sparse = trained
    model = build_tiny_transformer()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modules, before = dict(model.named_modules()), run(model)
    handle = enable_sla(model, folder)
    assert torch.equal(run(model), sparse)
    assert not any(p.requires_grad for p in lora_parameters(model).values())
    with handle.dense():
        assert torch.equal(run(model), before)
    assert torch.equal(run(model), sparse)
    disable_sla(model)
    assert torch.equal(run(model), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert not hasattr(model, "peft_config")


def test_dense_first_steps_are_those_of_the_model_itself(trained):
    folder, _ = trained
    pipe = build_tiny_pipeline()
    call = {**TINY_CALL, "output_type": "latent"}

    def latents(**settings):
        generator = torch.Generator().manual_seed(0)
        return pipe(**call, **settings, generator=generator).frames

    stock = latents()
    enable_sla(pipe, folder, dense_steps=3)
    assert torch.equal(latents(), stock)
    disable_sla(pipe)
    enable_sla(pipe, folder, dense_steps=1)
    first = latents()
    assert torch.equal(latents(), first) and not torch.equal(first, stock)


def test_a_patched_model_saves_as_itself(trained, tmp_path):
    folder, _ = trained
    model = build_tiny_transformer()
    before = model.state_dict()
    enable_sla(model, folder)
    model.save_pretrained(tmp_path / "model")
    saved = WanTransformer3DModel.from_pretrained(tmp_path / "model").state_dict()
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())


def test_the_users_own_adapters_stay(trained):
    folder, _ = trained
    model = build_tiny_transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]), adapter_name="style")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    styled = run(model)
    handle = enable_sla(model, folder)
    assert model.active_adapters() == ["style", "sla"]
    with handle.dense():
        torch.testing.assert_close(run(model), styled, rtol=0, atol=0)
    handle.remove()
    assert model.active_adapters() == ["style"] and list(model.peft_config) == ["style"]
    assert torch.equal(run(model), styled)


def test_the_patch_casts_the_adapter_with_the_model(trained):
    folder, _ = trained
    model = build_tiny_transformer().to(torch.bfloat16)
    enable_sla(model, folder)
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.bfloat16}


def test_a_handle_and_files_keep_what_describes_it(trained, tmp_path):
    folder, _ = trained
    description = json.loads((folder / "routers.json").read_text())
    assert description["format_version"] == 2
    assert description["lora"]["transformer"]["rank"] == 2
    model = build_tiny_transformer()
    handle = enable_sla(model, folder)
    kept, loaded = handle.router_set().lora["transformer"], load_routers(folder).lora["transformer"]
    assert (kept.rank, kept.alpha, set(kept.targets)) == (2, 3, set(loaded.targets))
    assert kept.tensors.keys() == loaded.tensors.keys()
    handle.remove()
    assert lora_of(model) is None
    # What was removed can still be saved, whatever the model is given then.
    enable_sla(model, config=SMALL_BLOCKS)
    add_lora(model, rank=1)
    again = load_routers(save_routers(tmp_path / "again", handle)).lora["transformer"]
    assert again.tensors.keys() == loaded.tensors.keys()
    assert all(torch.equal(again.tensors[name], t) for name, t in loaded.tensors.items())


def test_fused_projections_are_refused_before_and_after(trained):
    folder, _ = trained
    model = build_tiny_transformer()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"unfuse_qkv_projections"):
        enable_sla(model, folder)
    model.unfuse_qkv_projections()
    enable_sla(model, folder)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fused projections"):
        run(model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lora: lora["transformer"].pop("rank"), "rank"),
        (lambda lora: lora["transformer"].update(layers=11), "24 LoRA tensors, not 22"),
        (lambda lora: lora["transformer"].update(rank="two"), "two"),
    ],
    ids=["no-rank", "layers", "rank-text"],
)
def test_damaged_descriptions_are_one_line(trained, change, says):
    folder, _ = trained
    path = folder / "routers.json"
    description = json.loads(path.read_text())
    change(description["lora"])
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match=says) as error:
        load_routers(folder)
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_width_leaves_the_model_alone(trained):
    folder, _ = trained
    path = folder / "routers.json"
    description = json.loads(path.read_text())
    description["lora"]["transformer"]["rank"] = 3
    path.write_text(json.dumps(description))
    model = build_tiny_transformer()
    before, modules = run(model), set(dict(model.named_modules()))
    with pytest.raises(ValueError, match="do not fit"):
        enable_sla(model, folder)
    assert set(dict(model.named_modules())) == modules
    assert torch.equal(run(model), before)


def test_what_cannot_be_added_is_said():
    model = build_tiny_transformer()
    with pytest.raises(ValueError, match="at least 1"):
        add_lora(model, rank=0)
    with pytest.raises(ValueError, match="attn9"):
        add_lora(model, rank=2, targets=["attn9.to_q"])
    add_lora(model, rank=2)
    with pytest.raises(ValueError, match="already"):
        add_lora(model, rank=2)
