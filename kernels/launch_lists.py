"""How kernels may be launched: a short list for each kernel, format and GPU generation.

The first of a list is what runs unless tuning (`launch_tuning.py`) found another one to be faster
here. It is safe: it compiles within the shared memory of every GPU of its generation, and it is
the best known where that was measured, which is Hopper. `benchmarks/compile_check.py` compiles all
entries.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Generation = Literal["8.0", "8.6", "9.0", "10.0", "12.0"]
# Columns of a tile and size of its elements: float32, at most 64 columns, or more of them.
Width = Literal["float32", "narrow", "broad"]

_GENERATIONS: dict[tuple[int, int], Generation] = {
    (8, 0): "8.0",
    (8, 6): "8.6",
    (8, 7): "8.6",
    (8, 9): "8.6",
    (9, 0): "9.0",
    (10, 0): "10.0",
    (10, 3): "10.0",
    (12, 0): "12.0",
    (12, 1): "12.0",
    # A CPU, where Triton interprets.
    (0, 0): "8.0",
}


class LaunchConfig(NamedTuple):
    """How a kernel is compiled.

    Attributes:
        num_warps, num_stages: warps of a program, depth of its pipeline.
        max_registers: per thread, where more threads at once pay.
        tile_q, tile_k: most tokens in a tile of queries and of keys, of kernels that split blocks.
        bounded: whether query blocks with small logits go without a running maximum, of the kernel
            of both branches (`triton_bounded.py`).
    """

    num_warps: int
    num_stages: int
    max_registers: int | None = None
    tile_q: int = 128
    tile_k: int = 128
    bounded: bool = False

    def keywords(self) -> dict[str, int | None]:
        """As arguments of a launch."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


def _tiled(
    tile_q: int, tile_k: int, num_warps: int, num_stages: int, max_registers: int | None = None
) -> LaunchConfig:
    return LaunchConfig(num_warps, num_stages, max_registers, tile_q, tile_k)


_List = tuple[LaunchConfig, ...]
# By kernel, its format ("" for any) and width.
_Lists = dict[tuple[str, str, Width], _List]

# For 99 KiB of shared memory.
_SMALL: _Lists = {
    ("block_statistics", "", "float32"): (_tiled(32, 128, 4, 3), _tiled(32, 128, 8, 3)),
    ("block_statistics", "", "narrow"): (_tiled(32, 128, 4, 3), _tiled(64, 128, 4, 3)),
    ("block_statistics", "", "broad"): (
        _tiled(32, 128, 4, 3),
        _tiled(64, 128, 8, 3),
        _tiled(32, 128, 2, 3),
    ),
    ("prepare_keys", "", "float32"): (LaunchConfig(8, 1),),
    ("prepare_keys", "", "narrow"): (LaunchConfig(4, 3), LaunchConfig(4, 2), LaunchConfig(8, 2)),
    ("prepare_keys", "", "broad"): (LaunchConfig(8, 2), LaunchConfig(8, 1), LaunchConfig(4, 2)),
    ("prepare_keys", "long blocks", "broad"): (LaunchConfig(8, 1),),
    ("attend", "", "float32"): (LaunchConfig(8, 1),),
    ("attend", "", "narrow"): (LaunchConfig(4, 3), LaunchConfig(4, 2), LaunchConfig(8, 2)),
    ("attend", "", "broad"): (LaunchConfig(8, 2), LaunchConfig(4, 2), LaunchConfig(8, 1)),
    ("sparse_query_backward", "exact", "float32"): (_tiled(16, 32, 4, 1),),
    ("sparse_query_backward", "exact", "narrow"): (
        _tiled(64, 64, 4, 2),
        _tiled(128, 64, 8, 2),
        _tiled(64, 32, 4, 3),
    ),
    ("sparse_query_backward", "exact", "broad"): (_tiled(64, 64, 4, 2), _tiled(64, 32, 4, 2)),
    ("sparse_query_backward", "near", "float32"): (_tiled(16, 16, 4, 1),),
    ("sparse_query_backward", "near", "narrow"): (
        _tiled(64, 32, 4, 2),
        _tiled(128, 32, 8, 2),
        _tiled(64, 64, 4, 2),
    ),
    ("sparse_query_backward", "near", "broad"): (_tiled(64, 32, 4, 2), _tiled(64, 32, 8, 2)),
    ("linear_query_backward", "", "float32"): (_tiled(16, 16, 8, 1),),
    ("linear_query_backward", "", "narrow"): (_tiled(32, 64, 8, 1), _tiled(64, 64, 8, 1)),
    ("linear_query_backward", "", "broad"): (_tiled(32, 64, 8, 1), _tiled(16, 64, 4, 1)),
    ("key_backward", "", "float32"): (_tiled(16, 32, 4, 1),),
    ("key_backward", "", "narrow"): (_tiled(32, 64, 4, 2), _tiled(64, 64, 4, 2)),
    ("key_backward", "", "broad"): (_tiled(32, 64, 4, 2), _tiled(32, 64, 8, 2)),
}

