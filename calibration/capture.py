"""Q, K and V of self-attention layers while the dense pipeline denoises prompts.

A forward hook in front of `attn1` computes what the attention is about to see: projected, normed
and rotated. Hooks sit on the given instances only and are gone afterwards; the pipeline's own
attention runs on as if nobody watched. Letters: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sla_video.pipelines.errors import InputError, is_out_of_memory
from sla_video.pipelines.families.registry import family_of
from sla_video.pipelines.families.wan import project_in
from sla_video.pipelines.progress import Progress
from sla_video.pipelines.token_order import TokenOrder

COMPONENTS = ("transformer", "transformer_2")
# The golden ratio's fraction: multiples of it spread evenly however many there are.
_SPREAD = 0.618034


class Capture(NamedTuple):
    """What one call of one layer attends with, each `[B, L, H, D]`."""

    query: Tensor
    key: Tensor
    value: Tensor


class CallKey(NamedTuple):
    """One forward of a transformer: of which prompt, at which denoising step, in which branch.

    `branch` is 0 for the prompt and 1 for the negative prompt of classifier-free guidance.
    """

    prompt: int
    step: int
    branch: int


@dataclass(frozen=True, kw_only=True)
class CapturePlan:
    """How the pipeline is run, and how much of that is captured.

    Attributes:
        prompts: run one after another, with seeds `seed`, `seed + 1`, …
        capture_steps: calls captured for each prompt in each transformer, spread over the
            denoising steps; with guidance they take turns between the two branches.
        denoising_steps: of the schedule.
        dense_steps: first steps, never captured because they stay dense in generation.
        token_order: of what is captured, as in `SLAConfig`.
    """

    prompts: tuple[str, ...]
    capture_steps: int
    denoising_steps: int
    guidance_scale: float
    negative_prompt: str | None
    frames: int
    height: int
    width: int
    max_sequence_length: int
    dense_steps: int
    seed: int
    token_order: str = "raster"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return {**asdict(self), "prompts": list(self.prompts)}


class CaptureSink(Protocol):
    """Where captures go: to be kept (`capture_store.py`), or measured at once."""

    def has(self, layer: str, key: CallKey) -> bool:
        """Whether the capture is there."""

    def put(self, layer: str, key: CallKey, capture: Capture) -> None:
        """Take what is wanted of it; the tensors are not ours to keep."""


def sequence_length(
    pipe: Any, frames: int, height: int, width: int, component: str = COMPONENTS[0]
) -> int:
    """L of a video of these sizes in pixels."""
    return math.prod(token_grid(pipe, frames, height, width, component))


def token_grid(
    pipe: Any, frames: int, height: int, width: int, component: str = COMPONENTS[0]
) -> tuple[int, int, int]:
    """(T, H, W) in tokens of a video of these sizes in pixels."""
    scale = pipe.vae_scale_factor_spatial
    sizes = ((frames - 1) // pipe.vae_scale_factor_temporal + 1, height // scale, width // scale)
    patches = getattr(pipe, component).config.patch_size
    t, h, w = (size // patch for size, patch in zip(sizes, patches, strict=True))
    return t, h, w


def plan_calls(pipe: Any, plan: CapturePlan) -> dict[str, tuple[CallKey, ...]]:
    """The calls to capture in each transformer of a pipeline, prompt by prompt.

    Raises:
        InputError: a transformer that the schedule never uses, or too few steps.
    """
    owners = _owner_of_step(pipe, plan.denoising_steps)
    guided = plan.guidance_scale > 1
    calls = {}
    for component in dict.fromkeys(name for name in COMPONENTS if getattr(pipe, name, None)):
        steps = [
            step
            for step, owner in enumerate(owners)
            if owner == component and step >= plan.dense_steps
        ]
        if len(steps) < plan.capture_steps:
            raise InputError(
                f"`capture_steps` is {plan.capture_steps}, but only {len(steps)} of the "
                f"{plan.denoising_steps} denoising steps are sparse steps of {component!r}: "
                "capture fewer, or give more --denoising-steps"
            )
        calls[component] = tuple(
            CallKey(prompt, steps[position], (prompt + i) % 2 if guided else 0)
            for prompt in range(len(plan.prompts))
            for i, position in enumerate(_spread(len(steps), plan.capture_steps, prompt))
        )
    return calls


def _owner_of_step(pipe: Any, steps: int) -> list[str]:
    """The component that denoises at each step; two of them share the noise levels in Wan 2.2."""
    boundary = pipe.config.boundary_ratio
    if boundary is None:
        return [COMPONENTS[0]] * steps
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    limit = boundary * scheduler.config.num_train_timesteps
    return [COMPONENTS[0] if t >= limit else COMPONENTS[1] for t in scheduler.timesteps]


def _spread(total: int, count: int, prompt: int) -> list[int]:
    """`count` of `total` positions, evenly spread and shifted from prompt to prompt."""
    shift = (0.5 + prompt * _SPREAD) % 1
    return [int((i + shift) * total / count) for i in range(count)]


def run_captures(
    pipe: Any,
    layers: Mapping[str, nn.Module],
    plan: CapturePlan,
    calls: Mapping[str, Sequence[CallKey]],
    store: CaptureSink,
    progress: Progress,
    *,
    label: str = "capturing",
) -> None:
    """Run the pipeline on the prompts and put the calls of `layers` into `store`.

    Prompts whose calls are all in the store are not run, and a run ends after the last step that is
    wanted.

    Args:
        layers: "transformer.blocks.0.attn1" -> the attention module.

    Raises:
        InputError: a layer's values are not finite, too little memory, or tokens that are spread
            over several devices.
    """
    todo: dict[int, list[tuple[str, CallKey]]] = defaultdict(list)
    for name, attn in layers.items():
        if getattr(attn.processor, "_parallel_config", None) is not None:
            raise InputError(
                f"{name} sees a piece of the tokens (`enable_parallelism`), and routers are fitted "
                "to all of them: calibrate on one device"
            )
        for key in calls[name.partition(".")[0]]:
            if not store.has(name, key):
                todo[key.prompt].append((name, key))
    steps = {prompt: 1 + max(key.step for _, key in wanted) for prompt, wanted in todo.items()}
    progress.stage(label, sum(steps.values()))
    for prompt, wanted in sorted(todo.items()):
        watch = _Watch(wanted, store)
        try:
            with _hooked(pipe, layers, watch, plan.token_order):
                _run(pipe, plan, prompt, steps[prompt], watch, progress)
        except Exception as error:
            if is_out_of_memory(error):
                raise InputError(
                    f"out of memory at {plan.frames} frames of {plan.height}x{plan.width}; try "
                    "--offload, --spill, a smaller --memory, or fewer --frames"
                ) from error
            raise
        missing = [name for name, key in wanted if not store.has(name, key)]
        if missing:
            raise InputError(
                f"{missing[0]} was not called as a self-attention of its own: this model's "
                "attention cannot be captured"
            )


class _Watch:
    """Which calls are wanted, and which call is running."""

    def __init__(self, wanted: Sequence[tuple[str, CallKey]], store: CaptureSink) -> None:
        self.store = store
        self.step = 0
        self.branch: dict[str, int] = {}
        self._wanted = {(name, key.step, key.branch): key for name, key in wanted}

    def enter(self, component: str) -> None:
        """A forward of a transformer begins."""
        self.branch[component] = self.branch.get(component, -1) + 1

    def end_step(self) -> None:
        """A denoising step is done."""
        self.step += 1
        self.branch.clear()

    def see(self, name: str, attn: Any, arguments: Mapping[str, Any]) -> None:
        """A layer is about to attend."""
        branch = self.branch.get(name.partition(".")[0], 0)
        key = self._wanted.get((name, self.step, branch))
        # The first forward is looked at in any case: later every layer has caught what one spoils.
        if key is None and (self.step or branch):
            return
        other = ("encoder_hidden_states", "attention_mask")
        if any(arguments.get(argument) is not None for argument in other):
            return
        with torch.no_grad():
            parts = project_in(attn, arguments["hidden_states"], arguments.get("rotary_emb"))
        for what, part in zip(("queries", "keys", "values"), parts, strict=True):
            if not part.isfinite().all():
                raise InputError(
                    f"the {what} of {name} hold values that are not numbers (denoising step "
                    f"{self.step + 1}, {part.dtype}): the model is broken, or needs --dtype fp32"
                )
        if key is not None:
            self.store.put(name, key, Capture(*parts))


@contextmanager
def _hooked(
    pipe: Any, layers: Mapping[str, nn.Module], watch: _Watch, token_order: str
) -> Iterator[None]:
    def on_transformer(component: str) -> Any:
        return lambda _module, _args: watch.enter(component)

    def on_layer(name: str, attn: nn.Module) -> Any:
        signature = inspect.signature(attn.forward)

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            watch.see(name, module, _flat(signature.bind(*args, **kwargs).arguments))

        return hook

    with ExitStack() as stack:
        for component in {name.partition(".")[0] for name in layers}:
            transformer = getattr(pipe, component)
            if order := TokenOrder.of(token_order, family_of(transformer)):
                stack.enter_context(order.install(transformer))
            hook = transformer.register_forward_pre_hook(on_transformer(component))
            stack.callback(hook.remove)
        for name, attn in layers.items():
            hook = attn.register_forward_pre_hook(on_layer(name, attn), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Bound arguments with those that went into `**kwargs` beside the named ones."""
    named = dict(arguments)
    return {**named.pop("kwargs", {}), **named}


def _run(
    pipe: Any, plan: CapturePlan, prompt: int, steps: int, watch: _Watch, progress: Progress
) -> None:
    """Denoise one prompt, up to and with its last wanted step."""

    def on_step_end(pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        watch.end_step()
        progress.advance()
        # Diffusers' way to end early; the next call resets it.
        pipe._interrupt = watch.step >= steps
        return values

    with torch.no_grad():
        pipe(
            prompt=plan.prompts[prompt],
            negative_prompt=plan.negative_prompt,
            num_frames=plan.frames,
            height=plan.height,
            width=plan.width,
            num_inference_steps=plan.denoising_steps,
            guidance_scale=plan.guidance_scale,
            max_sequence_length=plan.max_sequence_length,
            generator=torch.Generator("cpu").manual_seed(plan.seed + prompt),
            output_type="latent",
            callback_on_step_end=on_step_end,
        )
    pipe._interrupt = False
