"""Which kinds of key orders a model's heads get: chosen on some prompts, judged on others."""

from __future__ import annotations

import pytest
import torch

from sla_video import SLAConfig, enable_sla
from sla_video.calibration.key_orders import choose_for_model, choose_kinds, measure_model
from sla_video.kernels.key_order_measures import OrderMeasures
from sla_video.pipelines.errors import InputError
from tiny_models import TINY_CALL, build_tiny_pipeline

CONFIG = SLAConfig(sparsity=0.75, block_q=16, block_k=8, impl="torch", dense_layers=[1])
RUN = {
    "frames": 9, "height": 64, "width": 64, "denoising_steps": 3, "guidance_scale": 3.0,
    "max_sequence_length": 16, "config": CONFIG, "every": 4,
}  # fmt: skip


def measures(identity, segment_sort, hot_peel, recall=None):
    """Densities of each head by kind; recalls of 1 minus them, if not given."""
    table = {"identity": identity, "segment_sort": segment_sort, "hot_peel": hot_peel}
    recall = recall or {kind: [1 - x for x in density] for kind, density in table.items()}
    return {
        kind: OrderMeasures(torch.tensor(density), torch.tensor(recall[kind]))
        for kind, density in table.items()
    }


def test_a_kind_has_to_save_enough_and_to_hold_on_held_out_calls():
    choosing = [
        measures([0.4, 0.4, 0.4, 0.4], [0.5, 0.2, 0.1, 0.1], [0.395, 0.3, 0.5, 0.5]),
        measures([0.4, 0.4, 0.4, 0.4], [0.5, 0.5, 0.1, 0.1], [0.395, 0.3, 0.5, 0.5]),
    ]
    # The third head needs more blocks here, and the selection of the fourth holds less mass.
    judging = measures([0.4, 0.4, 0.4, 0.4], [0.5, 0.5, 0.41, 0.3], [0.1, 0.3, 0.1, 0.1])
    judging["segment_sort"].recall[3] = 0.59
    choice = choose_kinds(choosing, [judging])
    assert choice.kinds == ("identity", "hot_peel", "identity", "identity")
    assert choice.dropped == 2
    torch.testing.assert_close(choice.density, torch.tensor([0.4, 0.3, 0.4, 0.4]))
    torch.testing.assert_close(choice.in_place, torch.full((4,), 0.4))


def hot_heads(pipe):
    """Some keys that all queries of a layer want, scattered over the sequence."""
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.attn1.norm_k.weight.mul_(3.0)
            block.attn1.norm_q.weight.mul_(3.0)
    return pipe


def test_choices_are_what_enable_sla_takes_and_hold_on_the_last_prompt():
    pipe = hot_heads(build_tiny_pipeline())
    prompts = ["a red circle moves left", "a blue square", "the circle and the square"]
    found = measure_model(pipe, prompts, **RUN)
    assert list(found) == ["transformer.blocks.0.attn1", "transformer.blocks.2.attn1"]
    for layer in found.values():
        assert (layer.density <= layer.in_place).all()
        assert layer.in_place.shape == (2,)
        assert (layer.in_place > 0).all() and (layer.in_place <= 1).all()
    chosen = choose_for_model(pipe, prompts, **RUN)
    assert chosen == {
        name: layer.kinds for name, layer in found.items() if set(layer.kinds) != {"identity"}
    }
    assert chosen, "no head has another kind: this tests nothing"
    with enable_sla(pipe, config=CONFIG.replace(key_orders=chosen)):
        frames = pipe(**TINY_CALL, output_type="latent").frames
    assert torch.as_tensor(frames).isfinite().all()


def test_bad_input_is_refused(tiny_pipeline):
    with pytest.raises(InputError, match="leave a prompt to choose by, got 1 of 1 prompts"):
        choose_for_model(tiny_pipeline, ["a red circle"], **RUN)
    with pytest.raises(InputError, match="`capture_steps` is 9, but only 3 of the 3"):
        choose_for_model(tiny_pipeline, ["a red circle", "a square"], **RUN, capture_steps=9)
