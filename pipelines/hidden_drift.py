"""How much each layer changes the hidden state, by which layers to compress are chosen.

Relative drift of a block: |out - in| / |in|, L2 norms over one token in eight of the batch. A block
that changes little can be wrong by little (Token Sparse Attention, arXiv 2602.03216).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sla_video.pipelines.later import Later

_EVERY = 8


class DriftMeter:
    """Forward hooks on the blocks of a transformer. Nothing waits for the device until `read`.

    Args:
        names: of the self-attentions, in the order of the layers.

    Attributes:
        running: whether to measure.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.running = False
        self._names = list(names)
        self._drifts: dict[str, Tensor] = {}
        self._later: Later | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "running": False, "_drifts": {}, "_later": None}

    def install(self, transformer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Put the hooks in place."""
        return [
            transformer.get_submodule(name.rpartition(".")[0]).register_forward_hook(
                _BlockHook(self, name), with_kwargs=True
            )
            for name in self._names
        ]

    def begin(self) -> None:
        """Measure anew, in the forward that begins."""
        self.running = True
        self._drifts, self._later = {}, None

    def end(self) -> None:
        """The measured forward is over: send the numbers to the host."""
        if not self.running:
            return
        self.running = False
        if set(self._drifts) == set(self._names):
            self._later = Later(torch.stack([self._drifts[name] for name in self._names]))

    def note(self, name: str, before: Tensor, after: Tensor) -> None:
        """One block's hidden state `[B, L, C]` before and after."""
        some, changed = before[:, ::_EVERY], after[:, ::_EVERY]
        norm = torch.linalg.vector_norm
        change = norm(changed - some, dtype=torch.float32)
        self._drifts[name] = (change / norm(some, dtype=torch.float32)).detach()

    def read(self) -> dict[str, float] | None:
        """Layer -> drift; None if not all layers have been seen."""
        if self._later is None:
            return None
        return dict(zip(self._names, self._later.read().tolist(), strict=True))


class _BlockHook:
    """Tells the meter of one block. An object, so that a copied model copies the meter too."""

    def __init__(self, meter: DriftMeter, name: str) -> None:
        self._meter = meter
        self._name = name

    def __call__(self, _block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # Compiled code has no state: who compiles names the layers.
        if torch.compiler.is_compiling() or not self._meter.running:
            return
        # The control blocks of VACE pass on two states, of which the last goes through attention.
        before = kwargs.get("control_hidden_states", kwargs.get("hidden_states"))
        if before is None:
            before = args[2] if isinstance(output, tuple) and len(args) > 2 else args[0]
        after = output[-1] if isinstance(output, tuple) else output
        self._meter.note(self._name, before, after)


def quiet_layers(drifts: Mapping[str, float], quantile: float) -> list[str]:
    """The share `quantile` of the layers, at least one, with the lowest drift."""
    ranked = sorted(drifts, key=lambda name: drifts[name])
    return ranked[: max(1, int(quantile * len(ranked)))]
