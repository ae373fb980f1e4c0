"""Models whose text and video attend to each other, each through its own pipeline class.

Compared with Diffusers itself: everything with full selection, and the text always.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import diffusers
import pytest
import torch
from family_checks import EVERYTHING, SPARSE, FamilyChecks, Stock
from tiny_families_joint import CASES, cogvideox_config, noise

from sla_video import disable_sla, enable_sla
from sla_video.pipelines.families.registry import find_family, supported_transformers
from tiny_models import seeded

JOINT_INPUTS = ("hidden_states", "encoder_hidden_states")


class JointStock(Stock):
    """Also with what the parts of the transformer were called."""

    def __init__(self, name: str) -> None:
        pipe = CASES[name].build()
        self.transformer = pipe.transformer
        family = find_family(self.transformer)
        assert family is not None
        self.layers = family.layers(self.transformer)
        # Of the transformer in each forward pass, and of each attention in the first one.
        self.inputs: list[dict] = []
        self.layer_inputs: dict = {}
        hooks = [
            self.transformer.register_forward_pre_hook(
                lambda _, args, kwargs: self.inputs.append(kwargs), with_kwargs=True
            )
        ]
        for layer_name, layer in self.layers.items():
            hooks.append(
                layer.register_forward_pre_hook(self._remember(layer_name), with_kwargs=True)
            )
        super().__init__(replace(CASES[name], build=lambda: pipe))
        for hook in hooks:
            hook.remove()

    def _remember(self, name):
        def hook(_module, args, kwargs):
            assert not args
            self.layer_inputs.setdefault(name, kwargs)

        return hook


_STOCK: dict[str, JointStock] = {}


def stock_of(name):
    """Made once for all tests, which leave it as it was."""
    if name not in _STOCK:
        _STOCK[name] = JointStock(name)
    return _STOCK[name]


def of_each(*names):
    return pytest.mark.parametrize(
        "stock", names or CASES, indirect=True, ids=lambda name: name.replace(" ", "-")
    )


@pytest.fixture
def stock(request):
    return stock_of(request.param)


@of_each()
class TestJoint(FamilyChecks):
    """Each case."""

    def test_dense_steps_are_the_first_ones(self, stock):
        if "CogVideoX" in type(stock.pipe.scheduler).__name__:
            with pytest.raises(ValueError, match="counts its steps, got CogVideoXDDIMScheduler"):
                enable_sla(stock.pipe, config=SPARSE, dense_steps=1)
            return
        with enable_sla(stock.pipe, config=SPARSE, dense_steps=1) as handle:
            stock.run()
            for layer in handle.stats().layers:
                assert layer.dense_calls == len(stock.inputs) / 2 == layer.calls / 2


@of_each()
def test_text_is_never_sparse(stock):
    for name, layer in stock.layers.items():
        call = stock.layer_inputs[name]
        with torch.no_grad():
            video, text = layer(**call)
            with enable_sla(stock.transformer, config=SPARSE):
                sparse_video, exact_text = layer(**call)
            with enable_sla(stock.transformer, config=EVERYTHING):
                full_video, _ = layer(**call)
        torch.testing.assert_close(exact_text, text, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(full_video, video, rtol=1e-4, atol=1e-5)
        assert (sparse_video - video).norm() > 1e-3 * video.norm()


@of_each("hunyuan", "cogvideox", "mochi")
def test_gradients_at_full_selection_are_the_stock_ones(stock):
    name, layer = next(iter(stock.layers.items()))
    call = dict(stock.layer_inputs[name])
    leaves = [call[key].clone().requires_grad_() for key in JOINT_INPUTS]
    call |= dict(zip(JOINT_INPUTS, leaves, strict=True))

    def gradients():
        video, text = layer(**call)
        loss = (video * noise(*video.shape)).sum() + (text * noise(*text.shape, seed=1)).sum()
        return torch.autograd.grad(loss, leaves)

    wanted = gradients()
    with enable_sla(stock.transformer, config=EVERYTHING):
        torch.testing.assert_close(gradients(), wanted, rtol=1e-4, atol=1e-5)


@of_each("hunyuan", "framepack", "hunyuan 1.5", "mochi")
def test_padding_of_the_text_changes_nothing(stock):
    call = dict(stock.inputs[0])
    padding = call["encoder_attention_mask"] == 0
    assert padding.any()
    words = call["encoder_hidden_states"]
    changed = {**call, "encoder_hidden_states": words + noise(*words.shape) * padding[..., None]}
    told = {**call, "encoder_hidden_states": words + noise(*words.shape) * ~padding[..., None]}
    with torch.no_grad(), enable_sla(stock.transformer, config=SPARSE):
        wanted = stock.transformer(**call)[0]
        torch.testing.assert_close(stock.transformer(**changed)[0], wanted)
        assert not torch.allclose(stock.transformer(**told)[0], wanted, atol=1e-3)


@of_each("hunyuan", "hunyuan 1.5")
def test_texts_of_different_lengths_in_one_batch(stock):
    # With and without the prompt.
    first, second = stock.inputs[:2]
    assert not torch.equal(first["encoder_attention_mask"], second["encoder_attention_mask"])
    both = {
        name: torch.cat((value, second[name])) if torch.is_tensor(value) else value
        for name, value in first.items()
    }
    with torch.no_grad():
        wanted = stock.transformer(**both)[0]
        with enable_sla(stock.transformer, config=EVERYTHING):
            torch.testing.assert_close(stock.transformer(**both)[0], wanted, rtol=1e-4, atol=1e-5)
        with enable_sla(stock.transformer, config=SPARSE):
            batch = stock.transformer(**both)[0]
            single = [stock.transformer(**call)[0] for call in (first, second)]
    torch.testing.assert_close(batch, torch.cat(single), rtol=1e-4, atol=1e-5)


# Stock Mochi looks for the tokens of the text that are there, which breaks the graph.
@of_each("hunyuan", "hunyuan 1.5", "mochi")
def test_attention_compiles_as_one_graph(stock):
    with torch.no_grad(), enable_sla(stock.transformer, config=SPARSE):
        for name, layer in [*stock.layers.items()][:: len(stock.layers) - 1]:
            call = stock.layer_inputs[name]
            compiled = torch.compile(layer, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(**call), layer(**call), rtol=1e-4, atol=1e-5)


@of_each("hunyuan")
def test_recall_is_that_among_the_video(stock):
    for config, expected in ((EVERYTHING, 1.0), (SPARSE, 0.15)):
        with enable_sla(stock.pipe, config=config) as handle:
            with handle.recording(exact_recall=True):
                stock.run()
            # The tiny model attends to everything alike, so 2 blocks of 24 hold about that share.
            assert handle.stats().recall == pytest.approx(expected, abs=1e-5 + 0.1 * (expected < 1))


@of_each("hunyuan")
def test_other_masks_are_dense_and_said_once(stock, caplog):
    name, layer = next(iter(stock.layers.items()))
    call = dict(stock.layer_inputs[name])
    mask = call["attention_mask"]
    call["attention_mask"] = mask.expand(-1, -1, mask.shape[-1], -1).tril()
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="sla_video"):
        wanted = layer(**call)
        enable_sla(stock.transformer, config=SPARSE)
        for _ in range(2):
            assert all(torch.equal(*pair) for pair in zip(layer(**call), wanted, strict=True))
        disable_sla(stock.transformer)
    assert caplog.text.count("an attention mask of pairs of tokens") == 1


@of_each("cogvideox")
def test_training_is_refused(stock):
    with enable_sla(stock.pipe, config=SPARSE) as handle:
        next(iter(handle.processors.values())).attention = lambda _, query, key, value: query
        with pytest.raises(ValueError, match="routers of CogVideoX cannot be trained yet"):
            stock.run()


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_consisid_is_cogvideox(sparsity):
    config = cogvideox_config(is_train_face=False)
    model = seeded(diffusers.ConsisIDTransformer3DModel, config, 0)
    call = {
        "hidden_states": noise(1, 3, 4, 8, 8),
        "encoder_hidden_states": noise(1, 16, 16),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    with torch.no_grad():
        wanted = model(**call)[0]
        with enable_sla(model, config=SPARSE.replace(sparsity=sparsity)):
            output = model(**call)[0]
        assert torch.allclose(output, wanted, rtol=1e-3, atol=1e-4) == (sparsity == 0)
        assert torch.equal(model(**call)[0], wanted)


def test_every_supported_class_is_tested():
    tested = {type(stock_of(name).transformer).__name__ for name in CASES}
    joint = ("Hunyuan", "CogVideo", "Mochi", "EasyAnimate")
    assert tested == {name for name in supported_transformers() if name.startswith(joint)}
