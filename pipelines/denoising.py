"""One call of a Diffusers pipeline: from a prompt and its inputs to frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.generation_plan import GenerationPlan, VideoPlan
from sla_video.pipelines.lap_timer import lap_timer
from sla_video.pipelines.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch


def run_pipeline(
    pipe: Any,
    plan: GenerationPlan,
    video: VideoPlan,
    *,
    device: torch.device,
    progress: Progress,
    count: str,
    seconds: dict[str, float],
) -> np.ndarray[Any, Any]:
    """Make the frames of `video`, `[F, H, W, 3]` uint8.

    Args:
        count: "2/3" and so on, for the progress bar.
        seconds: gets the time of each stage: denoise, decode, and text where it is apart.

    Raises:
        InputError: values that are no numbers, or what a pipeline that isn't Wan's refuses.
    """
    import numpy as np
    import torch

    lap = lap_timer(device)
    with torch.no_grad():
        if plan.pipeline.like_wan:
            progress.stage(f"reading the prompt{count}")
            text = _encode(pipe, plan, video)
            seconds["text"] = lap()
        else:
            text = {"prompt": video.prompt}
            if plan.negative_prompt is not None:
                text["negative_prompt"] = plan.negative_prompt
        progress.stage(f"denoising{count}", plan.denoising_steps)
        done = 0

        def on_step_end(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> Any:
            nonlocal done
            done += 1
            progress.advance()
            if done == getattr(pipe, "num_timesteps", plan.denoising_steps):
                seconds["denoise"] = lap()
                progress.stage(f"decoding{count}")
            return values

        arguments = _arguments(pipe, plan)
        try:
            images = pipe(
                **text,
                **plan.inputs,
                **arguments,
                # Noise from the CPU's generator is the same whatever the device.
                generator=torch.Generator("cpu").manual_seed(video.seed),
                output_type="np",
                callback_on_step_end=on_step_end,
            ).frames[0]
        except ValueError as error:
            if plan.pipeline.like_wan:
                raise
            # What sizes such a model makes is known to its pipeline only.
            raise InputError(f"{plan.pipeline.name} refuses: {one_line(error)}") from error
    if not np.isfinite(images).all():
        raise InputError(
            f"the model produced values that are not numbers in {pipe.transformer.dtype}: "
            "use --dtype fp32"
        )
    frames: np.ndarray[Any, Any] = (images * 255).round().astype(np.uint8)
    seconds["decode"] = lap()
    return frames


def _encode(pipe: Any, plan: GenerationPlan, video: VideoPlan) -> dict[str, Any]:
    """The text as embeddings: encoded apart from the rest only so that its time is known."""
    embeds, negative_embeds = pipe.encode_prompt(
        prompt=video.prompt,
        negative_prompt=plan.negative_prompt,
        do_classifier_free_guidance=plan.guidance_scale > 1,
        max_sequence_length=plan.max_sequence_length,
        device=pipe._execution_device,
    )
    return {"prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}


def _arguments(pipe: Any, plan: GenerationPlan) -> dict[str, Any]:
    """Sizes and settings, as this pipeline's call names them."""
    arguments: dict[str, Any] = {
        "height": plan.height,
        "width": plan.width,
        "num_inference_steps": plan.steps,
        "guidance_scale": plan.guidance_scale,
    }
    if not plan.pipeline.fixed_length:
        arguments["num_frames"] = plan.frames
    if plan.strength is not None:
        arguments["strength"] = plan.strength
    if plan.max_sequence_length is not None:
        arguments["max_sequence_length"] = plan.max_sequence_length
    if plan.pipeline.frame_rate is not None:
        arguments[plan.pipeline.frame_rate] = plan.fps
    return arguments
