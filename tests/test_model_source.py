"""What is known of a model before it is loaded: where it is and which sizes it can make."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_video.pipelines import hub, model_source
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.model_defaults import Geometry, ModelDefaults, wan_geometry
from sla_video.pipelines.model_source import find_model

WAN21 = ({}, {"patch_size": [1, 2, 2]})
WAN22_5B = (
    {"scale_factor_spatial": 16, "scale_factor_temporal": 4, "patch_size": 2},
    {"patch_size": [1, 2, 2], "rope_max_seq_len": 1024},
)
TINY = ({"scale_factor_spatial": 8, "scale_factor_temporal": 4}, {"patch_size": [1, 1, 1]})


@pytest.mark.parametrize(
    ("configs", "multiple", "sizes"),
    [(WAN21, 16, (81, 480, 832)), (WAN22_5B, 32, (121, 704, 1280)), (TINY, 16, (25, 256, 256))],
    ids=["Wan2.1", "Wan2.2-5B", "tiny-wan"],
)
def test_geometry_of_known_models(configs, multiple, sizes) -> None:
    geometry = wan_geometry(*configs)
    assert geometry.multiple == (multiple, multiple)
    assert geometry.temporal == 4
    geometry.check(*sizes)


@given(
    frames=st.integers(1, 400),
    height=st.integers(1, 2000),
    width=st.integers(1, 2000),
)
def test_the_nearest_sizes_that_are_named_are_valid_and_nearest(frames, height, width) -> None:
    geometry = Geometry(multiple=(32, 48), temporal=4, maximum=(201, 1024, 960))
    try:
        geometry.check(frames, height, width)
    except InputError as error:
        found = re.search(r"number is (\d+)", str(error))
        if found:
            better = int(found[1])
            geometry.check(better, 32, 48)
            assert abs(better - frames) <= 2 or better == 201
            return
        found = re.search(r"--height (\d+) --width (\d+)", str(error))
        assert found
        geometry.check(frames, int(found[1]), int(found[2]))
        assert abs(int(found[1]) - height) <= 16 or found[1] in ("32", "1024")
        assert abs(int(found[2]) - width) <= 24 or found[2] in ("48", "960")
    else:
        assert (frames - 1) % 4 == height % 32 == width % 48 == 0


def test_valid_sizes_do_generate(tiny_pipeline, tiny_pipeline_dir: Path) -> None:
    geometry = find_model(str(tiny_pipeline_dir)).geometry
    assert geometry.multiple == (16, 16)
    # The tiny position embedding has 32 places: 125 frames, 256 pixels.
    assert geometry.maximum == (125, 256, 256)
    geometry.check(1, 16, 256)
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    latents = tiny_pipeline("a", num_frames=1, height=16, width=256, **call).frames
    assert tuple(latents.shape[2:]) == (1, 2, 32)


def test_defaults(tiny_pipeline_dir: Path) -> None:
    source = find_model(str(tiny_pipeline_dir))
    assert source.defaults == ModelDefaults()
    assert (source.defaults.frames, source.defaults.height, source.defaults.width) == (81, 480, 832)
    assert source.folder == tiny_pipeline_dir
    assert source.transformer_config["num_attention_heads"] == 2


def hub_of(monkeypatch: pytest.MonkeyPatch, folder: Path, asked: list[str]) -> None:
    """A hub whose one repository lies in `folder`."""

    def hub_file(repository: str, filename: str) -> Path:
        asked.append(f"{repository}/{filename}")
        return folder / filename

    monkeypatch.setattr(model_source, "hub_file", hub_file)


def test_of_a_hub_model_only_the_descriptions_are_read(
    tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    hub_of(monkeypatch, tiny_pipeline_dir, asked)
    source = find_model("someone/some-wan")
    assert source.folder is None
    assert source.geometry == find_model(str(tiny_pipeline_dir)).geometry
    assert {name.removeprefix("someone/some-wan/") for name in asked} == {
        "model_index.json",
        "vae/config.json",
        "transformer/config.json",
    }


def test_a_hub_model_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}))
    hub_of(monkeypatch, tmp_path, [])
    with pytest.raises(InputError, match=r"'a/b' holds a CogVideoXPipeline"):
        find_model("a/b")


@pytest.mark.parametrize(
    ("name", "valid"),
    [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", True), ("a/b", True), ("a", False), ("a/b/c", False)],
)
def test_hub_ids(name: str, valid: bool) -> None:
    assert hub.is_hub_id(name) is valid


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("RepositoryNotFoundError", "neither a folder here nor a"),
        ("GatedRepoError", "gated.*hf auth login"),
        ("EntryNotFoundError", "has no model_index.json"),
        ("HfHubHTTPError", "cannot be reached"),
    ],
)
def test_answers_of_the_hub(
    error: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)
    # Their constructors differ between releases and want HTTP responses.
    raised = kind.__new__(kind)
    Exception.__init__(raised, "404 Client Error")

    def answer(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(InputError, match=words):
        hub.hub_file("a/b", "model_index.json")
