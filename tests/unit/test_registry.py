"""The registry: lineage, promotion, splits that keep their callers, and deletion that leaves nothing behind."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import Engine

from ascent.inference.registry import SOURCE, Registry
from ascent.inference.store import Store
from ascent.inference.versions import Choice, Lineage, Version
from ascent.records import DataSource, Decision, Estimate, ModelCard, Report, Verdict
from ascent.records.errors import BadInput, UnknownName

DATA = DataSource(name="train", path="s3://bucket/train.jsonl", rows=3, sha256="a" * 64)


@pytest.fixture
def registry(database: Engine, tmp_path: Path) -> Registry:
    return Registry(database, Store(tmp_path / "home"))


def verdict(decision: Decision = Decision.GO, reason: str = "12 fixed, 1 broken") -> Verdict:
    return Verdict(stage="sft", phase="after", decision=decision, reasons=(reason,))


def report(value: float) -> Report:
    metric = Estimate(name="exact", value=value, low=0.1, high=0.9, n=10)
    return Report(id=f"r{value}", model="m", stage="sft", data=DATA, metrics={"exact": metric})


def add(registry: Registry, name: str = "directions", owner: str = "ann", **more: object) -> Version:
    lineage = Lineage(method="sft", recipe={"algorithm": "sft"}, data=(DATA,), code="0.1.0", run="sft-1")
    return registry.add(name, f"{name}@1", owner, lineage=lineage, **more)  # type: ignore[arg-type]


def store_model(store: Store, tmp_path: Path, word: str, *, source: str = f"{SOURCE}test", parent: str | None = None):
    folder = tmp_path / word
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"word": word}))
    card = ModelCard(id=word, family="llama", source=source, licence="unknown", sha256="", parent=parent)
    return store.add(folder, card).name


def test_a_version_keeps_its_lineage_over_a_restart(registry: Registry) -> None:
    first = add(registry, base="smollm2@0")
    second = add(registry, parent=first.id, job="j2")
    again = Registry(registry.engine, registry.store)
    assert (first.number, second.number) == (1, 2)
    assert again.ancestry(second.id) == [second, first]
    assert again.get(first.id).lineage.data[0].sha256 == "a" * 64
    assert again.find("directions", "ann") == second
    assert again.find("directions@1", "ann") == first == again.find(first.id, "ann")


def test_one_job_makes_one_version_however_often_it_registers(registry: Registry) -> None:
    found: list[Version] = []
    threads = [threading.Thread(target=lambda: found.append(add(registry, job="j"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len({version.id for version in found}) == 1
    assert [event.event for event in registry.history("directions", "ann")] == ["added"]


def test_numbers_are_given_once_and_without_gaps_by_threads_that_compete(registry: Registry) -> None:
    threads = [threading.Thread(target=add, args=(registry,)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(version.number for version in registry.versions("directions", "ann")) == list(range(1, 11))


def test_names_belong_to_owners(registry: Registry) -> None:
    mine, theirs = add(registry), add(registry, owner="bob")
    assert (mine.number, theirs.number) == (1, 1)
    for call in (
        lambda: registry.get(theirs.id, "ann"),
        lambda: registry.find(theirs.id, "ann"),
        lambda: registry.delete(theirs.id, "ann", "ann"),
        lambda: registry.promote("directions", "champion", theirs.id, owner="ann", by="ann", override="mine now"),
        lambda: add(registry, parent=theirs.id),
    ):
        with pytest.raises(UnknownName):
            call()


@pytest.mark.parametrize("decision", [None, Decision.STOP, Decision.COLLECT, Decision.NO_GO])
def test_nothing_is_promoted_without_go_or_override(registry: Registry, decision: Decision | None) -> None:
    version = add(registry)
    given = None if decision is None else verdict(decision, "no gain worth having")
    with pytest.raises(BadInput, match="no verdict" if decision is None else "no gain worth having"):
        registry.promote("directions", "champion", version.id, owner="ann", by="ann", verdict=given)
    assert registry.alias("directions", "champion", "ann") is None
    assert registry.evidence(version.id).verdicts == ()  # what failed left nothing behind
    with pytest.raises(BadInput, match="reason"):
        registry.override(version.id, "  ", "ann")
    registry.promote("directions", "champion", version.id, owner="ann", by="eve", override="pilot with ten users")
    event = registry.history("directions", "ann")[-1]
    assert (event.event, event.by, event.alias) == ("promoted", "eve", "champion")
    assert event.reason == "override by eve: pilot with ten users"


def test_the_latest_verdict_counts(registry: Registry) -> None:
    version = add(registry)
    registry.record(version.id, verdict(), "gate")
    registry.record(version.id, verdict(), "gate")
    registry.record(version.id, report(0.5), "gate")
    evidence = registry.evidence(version.id)
    assert (len(evidence.verdicts), evidence.reports) == (1, (report(0.5),))
    assert registry.require_permission(version) == "verdict GO: 12 fixed, 1 broken"
    registry.record(version.id, verdict(Decision.NO_GO, "a guard was violated"), "gate")
    with pytest.raises(BadInput, match="a guard was violated"):
        registry.require_permission(version)


def test_history_says_who_followed_whom(registry: Registry) -> None:
    old, new = add(registry), add(registry)
    for version in (old, new):
        registry.promote("directions", "champion", version.id, owner="ann", by="ann", verdict=verdict())
    assert registry.alias("directions", "champion", "ann") == new
    assert registry.find("directions:champion", "ann") == new
    last = registry.history("directions", "ann")[-1]
    assert last.details["before"] == {old.id: 1.0}
    with pytest.raises(UnknownName, match="directions:champion"):
        registry.find("directions:champoin", "ann")


def test_a_split_is_sticky_and_only_ever_moves_callers_to_the_newest(registry: Registry) -> None:
    old, new = (add(registry) for _ in range(2))
    for version in (old, new):
        registry.record(version.id, verdict(), "gate")
    keys = [f"user-{number}" for number in range(400)]

    def met(weights: dict[str, float]) -> dict[str, str]:
        registry.route("directions", "champion", owner="ann", by="ann", weights=weights)
        return {key: registry.choose("directions", "champion", "ann", key).version.id for key in keys}

    tenth = met({new.id: 1, old.id: 9})
    counts = Counter(tenth.values())
    assert abs(counts[new.id] / len(keys) - 0.1) < 4 * (0.1 * 0.9 / len(keys)) ** 0.5
    assert met({old.id: 9, new.id: 1}) == tenth
    half = met({old.id: 1, new.id: 1})
    assert all(half[key] == new.id for key in keys if tenth[key] == new.id)
    assert registry.alias("directions", "champion", "ann") in (old, new)
    drawn = {registry.choose("directions", "champion", "ann").version.id for _ in range(40)}
    assert drawn == {old.id, new.id}


def test_a_shadow_sees_without_answering_and_ends_with_a_promotion(registry: Registry) -> None:
    champion, unproven = add(registry), add(registry)
    registry.promote("directions", "champion", champion.id, owner="ann", by="ann", verdict=verdict())
    registry.route("directions", "champion", owner="ann", by="ann", shadow=unproven.id)
    assert registry.choose("directions", "champion", "ann", "key") == Choice(champion, unproven)
    with pytest.raises(BadInput, match="no verdict"):
        registry.route("directions", "champion", owner="ann", by="ann", weights={champion.id: 1, unproven.id: 1})
    with pytest.raises(BadInput, match="above zero"):
        registry.route("directions", "champion", owner="ann", by="ann", weights={champion.id: 0})
    registry.promote("directions", "champion", champion.id, owner="ann", by="ann")
    assert registry.choose("directions", "champion", "ann").shadow is None


def test_what_is_deployed_or_pointed_at_is_not_deleted(registry: Registry) -> None:
    version = add(registry)
    registry.hold(version.id, "deployment d1")
    with pytest.raises(BadInput, match="deployment d1"):
        registry.delete(version.id, "ann", "ann")
    registry.release(version.id, "deployment d1")
    registry.promote("directions", "champion", version.id, owner="ann", by="ann", override="pilot")
    with pytest.raises(BadInput, match="directions:champion"):
        registry.delete(version.id, "ann", "ann")
    other = add(registry)
    registry.promote("directions", "champion", other.id, owner="ann", by="ann", override="pilot")
    registry.delete(version.id, "ann", "ann")
    with pytest.raises(UnknownName):
        registry.get(version.id)
    assert registry.history("directions", "ann")[-1].details["number"] == 1
    assert add(registry).number == 3


def test_files_go_with_the_last_version_that_refers_to_them(registry: Registry, tmp_path: Path) -> None:
    store = registry.store
    own, bought = store_model(store, tmp_path, "own"), store_model(store, tmp_path, "bought", source="pypi:x")
    base = store_model(store, tmp_path, "base")
    store_model(store, tmp_path, "adapter", parent=base)
    lineage = Lineage(method="sft")
    one, two, three, four = (registry.add("n", model, "ann", lineage=lineage) for model in (own, own, bought, base))
    assert registry.models() == {own, bought, base}
    registry.delete(one.id, "ann", "ann")
    assert (store.models / own).is_dir()
    registry.delete(two.id, "ann", "ann")
    assert not (store.models / own).exists()
    for version in (three, four):
        registry.delete(version.id, "ann", "ann")
    assert (store.models / bought).is_dir(), "the operator's own model went with a version"
    assert (store.models / base).is_dir(), "an adapter lost its base"


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a:b", "x" * 129, "-a"])
def test_unusable_names_are_refused(registry: Registry, name: str) -> None:
    with pytest.raises(BadInput, match="cannot name a model"):
        add(registry, name)
