"""`ascent registry` on a registry that a server wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ascent.cli.registry import command
from ascent.inference.registry import Registry
from ascent.inference.store import Store
from ascent.inference.versions import Lineage
from ascent.observe.database import open_database
from ascent.records import DataSource, Decision, Verdict
from ascent.records.errors import BadInput, UnknownName

DATA = DataSource(name="train", path="s3://bucket/train.jsonl", rows=12, sha256="a" * 64)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("ASCENT_HOME", str(tmp_path))
    return Registry(open_database(tmp_path / "server" / "ascent.db"), Store(tmp_path))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments, catch_exceptions=False, standalone_mode=True)


def test_what_the_registry_holds_is_shown(registry: Registry) -> None:
    first = registry.add("doses", "doses-1@1", "ann", lineage=Lineage(method="sft", data=(DATA,), run="sft-9"))
    second = registry.add("doses", "doses-2@2", "ann", lineage=Lineage(method="dpo"), parent=first.id)
    verdict = Verdict(stage="sft", phase="after", decision=Decision.GO, reasons=("12 fixed, 1 broken",))
    registry.record(first.id, verdict, "ann")
    assert run("promote", "doses@1", "champion", "--by", "ann").output == "doses:champion is doses@1\n"
    listed = run("list").output.splitlines()
    assert listed[1].split()[:6] == [first.id, "doses@1", "ann", "sft", "GO", "champion"]
    assert listed[2].split()[:6] == [second.id, "doses@2", "ann", "dpo", "-", "-"]
    shown = run("show", "doses").output
    assert f"doses@1 {first.id} (sft)" in shown and "dpo" in shown
    shown = run("show", "doses:champion").output
    assert "s3://bucket/train.jsonl, 12 rows, sha256 aaaa" in shown and "GO: 12 fixed, 1 broken" in shown
    history = run("history", "doses").output
    assert "promoted" in history and "verdict GO: 12 fixed, 1 broken" in history


def test_promotion_asks_for_a_verdict_or_a_reason(registry: Registry) -> None:
    registry.add("doses", "doses-1@1", "ann", lineage=Lineage(method="sft"))
    with pytest.raises(BadInput, match="no verdict"):
        run("promote", "doses", "champion", "--by", "ann")
    run("promote", "doses", "champion", "--by", "ann", "--override", "pilot")
    assert "override by ann: pilot" in run("history", "doses").output


def test_a_name_of_several_owners_needs_one_of_them(registry: Registry) -> None:
    for owner in ("ann", "bob"):
        registry.add("doses", "doses-1@1", owner, lineage=Lineage(method="sft"))
    with pytest.raises(BadInput, match="ann, bob"):
        run("show", "doses")
    assert "doses@1 of bob" in run("show", "doses", "--owner", "bob").output
    with pytest.raises(UnknownName, match="dose"):
        run("show", "dose")
