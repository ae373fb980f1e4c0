"""Recipes: the file, what applying one does, and every way it can be wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import SMALL, assert_refused, call, files_below

from sla_video import SLAConfig, disable_sla, enable_sla, load_recipe, save_recipe, save_routers
from sla_video.pipelines import recipe as recipes
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.recipe import Recipe, TunedSize
from sla_video.pipelines.recipe_routers import RecipeRouters
from sla_video.pipelines.router_files import load_routers
from sla_video.pipelines.router_set import ModelIdentity
from tiny_models import TINY_CALL, build_tiny_pipeline, build_tiny_transformer

# The default size of the tiny pipeline's test call: 9 frames of 64 x 64.
SIZE = TunedSize(frames=9, height=64, width=64, grid=(3, 8, 8))
CONFIG = SLAConfig(
    sparsity=0.6,
    layer_sparsity={0: 0.4},
    dense_layers=(2,),
    token_order="tile:3,4,4",
    block_q=16,
    block_k=16,
)


def recipe_for(pipe: Any, *configs: SLAConfig, **fields: Any) -> Recipe:
    parts = ("transformer", "transformer_2")[: len(configs)]
    return Recipe(
        configs=dict(zip(parts, configs, strict=True)),
        models={name: ModelIdentity.of(getattr(pipe, name)) for name in parts},
        **{"sizes": (SIZE,), "target": {"target_recall": 0.9}, **fields},
    )


def latents(pipe: Any, **changes: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    call = {**TINY_CALL, **changes, "generator": generator, "output_type": "latent"}
    found: torch.Tensor = pipe(**call).frames
    return found


@pytest.fixture
def file(tiny_pipeline: Any, here: Path) -> Path:
    return save_recipe(here / "mine.json", recipe_for(tiny_pipeline, CONFIG))


def test_it_does_what_its_settings_do(tiny_pipeline: Any, file: Path) -> None:
    wanted = []
    for settings in ({"config": CONFIG}, {"recipe": file}, {"recipe": str(file)}):
        with enable_sla(tiny_pipeline, **settings) as handle:
            wanted.append(latents(tiny_pipeline))
            assert handle.configs == {"transformer": CONFIG}
            assert handle.stats().sparsity > 0.3
    assert torch.equal(wanted[0], wanted[1]) and torch.equal(wanted[0], wanted[2])
    assert not torch.equal(wanted[0], latents(tiny_pipeline))


def test_file_round_trip(tiny_pipeline: Any, file: Path) -> None:
    recipe = recipe_for(tiny_pipeline, CONFIG, measured={"layers": {"a": 1}})
    assert load_recipe(save_recipe(file, recipe)) == recipe
    (file.parent / "folder").mkdir()
    file.rename(file.parent / "folder" / "recipe.json")
    assert load_recipe(file.parent / "folder") == recipe
    assert files_below(file.parent) == ["folder", "folder/recipe.json"]


def test_each_transformer_has_its_own(here: Path) -> None:
    pipe = build_tiny_pipeline(two_transformers=True)
    second = CONFIG.replace(token_order="raster", dense_layers=(0,), layer_sparsity={})
    save_recipe("two.json", recipe_for(pipe, CONFIG, second))
    handle = enable_sla(pipe, recipe="two.json")
    assert handle.configs == {"transformer": CONFIG, "transformer_2": second}
    plans = {name: p.sparsity for name, p in handle.processors.items()}
    assert plans["transformer.blocks.2.attn1"] is None
    assert plans["transformer_2.blocks.2.attn1"] == 0.6
    found = latents(pipe)
    with pytest.raises(ValueError, match="keep the routers that the recipe names"):
        save_routers("routers", handle)
    disable_sla(pipe)
    # The first denoises the first step, the second the other two; each as if alone.
    enable_sla(pipe.transformer, config=CONFIG)
    enable_sla(pipe.transformer_2, config=second, component="transformer_2")
    assert torch.equal(found, latents(pipe))


def test_routers_go_with_it(tiny_pipeline: Any, here: Path) -> None:
    config = CONFIG.replace(dense_layers=())
    with enable_sla(tiny_pipeline, config=config) as handle, torch.no_grad():
        for router in handle.routers.values():
            router.query_proj += 0.3 * torch.randn_like(router.query_proj)
        save_routers("routers", handle)
        wanted = latents(tiny_pipeline)
    routers = RecipeRouters.of("routers", load_routers("routers"))
    recipe = recipe_for(tiny_pipeline, config, routers=routers)
    (here / "deep").mkdir()
    save_recipe("deep/r.json", recipe)
    stored = json.loads((here / "deep/r.json").read_text())
    assert stored["routers"]["source"] == "./../routers"
    with enable_sla(tiny_pipeline, recipe="deep/r.json"):
        assert torch.equal(latents(tiny_pipeline), wanted)
    other = recipe_for(tiny_pipeline, config.replace(token_order="hilbert"), routers=routers)
    with pytest.raises(InputError, match=r"'hilbert' in 'transformer', but .* in 'tile:3,4,4'"):
        enable_sla(tiny_pipeline, recipe=other)
    with enable_sla(tiny_pipeline, config=config) as handle:
        save_routers("routers", handle)
    with pytest.raises(InputError, match="not those that the recipe was measured with"):
        enable_sla(tiny_pipeline, recipe="deep/r.json")


def test_some_settings_may_still_be_changed(tiny_pipeline: Any, file: Path) -> None:
    with enable_sla(tiny_pipeline, recipe=file, dense_steps=1, sparse_dtype="int8") as handle:
        assert handle.config == CONFIG.replace(dense_steps=1, sparse_dtype="int8")
    for change in ({"sparsity": 0.5}, {"token_order": "raster"}, {"config": CONFIG}):
        name = next(iter(change))
        with pytest.raises(InputError, match=f"`{name}` is what a recipe decides"):
            enable_sla(tiny_pipeline, recipe=file, **change)
    with pytest.raises(TypeError, match="`recipe` must be a file, a hub id"):
        enable_sla(tiny_pipeline, recipe=CONFIG)


def test_another_grid_is_refused_at_the_first_forward(tiny_pipeline: Any, file: Path) -> None:
    with enable_sla(tiny_pipeline, recipe=file):
        both = r"9 frames of 64x64 \(3x8x8 tokens\), but this video has a grid of 3x8x10 tokens"
        with pytest.raises(InputError, match=both):
            latents(tiny_pipeline, width=80)
        latents(tiny_pipeline)
    latents(tiny_pipeline, width=80)


def test_another_model_is_refused(tiny_pipeline: Any, file: Path) -> None:
    deeper = build_tiny_transformer(num_layers=4)
    with pytest.raises(InputError, match=r"3 layers .* is .* 4 layers .* num_layers: 3 / 4"):
        enable_sla(deeper, recipe=file)
    with pytest.raises(InputError, match=r"has a 'transformer_2', but this recipe is for 'trans"):
        enable_sla(build_tiny_pipeline(two_transformers=True), recipe=file)
    assert enable_sla(tiny_pipeline, recipe=file).active
    disable_sla(tiny_pipeline)


def test_generate(tiny_pipeline_dir: Path, tiny_pipeline: Any, here: Path) -> None:
    size = TunedSize(frames=5, height=32, width=32, grid=(2, 4, 4))
    save_recipe("r.json", recipe_for(tiny_pipeline, CONFIG, sizes=(size,)))
    rest = ("--model", tiny_pipeline_dir, "--steps", 2, "--device", "cpu", "--out", "a.mp4")
    outcome = call("generate", "a blue square", "--recipe", "r.json", "--seed", 0, *rest)
    assert outcome.code == 0, outcome.err
    sidecar = json.loads((here / "a.json").read_text())
    assert SLAConfig.from_dict(sidecar["attention"]["config"]) == CONFIG
    settings = sidecar["settings"]
    # The size is that of the recipe, not the model's.
    assert (settings["frames"], settings["height"], settings["width"]) == (5, 32, 32)
    assert settings["recipe"] == "r.json" and len(settings["recipe_sha256"]) == 64


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--height", "48"], ["9 frames of 64x64 (3x8x8 tokens)", "5 frames of 48x32"]),
        (["--sparsity", "0.9"], ["`recipe` decides on `sparsity`"]),
        (["--dense"], ["takes no `recipe`"]),
        (["--recipe", "missing.json"], ["no recipe at 'missing.json'", "sla-video tune"]),
        (
            ["--model", "tiny-wan"],
            ["was made for", "not for tiny-wan", "num_attention_heads: 2 / 4"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_generate_refuses(
    options: list[str], words: list[str], tiny_pipeline_dir: Path, file: Path
) -> None:
    arguments = ("--model", tiny_pipeline_dir, "--recipe", file, *SMALL, *options)
    assert_refused(call("generate", "a blue square", *arguments), *words)
    assert files_below(file.parent) == ["mine.json"]


def changed(text: str, *path: str, to: Any) -> str:
    values = json.loads(text)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return json.dumps(values)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t[:100], "corrupt or truncated"),
        (lambda t: "", "corrupt or truncated"),
        (lambda t: "[1]", "is not a recipe"),
        (lambda t: changed(t, "kind", to="routers"), "is not a recipe"),
        (lambda t: changed(t, "format_version", to=7), "has format version 7, but sla-video"),
        (lambda t: changed(t, "colour", to=1), "does not know its 'colour'"),
        (lambda t: changed(t, "sla", "transformer", "magic", to=1), "unknown settings magic"),
        (lambda t: changed(t, "sla", "transformer", "sparsity", to=2), "must be in [0, 1), got 2"),
        (lambda t: changed(t, "sla", to={}), "must name the same transformers"),
        (lambda t: changed(t, "sla", to=[]), "is corrupt"),
        (lambda t: changed(t, "tuned_for", to=[]), "`sizes` must hold"),
        (lambda t: changed(t, "tuned_for", to=[{"frames": 9}]), "is corrupt: no 'grid'"),
        (
            lambda t: changed(t, "models", "transformer", "config", "num_layers", to=9),
            "the configuration hash of 'transformer' does not match",
        ),
        (lambda t: t.replace('"routers": null,', ""), "is corrupt: no 'routers'"),
    ],
)
def test_a_damaged_file(damage: Any, words: str, file: Path) -> None:
    file.write_text(damage(file.read_text()))
    with pytest.raises(InputError) as caught:
        load_recipe(file)
    assert words in str(caught.value) and "mine.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_copies_keep_to_the_recipe(file: Path) -> None:
    pipe = build_tiny_pipeline()
    enable_sla(pipe, recipe=file)
    twin = copy.deepcopy(pipe)
    assert torch.equal(latents(twin), latents(pipe))
    with pytest.raises(InputError, match="a grid of 3x8x10"):
        latents(twin, width=80)


def test_it_is_one_graph(tiny_pipeline: Any, file: Path) -> None:
    pipe = build_tiny_pipeline()
    with enable_sla(tiny_pipeline, recipe=file):
        wanted = latents(tiny_pipeline)
    enable_sla(pipe, recipe=file)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    torch.testing.assert_close(latents(pipe), wanted)
    # Whatever error the compiler makes of it.
    with pytest.raises(Exception, match=r"9 frames of 64x64 .* but this video has another grid"):
        latents(pipe, width=80)


def test_from_the_hub(tiny_pipeline: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub_file(repository: str, name: str) -> Path:
        asked.append((repository, name))
        return file

    monkeypatch.setattr(recipes, "hub_file", hub_file)
    assert load_recipe("someone/wan-recipe") == recipe_for(tiny_pipeline, CONFIG)
    assert asked == [("someone/wan-recipe", "recipe.json")]
    # A file that is not there is no repository.
    with pytest.raises(InputError, match=r"no recipe at 'someone/wan\.json'"):
        load_recipe("someone/wan.json")
