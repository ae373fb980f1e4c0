"""The families of transformers that SLA attention supports."""

from __future__ import annotations

from sla_video.pipelines.families.allegro import ALLEGRO
from sla_video.pipelines.families.chronoedit import CHRONOEDIT
from sla_video.pipelines.families.cogvideox import COGVIDEOX
from sla_video.pipelines.families.easyanimate import EASYANIMATE
from sla_video.pipelines.families.family import Family
from sla_video.pipelines.families.hunyuan import HUNYUAN
from sla_video.pipelines.families.hunyuan15 import HUNYUAN15
from sla_video.pipelines.families.ltx import LTX
from sla_video.pipelines.families.ltx2 import LTX2
from sla_video.pipelines.families.mochi import MOCHI
from sla_video.pipelines.families.skyreels import SKYREELS
from sla_video.pipelines.families.wan import WAN
from sla_video.pipelines.families.wan_animate import WAN_ANIMATE

FAMILIES: tuple[Family, ...] = (
    WAN,
    WAN_ANIMATE,
    CHRONOEDIT,
    SKYREELS,
    HUNYUAN,
    HUNYUAN15,
    COGVIDEOX,
    MOCHI,
    EASYANIMATE,
    LTX,
    LTX2,
    ALLEGRO,
)


def family_of(transformer: object) -> Family:
    """The family of a Diffusers transformer; TypeError with the supported classes if none."""
    family = find_family(transformer)
    if family is None:
        raise TypeError(
            f"got {type(transformer).__name__}, but SLA attention supports "
            f"{', '.join(supported_transformers())} of Diffusers"
        )
    return family


def find_family(transformer: object) -> Family | None:
    """The family of a Diffusers transformer, None for anything else."""
    import diffusers

    # By name first, so that no class of another family is imported.
    names = [cls.__name__ for cls in type(transformer).__mro__]
    for family in FAMILIES:
        for name in family.transformers:
            if name in names and isinstance(transformer, getattr(diffusers, name, ())):
                return family
    return None


def family_named(name: str) -> Family:
    """The family of that `name`."""
    return next(family for family in FAMILIES if family.name == name)


def supported_transformers() -> list[str]:
    """Names of the supported classes that the installed Diffusers has, family by family."""
    import diffusers

    known = set(dir(diffusers))
    return [name for family in FAMILIES for name in family.transformers if name in known]
