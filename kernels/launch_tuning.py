"""Find the fastest launch of each kernel of the operator, on this GPU.

Only where it is asked for: `sla_video.warmup(..., tune=True)` or `sla-video bench --tune`. One
kernel after the other, all launches of its list take turns in the whole operator, with cold caches
(`gpu_timing.py`). One that cannot be compiled or launched is left out; so is one whose results
differ from those of the first of the list, which wins unless another is faster by a clear margin.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.gpu_timing import Name, time_runs, why_it_failed
from sla_video.kernels.launch_cache import write_launches
from sla_video.kernels.launch_choice import LaunchCase, adopt, trying
from sla_video.kernels.launch_lists import LaunchConfig
from sla_video.kernels.options import PhiK, Selection, SparseDtype

_LOGGER = logging.getLogger("sla_video")
# Below this share of the operator's time, another launch is as fast for all we know.
_CLEARLY = 0.01
# Relative L2 distance of what two launches of a kernel may make: sums in another order, rounded.
_ALLOWED_DISTANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-3}

# The operator, or both passes: outputs, or gradients.
Operator = Callable[[], Sequence[Tensor]]
# Milliseconds of the operator with each launch.
Timer = Callable[[Mapping[LaunchConfig, Operator], torch.device], Mapping[LaunchConfig, float]]
# Called with the cases done and those known of.
OnCase = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class TunedLaunch:
    """What was found for one kernel.

    Attributes:
        case: name of the kernel, its format and sizes.
        chosen, first: the winner, and what would run without tuning.
        milliseconds: of the whole operator, by launch.
        notes: why others were left out.
    """

    case: str
    chosen: LaunchConfig
    first: LaunchConfig
    milliseconds: dict[LaunchConfig, float]
    notes: dict[LaunchConfig, str]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What to tune for: arguments of `sla2_attention`, and the shape `[1, L, H, D]`."""

    length: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    sparse_dtype: SparseDtype
    sparsity: float = 0.97
    block_q: int = 128
    block_k: int = 64
    selection: Selection = "top_k"
    phi_k: PhiK = "smoothed"
    backward: bool = False


def tune_operator(
    problem: Problem,
    device: torch.device,
    *,
    timer: Timer | None = None,
    on_case: OnCase | None = None,
) -> list[TunedLaunch]:
    """`tune_launches` for Gaussian inputs of one shape, forward and, if wanted, backward.

    Raises:
        ValueError: sizes or options that the kernels are not made for.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, problem.length, problem.heads, problem.head_dim)
    qkv = [torch.randn(shape, generator=generator, device=device) for _ in range(3)]
    qkv = [x.to(problem.dtype) for x in qkv]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sla2_attention(
            query,
            key,
            value,
            sparsity=problem.sparsity,
            block_q=problem.block_q,
            block_k=problem.block_k,
            sparse_dtype=problem.sparse_dtype,
            selection=problem.selection,
            phi_k=problem.phi_k,
            impl="triton",
        )

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return (attend(*qkv),)

    def both() -> Sequence[Tensor]:
        with torch.enable_grad():
            leaves = [x.requires_grad_() for x in qkv]
            out = attend(*leaves)
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

    operators = [forward, both] if problem.backward else [forward]
    return tune_launches(operators, device, timer=timer, on_case=on_case)


def tune_launches(
    operators: Sequence[Operator],
    device: torch.device,
    *,
    timer: Timer | None = None,
    on_case: OnCase | None = None,
) -> list[TunedLaunch]:
    """Time the launches of all kernels that `operators` run, and keep the winners.

    Each kernel is tuned in the first operator that runs it. Winners count in this process from now
    on, not in CUDA graphs that exist, and in later ones through `launch_cache.py`.

    Args:
        timer: in place of the GPU's own clock.
        on_case: called before each case.
    """
    # "cuda" is the current one of several, and tensors know which.
    device = torch.empty(0, device=device).device
    winners: dict[LaunchCase, LaunchConfig] = {}
    found = []
    for operator in operators:
        cases = dict(winners)
        with trying(cases):
            wanted = [x.detach() for x in operator()]
        new = [c for c in cases if c not in winners and c.device == device]
        for done, case in enumerate(new):
            if on_case is not None:
                on_case(done, len(new))
            tuned = _tune(case, operator, wanted, winners, timer or _gpu_times)
            winners[case] = tuned.chosen
            found.append(tuned)
    adopt(winners)
    write_launches(device, {case.name: config._asdict() for case, config in winners.items()})
    return found


def _tune(
    case: LaunchCase,
    operator: Operator,
    wanted: Sequence[Tensor],
    winners: Mapping[LaunchCase, LaunchConfig],
    timer: Timer,
) -> TunedLaunch:
    """The fastest launch for one case, with those of others as they are."""
    first, *others = case.candidates()
    good, notes = {first: _with(operator, case, first, winners)}, {}
    for config in others:
        run = _with(operator, case, config, winners)
        try:
            distance = max(map(_distance, run(), wanted))
        except Exception as error:  # compilers fail in many ways
            notes[config] = why_it_failed(error)
            continue
        if distance <= _ALLOWED_DISTANCE[case.dtype]:
            good[config] = run
        else:
            notes[config] = f"results differ by {distance:.2g}"
    # With nothing to choose from there is nothing to time.
    times = dict(timer(good, case.device)) if len(good) > 1 else {}
    chosen = min(times, key=times.__getitem__, default=first)
    if times and not times[chosen] < (1 - _CLEARLY) * times.get(first, float("inf")):
        chosen = first
    for config, note in notes.items():
        _LOGGER.info("tuning %s: %s is left out: %s", case.name, _words(config), note)
    return TunedLaunch(case=case.name, chosen=chosen, first=first, milliseconds=times, notes=notes)


def _with(
    operator: Operator,
    case: LaunchCase,
    config: LaunchConfig,
    winners: Mapping[LaunchCase, LaunchConfig],
) -> Operator:
    """The operator with one launch for one case."""

    def run() -> Sequence[Tensor]:
        with trying({**winners, case: config}):
            return operator()

    return run


def _distance(got: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance; infinite for what is no number."""
    norm = torch.linalg.vector_norm(wanted, dtype=torch.float32)
    apart = torch.linalg.vector_norm(got.detach() - wanted, dtype=torch.float32)
    found = float(apart / norm) if norm > 0 else float(apart)
    return found if found == found else float("inf")


def _gpu_times(
    runs: Mapping[LaunchConfig, Operator], device: torch.device
) -> dict[LaunchConfig, float]:
    by_name: dict[Name, LaunchConfig] = {(_words(config), None): config for config in runs}
    named = {name: runs[config] for name, config in by_name.items()}
    rows = time_runs(named, "", device, seconds=0.5)
    return {
        by_name[row.attention, row.sparsity]: row.milliseconds
        for row in rows
        if row.milliseconds is not None
    }


def _words(config: LaunchConfig) -> str:
    return " ".join(f"{name}={value}" for name, value in config._asdict().items())
