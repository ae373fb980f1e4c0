"""Load a pipeline onto a device. The checks that need no weights are in `model_source.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError, is_out_of_memory, one_line
from sla_video.pipelines.model_source import check_pipeline_class, check_weights, read_json

if TYPE_CHECKING:
    import torch

# Components that lose too much in 16 bits.
_EXACT = ("image_encoder",)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def find_device(name: str | None) -> torch.device:
    """The device called `name` if it is there; without a name a CUDA GPU if there is one, else CPU.

    Raises:
        InputError: not a device name, or a device that this machine or this PyTorch lacks.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"`device` must be cpu, cuda, cuda:N or mps, got {name!r}") from error
    if device.type == "cpu":
        return device
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            build = "a build without CUDA" if torch.version.cuda is None else "no GPU is visible"
            raise InputError(
                f"`device` is {name!r}, but PyTorch {torch.__version__} finds no GPU ({build}); "
                "use --device cpu, or leave --device out"
            )
        if device.index is not None and device.index >= count:
            raise InputError(
                f"`device` is {name!r}, but there are {count} GPUs: cuda:0 to cuda:{count - 1}"
            )
        return device
    if device.type == "mps" and torch.backends.mps.is_available():
        return device
    raise InputError(f"`device` is {name!r}, which is not available here; use --device cpu")


def find_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype called `name`; without a name float32 on a CPU and bfloat16 elsewhere.

    Raises:
        InputError: not one of fp32, bf16, fp16.
    """
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise InputError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def load_pipeline(
    folder: Path,
    name: str = "WanPipeline",
    *,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool = False,
    tiled: bool = False,
) -> Any:
    """Load a pipeline.

    Args:
        folder: of a Diffusers pipeline, as `find_model` has checked it.
        name: its class, or another one that takes the same components.
        device: where the model runs.
        dtype: of the transformer and the text encoder. Wan's VAE and what sees pictures stay
            float32, which they need.
        tiled: decode in tiles.
        offload: keep each component in host memory until it is needed (slower, less GPU memory).

    Returns:
        A Diffusers pipeline in evaluation mode, its own progress bar off.

    Raises:
        InputError: files that cannot be read, or too little memory.
    """
    try:
        with _no_progress_bars():
            pipe = _from_pretrained(folder, name, dtype)
        if tiled:
            pipe.vae.enable_tiling()
        if offload:
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
    except InputError:
        raise
    except Exception as error:  # Diffusers and Transformers raise a dozen types for a bad file
        if is_out_of_memory(error):
            advice = "" if offload else "; --offload needs the least"
            raise InputError(f"out of memory while loading {folder}{advice}") from error
        raise InputError(f"cannot load the model in {folder}: {one_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _from_pretrained(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """The pipeline's `from_pretrained`, but weights that the files lack are an error."""
    import diffusers
    import torch

    pipeline = getattr(diffusers, name, None)
    if pipeline is None:
        raise InputError(f"Diffusers {diffusers.__version__} has no {name}: install a newer one")
    index = read_json(folder / "model_index.json")
    exact = [name for name in _EXACT if (index.get(name) or [None])[0] is not None]
    if index["vae"][1] == "AutoencoderKLWan":
        exact.append("vae")
    dtypes = {"default": dtype, **dict.fromkeys(exact, torch.float32)}
    pipe = pipeline.from_pretrained(
        str(folder),
        **_load_encoders(folder, index, dtypes),
        dtype=dtypes,
        use_safetensors=True,
        local_files_only=True,
    )
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            missing = [key for key, value in component.state_dict().items() if value.is_meta]
            _check_complete(folder / name, missing)
    if spatial := pipe.vae.config.get("scale_factor_spatial"):
        # Video to video and VACE count the VAE's levels instead, which is wrong where it patches.
        pipe.vae_scale_factor_spatial = spatial
    return pipe


def _load_encoders(
    folder: Path, index: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Any]:
    """The models of Transformers, loaded apart: only so does it tell which weights it made up."""
    import transformers

    found = {}
    for name, value in index.items():
        library, kind = value if isinstance(value, list) and len(value) == 2 else (None, None)
        cls = getattr(transformers, str(kind), None) if library == "transformers" else None
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            continue  # tokenizers and image processors
        model: Any = cls
        found[name], report = model.from_pretrained(
            str(folder / name),
            dtype=dtypes.get(name, dtypes["default"]),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        misshapen = [key for key, *_ in report["mismatched_keys"]]
        _check_complete(folder / name, [*report["missing_keys"], *misshapen])
    return found


def _check_complete(folder: Path, missing: Collection[str]) -> None:
    if missing:
        raise InputError(
            f"the weights in {folder} are incomplete: {len(missing)} are missing or of a wrong "
            f"shape, for instance {min(missing)}; download or save the model again"
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the libraries' own bars for local files, which take a second, off the terminal."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [log for log in (of_diffusers, of_transformers) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def download(name: str, pipelines: Sequence[str] = ("WanPipeline",)) -> Path:
    """Fetch a pipeline from the hub into its cache, weights included, and check what came.

    Args:
        pipelines: classes that the caller can use.

    Raises:
        InputError: the hub cannot be reached, or there is no room.
    """
    from diffusers import DiffusionPipeline

    try:
        folder = Path(DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:  # each HTTP library of each hub version raises its own types
        raise InputError(f"cannot download model {name!r}: {one_line(error)}") from error
    check_pipeline_class(name, read_json(folder / "model_index.json"), pipelines)
    for component in sorted(path for path in folder.iterdir() if path.is_dir()):
        check_weights(component)
    return folder
