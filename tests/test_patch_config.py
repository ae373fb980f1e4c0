"""`SLAConfig`: what it refuses, and that it survives JSON."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_video import SLAConfig

share = st.floats(0, 1, exclude_max=True)
configs = st.builds(
    SLAConfig,
    sparsity=share,
    layer_sparsity=st.dictionaries(st.integers(-50, 50), share, max_size=4),
    dense_layers=st.lists(st.integers(-50, 50), max_size=4),
    dense_steps=st.integers(0, 50),
    block_q=st.integers(1, 512),
    block_k=st.integers(1, 512),
    sparse_dtype=st.sampled_from(["bf16", "int8", "int8_fp8", "int8_int8"]),
    impl=st.sampled_from(["auto", "reference", "torch", "triton"]),
    router_per_head=st.booleans(),
    phi_k=st.sampled_from(["smoothed", "raw"]),
    selection=st.sampled_from(["top_k", "top_p"]),
    top_p=st.floats(0, 1, exclude_min=True),
    max_selected=st.none() | st.integers(1, 99),
    token_order=st.sampled_from(["raster", "tile:3,5,4", "morton", "hilbert", "axes:hwt"]),
)


@given(configs)
def test_json_round_trip(config):
    assert SLAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(configs)
def test_copies_are_equal_and_hashable(config):
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.replace()):
        assert twin == config and hash(twin) == hash(config)


def test_to_dict_holds_every_field():
    names = {field.name for field in dataclasses.fields(SLAConfig)}
    assert set(SLAConfig().to_dict()) == names


def test_per_block_alpha_goes_with_its_table_size():
    config = SLAConfig(alpha="per_block", num_query_blocks=56)
    assert SLAConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="`num_query_blocks` must be given with alpha='per_block'"):
        SLAConfig(alpha="per_block")
    with pytest.raises(ValueError, match="got alpha='adaptive' and num_query_blocks=56"):
        SLAConfig(num_query_blocks=56)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sparsity": 1.5}, ValueError, "`sparsity` must be in [0, 1), got 1.5"),
        ({"sparsity": 1}, ValueError, "`sparsity` must be in [0, 1), got 1"),
        ({"sparsity": -0.1}, ValueError, "`sparsity` must be in [0, 1), got -0.1"),
        ({"sparsity": float("nan")}, ValueError, "`sparsity` must be in [0, 1), got nan"),
        ({"sparsity": "0.9"}, TypeError, "`sparsity` must be a number in [0, 1), got '0.9'"),
        ({"sparsity": True}, TypeError, "`sparsity` must be a number in [0, 1), got True"),
        ({"layer_sparsity": [0.5]}, TypeError, "`layer_sparsity` must map layers to sparsities"),
        ({"layer_sparsity": {0: 2}}, ValueError, "`layer_sparsity[0]` must be in [0, 1), got 2"),
        ({"layer_sparsity": {"a": 0.5}}, TypeError, "`layer_sparsity` must be an integer, got 'a'"),
        ({"dense_layers": 3}, TypeError, "`dense_layers` must be a list of layer numbers"),
        ({"dense_layers": "01"}, TypeError, "`dense_layers` must be a list of layer numbers"),
        ({"dense_layers": [0.5]}, TypeError, "`dense_layers` must be an integer, got 0.5"),
        ({"dense_steps": -1}, ValueError, "`dense_steps` must be at least 0, got -1"),
        (
            {"dense_steps": 1.0},
            TypeError,
            "`dense_steps` must be an integer of at least 0, got 1.0",
        ),
        ({"block_q": 0}, ValueError, "`block_q` must be at least 1, got 0"),
        ({"block_k": -64}, ValueError, "`block_k` must be at least 1, got -64"),
        ({"top_p": 0}, ValueError, "`top_p` must be in (0, 1], got 0"),
        ({"min_selected": 0}, ValueError, "`min_selected` must be at least 1, got 0"),
        (
            {"min_selected": 4, "max_selected": 3},
            ValueError,
            "`max_selected` must be at least 4, got 3",
        ),
        ({"impl": "cuda"}, ValueError, "`impl` must be one of auto, reference, torch, triton, got"),
        ({"sparse_dtype": "fp4"}, ValueError, "`sparse_dtype` must be one of bf16, int8, int8_fp8"),
        (
            {"alpha": "shared"},
            ValueError,
            "`alpha` must be one of adaptive, per_block, got 'shared'",
        ),
        ({"phi_k": "x"}, ValueError, "`phi_k` must be one of smoothed, raw, got 'x'"),
        ({"selection": None}, ValueError, "`selection` must be one of top_k, top_p, got None"),
        ({"router_per_head": 1}, TypeError, "`router_per_head` must be a bool, got 1"),
        ({"token_order": "zigzag"}, ValueError, "`token_order` must be raster, morton, hilbert, a"),
        ({"token_order": "tile:4,4"}, ValueError, "tile:4,4,4 (frames, rows, columns), or axes"),
        ({"token_order": "tile:0,4,4"}, ValueError, "got 'tile:0,4,4'"),
        ({"token_order": "axes:hww"}, ValueError, "or axes such as axes:hwt, got 'axes:hww'"),
        ({"token_order": "hilbert\n"}, ValueError, "got 'hilbert\\n'"),
        ({"token_order": None}, ValueError, "got None"),
    ],
    ids=repr,
)
def test_bad_fields_say_what_was_expected_and_given(fields, error, message):
    with pytest.raises(error) as caught:
        SLAConfig(**fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(error):
        SLAConfig().replace(**fields)


@pytest.mark.parametrize("name", ["axes:thw", "tile:1,1,1"])
def test_names_of_the_same_token_order_are_one(name):
    assert SLAConfig(token_order=name) == SLAConfig(token_order="raster") == SLAConfig()


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown settings block, topk; known ones are alpha, "):
        SLAConfig.from_dict({"topk": 3, "block": 1, "sparsity": 0.5})
    with pytest.raises(TypeError, match="must be a mapping"):
        SLAConfig.from_dict([])


def test_config_is_frozen_and_keeps_its_own_copies():
    layers = {0: 0.5}
    config = SLAConfig(layer_sparsity=layers, dense_layers=[1])
    layers[1] = 0.1
    assert config.layer_sparsity == {0: 0.5} and config.dense_layers == (1,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.5


def test_layer_plan():
    config = SLAConfig(sparsity=0.9, layer_sparsity={1: 0.5, -1: 0.25}, dense_layers=[0, -2])
    assert config.layer_plan(5) == [None, 0.5, 0.9, None, 0.25]


def test_config_is_a_leaf():
    code = (
        "import sys, sla_video.config; "
        "print([m for m in ('torch', 'diffusers', 'numpy', 'triton') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
