"""How each command line of the documentation is checked.

- `sla-video …`: parsed by the real command line; `generate`, `calibrate` and `tune` are then
  run as documented up to the loading of the model, and all commands are run to their end with a
  small model and few steps, in the order of the page, so that one finds what another has written.
- `torchrun` and `accelerate launch`: parsed by their own parsers. What they start runs in one
  process if it is one of our commands; a program of the same page runs in two, at the end.
- `pip install`: folders, extras and packages have to be those of `pyproject.toml`.
- Anything else is refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_tools import call
from docs_pages import ROOT
from docs_stand_ins import MODELS, folder_of

from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.cli import app
from sla_video.pipelines import loading
from sla_video.pipelines.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What a command's options become, so that it takes a second. An option that is not there is added.
# Commands that are not named here run as documented.
SMALL: dict[str, dict[str, object]] = {
    "generate": {"frames": 9, "height": 64, "width": 64, "steps": 2, "device": "cpu"},
    "calibrate": {
        **{"frames": 9, "height": 64, "width": 64, "steps": 2, "device": "cpu"},
        **{"capture_steps": 1, "denoising_steps": 2},
    },
    "tune": {
        **{"frames": 9, "height": 64, "width": 64, "device": "cpu"},
        **{"capture_steps": 1, "denoising_steps": 2},
    },
    "finetune": {
        **{"frames": 9, "height": 64, "width": 64, "max_steps": 1, "data": "VIDEOS"},
        **{"accumulate": 1, "validation_clips": 1},
    },
    "bench": {"length": 128, "heads": 1, "head_dim": 16, "repeats": 1, "device": "cpu"},
}
# What checks write to, and never get as far.
OUT = {"tune": "not-written.json"}
# Left out of the small run: it would be long, or needs a GPU.
LEFT_OUT = {"offload", "minutes", "world_clips", "growth", "batch_size", "optimizer", "weights"}
# What the embedded model is for; the small model needs prompts.
PROMPTS = ("a red circle moves left", "a blue square")
# What may be installed besides what we need ourselves.
FOREIGN_PACKAGES = {"bitsandbytes", "torchao", "torch"}


class Commands:
    """Runs commands in the current folder, which has the files that pages speak of.

    Attributes:
        started: programs of the page that a launcher was to start.
    """

    def __init__(self, models: Path, programs: Collection[str], patch: pytest.MonkeyPatch) -> None:
        self.started: set[str] = set()
        self._models = models
        self._programs = programs
        self._patch = patch

    def run(self, words: list[str]) -> None:
        """Check one command; any error if it is not right."""
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            self._patch.setenv(*words.pop(0).split("=", 1))
        if not words:
            return
        match words[0]:
            case "sla-video":
                self._own(words[1:])
            case "torchrun":
                from torch.distributed.run import get_args_parser

                found = get_args_parser().parse_args(words[1:])
                self._start(found.module, found.training_script, found.training_script_args)
            case "accelerate" if words[1] == "launch":
                from accelerate.commands.launch import launch_command_parser

                found = launch_command_parser().parse_args(words[2:])
                self._start(found.module, found.training_script, found.training_script_args)
            case "pip":
                check_pip(words[1:])
            case _:
                raise AssertionError(f"no check for {words[0]!r}")

    def _start(self, is_module: bool, program: str, arguments: list[str]) -> None:
        if not is_module:
            assert not arguments, f"the program {program} takes none"
            assert program in self._programs, f"the page has no program {program}"
            self.started.add(program)
        elif program == "sla_video.calibration.finetune":
            self._own(["finetune", *arguments])
        else:
            assert program == "sla_video.cli", f"no check for the module {program}"
            self._own(arguments)

    def _own(self, arguments: list[str]) -> None:
        name, values = parse(arguments)
        if name not in SMALL:
            self._succeed(arguments)
            return
        model = values.get("model")
        self._as_documented(name, arguments, values)
        settings = dict(SMALL[name])
        if name == "finetune":
            # Guidance takes every clip twice.
            settings["batch_size"] = 2 if values["guidance"] else 1
        if model is not None:
            settings["model"] = self._folder(model)
        small = replace_options(arguments, settings, LEFT_OUT)
        if name in ("calibrate", "tune") and not (values["prompt"] or values["prompts"]):
            small += PROMPTS
        printed = self._succeed(small)
        if name == "generate":
            assert all(Path(line).suffix == ".mp4" for line in printed)
        if name != "bench":
            # Training prints its log before.
            results = printed[-1:] if name == "finetune" else printed
            assert results and all(Path(line).exists() for line in results)

    def _as_documented(self, name: str, arguments: list[str], values: dict[str, Any]) -> None:
        """Check all that is checked before a model is loaded."""
        if name == "finetune":
            FinetuneConfig(**values)
        if name not in ("generate", "calibrate", "tune"):
            return
        # The embedded model is at hand; but routers and recipes on a page belong to what stands in
        # for it.
        made_here = values.get("routers") or values.get("recipe")
        stands_in = values["model"] in MODELS or made_here
        model = self._folder(values["model"]) if stands_in else values["model"]
        documented = replace_options(arguments, {"model": model}, {"offload", "device", "out"})
        if name in ("calibrate", "tune") and model != "tiny-wan" and not values["prompts"]:
            documented += PROMPTS
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "load_pipeline", _stop)
            outcome = call(*documented, "--out", OUT.get(name, "not-written"))
        assert (outcome.code, "so far" in outcome.err) == (2, True), outcome.err

    def _succeed(self, arguments: list[str]) -> list[str]:
        outcome = call(*arguments)
        assert outcome.code == 0, f"sla-video {' '.join(arguments)}: {outcome.err}"
        return outcome.out.splitlines()

    def _folder(self, model: str) -> Path:
        name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" if model == "tiny-wan" else model
        return folder_of(name, self._models)


def _stop(*_: Any, **__: Any) -> None:
    raise InputError("so far")


def parse(arguments: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The command and its parameters; Click's `UsageError` for what it does not know."""
    group: Any = typer.main.get_command(app)
    # Only parsed: the callback of the group is not called.
    context = group.make_context("sla-video", list(arguments))
    # The name of the command; public in older releases of Click.
    first = getattr(context, "_protected_args", None) or getattr(context, "protected_args", [])
    rest = [*first, *context.args]
    if not rest:
        return None, {}
    name, command, rest = group.resolve_command(context, rest)
    return name, command.make_context(name, rest, parent=context).params


