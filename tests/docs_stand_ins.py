"""Tiny random models in the place of those that the documentation names.

`stand_in(patch)` makes Diffusers' `from_pretrained` give them, by hub id and class, and their
pipelines run on few frames of few pixels. All else is as documented: an argument that a pipeline
does not have is refused by it, sizes that the real model cannot make are refused here, and each
call of a patched pipeline has to run sparse attention.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families_joint as joint
import tiny_families_other as other
import tiny_families_wan as wan
import torch
from family_cases import Case

import sla_video
from sla_video.pipelines.handle import SLAHandle

SIZES = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3}
# So large that the position embedding ends nowhere near: sizes are checked as documented.
ROPE = 1024

WAN = wan.CASES
# The class that loads a model, and what stands in for it.
MODELS: dict[str, dict[str, Case]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {
        "WanPipeline": WAN["wan2.1 t2v"],
        "WanVideoToVideoPipeline": WAN["video to video"],
    },
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"WanPipeline": WAN["wan2.1 t2v"]},
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": {"WanImageToVideoPipeline": WAN["wan2.1 i2v"]},
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": {"WanImageToVideoPipeline": WAN["wan2.1 i2v"]},
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": {"WanImageToVideoPipeline": WAN["wan2.1 flf2v"]},
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": {"WanPipeline": WAN["wan2.2 t2v a14b"]},
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": {"WanImageToVideoPipeline": WAN["wan2.2 i2v a14b"]},
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": {
        "WanPipeline": WAN["wan2.2 5b t2v"],
        "WanImageToVideoPipeline": WAN["wan2.2 5b i2v"],
    },
    "Wan-AI/Wan2.1-VACE-1.3B-diffusers": {"WanVACEPipeline": WAN["vace"]},
    "Wan-AI/Wan2.1-VACE-14B-diffusers": {"WanVACEPipeline": WAN["vace"]},
    "Wan-AI/Wan2.2-Animate-14B-Diffusers": {"WanAnimatePipeline": WAN["animate"]},
    "nvidia/ChronoEdit-14B-Diffusers": {"ChronoEditPipeline": WAN["chronoedit"]},
    "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers": {"SkyReelsV2Pipeline": WAN["skyreels t2v"]},
    "Skywork/SkyReels-V2-I2V-14B-720P-Diffusers": {
        "SkyReelsV2ImageToVideoPipeline": WAN["skyreels i2v"]
    },
    "Skywork/SkyReels-V2-DF-14B-720P-Diffusers": {
        "SkyReelsV2DiffusionForcingPipeline": WAN["skyreels forcing"],
        "SkyReelsV2DiffusionForcingImageToVideoPipeline": WAN["skyreels forcing i2v"],
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline": WAN["skyreels forcing v2v"],
    },
    "decart-ai/Lucy-Edit-Dev": {"LucyEditPipeline": WAN["lucy edit"]},
    "hunyuanvideo-community/HunyuanVideo": {"HunyuanVideoPipeline": joint.CASES["hunyuan"]},
    "hunyuanvideo-community/HunyuanVideo-I2V": {
        "HunyuanVideoImageToVideoPipeline": joint.CASES["hunyuan i2v replaced"]
    },
    "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v": {
        "HunyuanVideo15Pipeline": joint.CASES["hunyuan 1.5"]
    },
    "THUDM/CogVideoX-5b": {"CogVideoXPipeline": joint.CASES["cogvideox 1.5"]},
    "THUDM/CogVideoX-5b-I2V": {"CogVideoXImageToVideoPipeline": joint.CASES["cogvideox i2v"]},
    "genmo/mochi-1-preview": {"MochiPipeline": joint.CASES["mochi"]},
    "alibaba-pai/EasyAnimateV5.1-12b-zh": {"EasyAnimatePipeline": joint.CASES["easyanimate"]},
    "Lightricks/LTX-Video": {
        "LTXPipeline": other.CASES["ltx t2v"],
        "LTXImageToVideoPipeline": other.CASES["ltx i2v"],
    },
    "Lightricks/LTX-2": {"LTX2Pipeline": other.CASES["ltx2"]},
    "rhymes-ai/Allegro": {"AllegroPipeline": other.CASES["allegro"]},
}
# Frames are a multiple of this and one more; Allegro's are not.
_FRAMES = {"LTX": 8, "Mochi": 6, "Allegro": 1}
_PIXELS = {"LTX": 32}


def build(name: str, kind: str | None = None) -> Any:
    """What stands in for the model `name`, loaded by the pipeline class `kind`."""
    assert name in MODELS, f"{name}: no small model stands in for it"
    kind = kind or next(iter(MODELS[name]))
    assert kind in MODELS[name], f"{name} is loaded by {list(MODELS[name])}, not by {kind}"
    pipe = MODELS[name][kind].build()
    pipe.stands_in = MODELS[name][kind]
    return pipe


def stand_in(patch: pytest.MonkeyPatch) -> list[SLAHandle]:
    """Let tiny models stand in. Returns a list that fills with the handles of patches."""
    handles: list[SLAHandle] = []
    original = diffusers.DiffusionPipeline.from_pretrained.__func__
    patch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained", classmethod(_from_pretrained(original))
    )
    original = diffusers.ModelMixin.from_pretrained.__func__
    patch.setattr(diffusers.ModelMixin, "from_pretrained", classmethod(_part_from(original)))
    offload = diffusers.DiffusionPipeline.enable_model_cpu_offload
    patch.setattr(
        diffusers.DiffusionPipeline,
        "enable_model_cpu_offload",
        lambda self, **_: offload(self, device="cpu"),
    )
    # Graphs are traced, and graph breaks found, but nothing is compiled.
    patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    enable = sla_video.enable_sla

    def spy(*arguments: Any, **settings: Any) -> SLAHandle:
        handles.append(enable(*arguments, **settings))
        return handles[-1]

    patch.setattr(sla_video, "enable_sla", functools.wraps(enable)(spy))
    # In the tests Triton's kernels are interpreted, a million times slower.
    warmup, little = sla_video.warmup, {"head_dim": 16, "heads": 1, "length": 64}
    patch.setattr(sla_video, "warmup", lambda **settings: warmup(**{**settings, **little}))
    for kind in {kind for cases in MODELS.values() for kind in cases}:
        cls = getattr(diffusers, kind)
        patch.setattr(cls, "__call__", _small_call(cls.__call__, handles))
    return handles


def _from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: type, name: Any, *, torch_dtype: Any = None, **parts: Any) -> Any:
        if Path(name).is_dir():
            return original(cls, name, torch_dtype=torch_dtype, **parts)
        pipe = build(name, None if cls is diffusers.DiffusionPipeline else cls.__name__)
        for part, given in parts.items():
            expected = type(pipe.components[part]).__name__
            assert type(given).__name__ == expected, f"{part} is a {expected}"
        pipe.register_modules(**parts)
        if torch_dtype is not None:
            dtypes = torch_dtype if isinstance(torch_dtype, Mapping) else {"default": torch_dtype}
            assert dtypes.keys() <= {"default", *pipe.components}
            for part, module in pipe.components.items():
                if isinstance(module, torch.nn.Module) and part not in parts:
                    module.to(dtypes.get(part, dtypes["default"]))
        return pipe

    return from_pretrained


def _part_from(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: type, name: Any, *arguments: Any, **settings: Any) -> Any:
        if name not in MODELS:
            return original(cls, name, *arguments, **settings)
        part = build(name).components[settings["subfolder"]]
        assert type(part) is cls, f"{settings['subfolder']} of {name} is a {type(part).__name__}"
        return part.to(settings.get("torch_dtype"))

    return from_pretrained


def _small_call(original: Callable[..., Any], handles: list[SLAHandle]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(self: Any, *positional: Any, **named: Any) -> Any:
        arguments = signature.bind(self, *positional, **named).arguments
        case = getattr(self, "stands_in", None)
        if case is None:
            return original(**arguments)
        _check_sizes(type(self).__name__, arguments)
        small = {**SIZES, "max_sequence_length": 16, **case.call}
        for name, value in small.items():
            # Pictures, videos and what goes with them have to be given on the page.
            if name not in {*SIZES, "max_sequence_length", *arguments} and "prompt" not in name:
                continue
            if value is None:
                arguments.pop(name, None)
            elif name in signature.parameters:
                arguments[name] = value
        before = [sparse_calls(handle) for handle in handles]
        result = original(**arguments)
        patched = [part for part in self.components.values() if hasattr(part, "_sla_patch")]
        if patched:
            after = [sparse_calls(handle) for handle in handles]
            # Calls in compiled blocks are not counted.
            compiled = any(m._compiled_call_impl for part in patched for m in part.modules())
            assert after != before or compiled, "no call ran sparse attention"
        return result

    return call


def sparse_calls(handle: SLAHandle) -> int:
    """How often attention has been sparse, over all layers."""
    return sum(layer.calls - layer.dense_calls for layer in handle.stats().layers)


def _check_sizes(kind: str, arguments: Mapping[str, Any]) -> None:
    """Those that the real model makes; Diffusers would round some of them, with a warning."""
    family = next((name for name in _FRAMES if kind.startswith(name)), "")
    pixels, frames = _PIXELS.get(family, 16), _FRAMES.get(family, 4)
    for side in ("height", "width"):
        assert arguments.get(side, 0) % pixels == 0, f"{side} is no multiple of {pixels}"
    count = arguments.get("num_frames", 1)
    assert (count - 1) % frames == 0, f"num_frames is not {frames}k+1, but {count}"


def folder_of(name: str, folder: Path) -> Path:
    """A folder with what stands in for the model `name`, for the command line."""
    place = folder / name.replace("/", "--")
    if not place.exists():
        pipe = build(name)
        for part in ("transformer", "transformer_2"):
            if (module := getattr(pipe, part, None)) is not None and hasattr(module, "rope"):
                module.register_to_config(rope_max_seq_len=ROPE)
        pipe.save_pretrained(place)
    return place
