"""Sparse branch of the `torch` implementation: exact softmax over gathered key blocks.

    O_s = softmax(Q Ksel^T / sqrt(D)) Vsel

Letters: h heads of a group, m query blocks of a chunk, N key blocks, K blocks kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.options import SparseDtype
from sla_video.kernels.quantize import quantize_int8, quantize_value, quantize_weights


class SparseBranch:
    """Attention of query blocks to selected key blocks, for one group of heads.

    Args:
        keys, values: blocks `[h, N, block_k, D]`, zero beyond the last token.
        key_mean: `[h, D]` mean key, in the dtype to compute in.
        length: L, number of real tokens.
        sparse_dtype: arithmetic to simulate, see `sla2_attention`.
        need_lse: return log-sum-exps too.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        key_mean: Tensor,
        *,
        length: int,
        sparse_dtype: SparseDtype,
        need_lse: bool,
    ) -> None:
        self.keys = keys
        self.values = values
        self.key_mean = key_mean
        self.length = length
        self.sparse_dtype = sparse_dtype
        self.need_lse = need_lse
        heads, total = keys.shape[:2]
        # Row of the first block of each head, once heads and blocks are one dimension.
        self.first_block = torch.arange(0, heads * total, total, device=keys.device)[:, None, None]
        if sparse_dtype == "bf16":
            return
        with torch.no_grad():
            smooth = (keys.to(key_mean.dtype) - key_mean[:, None, None]).flatten(1, 2)
            smooth[:, length:] = 0  # the mean of absent tokens must not set a block's scale
            self.low_keys = quantize_int8(smooth.view(keys.shape), (-2, -1))
            tokens = values.to(key_mean.dtype).flatten(1, 2)
            self.low_values = quantize_value(tokens, sparse_dtype).view(keys.shape)

    def __call__(
        self, rows: Tensor, indices: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from rows `[h, m, block_q, D]` to the blocks in indices `[h, m, K]`.

        Entries of `indices` that are False in `valid` are skipped.

        Returns:
            output `[h, m, block_q, D]` and LSE `[h, m, block_q]` (None unless needed).
        """
        mask = self._token_mask(indices, valid)
        flat = (indices + self.first_block).flatten()
        if rows.is_cuda and not self.need_lse and self.sparse_dtype == "bf16":
            shape = (*indices.shape[:2], -1, rows.shape[-1])
            keys, values = _gather(self.keys, flat, shape), _gather(self.values, flat, shape)
            out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
            return out.to(self.key_mean.dtype), None

        # Batched matmuls on flattened tensors: on CPUs the calls are short enough for matmul's
        # own handling of batch dimensions to show.
        query = rows.to(self.key_mean.dtype).flatten(0, 1)
        mask = None if mask is None else mask.flatten(0, 1)
        if self.sparse_dtype == "bf16":
            out, lse = self._attend(query, flat, mask)
        else:
            with torch.no_grad():
                # [h * m, D, 1]
                mean = self.key_mean.repeat_interleave(rows.shape[1], 0).unsqueeze(-1)
                out, lse = self._attend_low_bit(query, flat, mask, mean)
            if torch.is_grad_enabled():
                # The value of the low-bit path with the gradient of the unquantized one.
                exact, exact_lse = self._attend(query, flat, mask)
                out = exact + (out - exact).detach()
                if exact_lse is not None and lse is not None:
                    lse = exact_lse + (lse - exact_lse).detach()
        return out.view(rows.shape), None if lse is None else lse.view(rows.shape[:3])

    def _attend(
        self, query: Tensor, flat: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Output `[h * m, block_q, D]`, LSE `[h * m, block_q]` of `query`."""
        shape = (query.shape[0], -1, query.shape[-1])
        keys = _gather(self.keys, flat, shape).to(query.dtype)
        scores = torch.bmm(query * query.shape[-1] ** -0.5, keys.mT)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = torch.softmax(scores, -1)
        values = _gather(self.values, flat, shape).to(query.dtype)
        out = torch.bmm(weights, values)
        if not self.need_lse:
            return out, None
        # At the largest score, log softmax = score - lse.
        return out, scores.amax(-1) - weights.amax(-1).log()

    def _attend_low_bit(
        self, query: Tensor, flat: Tensor, mask: Tensor | None, key_mean: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `_attend`, with the matmuls on quantized operands."""
        shape = (query.shape[0], -1, query.shape[-1])
        scale = query.shape[-1] ** -0.5
        low_query = quantize_int8(query, (-2, -1))
        scores = torch.bmm(low_query, _gather(self.low_keys, flat, shape).mT) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        largest = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - largest)
        total = weights.sum(-1, keepdim=True)
        low_weights = quantize_weights(weights, self.sparse_dtype)
        out = torch.bmm(low_weights, _gather(self.low_values, flat, shape)) / total
        if not self.need_lse:
            return out, None
        # The scores were of smoothed keys: q . mean(k) is missing from each of them.
        shift = torch.bmm(query, key_mean) * scale
        return out, (largest + total.log() + shift).squeeze(-1)

    def _token_mask(self, indices: Tensor, valid: Tensor | None) -> Tensor | None:
        """True on the tokens to attend to, `[h, m, 1, K * block_k]`; None when all are."""
        block = self.keys.shape[-2]
        if valid is None and self.length == self.keys.shape[1] * block:
            return None
        token = torch.arange(block, device=indices.device)
        mask = indices.unsqueeze(-1) * block + token < self.length
        if valid is not None:
            mask = mask & valid.unsqueeze(-1)
        return mask.flatten(-2).unsqueeze(-2)


def _gather(blocks: Tensor, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Blocks `[h, N, block, D]` at `flat` rows of `[h * N, ...]`, viewed as `shape`."""
    # One contiguous row per block: index_select copies rows at memory speed.
    return blocks.reshape(-1, blocks.shape[-2] * blocks.shape[-1]).index_select(0, flat).view(shape)
