"""What a stage does: its recipe with this use case's values, and its training data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ascent.ladder.usecase import StageSpec, UseCase
from ascent.records import Preference
from ascent.records.errors import BadRecipe, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ascent.customize.recipes import Recipe
    from ascent.customize.rollout import Group

MINIMUM_GAP = 0.05
"""The least difference in reward that makes a preference pair; smaller ones are noise of partial credit."""


def recipe_of(usecase: UseCase, stage: StageSpec, model: str, seed: int) -> Recipe:
    """Return the stage's recipe: the row's defaults, the use case's prompt and program, then the stage's overrides.

    Raises:
        BadRecipe: an override that the row's recipe does not have, or a value out of range.
    """
    from ascent.customize.recipes import recipe_class

    kind = recipe_class(stage.row)
    own: dict[str, Any] = {
        "algorithm": stage.row,
        "model": model,
        "seed": seed,
        "system": usecase.prompt.system,
        "program": usecase.path(usecase.program),
    }
    if stage.kind == "online":
        own |= {"reward": usecase.reward, "max_tokens": usecase.sampling.max_tokens}
        own["prompts"] = str(usecase.data.prompts or "the stage's tasks")
    else:
        own["data"] = str(usecase.data.train if stage.kind == "sft" else "pairs of the champion's samples")
    unknown = [key for key in stage.recipe if key not in kind.model_fields]
    if unknown:
        raise BadRecipe(
            f"stage {stage.name!r}: a {stage.row} recipe has no field {unknown[0]!r}"
            f"{nearest(unknown[0], kind.model_fields)}; known: {', '.join(sorted(kind.model_fields))}",
            file=usecase.folder / "usecase.yaml",
            field="stages",
        )
    try:
        return kind.model_validate({**own, **stage.recipe})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BadRecipe(
            f"stage {stage.name!r}: {first['msg']}", file=usecase.folder / "usecase.yaml", field=field
        ) from error


def pairs_from_samples(groups: Sequence[Group]) -> list[Preference]:
    """Best against worst: one pair for each prompt whose samples differ in reward by at least `MINIMUM_GAP`.

    Among equals the more probable answer is chosen on both sides: it is what the model would really say.
    """
    pairs = []
    for group in groups:
        graded = [(r, sum(e.logps), e) for r, e in zip(group.rewards, group.episodes, strict=True) if not math.isnan(r)]
        if len(graded) < 2:
            continue
        best = max(graded, key=lambda item: (item[0], item[1]))
        worst = min(graded, key=lambda item: (item[0], -item[1]))
        if best[0] - worst[0] < MINIMUM_GAP or best[2].text.strip() == worst[2].text.strip():
            continue
        pairs.append(
            Preference(
                id=group.task.id,
                messages=group.task.messages,
                chosen=best[2].text,
                rejected=worst[2].text,
                chosen_score=best[0],
                rejected_score=worst[0],
                source="samples",
                input=group.task.input,
                group=group.task.group,
            )
        )
    return pairs
