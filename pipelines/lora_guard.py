"""Watches over the LoRA of the routers, which calls meant for the user's own LoRA also reach.

Adapters share PEFT's layers: `load_lora_weights` and `set_adapters` leave only those active that
they name, `fuse_lora` makes a layer leave out what it did not fuse, and `unload_lora_weights` takes
all away. Routers without the corrections they were trained with would be wrong in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sla_video.pipelines.lora import ADAPTER_NAME, our_layers

_AGAIN = "call `disable_sla`, then `enable_sla` anew"


class LoraGuard:
    """Forward pre-hook of a transformer whose routers came with LoRA.

    An adapter that was made inactive becomes active again, beside the user's. What cannot be put
    right is a ValueError that says how the user can.
    """

    def __init__(self, transformer: nn.Module) -> None:
        names = {id(module): name for name, module in transformer.named_modules()}
        # (parent, name in it, layer)
        self._layers: list[tuple[nn.Module, str, Any]] = []
        for layer in our_layers(transformer):
            parent, _, child = names[id(layer)].rpartition(".")
            self._layers.append((transformer.get_submodule(parent), child, layer))

    def __call__(self, module: nn.Module, args: Any) -> None:
        for parent, child, layer in self._layers:
            now: Any = parent._modules.get(child)
            if now is not layer or ADAPTER_NAME not in layer.lora_A:
                raise ValueError(
                    "the LoRA that came with these routers has been taken off the transformer, as "
                    f"`unload_lora_weights` does: {_AGAIN}"
                )
            if layer.merged:
                raise ValueError(
                    "LoRA has been fused into the transformer (`fuse_lora`), which leaves out or "
                    "bakes in the LoRA that came with these routers: call `unfuse_lora`, or "
                    "`disable_sla` before fusing"
                )
            if layer.disable_adapters:
                raise ValueError(
                    "`disable_lora` switches off the LoRA that came with these routers as well: "
                    "call `enable_lora`, and leave your own out with `set_adapters` or "
                    "`delete_adapters`"
                )
            if ADAPTER_NAME not in layer.active_adapters:
                _activate(layer)


@torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
def _activate(layer: Any) -> None:
    """Ours beside those that are active. What is trainable stays so."""
    trainable = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    layer.set_adapter([*layer.active_adapters, ADAPTER_NAME])
    for parameter, flag in trainable:
        parameter.requires_grad_(flag)
