"""The processes of one launch that share a command, and what little they tell each other.

`torchrun` and `accelerate launch` start N processes with the same command line and say in the
environment which is which. They meet at a key-value store, which needs no device and no backend,
and pass JSON. The work itself needs no communication, so nobody waits for another before the end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError, ReportedElsewhere, one_line

if TYPE_CHECKING:
    import torch

_JOIN_TIMEOUT = timedelta(minutes=10)
# How long a failing process 0 stays, so that the others hear of it.
_GOODBYE_SECONDS = 20.0
_POLL_SECONDS = 0.1


class Team:
    """This process among those of its launch; alone unless a launcher has started several.

    A context manager: leaving it tells the others how it went.

    Attributes:
        rank, size: number of this process, and how many there are.
        local_rank: its number on this machine, which is that of its GPU.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, *, local_rank: int = 0, store: Any = None
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store
        self._has_begun = self._has_ended = False

    @classmethod
    def join(cls) -> Team:
        """Meet the other processes, if the environment tells of any.

        Raises:
            InputError: it tells too little, or the others do not come.
        """
        size = os.environ.get("WORLD_SIZE", "1")
        if size == "1":
            return cls()
        from torch.distributed.rendezvous import rendezvous

        try:
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            store, rank, count = next(rendezvous("env://", timeout=_JOIN_TIMEOUT))
        except Exception as error:  # the rendezvous raises a dozen types
            raise InputError(
                f"the environment says WORLD_SIZE={size}, but the processes cannot meet: "
                f"{one_line(error)}; start them by torchrun or accelerate launch, or unset it"
            ) from error
        return cls(rank, count, local_rank=local_rank, store=store)

    def begin(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in process 0, as JSON can hold it, in every process.

        Raises:
            ReportedElsewhere: process 0 failed before it got there.
        """
        if self._store is None:
            return make()
        if self.rank == 0:
            value = make()
            self._begin({"value": value})
            return value
        self._has_begun = True
        self._wait(lambda: self._store.check(["begin"]))
        told = json.loads(self._store.get("begin"))
        self._store.add("heard", 1)
        if "error" in told:
            raise ReportedElsewhere(told["error"])
        return told["value"]

    def end(self, result: Any) -> tuple[list[Any], list[str]]:
        """Tell `result`, and in process 0 wait for all others.

        Returns:
            In process 0, the results of all that ended well and the errors of all others.
        """
        self._end({"result": result})
        if self.rank:
            return [], []
        ends = [{"result": result}]
        for key in [f"end/{rank}" for rank in range(1, self.size)]:
            self._wait(partial(self._store.check, [key]))
            ends.append(json.loads(self._store.get(key)))
        return (
            [end["result"] for end in ends if "result" in end],
            [end["error"] for end in ends if "error" in end],
        )

    def own_device(self, device: torch.device) -> torch.device:
        """`device`, where "cuda" among several processes is the GPU with their number.

        Raises:
            InputError: there are fewer GPUs than processes.
        """
        if self.size == 1 or device.type != "cuda" or device.index is not None:
            return device
        import torch

        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise InputError(
                f"there are {count} GPUs for more processes: start at most {count} on a machine"
            )
        return torch.device("cuda", self.local_rank)

    def name(self) -> str:
        """ "process 1 of 4", for messages; empty for a process that is alone."""
        return "" if self.size == 1 else f"process {self.rank + 1} of {self.size}"

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._store is None or error is None:
            return
        begun, reason = self._has_begun, {"error": f"{self.name()}: {one_line(error)}"}
        if self.rank == 0 and not begun:
            self._begin(reason)
            self._wait(lambda: self._store.add("heard", 0) == self.size - 1, _GOODBYE_SECONDS)
        elif self.rank and not begun and isinstance(error, InputError):
            # What is wrong for all of them is said by process 0.
            self.begin(lambda: None)
        if not self._has_ended:
            self._end(reason)
        if begun and type(error) is InputError:
            raise InputError(reason["error"]) from error

    def _begin(self, told: Any) -> None:
        self._has_begun = True
        self._store.set("begin", json.dumps(told))

    def _end(self, told: Any) -> None:
        self._has_ended = True
        if self._store is None:
            return
        try:
            self._store.set(f"end/{self.rank}", json.dumps(told))
        except RuntimeError as error:
            # Process 0 held the store, and is gone: it has said why.
            raise ReportedElsewhere(one_line(error)) from error

    def _wait(self, ready: Callable[[], bool], seconds: float = float("inf")) -> None:
        until = time.monotonic() + seconds
        try:
            while not ready() and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)
        except RuntimeError as error:
            raise ReportedElsewhere(one_line(error)) from error
