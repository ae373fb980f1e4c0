"""The compatibility table: its rows parametrise the tests and make `docs/compatibility.md`.

`python tests/compatibility_table.py` writes the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compatibility_rows import (
    ATTENTION,
    CACHES,
    CALLS,
    COMPILER,
    FEATURES,
    GUIDANCE,
    LORA,
    MEMORY,
    ROUTER_LORA_ROWS,
    TRAINING,
    WEIGHTS,
    RouterLora,
)

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
# What only a GPU can show, and has shown, or has not been asked yet.
ON_GPU = "works (GPU)"
GPU = "GPU"


@dataclass(frozen=True, kw_only=True)
class Single:
    """A row that a test of its own stands for: "test_file.py::test_function"; None if none can."""

    group: str
    name: str
    test: str | None
    before: str = "works"
    after: str = "works"
    note: str = ""


_MORE = "test_compatibility_more.py::"
_GPU = "test_compatibility_gpu.py::"
SINGLES = [
    Single(
        group=COMPILER,
        name="`compile_repeated_blocks(fullgraph=True)`",
        test=_MORE + "test_compiled_blocks_are_one_graph_each_and_compute_the_same",
        note="Compiled blocks are not counted by `stats()`.",
    ),
    Single(
        group=COMPILER,
        name="... with `dynamic=True`, other sizes of video",
        test=_MORE + "test_compiled_blocks_with_triton_take_any_length_in_one_graph",
        note='With `impl="triton"` one graph serves all sizes. `impl="torch"` compiles anew for '
        "each.",
    ),
    Single(
        group=COMPILER,
        name="`transformer.compile(fullgraph=True)`, `torch.compile(transformer)`",
        test=_MORE + "test_a_compiled_transformer_is_one_graph",
        note="`dense_steps`, and LoRA that has to be put right, break the graph in two.",
    ),
    Single(
        group=COMPILER,
        name="Inductor on a GPU",
        test=_GPU + "test_compiled_blocks_compute_the_same",
        before=ON_GPU,
        after=ON_GPU,
    ),
    Single(
        group=ATTENTION,
        name="`with attention_backend(...)`",
        test=_MORE + "test_attention_backends_are_for_cross_attention_and_dense_layers",
        note="For cross-attention and dense layers; SLA2 has its own kernels.",
    ),
    Single(
        group=WEIGHTS,
        name="`from_pretrained(quantization_config=TorchAoConfig(...))`",
        test=_MORE + "test_weights_that_diffusers_quantizes_on_loading",
        after="—",
    ),
    Single(
        group=WEIGHTS,
        name="torchao INT8 and FP8 weights and activations",
        test=_GPU + "test_quantized_products",
        before=ON_GPU,
        after=ON_GPU,
    ),
    Single(
        group=WEIGHTS,
        name="bitsandbytes",
        test=_GPU + "test_bitsandbytes_weights",
        before=GPU,
        after="—",
        note="Diffusers quantizes with it on a GPU only.",
    ),
    Single(
        group=MEMORY,
        name="The same on a GPU, `enable_sequential_cpu_offload()` too",
        test=_GPU + "test_offloading_from_a_gpu",
        before=ON_GPU,
        after=ON_GPU,
    ),
    Single(
        group=TRAINING,
        name="`enable_gradient_checkpointing()`",
        test=_MORE + "test_checkpointed_gradients_are_those_of_diffusers_and_of_plain_training",
    ),
    Single(
        group=TRAINING,
        name="`save_pretrained`, `from_pretrained`",
        test=_MORE + "test_a_patched_pipeline_saves_a_stock_pipeline",
        before="—",
        note="Writes the stock pipeline. Save routers with `save_routers`.",
    ),
    Single(
        group=TRAINING,
        name="`copy.deepcopy(pipe)`",
        test=_MORE + "test_a_copied_pipeline_is_patched_on_its_own_and_counts_its_own_steps",
        before="—",
    ),
    Single(
        group=TRAINING,
        name="`copy.deepcopy(pipe.transformer)` with `dense_steps`",
        test=_MORE + "test_a_copied_transformer_does_not_count_the_steps_of_another_pipeline",
        before="—",
        after="refused",
        note="It has no pipeline that counts steps.",
    ),
    Single(
        group=CALLS,
        name="A batch gives each prompt the video that it has alone",
        test=_MORE + "test_videos_of_a_batch_do_not_see_each_other",
    ),
    Single(
        group=GUIDANCE,
        name="Perturbed attention guidance, skipped attention (`LayerSkipConfig`)",
        test=_MORE + "test_skipped_attention_is_refused_by_diffusers_for_wan",
        before="refused",
        after="refused",
        note="By Diffusers itself, which has not registered the attention of Wan for it.",
    ),
]

_EXPLANATION = """# What goes together with SLA attention

Made from the table that parametrises the tests (`tests/compatibility_table.py`); do not edit.
"before" is a feature that was switched on before `enable_sla`, "after" one after it.

*Works* means, with tiny random Wan models and trained routers, through the pipeline:

- with all blocks selected the video is that of Diffusers with the same feature, to a relative error
  below 2e-6 (1e-2 in bfloat16);
- at 79% sparsity the video is that of SLA2 without the feature where the feature must not change
  videos, and another one where it must;
- `stats()` counts the calls that were really made;
- after `disable_sla` the video is again that of Diffusers with the feature, to the bit.

*Refused* means a one-line error that says what to do; nothing is computed. *Works (GPU)* means that
only a GPU can show it and an H100 did, in `tests/test_compatibility_gpu.py`, which is left out
elsewhere; *GPU*, that the test is there and has not been run. Rows on
compilers, training and copies have tests of their own, which compare with plain eager SLA2 and with
Diffusers.
"""


def _cell(row: Any, order: str) -> str:
    if isinstance(row, Single):
        return str(getattr(row, order))
    if isinstance(row, RouterLora):
        return "works" if getattr(row, order) is None else "refused"
    return "works"


def rows() -> list[Any]:
    """All rows, in the order of the page."""
    groups = [COMPILER, ATTENTION, LORA, ROUTER_LORA_ROWS[0].group, CACHES, GUIDANCE, MEMORY]
    groups += [WEIGHTS, CALLS, TRAINING]
    found = [*FEATURES, *ROUTER_LORA_ROWS, *SINGLES]
    return sorted(found, key=lambda row: groups.index(row.group))


def page() -> str:
    """`docs/compatibility.md`."""
    lines = [_EXPLANATION]
    group = None
    for row in rows():
        if row.group != group:
            group = row.group
            lines += [f"\n## {group}\n", "| | before | after | |", "|---|---|---|---|"]
        lines.append(
            f"| {row.name} | {_cell(row, 'before')} | {_cell(row, 'after')} | {row.note} |"
        )
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
