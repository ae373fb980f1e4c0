"""Many videos over several processes: the first names all files, each makes every N-th of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sla_video.pipelines.generation_plan import (
    GenerationPlan,
    VideoPlan,
    plan_generation,
)
from sla_video.pipelines.generation_request import GenerationRequest
from sla_video.pipelines.processes import Team


def plan_share(
    request: GenerationRequest, team: Team
) -> tuple[GenerationPlan, tuple[VideoPlan, ...]]:
    """What this process makes, and, in the first process, what an earlier run has finished.

    Names, and the seed if it is drawn, have to come from one process: another one would find
    files that the first has written meanwhile. Seeds are those of one process.

    Raises:
        InputError: what `plan_generation` raises.
    """

    planned: list[GenerationPlan] = []

    def make() -> Any:
        planned.append(plan_generation(request))
        return [
            {**dataclasses.asdict(video), "path": str(video.path)} for video in planned[0].videos
        ]

    videos = [VideoPlan(**{**video, "path": Path(video["path"])}) for video in team.begin(make)]
    plan = planned[0] if planned else plan_generation(request, name_files=False)
    todo = [video for video in videos if not video.finished]
    finished = tuple(video for video in videos if video.finished and team.rank == 0)
    return dataclasses.replace(plan, videos=tuple(todo[team.rank :: team.size])), finished
