"""Make Triton's interpreter compute what a GPU computes, where it does not.

Found in Triton 3.6 and 3.9: `tl.dot` of bfloat16 multiplies the bit patterns as integers, and casts
from float32 to bfloat16 and FP8 drop the low bits instead of rounding to nearest. Casts by torch,
which rounds as the hardware does, replace its own.

Its other habits only cost time, most of that of small kernels. It readies the language anew in
every call of a helper, where once in a launch does for all that share their globals. It works out
whether integers overflow, but asserts nothing of it, since it is not in debug mode. For each value
it makes anew the table of what numpy calls its dtype.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import torch


def interpret_without_gpu() -> None:
    """Interpret Triton kernels if there is no GPU. Call before anything imports Triton."""
    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return

    _save_time(interpreter)
    theirs = interpreter._convert_float
    # Triton's dtype -> torch's, and the integer that numpy holds its bits in.
    rounded = {
        tl.bfloat16: (torch.bfloat16, torch.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    }
    wide = {tl.float32: torch.float32, tl.float16: torch.float16}

    def convert_float(data, input_dtype, output_dtype, rounding_mode):
        if input_dtype not in wide or output_dtype not in rounded:
            return theirs(data, input_dtype, output_dtype, rounding_mode)
        dtype, bits = rounded[output_dtype]
        values = torch.from_numpy(data.copy()).view(wide[input_dtype])
        return values.to(dtype).view(bits).numpy()

    def create_dot(self, a, b, acc, *more):
        a, b = (
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return their_dot(self, a, b, acc, *more)

    their_dot = interpreter.InterpreterBuilder.create_dot
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def _save_time(interpreter) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)

    their_dtype = interpreter._get_np_dtype
    dtypes: dict[str, np.dtype] = {}

    def get_np_dtype(tt_dtype):
        name = tt_dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = their_dtype(tt_dtype)
        return dtypes[name]

    interpreter._get_np_dtype = get_np_dtype

    their_launch, their_patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    ready: set[int] = set()

    def launch(self, *args, **kwargs):
        ready.clear()
        try:
            return their_launch(self, *args, **kwargs)
        finally:
            ready.clear()

    def patch_lang(fn):
        # The first call is the launch's own, which undoes at its end what it gets here; of the
        # others nobody uses the result.
        if id(fn.__globals__) in ready:
            return None
        ready.add(id(fn.__globals__))
        return their_patch(fn)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch, patch_lang
