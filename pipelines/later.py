"""Numbers of the device that the host reads one forward later."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A copy to the host that nothing waits for until `read`.

    Whoever reads it a forward later finds it done: the host is seldom a whole forward ahead of the
    device, and if it is, it waits while the device still has that forward's work.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = numbers.detach().to("cpu", copy=True)

    def read(self) -> Tensor:
        """The numbers, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