# For 160 KiB and more.
_LARGE: _Lists = _SMALL | {
    ("attend", "", "broad"): (LaunchConfig(8, 2), LaunchConfig(8, 3), LaunchConfig(4, 3)),
    ("sparse_query_backward", "exact", "float32"): (_tiled(32, 32, 4, 1),),
    ("sparse_query_backward", "exact", "narrow"): (
        _tiled(128, 64, 8, 3, 128),
        _tiled(128, 64, 8, 2, 128),
        _tiled(64, 64, 4, 3),
    ),
    ("sparse_query_backward", "exact", "broad"): (
        _tiled(128, 64, 8, 3),
        _tiled(128, 64, 8, 2),
        _tiled(64, 64, 4, 3),
    ),
    ("sparse_query_backward", "near", "float32"): (_tiled(16, 32, 4, 1),),
    ("sparse_query_backward", "near", "narrow"): (
        _tiled(128, 32, 8, 3, 128),
        _tiled(128, 64, 8, 2),
        _tiled(64, 32, 4, 3),
    ),
    ("sparse_query_backward", "near", "broad"): (
        _tiled(128, 32, 8, 3),
        _tiled(128, 64, 8, 2),
        _tiled(64, 32, 4, 3),
    ),
    ("linear_query_backward", "", "narrow"): (_tiled(128, 64, 8, 1, 128), _tiled(32, 64, 4, 1)),
    ("linear_query_backward", "", "broad"): (_tiled(64, 64, 8, 1), _tiled(16, 64, 4, 1)),
    ("key_backward", "", "float32"): (_tiled(32, 32, 4, 1),),
    ("key_backward", "", "narrow"): (_tiled(32, 64, 4, 3, 168), _tiled(32, 64, 4, 2, 168)),
    ("key_backward", "", "broad"): (
        _tiled(32, 64, 4, 3),
        _tiled(64, 64, 8, 2),
        _tiled(32, 64, 4, 2),
    ),
}

_HOPPER: _Lists = _LARGE | {
    # Two programs share a multiprocessor.
    ("prepare_keys", "", "broad"): (
        LaunchConfig(8, 4, 128),
        LaunchConfig(8, 3, 128),
        LaunchConfig(4, 3),
    ),
    ("prepare_keys", "long blocks", "broad"): (LaunchConfig(8, 4), LaunchConfig(8, 2)),
    ("attend", "bf16", "broad"): (
        LaunchConfig(8, 3),
        LaunchConfig(8, 2, 128),
        LaunchConfig(4, 3),
    ),
    ("attend", "int8", "broad"): (
        LaunchConfig(4, 5),
        LaunchConfig(4, 4),
        LaunchConfig(8, 3, 128),
        # Not timed yet: taken only where tuning finds them faster.
        LaunchConfig(4, 5, bounded=True),
        LaunchConfig(4, 4, bounded=True),
        LaunchConfig(8, 3, 128, bounded=True),
    ),
    ("attend", "int8_fp8", "broad"): (
        LaunchConfig(8, 5, 128),
        LaunchConfig(8, 3, 128),
        LaunchConfig(8, 4),
    ),
    ("attend", "int8_int8", "broad"): (
        LaunchConfig(8, 3),
        LaunchConfig(4, 4),
        LaunchConfig(8, 4, 128),
    ),
    # More programs at a time hide more of what each waits for.
    ("linear_query_backward", "", "broad"): (
        _tiled(16, 64, 4, 1),
        _tiled(32, 64, 4, 1),
        _tiled(64, 64, 8, 1),
    ),
}

_LISTS: dict[Generation, _Lists] = {
    "8.0": _LARGE,
    "8.6": _SMALL,
    "9.0": _HOPPER,
    "10.0": _LARGE,
    "12.0": _SMALL,
}


def generation(capability: tuple[int, int]) -> Generation:
    """Whose lists a GPU takes; those of the least shared memory for one that is not known."""
    return _GENERATIONS.get(capability, "8.6")


def launch_list(
    kernel: str, variant: str, width: Width, of: Generation
) -> tuple[LaunchConfig, ...]:
    """The launches to choose from, the safe one first.

    Args:
        variant: the format of the kernel's operands, or what else changes its needs.
    """
    lists = _LISTS[of]
    return lists.get((kernel, variant, width)) or lists[kernel, "", width]
