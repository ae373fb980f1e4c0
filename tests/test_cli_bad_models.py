"""Models and routers that cannot be used: one line on stderr, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_tools import SMALL, assert_refused, call, files_below, run

import sla_video
from sla_video.pipelines import model_source

PROMPT = "a red circle"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nonsense", ["unknown model 'nonsense'", "tiny-wan", "hub id"]),
        ("./nowhere", ["unknown model './nowhere'"]),
        ("", ["not a Diffusers pipeline", "model_index.json"]),
        ("empty", ["empty is not a Diffusers pipeline", "model_index.json"]),
        ("file", ["'file' is not a folder"]),
    ],
)
def test_models_that_are_none(model: str, words: list[str], here: Path) -> None:
    (here / "empty").mkdir()
    (here / "file").write_text("")
    assert_refused(call("generate", PROMPT, "--model", model), *words)
    assert files_below(here) == ["empty", "file"]


def test_an_installation_without_its_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "embedded_folder", lambda: here / "tiny-wan")
    outcome = call("generate", PROMPT)
    assert_refused(outcome, "embedded model 'tiny-wan' is missing", "--model")


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "corrupt or truncated"),
        (lambda path: path.write_bytes(b""), "corrupt or truncated"),
        (lambda path: path.write_bytes(b"not safetensors at all"), "corrupt or truncated"),
        (Path.unlink, "holds no safetensors file"),
    ],
    ids=["truncated", "empty", "garbage", "missing"],
)
@pytest.mark.parametrize("component", WEIGHTS)
def test_weights_that_cannot_be_read(
    component: str, damage: Callable[[Path], object], words: str, broken: Path, here: Path
) -> None:
    damage(broken / component / WEIGHTS[component])
    assert_refused(call("generate", PROMPT, "--model", broken, *SMALL), component, words)
    assert files_below(here) == []


@pytest.mark.parametrize("component", WEIGHTS)
def test_weights_that_are_missing_from_a_sound_file(
    component: str, broken: Path, here: Path
) -> None:
    names: list[str] = []
    rewrite(
        broken / component / WEIGHTS[component],
        lambda tensors: names.append(sorted(tensors)[0]) or tensors.pop(names[0]),
    )
    outcome = call("generate", PROMPT, "--model", broken, *SMALL)
    assert_refused(outcome, f"{component} are incomplete", names[0])
    assert files_below(here) == []


@pytest.mark.parametrize("component", WEIGHTS)
def test_weights_of_another_shape(component: str, broken: Path, here: Path) -> None:
    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[max(tensors)] = torch.zeros(3, 5, 7)

    rewrite(broken / component / WEIGHTS[component], reshape)
    assert_refused(call("generate", PROMPT, "--model", broken, *SMALL), "shape")
    assert files_below(here) == []


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model_index.json", "{", "not valid JSON"),
        ("model_index.json", "[]", "must hold a JSON object"),
        ("model_index.json", '{"_class_name": "FluxPipeline"}', "holds a FluxPipeline"),
        ("model_index.json", "{}", "pipeline of unknown class"),
        ("vae/config.json", "{", "not valid JSON"),
        ("defaults.json", '{"num_frames": "many"}', "`frames` must be a number, got 'many'"),
        ("tokenizer/tokenizer.json", "{", "cannot load the model"),
        ("scheduler/scheduler_config.json", "{", "cannot load the model"),
    ],
)
def test_damaged_descriptions(
    file: str, content: str, words: str, broken: Path, here: Path
) -> None:
    (broken / file).write_text(content)
    assert_refused(call("generate", PROMPT, "--model", broken, *SMALL), words)
    assert files_below(here) == []


@pytest.mark.usefixtures("nothing_is_loaded")
def test_missing_component(broken: Path) -> None:
    shutil.rmtree(broken / "vae")
    assert_refused(call("generate", PROMPT, "--model", broken), "incomplete", "vae is missing")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_missing_shard(broken: Path) -> None:
    index = {"weight_map": {"a": "part-1.safetensors"}}
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert_refused(call("generate", PROMPT, "--model", broken), "part-1.safetensors is missing")


@pytest.fixture
def other_routers(tmp_path: Path) -> Path:
    """Routers of a model with other heads."""
    from tiny_models import build_tiny_transformer

    transformer = build_tiny_transformer(num_attention_heads=3)
    sla_video.save_routers(tmp_path / "routers", sla_video.enable_sla(transformer))
    return tmp_path / "routers"


@pytest.mark.usefixtures("nothing_is_loaded")
def test_routers_of_another_model(other_routers: Path, tiny_pipeline_dir: Path, here: Path) -> None:
    arguments = ("--model", tiny_pipeline_dir, *SMALL, "--routers", other_routers)
    assert_refused(call("generate", PROMPT, *arguments), "num_attention_heads: 3 / 2")
    assert files_below(here) == []


@pytest.mark.usefixtures("nothing_is_loaded")
def test_corrupt_routers(other_routers: Path, tiny_pipeline_dir: Path, here: Path) -> None:
    truncate(other_routers / "routers.safetensors")
    arguments = ("--model", tiny_pipeline_dir, *SMALL, "--routers", other_routers)
    assert_refused(call("generate", PROMPT, *arguments), "routers.safetensors", "corrupt")
    assert files_below(here) == []


def test_values_that_are_not_numbers(broken: Path, here: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(float("nan"))

    rewrite(broken / "vae" / WEIGHTS["vae"], spoil)
    outcome = call("generate", PROMPT, "--model", broken, *SMALL)
    assert_refused(outcome, "not numbers", "--dtype fp32")
    assert files_below(here) == []


def test_program_with_a_damaged_model(broken: Path, here: Path) -> None:
    rewrite(
        broken / "text_encoder" / WEIGHTS["text_encoder"],
        lambda tensors: tensors.pop(max(tensors)),
    )
    outcome = run("generate", PROMPT, "--model", broken, *SMALL, cwd=here)
    assert_refused(outcome, "text_encoder are incomplete")
    assert files_below(here) == []
