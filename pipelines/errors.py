"""The error that means "this input cannot be used", and how to phrase it in one line."""

from __future__ import annotations

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


class InputError(ValueError):
    """Input that cannot be used. The message says what is wrong, what was given and what to do.

    It is one line. The command line prints it as it is and exits with code 2.
    """


class ReportedElsewhere(InputError):
    """Another process of this run has said what is wrong. The command line only exits with 2."""


def one_line(error: BaseException | str, *, limit: int = 400) -> str:
    """Collapse an error's text into one line of at most `limit` characters."""
    text = " ".join(str(error).split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that host or device memory ran out; PyTorch has no one type for it."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _OUT_OF_MEMORY)
