"""Load a Wan pipeline onto a device. The checks that need no weights are in `model_source.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError, is_out_of_memory, one_line
from sla_video.pipelines.model_source import check_pipeline_class, check_weights, read_json

if TYPE_CHECKING:
    import torch

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
    *,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool = False,
) -> Any:
    """Load the `WanPipeline` in `folder`.

    Args:
        folder: of a Diffusers pipeline, as `find_model` has checked it.
        device: where the model runs.
        dtype: of the transformer and the text encoder. The VAE stays float32, which it needs.
        offload: keep each component in host memory until it is needed (slower, less GPU memory).

    Returns:
        A `diffusers.WanPipeline` in evaluation mode, its own progress bar off.

    Raises:
        InputError: files that cannot be read, or too little memory.
    """
    try:
        with _no_progress_bars():
            pipe = _from_pretrained(folder, dtype)
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


def _from_pretrained(folder: Path, dtype: torch.dtype) -> Any:
    """`WanPipeline.from_pretrained`, but weights that the files lack are an error."""
    import torch
    from diffusers import WanPipeline
    from transformers import UMT5EncoderModel

    # Loaded apart, since only so does Transformers tell which weights it made up.
    text_encoder, report = UMT5EncoderModel.from_pretrained(
        str(folder / "text_encoder"),
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    misshapen = [key for key, *_ in report["mismatched_keys"]]
    _check_complete(folder / "text_encoder", [*report["missing_keys"], *misshapen])
    pipe = WanPipeline.from_pretrained(
        str(folder),
        text_encoder=text_encoder,
        dtype={"default": dtype, "vae": torch.float32},
        use_safetensors=True,
        local_files_only=True,
    )
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            missing = [key for key, value in component.state_dict().items() if value.is_meta]
            _check_complete(folder / name, missing)
    return pipe


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


def download(name: str) -> Path:
    """Fetch a pipeline from the hub into its cache, weights included, and check what came.

    Raises:
        InputError: the hub cannot be reached, or there is no room.
    """
    from diffusers import WanPipeline

    try:
        folder = Path(WanPipeline.download(name, use_safetensors=True))
    except Exception as error:  # each HTTP library of each hub version raises its own types
        raise InputError(f"cannot download model {name!r}: {one_line(error)}") from error
    check_pipeline_class(name, read_json(folder / "model_index.json"))
    for component in sorted(path for path in folder.iterdir() if path.is_dir()):
        check_weights(component)
    return folder
