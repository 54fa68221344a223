"""What use costs, to the millionth, and that nothing is charged twice."""

from __future__ import annotations

from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascent.jobs.ledger import Ledger, Usage
from ascent.jobs.prices import PriceList, load_prices
from ascent.observe.database import open_database
from ascent.records.errors import BadFile, BadInput, UnknownName

counts = st.integers(0, 10**9)
amounts = st.decimals(0, 1000, places=9)


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


@given(counts, counts, counts, counts, counts, st.lists(amounts, min_size=5, max_size=5))
@settings(deadline=None)
def test_a_cost_is_the_exact_sum_rounded_once(
    prompt: int, cached: int, completion: int, training: int, milliseconds: int, prices: list[Any]
) -> None:
    cached = min(cached, prompt)
    names = ("prompt", "cached", "completion", "training", "second")
    price_list = PriceList.model_validate({"models": {"m": dict(zip(names, map(str, prices), strict=True))}})
    found = price_list.cost_micros(
        "m", prompt=prompt, completion=completion, cached=cached, training=training, milliseconds=milliseconds
    )
    used = (prompt - cached, cached, completion, training, milliseconds)
    exact = sum(Fraction(price) * count for price, count in zip(prices, used, strict=True)) * 1000
    assert isinstance(found, int) and found == round(exact)  # round of a Fraction is half to even


def test_the_first_pattern_that_fits_decides(tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text(
        "currency: EUR\nmodels:\n  smollm2-135m: {prompt: 0.1}\n  smollm2-*: {prompt: 0.2}\ndefault: {prompt: 0.3}\n"
    )
    prices = load_prices(tmp_path / "prices.yaml")
    assert prices.currency == "EUR"
    assert [str(prices.of(name).prompt) for name in ("smollm2-135m", "smollm2-360m", "other")] == ["0.1", "0.2", "0.3"]


def test_the_packaged_list_is_free_and_its_example_fits(tmp_path: Path) -> None:
    import ascent.jobs.prices as module

    text = module.FREE.read_text()
    free = load_prices()
    assert free.cost_micros("m", prompt=10**9, completion=10**9, cached=0, training=10**9, milliseconds=10**9) == 0
    example = "\n".join(
        line[2:] for line in text.splitlines() if line.startswith(("# models", "#   smol", "# default"))
    )
    (tmp_path / "example.yaml").write_text(example)
    cost = load_prices(tmp_path / "example.yaml").cost_micros
    assert cost("smollm2-135m", prompt=1000, completion=1000, cached=0, training=0, milliseconds=0) == 60 + 240


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {m: {promt: 1}}", r"prices.yaml \[models.m.promt\].*did you mean 'prompt'"),
        ("default: {prompt: -1}", r"default.prompt.*greater than or equal to 0"),
        ("default: {prompt: cheap}", "default.prompt"),
        ("default: {prompt: NaN}", "default.prompt"),
        ("currency: dollars", "currency"),
        ("a: [", "prices.yaml:1: not valid YAML"),
        ("[1]", "prices.yaml"),
    ],
)
def test_a_malformed_list_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(BadFile, match=said):
        load_prices(tmp_path / "prices.yaml")
    with pytest.raises(BadFile, match="cannot be read"):
        load_prices(tmp_path / "absent.yaml")


def test_totals_by_everything_over_a_window(tmp_path: Path) -> None:
    now = 1_800_000_000.0
    prices = PriceList.model_validate({"default": {"prompt": "1", "completion": "2", "cached": "0.5"}})
    ledger = Ledger(open_database(tmp_path / "l.db"), prices, wall=lambda: now)
    rows = [
        Usage("1", "anna", model="m", deployment="d", prompt_tokens=1000, cached_tokens=500, completion_tokens=100),
        Usage("2", "anna", model="n", deployment="d", prompt_tokens=10, seconds=0.25),
        Usage("3", "bert", model="m", job="j", training_tokens=7),
    ]
    assert ledger.record(*rows) == 3
    assert ledger.record(rows[0]) == 0 == ledger.record()
    by_model = ledger.totals()
    assert [(total.name, total.rows) for total in by_model] == [("m", 2), ("n", 1)]
    assert by_model[0].cost_micros == 500_000 + 250_000 + 200_000 and by_model[0].training_tokens == 7
    (deployed,) = ledger.totals("anna", by="deployment")
    assert (deployed.name, deployed.prompt_tokens, deployed.milliseconds) == ("d", 1010, 250)
    now += 100
    ledger.record(Usage("4", "anna", model="m", prompt_tokens=1))
    assert [total.rows for total in ledger.totals(by="owner", since=at(now))] == [1]
    assert [total.rows for total in ledger.totals(by="owner", until=at(now))] == [2, 1]
    ledger.prices = PriceList()
    assert ledger.totals()[0].cost_micros == 951_000, "a new price list changes no old row"
    with pytest.raises(UnknownName, match="did you mean 'owner'"):
        ledger.totals(by="ownr")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="time zone"):
        ledger.totals(since=datetime(2030, 1, 1))


@pytest.mark.parametrize(
    "change", [{"prompt_tokens": -1}, {"cached_tokens": 1}, {"seconds": -1.0}, {"seconds": float("nan")}, {"key": ""}]
)
def test_impossible_use_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Usage(**({"key": "k", "owner": "anna"} | change))
