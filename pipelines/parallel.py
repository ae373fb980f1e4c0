"""Context parallelism by Ulysses: pieces of the sequence outside of attention, heads inside.

Diffusers' `enable_parallelism` gives each of N ranks a piece of the tokens. SLA2 needs all tokens
of a head (their block means, their linear state), but no head needs another. So an all-to-all
trades pieces of all heads for whole sequences of H/N heads, SLA2 runs there as on one device, and
a second all-to-all trades back (DeepSpeed-Ulysses, arXiv 2309.14509). Nothing is approximated.

Gradients flow through both. What a rank has of them covers its own tokens and heads only, of
routers and of all other weights alike: `sum_gradients` adds them up.
Letters: B batch, H heads, L tokens, D head dimension, N ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn

# query, key, value -> output, all `[B, L, H, D]`.
Operator = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Ulysses:
    """How one rank takes part. Plain values, so that it can be copied, and compiled code sees them.

    Attributes:
        group: name of the process group.
        rank, size: of this process in the group, and N.
        uneven: pieces and head counts may differ by one (Diffusers' `ulysses_anything`).
    """

    group: Any
    rank: int
    size: int
    uneven: bool = False

    @classmethod
    def of(cls, config: Any) -> Ulysses | None:
        """From what Diffusers sets as `_parallel_config`; None where tokens are not sharded.

        Raises:
            ValueError: a kind of parallelism in which SLA attention would not be exact.
        """
        if config is None:
            return None
        if getattr(config, "tensor_parallel_config", None) is not None:
            raise ValueError(
                "SLA attention does not run with tensor parallelism, which spreads the heads of "
                "each projection over the devices: use ContextParallelConfig(ulysses_degree=N)"
            )
        context = config.context_parallel_config
        if context is None:
            return None
        if context.ring_degree > 1:
            raise ValueError(
                f"SLA attention does not run with ring attention (ring_degree={context.ring_degree}"
                "), where no device sees all tokens: use ContextParallelConfig(ulysses_degree=N)"
            )
        if context._ulysses_mesh is None:
            raise ValueError(
                "the parallel configuration has no process group yet: set it up by "
                "`transformer.enable_parallelism(config=…)`"
            )
        group = context._ulysses_mesh.get_group()
        return cls(
            group=group.group_name,
            rank=dist.get_rank(group),
            size=context.ulysses_degree,
            uneven=context.ulysses_anything,
        )

    def check_heads(self, heads: int) -> None:
        """Raise `ValueError` unless `heads` can be spread over the ranks."""
        if heads < self.size:
            raise ValueError(
                f"{heads} attention heads cannot be spread over {self.size} devices: use a "
                f"ulysses_degree of at most {heads}"
            )
        if heads % self.size and not self.uneven:
            raise ValueError(
                f"{heads} attention heads cannot be spread evenly over {self.size} devices: use "
                f"a ulysses_degree that divides {heads}, or ulysses_anything=True"
            )

    def head_counts(self, heads: int) -> list[int]:
        """Heads of each rank, in this order; the first ranks get what is left over."""
        share, left = divmod(heads, self.size)
        return [share + (rank < left) for rank in range(self.size)]

    def own_heads(self, heads: int) -> tuple[int, int]:
        """First head of this rank, and the one after its last."""
        counts = self.head_counts(heads)
        start = sum(counts[: self.rank])
        return start, start + counts[self.rank]

    def attend(self, operator: Operator, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`operator` on whole sequences, for a piece of them.

        Args:
            operator: called with all tokens of the heads `own_heads`.
            query, key, value: all heads of the tokens of this rank, `[B, L_rank, H, D]`.

        Returns:
            The output for the tokens of this rank, `[B, L_rank, H, D]`.
        """
        heads, length = query.shape[2], query.shape[1]
        # Known without asking, unless pieces may differ: asking waits for the device.
        lengths = self._gather_lengths(query) if self.uneven else [length] * self.size
        query, key, value = (self._to_sequences(x, lengths) for x in (query, key, value))
        return self._to_pieces(operator(query, key, value), lengths, heads)

    def _to_sequences(self, x: Tensor, lengths: list[int]) -> Tensor:
        """`[B, L_rank, H, D]` to `[B, L, H_rank, D]`."""
        batch, length, heads, dim = x.shape
        counts = self.head_counts(heads)
        if heads % self.size:
            parts = [part.permute(1, 0, 2, 3).flatten() for part in x.split(counts, 2)]
            packed = torch.cat(parts)
        else:
            # [N, L_rank, B, H/N, D]: tokens before batch, so that pieces received line up.
            packed = x.unflatten(2, (self.size, -1)).permute(2, 1, 0, 3, 4).flatten()
        row = batch * dim
        received = _exchange(
            packed,
            [row * count * length for count in counts],
            [row * counts[self.rank] * other for other in lengths],
            self.group,
        )
        # [L, B, H_rank, D]
        rows: Tensor = received.view(-1, batch, counts[self.rank], dim)
        return rows.transpose(0, 1)

    def _to_pieces(self, x: Tensor, lengths: list[int], heads: int) -> Tensor:
        """`[B, L, H_rank, D]` to `[B, L_rank, H, D]`."""
        batch, _, own, dim = x.shape
        length = lengths[self.rank]
        counts = self.head_counts(heads)
        row = batch * dim
        sizes = [row * count * length for count in counts]
        received = _exchange(
            x.transpose(0, 1).flatten(),
            [row * own * other for other in lengths],
            sizes,
            self.group,
        )
        if heads % self.size:
            parts = [
                part.view(length, batch, count, dim)
                for part, count in zip(received.split(sizes), counts, strict=True)
            ]
            return torch.cat(parts, 2).transpose(0, 1)
        # [N, L_rank, B, H/N, D]
        pieces = received.view(self.size, length, batch, own, dim)
        return pieces.permute(2, 1, 0, 3, 4).flatten(2, 3)

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def _gather_lengths(self, x: Tensor) -> list[int]:
        """Tokens of each rank, whose own are `[B, L_rank, H, D]`."""
        own = torch.full((self.size,), x.shape[1], device=x.device)
        ones = [1] * self.size
        lengths: list[int] = _all_to_all(own, ones, ones, self.group).tolist()
        return lengths


class _Exchange(torch.autograd.Function):
    """All-to-all of a flat tensor; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _all_to_all(flat, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override,unused-ignore]
        sent, received = ctx.sizes
        return _all_to_all(grad.contiguous(), received, sent, ctx.group), None, None, None


_exchange: Callable[[Tensor, list[int], list[int], Any], Tensor] = _Exchange.apply


def _all_to_all(flat: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    # The functional form: `torch.compile` takes it into its graph.
    result: Tensor = functional.all_to_all_single(flat, received, sent, group)
    if isinstance(result, functional.AsyncCollectiveTensor):
        result = result.wait()
    return result


def context_parallel_plan(transformer: nn.Module) -> dict[str, Any]:
    """Where the tokens of `transformer` are cut and gathered, as `enable_parallelism` takes it.

    Diffusers has such a plan in most classes, and none in VACE, where the control blocks read the
    same tokens as the others:
    `transformer.enable_parallelism(config=…, cp_plan=context_parallel_plan(transformer))`.

    Raises:
        ValueError: a class for which neither Diffusers nor we know a plan.
    """
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
    from diffusers.models._modeling_parallel import ContextParallelInput

    plan: dict[str, Any] | None = getattr(transformer, "_cp_plan", None)
    if plan is not None:
        return plan
    if isinstance(transformer, WanVACETransformer3DModel):
        tokens = ContextParallelInput(split_dim=1, expected_dims=3)
        first = {"hidden_states": tokens, "control_hidden_states": tokens}
        return {**WanTransformer3DModel._cp_plan, "vace_blocks.0": first}
    raise ValueError(
        f"no plan is known for context parallelism of a {type(transformer).__name__}: run it on "
        "one device"
    )


def sum_gradients(parameters: Iterable[nn.Parameter], transformer: nn.Module) -> None:
    """Add up the gradients of all ranks, after `backward` and before the optimizer's step.

    For a loss that every rank computes on the whole output of `transformer`, as its context
    parallelism gathers it. Each rank's gradients cover its own tokens, and in routers its own
    heads, so the sum (not the mean, which data parallelism takes) is the gradient of one process.
    All ranks have to call this with the same parameters in the same order.

    Raises:
        ValueError: `transformer` does not run in context parallelism, or only by ring attention.
    """
    ulysses = Ulysses.of(getattr(transformer, "_parallel_config", None))
    if ulysses is None:
        raise ValueError(
            f"this {type(transformer).__name__} does not run in context parallelism: its "
            "gradients are whole"
        )
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            # Another rank may have one, and waits for us.
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(functional.all_reduce(parameter.grad, "sum", ulysses.group))
