"""A language model as the reward, let in only when it has shown that it agrees with people."""

from __future__ import annotations

from pathlib import Path

from ascent.customize.data import load_feedback
from ascent.customize.recipes import JudgeSpec
from ascent.customize.yamlfile import load_yaml
from ascent.evaluate.agreement import JudgeCheck, check_judge, require_agreement
from ascent.evaluate.judge import Rubric, RubricJudge
from ascent.inference.engines.named import open_named
from ascent.records import Episode, Feedback, Task
from ascent.records.errors import BadInput
from ascent.records.files import write_atomic

CHECK = "judge.json"


def open_judge(spec: JudgeSpec, folder: Path) -> tuple[RubricJudge, JudgeCheck | None]:
    """Open a recipe's judge and measure it on its gold set; the check is kept as `folder/judge.json`.

    Raises:
        BadInput: there is neither a gold set nor a reason to do without, the judge does not agree well enough with
            people, or its answers are not in the asked form.
        BadData: the gold set is malformed.
    """
    judge = RubricJudge(open_named(spec.model), load_yaml(spec.rubric, Rubric), name="judge")
    if spec.gold is None:
        if not spec.override:
            raise BadInput(
                f"the judge {spec.model!r} has not shown that it agrees with people; give judge.gold a file of rows "
                "with 'input', 'answer' and 'good' (true or false by a person), or say in judge.override why it may "
                "reward all the same"
            )
        return judge, None
    check = require_agreement(measure_judge(judge, load_feedback(spec.gold).rows, spec.threshold), spec.override)
    write_atomic(folder / CHECK, check.to_json(indent=1))
    return judge, check


def measure_judge(judge: RubricJudge, gold: tuple[Feedback, ...], threshold: float) -> JudgeCheck:
    """Compare a judge with people's thumbs: a value of at least one half counts as good (Cohen's kappa)."""
    pairs = [
        (
            Task(id=item.id, input=item.input, messages=item.messages, group=item.group),
            Episode(task_id=item.id, model="gold", messages=item.messages, text=item.answer),
        )
        for item in gold
    ]
    scores = judge.grade(pairs)
    called = [None if score.value is None else float(score.value >= 0.5) for score in scores]
    groups = [item.group or item.id for item in gold]
    return check_judge(
        judge.engine.model,
        judge.digest,
        [float(item.good) for item in gold],
        called,
        threshold=threshold,
        clusters=groups,
    )
