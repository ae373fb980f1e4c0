"""The tiny pipeline with token compression, as several tests run it.

It has 3 x 8 x 8 = 192 tokens, of which `pairs=0.6` keeps 128.
"""

from __future__ import annotations

import torch
from family_cases import CALL

from sla_video import SLAConfig, TokenCompression

SMALL = SLAConfig(sparsity=0.8, block_q=16, block_k=8, impl="torch")
DENSE = SMALL.replace(dense_layers=[0, 1, 2])
HALF = TokenCompression(pairs=0.6, layers=[1])


def run(pipe, steps=8, **changes):
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "num_inference_steps": steps, "output_type": "latent", **changes}
    return pipe(**call, generator=torch.Generator().manual_seed(0)).frames


def pairs_of(handle):
    return [layer.pairs for layer in handle.stats().layers]
