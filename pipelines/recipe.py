"""A recipe: which settings suit the layers of one model at one video size, and what says so.

One JSON file, meant to be read by people too. It holds the whole `SLAConfig` of each transformer,
the model and the grids of tokens that it was measured on, the routers it was measured with, and
the measurements. What was measured on one grid says little of another, so another is refused.
Imports neither torch nor diffusers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video import __version__
from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.hub import hub_file, is_hub_id
from sla_video.pipelines.json_file import JsonFile
from sla_video.pipelines.model_identity import ModelIdentity
from sla_video.pipelines.recipe_routers import RecipeRouters

if TYPE_CHECKING:
    from sla_video.pipelines.router_set import RouterSet

KIND = "sla-video recipe"
FORMAT_VERSION = 1
# What a folder or a repository of the hub calls it.
RECIPE_FILE = "recipe.json"

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class TunedSize:
    """A size of video that a recipe was measured at.

    Attributes:
        frames, height, width: in frames and pixels.
        grid: (T, H, W) in tokens.
    """

    frames: int
    height: int
    width: int
    grid: Grid

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height}x{self.width}"

    @property
    def options(self) -> str:
        """As the command line takes it."""
        return f"--frames {self.frames} --height {self.height} --width {self.width}"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of all transformers of a pipeline, with what they were chosen by.

    Attributes:
        configs: "transformer" (and "transformer_2") -> its settings.
        models: the same names -> the kind of model.
        sizes: that it was measured at; others are refused.
        routers: that it was measured with; None is the training-free mode.
        target: what it was to reach.
        measured: whatever was measured; anything that JSON can hold.
    """

    configs: Mapping[str, SLAConfig]
    models: Mapping[str, ModelIdentity]
    sizes: tuple[TunedSize, ...]
    routers: RecipeRouters | None = None
    target: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.configs or self.configs.keys() != self.models.keys():
            raise ValueError(
                f"`configs` and `models` must name the same transformers, got "
                f"{sorted(self.configs)} and {sorted(self.models)}"
            )
        if not self.sizes:
            raise ValueError("`sizes` must hold the size that the recipe was measured at")

    @property
    def grids(self) -> tuple[Grid, ...]:
        """(T, H, W) in tokens of each size."""
        return tuple(size.grid for size in self.sizes)

    @property
    def digest(self) -> str:
        """SHA-256 of all settings, in hexadecimal digits."""
        settings: dict[str, Any] = {name: c.to_dict() for name, c in self.configs.items()}
        if self.routers is not None:
            settings["routers"] = self.routers.sha256
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def check_fits(self, component: str, model: ModelIdentity) -> None:
        """Raise an `InputError` that names both sides unless it was made for `model`."""
        made_for = self.models.get(component)
        if made_for is None:
            raise InputError(
                f"the model has a {component!r}, but this recipe is for "
                f"{', '.join(map(repr, self.models))}"
            )
        if made_for != model:
            raise InputError(
                f"this recipe was made for {made_for}, but the model's {component!r} is {model}; "
                f"they differ in {made_for.differences(model) or 'family'}: tune one for this model"
            )

    def check_size(self, frames: int, height: int, width: int) -> None:
        """Raise an `InputError` that names both sides unless it was measured at that size."""
        if (frames, height, width) not in [(s.frames, s.height, s.width) for s in self.sizes]:
            raise InputError(self.refusal(f"{frames} frames of {height}x{width}"))

    def check_grid(self, grid: Grid) -> None:
        """The same for a grid of tokens."""
        if grid not in self.grids:
            raise InputError(self.refusal("a grid of {}x{}x{} tokens".format(*grid)))

    def refusal(self, got: str) -> str:
        """What to say of a video of a size that it was not measured at."""
        known = " or ".join("{} ({}x{}x{} tokens)".format(s, *s.grid) for s in self.sizes)
        return (
            f"this recipe was tuned for {known}, but this video has {got}: make that size "
            f"({self.sizes[0].options}), or tune a recipe for yours with `sla-video tune`"
        )

    def router_set(self) -> RouterSet | None:
        """The routers that it names, or None where it has none.

        Raises:
            ValueError: they are not there, are others, or were trained in another token order.
        """
        return None if self.routers is None else self.routers.load(self.configs)


