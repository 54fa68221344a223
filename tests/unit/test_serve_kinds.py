"""What jobs are made of: addresses that stay where they may, hyperparameters, and verdicts on likelihoods."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ascent.customize.recipes import OnlineRecipe, PreferenceRecipe, SupervisedRecipe
from ascent.evaluate.suite import estimate
from ascent.records import DataSource, Decision, Episode, Report, Score
from ascent.records.errors import BadData, BadInput
from ascent.serve.kinds.formats import convert
from ascent.serve.kinds.hyperparameters import DISTILLATION, METHODS, knobs_of, recipe_of, settings_of, settled
from ascent.serve.kinds.measure import MINIMUM, judge
from ascent.serve.kinds.places import Rules, check_place, fetch, fetch_all, put


def test_a_file_is_copied_once_with_its_sha256(tmp_path: Path) -> None:
    source = tmp_path / "rows"
    source.write_bytes(b"first\n")
    uri = source.as_uri()
    got = fetch(uri, tmp_path / "job", Rules(), name="train")
    assert got.path.name == "train.jsonl" and got.sha256 == hashlib.sha256(b"first\n").hexdigest()
    source.write_bytes(b"second\n")
    assert fetch(uri, tmp_path / "job", Rules(), name="train") == got
    assert got.path.read_bytes() == b"first\n"


def test_folders_are_copied_by_suffix_and_results_written_back(tmp_path: Path) -> None:
    tree = tmp_path / "model"
    (tree / "deep").mkdir(parents=True)
    for name in ("a.json", "deep/b.json", "weights.bin"):
        (tree / name).write_text(name)
    found = fetch_all(tree.as_uri(), tmp_path / "job", Rules(), suffixes=(".json",))
    assert {file.path.relative_to(tmp_path / "job").as_posix() for file in found} == {"a.json", "deep/b.json"}
    put((tmp_path / "out").as_uri(), {"x/a.json": found[0].path}, Rules())
    assert (tmp_path / "out" / "x" / "a.json").read_text() == "a.json"
    with pytest.raises(BadInput, match="is a folder"):
        fetch(tree.as_uri(), tmp_path / "job", Rules())
    with pytest.raises(BadInput, match="-1 MiB are allowed"):
        fetch_all(tree.as_uri(), tmp_path / "other", Rules(limit_mb=-1))
    with pytest.raises(BadInput, match="nothing lies"):
        fetch((tmp_path / "absent").as_uri(), tmp_path / "job", Rules())


def test_no_way_leads_out_of_the_roots_or_into_the_servers_folder(tmp_path: Path) -> None:
    for name in ("open", "server"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "secret.jsonl").write_text("{}")
    (tmp_path / "open" / "link").symlink_to(tmp_path / "server")
    (tmp_path / "open" / "one.jsonl").symlink_to(tmp_path / "server" / "secret.jsonl")
    closed = Rules(closed=(str(tmp_path / "server"),))
    rooted = Rules(roots=(str(tmp_path / "open"),))
    for rules in (closed, rooted):
        check_place(f"file://{tmp_path}/open/secret.jsonl", rules)
        for place in ("server/secret.jsonl", "open/../server/secret.jsonl", "open/link/secret.jsonl", "open/one.jsonl"):
            with pytest.raises(BadInput):
                check_place(f"file://{tmp_path}/{place}", rules)
            with pytest.raises(BadInput):
                fetch(f"file://{tmp_path}/{place}", tmp_path / "job", rules)
        with pytest.raises(BadInput):
            fetch_all(f"file://{tmp_path}/open", tmp_path / "job", rules)
        with pytest.raises(BadInput):
            put(f"file://{tmp_path}/open/link", {"a": tmp_path / "open" / "secret.jsonl"}, rules)
    for uri in ("local:///a", "dir://a", "zip://a", "memory://a", "simplecache::file:///a", "nothing://a", "s3://"):
        with pytest.raises(BadInput):
            check_place(uri, Rules())
    assert check_place("s3://bucket/key.jsonl", Rules()) == "s3"
    team = Rules(roots=("s3://bucket/team", f"file://{tmp_path}/open"))
    assert check_place("s3://bucket/team/a.jsonl", team) == "s3"
    assert check_place(f"file://{tmp_path}/open/secret.jsonl", team) == "file"
    for uri in ("s3://bucket/key", "s3://bucket/teams/a", "s3://bucket/team/../key", "s3a://bucket/team/a"):
        with pytest.raises(BadInput):
            check_place(uri, team)
    with pytest.raises(BadInput, match="nowhere, by `data`"):
        check_place(f"file://{tmp_path}/open/secret.jsonl", Rules(roots=()))


@pytest.mark.parametrize("kind", METHODS)
def test_every_documented_hyperparameter_reaches_the_recipe(kind: str) -> None:
    table = knobs_of(kind, METHODS[kind])
    examples = {"schedule": "linear", "precision": "fp32", "reasoning": "mask", "loraTargets": "q_proj, v_proj"}
    examples |= {"loraRank": "7", "tokenBudget": "640", "trainingSamplePerPrompt": "5"}
    given = {name: examples.get(name, "3") for name in table if name not in ("method", "adapter", "useCase")}
    field = {"prompts" if kind.startswith("REINFORCEMENT") else "data": "x.jsonl"}

    def recipe(hyperparameters: dict[str, str]) -> object:
        settings = settings_of(kind, hyperparameters, "tiny")
        teacher = {"teacher": {**settings.fields.get("teacher", {}), "model": "t"}} if kind == DISTILLATION else {}
        return recipe_of(settings, **field, **teacher)

    changed, plain = recipe(given), recipe({})
    for name, knob in table.items():
        if knob.place and name in given:
            value, before = (functools.reduce(getattr, knob.place, made) for made in (changed, plain))
            expected = knob.read(given[name])
            assert value == (tuple(expected) if isinstance(expected, list) else expected), name
            assert value != before, f"{name}: the example is the default, so the test shows nothing"


def test_what_is_not_given_keeps_the_methods_own_default() -> None:
    settings = settings_of("FINE_TUNING", {"method": "dpo", "weight_decay": "0.1"}, "tiny")
    recipe = recipe_of(settings, data="x.jsonl")
    assert isinstance(recipe, PreferenceRecipe)
    assert (recipe.optim.weight_decay, recipe.optim.lr) == (0.1, 5e-5)
    whole = recipe_of(settings_of("FINE_TUNING", {"adapter": "none"}, "tiny"), data="x.jsonl")
    assert isinstance(whole, SupervisedRecipe) and whole.lora is None


def test_passes_and_warm_up_become_steps() -> None:
    rft = settings_of("REINFORCEMENT_FINE_TUNING", {"epochCount": "2", "batchSize": "4", "minibatches": "2"}, "tiny")
    recipe = recipe_of(rft, prompts="x.jsonl")
    assert isinstance(recipe, OnlineRecipe)
    assert settled(rft, recipe, 10).steps == 10  # type: ignore[union-attr]
    sft = settings_of("FINE_TUNING", {"learningRateWarmupSteps": "3", "batchSize": "5"}, "tiny")
    assert settled(sft, recipe_of(sft, data="x"), 30).optim.warmup_fraction == 0.5
    long = settings_of("FINE_TUNING", {"learningRateWarmupSteps": "7", "batchSize": "5"}, "tiny")
    with pytest.raises(BadInput, match="6 steps"):
        settled(long, recipe_of(long, data="x"), 30)


def test_rows_keep_their_lines_and_their_meaning(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "q", "completion": "a"}\n\n'
        '{"system": [{"text": "s"}], "messages": [{"role": "user", "content": [{"text": "a"}, {"text": "b"}]}]}\n'
        '{"input": "raw"}\n'
        '{"prompt": "q", "referenceResponse": "r", "recordId": "7"}\n'
    )
    convert(source, out, "s3://b/in.jsonl", "texts")
    lines = out.read_text().split("\n")
    assert lines[0] == '{"input": {"prompt": "q"}, "target": "a"}' and lines[1] == ""
    assert '"content": "a\\nb"' in lines[2] and '"role": "system", "content": "s"' in lines[2]
    assert lines[3] == '{"text": "raw"}'
    assert lines[4] == '{"input": {"prompt": "q"}, "expected": {"answer": "r"}, "id": "7"}'
    plain = tmp_path / "plain.txt"
    plain.write_text("One.\nTwo.")
    convert(plain, out, "u", "texts")
    assert json.loads(out.read_text()) == {"text": "One.\nTwo."}
    judged = tmp_path / "judged.jsonl"
    judged.write_text('{"prompt": "q", "completion": "a", "label": false}\n')
    convert(judged, out, "u", "feedback")
    assert json.loads(out.read_text()) == {"input": {"prompt": "q"}, "answer": "a", "good": False}
    judged.write_bytes(b"\xff\xfe")
    with pytest.raises(BadData, match="s3://b/bad"):
        convert(judged, out, "s3://b/bad", "texts")


def report(values: list[float], model: str) -> Report:
    items = tuple(
        Episode(task_id=f"{n:03}", model=model, messages=(), text="", scores=(Score(name="m", value=value),))
        for n, value in enumerate(values)
    )
    data = DataSource(name="d", path="p", rows=len(values), sha256="a" * 64)
    return Report(id=model, model=model, stage="sft", data=data, metrics={"m": estimate("m", items)}, items=items)


def test_a_verdict_needs_rows_a_gain_and_significance() -> None:
    base = [-2.0 - 0.01 * n for n in range(40)]
    noise = [(-1) ** n * 0.5 for n in range(40)]
    cases = SimpleNamespace(
        better=[value + 0.3 for value in base],
        worse=[value - 0.3 for value in base],
        unproven=[value + 0.05 + wave for value, wave in zip(base, noise, strict=True)],
    )
    assert judge(report(base, "a"), report(cases.better, "b"), "m").decision is Decision.GO
    assert judge(report(base, "a"), report(cases.better, "b"), "m").champion == "b"
    stopped = judge(report(base, "a"), report(cases.worse, "b"), "m")
    assert (stopped.decision, stopped.champion) == (Decision.STOP, "a")
    unproven = judge(report(base, "a"), report(cases.unproven, "b"), "m")
    assert unproven.decision is Decision.COLLECT and unproven.collect > 100
    few = judge(report(base[:5], "a"), report(cases.better[:5], "b"), "m")
    assert (few.decision, few.collect) == (Decision.COLLECT, MINIMUM - 5)
