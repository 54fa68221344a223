"""The report of a climb: one HTML file that needs nothing else, and the same facts as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from ascent.ladder.charts import curve_plots, interval_plot
from ascent.ladder.facts import gather
from ascent.ladder.words import duration, percent, points, signed, span
from ascent.records.files import write_atomic

TEMPLATES = Path(__file__).parent / "templates"
HTML, JSON = "report.html", "report.json"


def build_report(run_folder: Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` into a run folder and return their paths.

    It can be called at any time during a climb; stages without a measurement are shown as such. The HTML loads
    nothing from anywhere, and its content policy forbids any script but its own.

    Raises:
        BadInput: the folder holds no climb.
        Corrupt: a file of the run is damaged or missing.
        NoSpace: the disk is full; the old report is unchanged.
    """
    facts = gather(run_folder)
    html, data = run_folder / HTML, run_folder / JSON
    write_atomic(data, json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomic(html, render(facts))
    return html, data


def render(facts: dict[str, Any]) -> str:
    """Return the facts as an HTML page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # loads on use: gates do not need it

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # components keep the order of the data
    environment.filters.update(
        percent=percent, points=points, signed=signed, duration=duration, value=shown_value, json=shown_json
    )
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        facts=facts,
        accuracy=interval_plot(facts["stages"], facts["use_case"]["target"]),
        curves={stage["name"]: curve_plots(stage["curves"]) for stage in facts["stages"]},
        span=span,
        against={stage["name"]: stage["against"] for stage in facts["stages"]},
        script=script,
        script_checksum=checksum,
    )


def shown_value(value: Any) -> str:
    """Return a component's value as a reader expects it."""
    if value is None:
        return "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(shown_value(part) for part in value) or "none"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def shown_json(value: Any) -> str:
    """Return a value as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)