def names_of_commands() -> list[str]:
    """Those of `sla-video`, and "" for the program itself."""
    group: Any = typer.main.get_command(app)
    return ["", *group.commands]


def options_of(name: str) -> dict[str, Any]:
    """Long option -> option of one of our commands."""
    group: Any = typer.main.get_command(app)
    command = group if name == "" else group.commands[name]
    return {
        flag: parameter
        for parameter in command.params
        if parameter.param_type_name == "option"
        for flag in [*parameter.opts, *parameter.secondary_opts]
    }


def replace_options(
    arguments: list[str], settings: Mapping[str, object], left_out: Collection[str]
) -> list[str]:
    """`arguments` with other values of the options named in `settings`."""
    known = options_of(name := arguments[0])
    kept, words = [], iter(arguments)
    for word in words:
        option = known.get(word.split("=")[0])
        if option is None or option.name not in {*settings, *left_out}:
            kept.append(word)
        elif not option.is_flag and "=" not in word:
            next(words)
    names = {option.name: flag for flag, option in reversed(known.items())}
    for setting, value in settings.items():
        assert setting in names, f"{name} has no {setting}"
        kept += [names[setting], str(value)]
    return kept


def check_pip(words: list[str]) -> None:
    """Refuse what `pyproject.toml` does not have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    needed = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    known = {re.match(r"[\w-]+", requirement)[0] for requirement in needed}  # type: ignore[index]
    assert words[0] == "install"
    targets = [word for word in words[1:] if word != "-e"]
    assert targets, "nothing to install"
    for target in targets:
        if found := re.fullmatch(r"\.(?:\[([\w,]+)\])?", target):
            asked = set((found[1] or "").split(",")) - {""}
            assert asked <= extras.keys(), f"no extra {asked - extras.keys()}"
        else:
            assert target in known | FOREIGN_PACKAGES, f"{target} is not a package that we use"
