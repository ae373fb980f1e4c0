"""The operator for a query that is its caller's own: the output may take the memory of the query.

Of all the tokens of a video, the output is as large as each of Q, K and V, and lives beside them
where attention needs the most memory. The blocks of a query that one program reads are those whose
output it writes, and no other reads them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sla_video.kernels.api import Implementation, attend
from sla_video.kernels.options import Options
from sla_video.kernels.router import Router


def attention_over_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    router: Router | None = None,
    *,
    impl: Implementation = "auto",
    **options: Any,
) -> Tensor:
    """`sla2_attention` without a context, which leaves anything in `query`.

    The result may be `query` itself: where it runs in Triton, nobody asks for gradients, and the
    tokens of `query` lie one after the other.

    Args:
        query, key, value: `[B, L, H, D]`; `query` shares no memory with the others, and is not read
            after.
        options: of `sla2_attention`, with its defaults.

    Raises:
        TypeError, ValueError: as `sla2_attention` does.
    """
    chosen = Options(**options, overwrite_query=True)
    output = attend(query, key, value, router, chosen, impl, return_lse=False)
    assert isinstance(output, Tensor)
    return output
