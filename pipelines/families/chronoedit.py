"""ChronoEdit: Wan whose last frame is the edited picture."""

from __future__ import annotations

from dataclasses import replace

from sla_video.pipelines.families.wan import WAN

CHRONOEDIT = replace(
    WAN,
    name="ChronoEdit",
    transformers=("ChronoEditTransformer3DModel",),
    identity_fields=(*WAN.identity_fields, "rope_temporal_skip_len"),
)
