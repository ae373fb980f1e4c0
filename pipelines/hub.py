"""Fetch small files from the Hugging Face hub, and fail at once where it cannot be reached."""

from __future__ import annotations

import re
from pathlib import Path

from sla_video.pipelines.errors import InputError, one_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TIMEOUT = 10.0  # seconds


def is_hub_id(name: str) -> bool:
    """Whether `name` looks like "owner/name"."""
    return _HUB_ID.fullmatch(name) is not None


def hub_file(repository: str, filename: str) -> Path:
    """The local copy of one file of a repository: from the cache, else downloaded.

    Raises:
        InputError: no such repository or file, no permission, or no connection.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    cached = try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return Path(cached)
    try:
        # Without a network `hf_hub_download` tries again for half a minute; this asks once.
        HfApi().model_info(repository, timeout=_TIMEOUT)
        return Path(hf_hub_download(repository, filename))
    except GatedRepoError as error:
        raise InputError(
            f"{repository!r} is gated: accept its licence on the hub, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{repository!r} is neither a folder here nor a (public) repository of the hub"
        ) from error
    except EntryNotFoundError as error:
        raise InputError(f"{repository!r} on the hub has no {filename}") from error
    except Exception as error:  # each HTTP library of each hub version raises its own types
        raise InputError(
            f"{repository!r} is not a folder here, and the hub cannot be reached "
            f"({one_line(error, limit=120)})"
        ) from error
