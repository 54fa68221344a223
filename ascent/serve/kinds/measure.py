"""Is the tuned model better than its start? Both are measured on the same held-out rows, and a verdict says so.

| rows learnt from | metric, higher being better |
|---|---|
| a use case's, with `expected` | the use case's own, by its own gate |
| demonstrations, text, a teacher's answers | `log_likelihood`: mean log-prob of a row's target tokens, −loss |
| pairs | `preference_margin`: that of the chosen answer minus that of the rejected one |
| judged answers | `judged_log_likelihood`: that of a good answer, minus that of a bad one |
| prompts with a grader | the grader, on greedy answers |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Any

from ascent.records import Decision, Episode, Report, Score, Verdict, digest
from ascent.serve.kinds.rows import Rows

if TYPE_CHECKING:
    from ascent.customize.batch import TrainSequence
    from ascent.customize.recipes import Recipe
    from ascent.inference.chat import Renderer
    from ascent.records import Change

ALPHA, POWER = 0.05, 0.8
MINIMUM = 20
"""Fewest held-out rows that a verdict may rest on: below it the bootstrap of a mean covers too little."""
LIKELIHOOD, MARGIN, JUDGED = "log_likelihood", "preference_margin", "judged_log_likelihood"


def likelihood_report(folder: Path, model: str, stage: str, rows: Rows, recipe: Recipe) -> tuple[Report, float]:
    """Measure how likely a model finds held-out rows.

    Args:
        folder: the model, with whole weights.
        model: its name in the report.
        stage: the measurement's name.
        rows: demonstrations, documents, pairs or judged answers.
        recipe: the run's; it says how rows are rendered and what precision applies.

    Returns:
        The report, and the loss in nats per target token: of pairs and judged answers, of the good side.
    """
    from ascent.customize.feed import feed_of
    from ascent.customize.policy import DTYPES, Teacher, teacher_logps
    from ascent.evaluate.suite import estimate
    from ascent.inference.chat import Renderer
    from ascent.inference.decoder import DecoderConfig, load_decoder

    window = min(DecoderConfig.from_folder(folder).context, recipe.token_budget)
    units, signs, ids = _units(rows, recipe, Renderer(folder), window)
    scored = teacher_logps(Teacher(load_decoder(folder, DTYPES[recipe.precision])), units, recipe.token_budget)
    values: dict[str, list[float]] = {}
    for id, sign, logps in zip(ids, signs, scored, strict=True):
        values.setdefault(id, []).append(sign * fmean(logps))
    feed = feed_of(recipe)
    paired = feed == "preferences"
    metric = {"preferences": MARGIN, "feedback": JUDGED}.get(feed, LIKELIHOOD)
    items = tuple(
        Episode(
            task_id=id,
            model=model,
            messages=(),
            text="",
            scores=(Score(name=metric, value=sum(found) if paired else fmean(found)),),
        )
        for id, found in values.items()
    )
    groups = {row.id: row.group for row in rows.loaded if row.group is not None}
    report = Report(
        id="",
        model=model,
        stage=stage,
        data=rows.loaded.source,
        metrics={metric: estimate(metric, items, groups)},
        items=items,
        groups=groups,
    )
    good = [logp for sign, logps in zip(signs, scored, strict=True) if sign > 0 for logp in logps]
    loss = -fmean(good) if good else 0.0
    return report.model_copy(update={"id": digest(report.model_dump(mode="json"))[:16]}), loss


def answer_report(
    folder: Path, model: str, stage: str, rows: Rows, graders: Sequence[str], program: Path | None, max_tokens: int
) -> Report:
    """Let a model answer held-out prompts greedily and grade the answers.

    Raises:
        UnknownName: there is no such grader.
    """
    from ascent.evaluate.pool import GraderPool
    from ascent.evaluate.suite import evaluate
    from ascent.inference.engine import Sampling
    from ascent.inference.engines.torch import TorchEngine

    engine = TorchEngine.load(folder, model)
    sampling = Sampling(max_tokens=max_tokens, temperature=0)
    with GraderPool(program, graders) as pool:
        return evaluate(engine, rows.loaded.rows, pool, sampling=sampling, data=rows.loaded.source, stage=stage)


def judged_report(
    folder: Path, model: str, stage: str, rows: Rows, criteria: Sequence[str], judge: str, max_tokens: int
) -> Report:
    """Let a model answer held-out prompts greedily and a model judge the answers.

    Args:
        folder: the model's.
        model: its name.
        stage: the measurement's name.
        rows: tasks.
        criteria: names of `ascent.evaluate.criteria`.
        judge: a model of the store, or `remote:URL#MODEL`.
        max_tokens: of an answer.

    Raises:
        BadInput: too much of what the judge says cannot be used.
    """
    from ascent.evaluate.criteria import judges_of
    from ascent.evaluate.judge import Judges
    from ascent.evaluate.suite import evaluate
    from ascent.inference.engine import Sampling
    from ascent.inference.engines.named import open_named
    from ascent.inference.engines.torch import TorchEngine

    judges = judges_of(open_named(judge), criteria)
    return evaluate(
        TorchEngine.load(folder, model),
        rows.loaded.rows,
        Judges(judges),
        sampling=Sampling(max_tokens=max_tokens, temperature=0),
        data=rows.loaded.source,
        stage=stage,
        details={"judges": {each.name: each.digest for each in judges}},
    )


def usecase_report(folder: Path, model: str, stage: str, file: Path, use_case: Path, *, tuned: bool) -> Report:
    """Measure a model with a use case's metrics, on its short prompt if `tuned`, else on the whole one.

    Raises:
        BadData: the rows do not fit the use case.
    """
    from ascent.evaluate.pool import GraderPool
    from ascent.evaluate.suite import evaluate
    from ascent.inference.engine import Sampling
    from ascent.inference.engines.torch import TorchEngine
    from ascent.ladder.workspace import open_tasks

    usecase, loaded = open_tasks(use_case, file, prompted=not tuned)
    engine = TorchEngine.load(folder, model)
    sampling = Sampling(max_tokens=usecase.sampling.max_tokens, temperature=0)
    with GraderPool(usecase.path(usecase.program), list(usecase.metrics.names)) as pool:
        return evaluate(engine, loaded.rows, pool, sampling=sampling, data=loaded.source, stage=stage)


def judge(champion: Report, challenger: Report, metric: str) -> Verdict:
    """Decide whether a challenger is better on the same held-out rows: GO, COLLECT(n) or STOP.

    GO needs a paired improvement that is significant at 5 %, on at least `MINIMUM` rows.

    Raises:
        BadInput, UnknownName: the reports cannot be compared.
    """
    from ascent.evaluate.statistics import compare

    change = compare(champion, challenger, metric)
    told = (
        f"{metric} went from {change.champion:.4g} to {change.challenger:.4g} on the same {change.n:,} held-out rows "
        f"({change.difference:+.3g}, 95 % interval {change.low:+.3g} to {change.high:+.3g}, p = {change.p_value:.3g})"
    )
    collect = 0
    if change.n < MINIMUM:
        decision, collect = Decision.COLLECT, MINIMUM - change.n
        reason = f"Too few rows: {told}; a verdict rests on {MINIMUM} or more, so add {collect} to the validation data."
    elif change.difference > 0 and change.low > 0 and change.p_value < ALPHA:
        decision, reason = Decision.GO, f"A significant improvement: {told}."
    elif change.difference > 0:
        decision, collect = Decision.COLLECT, _missing(change)
        reason = f"Unproven: {told}; about {collect:,} more rows would settle a gain of this size."
    else:
        decision, reason = Decision.STOP, f"No improvement: {told}. The start model stays."
    promoted = decision is Decision.GO
    return Verdict(
        stage=challenger.stage,
        phase="after",
        decision=decision,
        reasons=(reason,),
        collect=collect,
        champion=challenger.model if promoted else champion.model,
        changes=(change,),
        evidence={"n": change.n, "difference": change.difference, "p_value": change.p_value, "alpha": ALPHA},
    )


def _missing(change: Change) -> int:
    """Rows missing for the power to see this difference, by a normal approximation."""
    normal = NormalDist()
    spread = (change.high - change.low) / (2 * normal.inv_cdf(0.975))
    wanted = normal.inv_cdf(1 - ALPHA / 2) + normal.inv_cdf(POWER)
    return max(1, int(change.n * (wanted * spread / change.difference) ** 2) + 1 - change.n)


def _units(
    rows: Rows, recipe: Recipe, renderer: Renderer, window: int
) -> tuple[list[TrainSequence], list[float], list[str]]:
    """Return sequences with, for each, whether more of its likelihood is better (±1), and the id of its row."""
    from ascent.customize.feed import feed_of
    from ascent.customize.sequences import (
        answer_sequences,
        conversation_sequences,
        document_sequences,
        pair_sequences,
    )

    loaded: Sequence[Any] = rows.loaded.rows
    feed = feed_of(recipe)
    if feed == "preferences":
        pairs = pair_sequences(loaded, renderer)
        flat = [side for pair in pairs for side in pair]
        return flat, [1.0, -1.0] * len(pairs), [row.id for row in loaded for _ in range(2)]
    if feed == "feedback":
        singles = [single for (single,) in answer_sequences(loaded, renderer)]
        return singles, [1.0 if row.good else -1.0 for row in loaded], [row.id for row in loaded]
    found: list[TrainSequence] = []
    ids: list[str] = []
    for row in loaded:
        if getattr(row, "text", ""):
            parts = document_sequences([row.text], renderer, window)
        else:
            parts = conversation_sequences([row.messages], renderer, getattr(recipe, "reasoning", "train"))
        found += parts
        ids += [row.id] * len(parts)
    return found, [1.0] * len(found), ids
