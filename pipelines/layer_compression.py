"""Token compression in one layer: what it keeps from a full step for the short ones after it.

A full step runs the layer's own attention (SLA2, or Diffusers' at whatever backend) on all tokens,
ranks the tokens of each head, and puts aside what the short steps need:

    kept and dropped tokens                       8 B H L bytes, twice with fill "neighbor"
    residual, mode "kv"                           B L H D numbers
    residual, mode "qkv"                          B K H D numbers
    dropped outputs, fill "prev" in mode "qkv"    B (L - K) H D numbers

for each branch of guidance, until the last step has used them. The layer's own count of kept
tokens is that of the first branch, which Diffusers calls with the prompt. Letters: B batch, H
heads, L tokens, K kept tokens, D head dimension.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sla_video.config_compression import TokenCompression
from sla_video.kernels.context import needs_gradients
from sla_video.kernels.token_compression import (
    Inner,
    TokenSelection,
    compressed_attention,
    fewer_keys,
    gather_tokens,
    nearest_kept,
    select_tokens,
    short_attention,
)
from sla_video.kernels.token_order import Grid
from sla_video.kernels.token_scores import (
    always_kept_on,
    coverage_count,
    rank_tokens,
    share_count,
    token_scores,
)
from sla_video.pipelines.later import Later

if TYPE_CHECKING:
    from sla_video.pipelines.processor import SLAAttnProcessor

# "count": a full step that only counts tokens; "refresh": a full step before short ones.
Role = Literal["count", "refresh", "short"]
NOT_PARALLEL = (
    "`compression` does not run in context parallelism: run it on one device, or without "
    "compression"
)


@dataclass
class ForwardPlace:
    """Where the running forward of a transformer is; shared by its layers.

    Attributes:
        window: how many refreshes there have been in this generation.
        branch: of guidance, in the order of calls within a step.
        last: whether no other step follows.
        grid: (T, H, W) tokens.
        order: `[L]` raster place of each token; None for raster order.
    """

    window: int = 0
    branch: int = 0
    last: bool = False
    grid: Grid = (1, 1, 1)
    order: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Aside:
    """What a full step has put aside for one branch."""

    window: int
    like: tuple[torch.Size, torch.dtype, torch.device]
    selection: TokenSelection
    nearest: Tensor | None
    dropped_output: Tensor | None
    residual: Tensor | None

    @property
    def bytes(self) -> int:
        tensors = (*self.selection, self.nearest, self.dropped_output, self.residual)
        return sum(x.nbytes for x in tensors if x is not None)


class LayerCompression:
    """Compressed attention of one layer.

    Args:
        settings: of the transformer.
        place: where its forward is.
        processor: of the layer.

    Attributes:
        engaged: whether the running forward needs `attend`; without, the layer is as without us.
    """

    def __init__(
        self, settings: TokenCompression, place: ForwardPlace, processor: SLAAttnProcessor
    ) -> None:
        self._settings = settings
        self._place = place
        self._processor = processor
        self.role = None
        self.forget()
        self._register()

    def _register(self) -> None:
        # For compiled code, which finds us by it; a tensor, for a number would be compiled in.
        self._number = torch.tensor(next(_numbers))
        _layers[int(self._number)] = self

    @property
    def role(self) -> Role | None:
        """What the layer does in the running forward; None is nothing."""
        return self._role

    @role.setter
    def role(self, role: Role | None) -> None:
        self._role = role
        # All that compiled code looks at: it has one graph with us and one without.
        self.engaged = role is not None

    def forget(self) -> None:
        """Drop everything that was put aside."""
        self._aside: dict[int, _Aside] = {}
        self._count: int | None = None
        self._counting: Later | None = None

    def release(self) -> None:
        """Drop what was put aside for this branch: no short step will follow."""
        self._aside.pop(self._place.branch, None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model starts anew: events of a device cannot be copied.
        return {"_settings": self._settings, "_place": self._place, "_processor": self._processor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.role = None
        self.forget()
        self._register()

    @property
    def bytes(self) -> int:
        """Memory that is put aside just now."""
        return sum(aside.bytes for aside in self._aside.values())

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention `[B, L, H, D]` of the same, in the role of this forward."""
        if torch.compiler.is_compiling() and not needs_gradients(query, key, value):
            # To the compiler one step that it does not look into: it could not follow our state.
            output: Tensor = _attend(query, key, value, self._number)
            return output
        whole: Tensor = self.run(query, key, value)
        return whole

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def run(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`attend` outside of compiled code."""
        processor = self._processor
        like = (query.shape, query.dtype, query.device)
        if self.role == "short":
            aside = self._aside.get(self._place.branch)
            if aside is not None and (aside.window, aside.like) == (self._place.window, like):
                return self._short(aside, query, key, value)
        output = _own_attention(processor, query, key, value)
        processor.recorder.add("pairs", 1.0)
        if self.role in ("count", "refresh"):
            self._prepare(query, key, value, output)
        return output

    def _short(self, aside: _Aside, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._place.last:
            del self._aside[self._place.branch]
        share = aside.selection.kept.shape[-1] / query.shape[1]
        self._processor.recorder.add("pairs", share if self._settings.mode == "kv" else share**2)
        return compressed_attention(
            query,
            key,
            value,
            aside.selection,
            self._inner(),
            mode=self._settings.mode,
            fill=self._settings.fill,
            dropped_output=aside.dropped_output,
            nearest=aside.nearest,
            residual=aside.residual,
        )

    @torch.no_grad()
    def _prepare(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Count, and before short steps choose tokens and put aside what those need."""
        settings, place = self._settings, self._place
        first = place.branch == 0
        # Memory of the last window serves this one.
        self._aside.pop(place.branch, None)
        always = always_kept_on(place.grid, str(query.device))
        if place.order is not None:
            always = always[place.order]
        if first and settings.share is not None:
            frame, lattice = place.grid[1] * place.grid[2], [-(-n // 2) for n in place.grid]
            # Of the first frame and of the lattice beyond it.
            number = frame + (lattice[0] - 1) * lattice[1] * lattice[2]
            self._count = share_count(query.shape[1], number, settings.share)
        elif first:
            # From the last full step: what is counted in this one is not known on the host yet.
            self._count = None if self._counting is None else int(self._counting.read())
        counts = first and settings.share is None
        keeps = self.role == "refresh" and self._count is not None
        if not (counts or keeps):
            return
        scores = token_scores(query, key, place.grid, order=place.order, probes=settings.probes)
        ranking = rank_tokens(scores, always)
        if counts:
            self._counting = Later(coverage_count(scores, ranking, always, settings.tau))
        if keeps:
            assert self._count is not None
            selection = select_tokens(ranking, self._count)
            self._put_aside(selection, query, key, value, output)

    def _put_aside(
        self,
        selection: TokenSelection,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
    ) -> None:
        settings, place = self._settings, self._place
        some = settings.mode == "qkv" and selection.dropped.shape[-1] > 0
        residual = None
        if settings.residual and selection.dropped.shape[-1] > 0:
            inner = self._inner(recording=False)
            short = short_attention(query, key, value, selection, inner, mode=settings.mode)
            residual = (gather_tokens(output, selection.kept) if some else output) - short
        self._aside[place.branch] = _Aside(
            window=place.window,
            like=(query.shape, query.dtype, query.device),
            selection=selection,
            nearest=(
                nearest_kept(selection, place.grid, order=place.order)
                if some and settings.fill == "neighbor"
                else None
            ),
            dropped_output=(
                gather_tokens(output, selection.dropped)
                if some and settings.fill == "prev"
                else None
            ),
            residual=residual,
        )

    def _inner(self, *, recording: bool = True) -> Inner:
        """The layer's own attention among fewer keys; what it leaves out is recorded."""
        processor = self._processor

        def sla2(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # Places of keys in the whole sequence say nothing of those that are left.
            return processor.sla2(query, key, value, key_order=None)

        def inner(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if processor.sparsity is None:
                if recording:
                    processor.recorder.add("sparsity", 0.0)
                return dense_attention(processor, query, key, value)
            if recording:
                processor._observe(query, key, None)
            return fewer_keys(sla2, query, key, value, processor.operator_options["block_q"])

        return inner


_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, LayerCompression] = weakref.WeakValueDictionary()


@torch.library.custom_op("sla_video::compressed_attention", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, number: Tensor) -> Tensor:
    """What is put aside is of memory of its own, so compiled code may write into the output."""
    output: Tensor = _layers[int(number)].run(query, key, value)
    # As it was announced, also under autocast.
    return output.to(value.dtype).contiguous()


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, number: Tensor) -> Tensor:
    return value.new_empty(value.shape)


def _own_attention(
    processor: SLAAttnProcessor, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """What the layer does without compression, on projected tensors."""
    if processor.sparsity is not None:
        return processor._operator(query, key, value)
    processor.recorder.add("sparsity", 0.0)
    return dense_attention(processor, query, key, value)


def dense_attention(
    processor: SLAAttnProcessor, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Diffusers' attention as the stock processor would call it, at the backend that is set."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    output: Tensor = dispatch_attention_fn(query, key, value, backend=processor._attention_backend)
    return output