def save_recipe(path: str | os.PathLike[str], recipe: Recipe) -> Path:
    """Write the file, whole or not at all; what is there is replaced.

    Raises:
        InputError: it cannot be written there.
    """
    file = Path(path).expanduser()
    routers = None if recipe.routers is None else recipe.routers.to_dict(file.parent)
    JsonFile(file).write(
        {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "target": dict(recipe.target),
            "tuned_for": [{**vars(size), "grid": list(size.grid)} for size in recipe.sizes],
            "models": {
                component: {
                    "family": model.family,
                    "config_hash": model.config_hash,
                    "config": dict(model.fields),
                }
                for component, model in recipe.models.items()
            },
            "routers": routers,
            "sla": {component: config.to_dict() for component, config in recipe.configs.items()},
            "measured": dict(recipe.measured),
        }
    )
    return file


def load_recipe(source: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from a file, from a folder that holds `recipe.json`, or from the hub.

    Raises:
        InputError: there is none, or it is corrupt, or of a version that this library does not
            know, or holds settings that it does not know. The message is one line.
    """
    path = _find(source)
    values = _read(path)
    try:
        return _recipe(path, values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise InputError(
            f"the recipe {path} is corrupt: {what}; tune or download it again"
        ) from error


def _find(source: str | os.PathLike[str]) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        path /= RECIPE_FILE
    if path.is_file():
        return path
    # A name such as recipes/mine.json is a file that is missing, not someone's repository.
    if isinstance(source, str) and is_hub_id(source) and path.suffix != ".json":
        return hub_file(source, RECIPE_FILE)
    raise InputError(
        f"no recipe at {str(source)!r}: give a file that `sla-video tune` wrote, a folder that "
        f"holds {RECIPE_FILE}, or a hub id"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(
            f"the recipe {path} is corrupt or truncated: {one_line(error)}; tune or download it "
            "again"
        ) from error
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise InputError(f'{path} is not a recipe: it does not say "kind": "{KIND}"')
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"the recipe {path} has format version {version!r}, but sla-video {__version__} reads "
            f"version {FORMAT_VERSION}: update sla-video, or tune again"
        )
    return values


_FIELDS = {
    *("kind", "format_version", "library_version", "target", "tuned_for", "models", "routers"),
    *("sla", "measured"),
}


def _recipe(path: Path, values: Mapping[str, Any]) -> Recipe:
    if unknown := sorted(set(values) - _FIELDS):
        raise ValueError(
            f"sla-video {__version__} does not know its {', '.join(map(repr, unknown))}"
        )
    models = {
        component: ModelIdentity(family=str(model["family"]), fields=dict(model["config"]))
        for component, model in values["models"].items()
    }
    for component, model in models.items():
        if model.config_hash != values["models"][component]["config_hash"]:
            raise ValueError(f"the configuration hash of {component!r} does not match")
    routers = values["routers"]
    return Recipe(
        configs={c: SLAConfig.from_dict(config) for c, config in values["sla"].items()},
        models=models,
        sizes=tuple(_size(size) for size in values["tuned_for"]),
        routers=None if routers is None else RecipeRouters.from_dict(routers, path.parent),
        target=dict(values["target"]),
        measured=dict(values["measured"]),
    )


def _size(values: Mapping[str, Any]) -> TunedSize:
    t, h, w = (int(size) for size in values["grid"])
    sizes = {name: int(values[name]) for name in ("frames", "height", "width")}
    if min(t, h, w, *sizes.values()) < 1:
        raise ValueError(f"`tuned_for` must hold sizes of at least 1, got {dict(values)}")
    return TunedSize(**sizes, grid=(t, h, w))
