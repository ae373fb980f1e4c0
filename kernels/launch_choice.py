"""Which launch of its list a kernel takes: the first, or the one that tuning found here.

Chosen once for each case and looked up after that: no file is read, and nothing waits for the
device, in the way of a call. Why not `triton.autotune`: it tunes during the first call, and again
whenever an argument in its key changes; its results are not compared with one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from sla_video.kernels.launch_cache import read_launches
from sla_video.kernels.launch_lists import LaunchConfig, Width, generation, launch_list
from sla_video.kernels.triton_tiles import capability, padded_dim


class LaunchCase(NamedTuple):
    """What a launch is chosen for; L, B and H are not part of it, as they are none of a kernel.

    Attributes:
        kernel, variant: of `launch_list`.
        columns: head dimension, padded.
    """

    kernel: str
    variant: str
    device: torch.device
    dtype: torch.dtype
    columns: int
    block_q: int
    block_k: int

    @property
    def name(self) -> str:
        """How files call it."""
        dtype = str(self.dtype).removeprefix("torch.")
        words = (self.kernel, self.variant, dtype, f"{self.columns}")
        blocks = f"{self.block_q}x{self.block_k}"
        return " ".join(word for word in (*words, blocks) if word)

    def candidates(self) -> tuple[LaunchConfig, ...]:
        """What there is to choose from, the safe one first."""
        width: Width = "narrow" if self.columns <= 64 else "broad"
        if self.dtype.itemsize > 2:
            width = "float32"
        of = generation(capability(self.device))
        found = launch_list(self.kernel, self.variant, width, of)
        # What has no bound in float16 is no choice there.
        return tuple(x for x in found if not x.bounded or self.dtype != torch.float16)


_chosen: dict[LaunchCase, LaunchConfig] = {}
# While launches are tried, in place of `_chosen`.
_tried: dict[LaunchCase, LaunchConfig] | None = None


def launch_config(
    kernel: str, x: Tensor, *, block_q: int = 0, block_k: int = 0, variant: str = ""
) -> LaunchConfig:
    """How to launch a kernel on tensors like x `[B, L, H, D]`."""
    columns = padded_dim(x.shape[-1])
    return _choose(LaunchCase(kernel, variant, x.device, x.dtype, columns, block_q, block_k))


def _attend_is_bounded(
    device: torch.device, dtype: torch.dtype, columns: int, block_q: int, block_k: int
) -> bool:
    """Whether the kernel of both branches has a launch for bounded logits here, with INT8 keys.

    Needed before anything is launched, where compilers look on: they take it for a constant.
    """
    return _choose(LaunchCase("attend", "int8", device, dtype, columns, block_q, block_k)).bounded


attend_is_bounded: Callable[[torch.device, torch.dtype, int, int, int], bool] = (
    torch.compiler.assume_constant_result(_attend_is_bounded)
)


def _choose(case: LaunchCase) -> LaunchConfig:
    choices = _chosen if _tried is None else _tried
    found = choices.get(case)
    if found is None:
        found = case.candidates()[0] if _tried is not None else _from_cache(case)
        choices[case] = found
    return found


def _from_cache(case: LaunchCase) -> LaunchConfig:
    """What the cache knows, if it is on the list; else the first."""
    candidates = case.candidates()
    known = read_launches(case.device).get(case.name)
    return next((config for config in candidates if config._asdict() == known), candidates[0])


@contextmanager
def trying(choices: dict[LaunchCase, LaunchConfig]) -> Iterator[None]:
    """Launch as `choices` say, and by the first of each list in other cases.

    Those are added to `choices`, which so tells what cases there were. Not for several threads.
    """
    global _tried
    before, _tried = _tried, choices
    try:
        yield
    finally:
        _tried = before


def adopt(choices: Mapping[LaunchCase, LaunchConfig]) -> None:
    """Launch as `choices` say from now on, in this process."""
    _chosen.update(choices)
