"""A space-filling curve through a box of any sizes, of which neighbours are neighbours.

The generalised Hilbert curve ("gilbert") of Jakub Červený, github.com/jakubcerveny/gilbert (BSD
2-clause): a box is split into smaller ones, which its curve passes through one after another. In a
cube of a power of two it is a Hilbert curve. Where all sizes are even each step is one along one
axis; odd sizes make a few steps diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator

Vector = tuple[int, int, int]


def hilbert_points(sizes: Vector) -> Iterator[Vector]:
    """Every point of the box `[0, sizes)` once, from the origin along its longest axis."""
    axes = sorted(range(3), key=lambda axis: -sizes[axis])
    # Sides of the box as vectors, the longest first.
    sides = [tuple(sizes[axis] * (i == axis) for i in range(3)) for axis in axes]
    return _fill((0, 0, 0), *sides)  # type: ignore[arg-type]


def _fill(start: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """The box of sides `a`, `b`, `c` from corner `start`: in along `a`, out at its far end."""
    length, width, depth = (abs(sum(side)) for side in (a, b, c))
    step_a, step_b, step_c = _unit(a), _unit(b), _unit(c)
    for side, step, others in (
        (length, step_a, (width, depth)),
        (width, step_b, (length, depth)),
        (depth, step_c, (length, width)),
    ):
        if others == (1, 1):
            for _ in range(side):
                yield start
                start = _add(start, step)
            return

    half_a, half_b, half_c = _half(a), _half(b), _half(c)
    rest_a, rest_b, rest_c = _sub(a, half_a), _sub(b, half_b), _sub(c, half_c)
    # Where the last part of a box with `a` turned back begins.
    end_a = _add(start, _sub(a, step_a))
    if 2 * length > 3 * width and 2 * length > 3 * depth:
        yield from _fill(start, half_a, b, c)
        yield from _fill(_add(start, half_a), rest_a, b, c)
    elif 3 * width > 4 * depth:
        yield from _fill(start, half_b, c, half_a)
        yield from _fill(_add(start, half_b), a, rest_b, c)
        corner = _add(end_a, _sub(half_b, step_b))
        yield from _fill(corner, _neg(half_b), c, _neg(rest_a))
    elif 3 * depth > 4 * width:
        yield from _fill(start, half_c, half_a, b)
        yield from _fill(_add(start, half_c), a, b, rest_c)
        corner = _add(end_a, _sub(half_c, step_c))
        yield from _fill(corner, _neg(half_c), _neg(rest_a), b)
    else:
        far_c = _sub(c, step_c)
        yield from _fill(start, half_b, half_c, half_a)
        yield from _fill(_add(start, half_b), c, half_a, rest_b)
        corner = _add(_add(start, _sub(half_b, step_b)), far_c)
        yield from _fill(corner, a, _neg(half_b), _neg(rest_c))
        corner = _add(_add(end_a, half_b), far_c)
        yield from _fill(corner, _neg(c), _neg(rest_a), rest_b)
        corner = _add(end_a, _sub(half_b, step_b))
        yield from _fill(corner, _neg(half_b), half_c, _neg(rest_a))


def _half(side: Vector) -> Vector:
    """Half a side; of a longer one an even number of steps, without which curves do not meet."""
    half = (side[0] // 2, side[1] // 2, side[2] // 2)
    length = abs(sum(half))
    return _add(half, _unit(side)) if length % 2 and abs(sum(side)) > 2 else half


def _unit(side: Vector) -> Vector:
    x, y, z = side
    return ((x > 0) - (x < 0), (y > 0) - (y < 0), (z > 0) - (z < 0))


def _add(a: Vector, b: Vector) -> Vector:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])


def _sub(a: Vector, b: Vector) -> Vector:
    return (a[0] - b[0], a[1] - b[1], a[2] - b[2])


def _neg(a: Vector) -> Vector:
    return (-a[0], -a[1], -a[2])
