"""Reports: what an engine's answers become, what is compared, what lies on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from scipy import stats

from ascent.evaluate import statistics as s
from ascent.evaluate.log import read_report, write_report
from ascent.evaluate.pool import GraderPool
from ascent.evaluate.suite import episode_of, estimate, evaluate
from ascent.inference.engine import Completion, Engine, Prompt, Sampling
from ascent.records import DataSource, Episode, Estimate, FinishReason, Message, Report, Score, Task, Unscored
from ascent.records.errors import BadInput, Corrupt, UnknownName

DATA = DataSource(name="test", path="data/test.jsonl", rows=6, sha256="a" * 64)


class Parrot:
    """An engine that answers with a function of the question; each character is one token of log-prob -0.5."""

    def __init__(self, answer: Callable[[str, int], str | None], model: str = "parrot") -> None:
        self.answer, self.model = answer, model
        self.calls: list[int] = []

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[list[Completion]]:
        self.calls.append(len(prompts))
        return [[self._one(prompt, k, on_done) for k in range(sampling.n)] for prompt in prompts]

    def _one(self, prompt: Prompt, sample: int, on_done: Callable[[int], None] | None) -> Completion:
        question = prompt.messages[-1].content
        text = self.answer(question, sample)
        if on_done is not None:
            on_done(1)
        if text is None:
            return Completion(text="", finish=FinishReason.error, error="HTTP 500")
        ids = tuple(ord(character) for character in text)
        return Completion(text, ids, (-0.5,) * len(ids), FinishReason.stop, tuple(map(ord, question)))


def task(number: int, group: str | None = None) -> Task:
    messages = (Message(role="user", content=f"q{number}"),)
    return Task(id=f"t{number}", messages=messages, expected={"answer": f"a{number}"}, group=group)


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool(None, ["exact", "numeric"]) as pool:
        yield pool


def test_evaluate_fills_the_report(pool: GraderPool) -> None:
    answers = {"q0": "a0", "q1": "a1", "q2": "no", "q3": None, "q4": "a4", "q5": "\ud800"}
    engine: Engine = Parrot(lambda question, sample: answers[question])
    tasks = [task(number).model_copy(update={"expected": {"answer": f"a{number}"}}) for number in range(6)]
    tasks[4] = tasks[4].model_copy(update={"expected": None})
    done: list[int] = []
    with GraderPool(None, ["exact"]) as exact:
        report = evaluate(
            engine, tasks, exact, sampling=Sampling(temperature=0), data=DATA, stage="sft", on_done=done.append, chunk=4
        )
    assert engine.calls == [4, 2]  # type: ignore[attr-defined]
    assert sum(done) == 6
    found = report.metrics["exact"]
    assert (found.n, found.successes, found.unscored, found.not_applicable) == (4, 2.0, 1, 1)
    assert found.method == "wilson"
    theirs = stats.binomtest(2, 4).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert report.values("exact") == {"t0": 1.0, "t1": 1.0, "t2": 0.0, "t5": 0.0}
    assert report.items[3].score("exact") == Score(name="exact", unscored=Unscored.no_output, reason="HTTP 500")
    assert (report.items[3].error, report.items[5].text) == ("HTTP 500", "?")
    assert report.prompt_tokens == 2 * 5  # the failed one says nothing of its prompt
    assert report.completion_tokens == 2 + 2 + 2 + 2 + 1
    assert report.sampling["temperature"] == 0
    assert all(item.token_ids == () for item in report.items)
    assert report.seconds > 0
    assert report.created
    assert Report.from_json(report.to_json()) == report


def test_identical_measurements_have_identical_ids_and_others_do_not(pool: GraderPool) -> None:
    def measure(answer: str, stage: str = "sft", keep: bool = False) -> Report:
        engine = Parrot(lambda question, sample: answer)
        return evaluate(engine, [task(1)], pool, sampling=Sampling(), data=DATA, stage=stage, keep_tokens=keep)

    first = measure("a1")
    assert measure("a1").id == first.id
    assert len({first.id, measure("a2").id, measure("a1", "dpo").id}) == 3
    kept = measure("a1", keep=True).items[0]
    assert kept.token_ids == (*map(ord, "q1"), *map(ord, "a1"))
    assert kept.loss_mask == (False, False, True, True)
    assert kept.logps == (0.0, 0.0, -0.5, -0.5)


def test_samples_of_a_task_are_one_cluster_and_average_in_comparisons(pool: GraderPool) -> None:
    engine = Parrot(lambda question, sample: "a" + question[1:] if sample < int(question[1:]) else "no")
    tasks = [task(number) for number in range(5)]
    report = evaluate(engine, tasks, pool, sampling=Sampling(n=4), data=DATA, stage="sft")
    assert [(item.task_id, item.sample) for item in report.items[:5]] == [("t0", k) for k in range(4)] + [("t1", 0)]
    found = report.metrics["exact"]
    assert (found.n, found.value, found.method) == (20, 0.5, "clustered-bootstrap")
    assert report.values("exact") == {"t0": 0.0, "t1": 0.25, "t2": 0.5, "t3": 0.75, "t4": 1.0}


def test_tasks_that_cannot_be_measured_are_refused(pool: GraderPool) -> None:
    engine = Parrot(lambda question, sample: "")
    for tasks, message in [([task(1), task(1)], "two tasks have the id 't1'"), ([Task(id="x")], "'x' has no messages")]:
        with pytest.raises(BadInput, match=message):
            evaluate(engine, tasks, pool, sampling=Sampling(), data=DATA, stage="sft")


def test_tokens_without_log_probs_are_left_out() -> None:
    episode = episode_of(task(1), Completion("hi", (1, 2), (), FinishReason.stop, (9,)), "remote")
    assert (episode.text, episode.token_ids, episode.logps) == ("hi", (), ())


def graded(values: Sequence[float | None], name: str = "m") -> list[Episode]:
    episodes = []
    for number, value in enumerate(values):
        score = Score(name=name, value=value) if value is not None else Score(name=name, unscored=Unscored.timeout)
        episodes.append(Episode(task_id=f"t{number:03}", model="m", messages=(), text="", scores=(score,)))
    return episodes


def by_document(size: int, items: int) -> dict[str, str]:
    return {f"t{number:03}": f"d{number // size}" for number in range(items)}


def test_estimate_of_clustered_rates_is_wider_and_never_narrower_than_wilson() -> None:
    values = [1.0] * 60 + [0.0] * 40
    alone, grouped = estimate("m", graded(values)), estimate("m", graded(values), by_document(10, 100))
    assert (alone.method, grouped.method) == ("wilson", "clustered-bootstrap")
    assert (alone.value, alone.successes, grouped.value) == (0.6, 60.0, 0.6)
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)
    rare = [0.0] * 299 + [1.0]
    found = estimate("m", graded(rare), by_document(2, 300))
    assert found.high == pytest.approx(s.wilson(1, 300)[1])
    flawless = estimate("m", graded([1.0] * 100), by_document(10, 100))
    assert (flawless.low, flawless.high) == pytest.approx(s.wilson(10, 10))
    own_groups = estimate("m", graded(values), by_document(1, 100))
    assert own_groups == alone


def test_estimate_of_other_values_is_a_bootstrap_that_ignores_the_order() -> None:
    values = [math.sin(number) for number in range(200)]
    episodes = graded([*values, None])
    found = estimate("m", episodes)
    assert (found.method, found.successes, found.n, found.unscored) == ("bootstrap", None, 200, 1)
    t = stats.t.interval(0.95, 199, sum(values) / 200, stats.sem(values))
    assert (found.low, found.high) == pytest.approx(t, abs=0.012)
    assert estimate("m", episodes[::-1]) == found
    assert estimate("m", episodes, by_document(5, 200)).method == "clustered-bootstrap"


def test_estimate_of_nothing_claims_nothing() -> None:
    found = estimate("m", graded([None, None]))
    assert (found.n, found.unscored, found.method) == (0, 2, "none")
    assert math.isnan(found.value)
    assert not found.value >= 0.9
    assert estimate("absent", graded([1.0])).unscored == 1


def report_of(
    values: Sequence[float | None],
    model: str = "champion",
    sha256: str = "a" * 64,
    groups: dict[str, str] | None = None,
) -> Report:
    episodes = graded(values)
    data = DATA.model_copy(update={"sha256": sha256})
    metrics: dict[str, Estimate] = {"m": estimate("m", episodes, groups)}
    return Report(
        id=model, model=model, stage="s", data=data, metrics=metrics, items=tuple(episodes), groups=groups or {}
    )


def test_compare_of_rates_is_mcnemar_with_tangos_interval() -> None:
    champion = report_of([0.0] * 9 + [1.0] * 89 + [None, 1.0])
    challenger = report_of([1.0] * 8 + [0.0] + [0.0] * 2 + [1.0] * 87 + [1.0, None], "challenger")
    change = s.compare(champion, challenger, "m")
    assert change.n == 98
    assert change.test == "mcnemar-exact"
    assert change.fixed == tuple(f"t00{number}" for number in range(8))
    assert change.broken == ("t009", "t010")
    assert change.p_value == pytest.approx(stats.binomtest(2, 10).pvalue)
    assert (change.low, change.high) == pytest.approx(s.tango(8, 2, 98))
    assert (change.champion, change.challenger) == pytest.approx((89 / 98, 95 / 98))
    assert change.difference == pytest.approx(6 / 98)
    assert s.compare_noninferior(champion, challenger, "m", 0.02) == pytest.approx(s.tango_p(8, 2, 98, -0.02))


def test_compare_of_clustered_rates_does_not_count_copies() -> None:
    """8 fixed documents of 10 items each are 8 observations: p = 2/2^8, not 2/2^80."""
    groups = by_document(10, 100)
    champion = report_of([0.0] * 80 + [1.0] * 20, groups=groups)
    challenger = report_of([1.0] * 100, "challenger", groups=groups)
    change = s.compare(champion, challenger, "m")
    assert change.test == "cluster-sign-flip"
    assert change.p_value == pytest.approx(2 / 2**8)
    assert change.low < s.tango(80, 0, 100)[0]
    assert 0.8 < change.high <= 1.0
    same = s.compare(champion, champion, "m")
    assert (same.low, same.high, same.p_value) == (*s.tango(0, 0, 10), 1.0)


def test_compare_of_scores_is_a_paired_bootstrap() -> None:
    before = [math.sin(number) for number in range(60)]
    after = [value + 0.1 + 0.3 * math.cos(7 * number) for number, value in enumerate(before)]
    champion, challenger = report_of(before), report_of(after, "challenger")
    change = s.compare(champion, challenger, "m")
    assert change.test == "paired-bootstrap"
    _, low, high, p = s.paired_bootstrap(before, after)
    assert (change.low, change.high, change.p_value) == (low, high, p)
    shuffled = challenger.model_copy(update={"items": challenger.items[::-1]})
    assert s.compare(champion, shuffled, "m") == change
    groups = by_document(3, 60)
    grouped = s.compare(report_of(before, groups=groups), report_of(after, groups=groups), "m")
    assert grouped.test == "clustered-paired-bootstrap"


def test_compare_refuses_what_is_not_comparable() -> None:
    with pytest.raises(
        BadInput, match=r"'champion' and 'new' measured different data: test \(sha256 aaaaaaaaaaaa\).*bbb"
    ):
        s.compare(report_of([1.0]), report_of([1.0], "new", sha256="b" * 64), "m")
    with pytest.raises(UnknownName, match="unknown metric 'n'"):
        s.compare(report_of([1.0]), report_of([1.0]), "n")
    with pytest.raises(BadInput, match="no item has a value of 'm' in both"):
        s.compare(report_of([1.0, None]), report_of([None, 1.0]), "m")


def test_a_written_report_reads_back_and_is_never_overwritten(tmp_path: Path) -> None:
    report = report_of([1.0, 0.0, None, math.pi]).model_copy(update={"stage": "best of/é"})
    path = write_report(report, tmp_path / "reports")
    assert path.name.startswith("best-of-") and path.suffix == ".json"
    assert not os.stat(path).st_mode & 0o222
    before = os.stat(path)
    assert write_report(report, tmp_path / "reports") == path
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns
    assert read_report(path) == report
    other = write_report(report.model_copy(update={"seconds": 1.0}), tmp_path / "reports")
    assert other != path
    assert len(list((tmp_path / "reports").iterdir())) == 2


def test_an_edited_cut_or_renamed_report_is_corrupt(tmp_path: Path) -> None:
    report = report_of([1.0, 0.0])
    path = write_report(report, tmp_path)
    raw = path.read_bytes()
    path.chmod(0o644)
    edited = json.loads(raw)
    edited["metrics"]["m"]["value"] = 1.0
    for content in (json.dumps(edited).encode(), raw[:-10], b""):
        path.write_bytes(content)
        with pytest.raises(Corrupt, match="edited, cut off or renamed"):
            read_report(path)
        with pytest.raises(Corrupt):
            write_report(report, tmp_path)
    path.write_bytes(raw)
    assert read_report(path) == report
    copy = tmp_path / "report.json"
    copy.write_bytes(raw)
    with pytest.raises(BadInput, match="not a report's file name"):
        read_report(copy)
    with pytest.raises(BadInput, match="there is no report"):
        read_report(tmp_path / "none-0000000000000000.json")
