"""The page of results: Markdown and a plot, from results.json alone. Only the standard library."""

from __future__ import annotations

import math
import statistics
from typing import Any

Json = dict[str, Any]
OURS = "ascent"
STEEP = 0.15
"""A growth exponent this far above both 1 and the model's is called super-linear: timing noise stays below it."""
SCALE = {"time": "{:.1f}×", "memory": "1/{:.1f}", "share": "{:.0%}"}
SERVERS = {"vllm": 1.0, "transformers serve": 4.0}
"""Times the throughput of these servers that ours is to reach at the most clients."""
ADAPTERS_COST = 0.25
MARK = {
    "time": "{:g}× faster than {}",
    "memory": "1/{:g} of the peak memory of {}",
    "share": "{:.0%} of the measured bf16 matrix-product peak",
}


def pages(results: Json, serving: Json | None = None) -> dict[str, str]:
    """Return file name → content."""
    found = {"benchmarks.md": page(results, serving)}
    if "curves" in results:
        found["benchmarks.svg"] = plot(results["curves"])
    return found


def page(results: Json, serving: Json | None = None) -> str:
    """The page."""
    entries = results["workloads"]
    return "\n".join(
        [
            "# Benchmarks\n",
            *facts(entries),
            "## Marks\n",
            table(("workload", "to reach", "measured", ""), [row for e in entries.values() for row in marks(e)]),
            "## Workloads\n",
            *(part for name, entry in entries.items() for part in section(name, entry)),
            *(curves_section(results["curves"]) if "curves" in results else []),
            *(serving_section(serving) if serving else []),
            RULES,
        ]
    )


RULES = """## How it is measured

- Each side runs in a process of its own, pinned to the same cores, with the same number of threads, and in its own
  environment. After the warm-up come at least five steps; shown are the median and, in brackets, the quickest and the
  slowest. Ours runs before and after the others.
- The work is the same: SmolLM2-135M-Instruct with its base in bf16, LoRA of rank 16 on all linear layers, AdamW, the
  same texts of exactly as many tokens, every sampled answer as long as asked (no end token is drawn or heeded). Ours
  goes through the loops, the trainer and the engine that `ascent train` uses, and returns log-probs with each sample.
- GRPO: a step samples, grades (share of vowels), scores its samples with the reference, updates once and brings the new
  policy to the sampler. The KL weight is 0.04 on both sides, that of the paper; TRL's default is 0, which saves the
  reference's pass: `grpo-70-no-kl`. DPO: a step includes the reference's log-probs.
- Prompts are unlike one another; they share the chat template's system line and nothing else. What is shared are the
  samples of a prompt and the two answers of a pair.
- TRL runs without gradient checkpointing, which is its quicker setting, and with the settings it has otherwise. Its
  default, checkpointing, is measured beside it where memory is compared. Packing has its default length of 1,024.
- Peak memory is that of the process and its children, measured by the kernel.
- The floor is operations over the measured peak of bf16 matrix products plus bytes over the measured bandwidth, counted
  in `benchmarks/floors.py`: each distinct token once, nothing computed again, nothing padded. Its share says how much
  of the time is what the work needs at least.
"""


def facts(entries: Json) -> list[str]:
    """Machine, versions, date and command, one paragraph for each run that the results are from."""
    parts = []
    runs: dict[tuple[str, str], list[str]] = {}
    for name, entry in entries.items():
        runs.setdefault((entry["command"], entry["date"]), []).append(name)
    for (command, date), names in runs.items():
        mine = [entries[name] for name in names]
        first, peaks = mine[0], [entry["rates"] for entry in mine]
        m = first["machine"]
        others = [side["others"] for entry in mine for side in entry["sides"].values() if "others" in side]
        about = "All" if len(runs) == 1 else ", ".join(names)
        parts.append(
            f"{about}: `{command}`, {date[:10]}, {m['threads']} threads of {m['cores']} cores of {m['cpu']} "
            f"({m['family']}), {m['memory_gb']:g} GB, {m['system']}. Measured in the same run: bf16 "
            f"{spread([p['bf16'] / 1e9 for p in peaks])} and fp32 {spread([p['fp32'] / 1e9 for p in peaks])} GFLOP/s "
            f"of matrix products, {spread([p['bandwidth'] / 1e9 for p in peaks], 1)} GB/s. Meanwhile other "
            f"processes used {spread(others, 2)} cores.\n"
        )
    found: dict[str, str] = {}
    for entry in entries.values():
        for side in entry["sides"].values():
            found |= side.get("versions", {})
    parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(found.items())) + ".\n")
    return parts


def marks(entry: Json) -> list[tuple[str, ...]]:
    """A workload's marks: what is to be reached, what was, and whether."""
    rows = []
    for target in entry["targets"]:
        known = [name for name in target["peers"] if "seconds" in entry["sides"].get(name, {})]
        quantity, reach = target["quantity"], target["reach"]
        words = MARK[quantity].format(reach, " or ".join(target["peers"]))
        value = measured(entry, quantity, known)
        shown = "not measured" if value is None else SCALE[quantity].format(value)
        reached = "" if value is None else "reached" if value >= reach else "**not reached**"
        rows.append((entry["title"], words, shown, reached))
    return rows


def measured(entry: Json, quantity: str, peers: list[str]) -> float | None:
    """How much quicker or smaller ours is than the best of the peers, or its share of the peak."""
    mine = entry["sides"].get(OURS, {})
    if "seconds" not in mine:
        return None
    if quantity == "share":
        return float(entry["floor"]["operations"] / entry["rates"]["bf16"] / statistics.median(mine["seconds"]))
    if not peers:
        return None
    theirs = [entry["sides"][name] for name in peers]
    if quantity == "memory":
        return float(min(side["peak_mb"] for side in theirs) / mine["peak_mb"])
    return speed(mine) / max(speed(side) for side in theirs)


def speed(side: Json) -> float:
    """Tokens per second, the median over steps: where a side packs, its steps differ in tokens."""
    return statistics.median(tokens / time for tokens, time in zip(side["tokens"], side["seconds"], strict=True))


def section(name: str, entry: Json) -> list[str]:
    """One workload: its sides and its floor."""
    base, mine = entry["floor"], entry["sides"].get(OURS, {})
    rows, notes = [], []
    for who, side in entry["sides"].items():
        notes += [f"{who}: {note}." for note in side.get("notes", ())]
        if "seconds" not in side:
            notes.append(f"{who}: {side['failed']}.")
            continue
        middle = statistics.median(side["seconds"])
        ratio = speed(mine) / speed(side) if "seconds" in mine else math.nan
        rows.append(
            (
                who,
                f"{len(side['seconds'])}",
                f"{middle:.2f} ({min(side['seconds']):.2f} to {max(side['seconds']):.2f})",
                f"{speed(side):,.0f}",
                f"{side['peak_mb'] / 1024:.2f}",
                "" if who == OURS else f"{ratio:.1f}×",
                "" if who == OURS or "peak_mb" not in mine else f"1/{side['peak_mb'] / mine['peak_mb']:.1f}",
                f"{base['seconds'] * speed(side) / entry['tokens']:.0%}",
            )
        )
    floor = (
        f"Floor: {base['operations'] / 1e12:.2f}·10¹² operations and {base['bytes'] / 1e9:.1f} GB, "
        f"{base['seconds']:.2f} s at this machine's peaks."
    )
    heads = ("side", "steps", "seconds a step", "tokens/s", "peak GB", "ours is faster", "ours needs", "of the floor")
    return [f"### {name}\n", f"{entry['title'][:1].upper()}{entry['title'][1:]}. {floor}\n", table(heads, rows)] + (
        [" ".join(notes) + "\n"] if notes else []
    )


def curves_section(curves: Json) -> list[str]:
    """The cost curves: plot, numbers, and what grows faster than it should."""
    rows, words = [], []
    for curve in curves["lines"].values():
        known = [p for p in curve["points"] if p["seconds"]]
        ratios = [min(p["seconds"]) / p["model"]["seconds"] for p in known if p["model"]]
        middle = statistics.median(ratios) if ratios else math.nan
        for p in curve["points"]:
            time, model = (min(p["seconds"]) if p["seconds"] else None), p["model"] or {}
            rows.append(
                (
                    f"{curve['title']}: {curve['unit']} {p['x']:,}",
                    "failed" if time is None else f"{time:.2f}",
                    f"{model['seconds']:.2f}" if model else "",
                    f"{time / model['seconds']:.2f}" if model and time else "",
                    f"{p['peak_mb'] / 1024:.2f}" if p["peak_mb"] else "",
                    f"{model['peak_mb'] / 1024:.2f}" if model else "",
                )
            )
        words.append(f"- {curve['title']}, {curve['unit']}: {verdict(known, middle)}")
    heads = ("point", "seconds", "model", "measured / model", "peak GB", "model GB")
    return [
        "## Cost curves\n",
        "How our step grows with one size at a time, beside the cost model of `ascent train` (`ascent plan`) without "
        "the slowdown it learns from past runs. Dots are measured (the quicker of up to three), lines are the model.\n",
        "![Seconds and the cost model against tokens, group size, prompt length and rank](benchmarks.svg)\n",
        *words,
        "",
        table(heads, rows),
    ]


def serving_section(serving: Json) -> list[str]:
    """Servers under load, the marks against them, and what adapters cost."""
    rows, rates = [], {}
    for name, side in serving["sides"].items():
        if "failed" in side:
            rows.append((name, "", f"failed: {side['failed']}", "", "", ""))
            continue
        for found in side["levels"]:
            rates.setdefault(found["clients"], {})[name] = found["tokens_per_s"]
            times = (f"{found[key]:.2f}" for key in ("p50_s", "p95_s", "first_p50_s"))
            rows.append((name, str(found["clients"]), f"{found['tokens_per_s']:,.0f}", *times))
    at_most = rates.get(max(rates, default=0), {})
    mine = [rate for name, rate in at_most.items() if name.startswith(OURS)]
    told = []
    for peer, reach in SERVERS.items():
        known = [rate for name, rate in at_most.items() if name.startswith(peer)]
        if mine and known:
            ratio = statistics.mean(mine) / max(known)
            word = "reached" if ratio >= reach else "**not reached**"
            told.append((f"{max(rates)} clients", f"{reach:g}× {peer}", f"{ratio:.1f}×", word))
    if costs := serving["sides"].get(OURS, {}).get("adapters"):
        extra = costs["one"]["tokens_per_s"] / costs["four"]["tokens_per_s"] - 1
        word = "reached" if extra <= ADAPTERS_COST else "**not reached**"
        told.append(("four adapters in one batch", f"at most {ADAPTERS_COST:.0%} over one", f"{extra:+.0%}", word))
    known = {name: side["versions"] for name, side in serving["sides"].items() if "versions" in side}
    versions = sorted({f"{package} {version}" for side in known.values() for package, version in side.items()})
    machine = serving["machine"]
    return [
        "## Serving under load\n",
        f"`{serving['command']}`, {serving['date'][:10]}, {machine['cpu']}, {machine['threads']} threads; "
        f"{', '.join(versions)}. Questions of about a hundred tokens, no two alike; greedy answers of at most 64, "
        "streamed through the OpenAI protocol. Each client asks again when its answer has ended. Ours runs before and "
        "after the others, and their mean counts.\n",
        table(("load", "to reach", "measured", ""), told),
        table(("server", "clients", "tokens/s", "answer, median s", "95 % s", "first token, median s"), rows),
        *_beside_training(serving.get("training")),
    ]


def _beside_training(found: Json | None) -> list[str]:
    if found is None:
        return []
    alone, beside = found["alone"], found["beside"]
    return [
        f"While a customization job trains on the same cores, {beside['clients']} clients get "
        f"{beside['tokens_per_s']:,.0f} tokens/s instead of {alone['tokens_per_s']:,.0f}, and an answer takes "
        f"{beside['p50_s']:.2f} s instead of {alone['p50_s']:.2f} s in the median: jobs compute in what time answers "
        "leave.\n"
    ]


def verdict(points: list[Json], middle: float) -> str:
    """What a curve says: its growth over the upper half, and whether that is a surprise."""
    if len(points) < 2:
        return "too few points."
    upper = points[len(points) // 2 :] if len(points) > 3 else points
    mine = slope([(p["x"], min(p["seconds"])) for p in upper])
    modelled = [(p["x"], p["model"]["seconds"]) for p in upper if p["model"]]
    theirs = slope(modelled) if len(modelled) > 1 else math.nan
    said = "says so too" if mine <= theirs + STEEP else "does not say so"
    told = f"**super-linear, and the model {said}**" if mine > 1 + STEEP else "no super-linear surprise"
    return (
        f"time grows as x^{mine:.2f} over the upper half, the model as x^{theirs:.2f}: {told}. Measured over model: "
        f"{middle:.2f} in the median."
    )


def slope(points: list[tuple[float, float]]) -> float:
    """Exponent of growth: least squares through the logarithms."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    return statistics.linear_regression(xs, ys).slope


def plot(curves: Json) -> str:
    """Four panels, both axes logarithmic."""
    wide, high = 340, 240
    panels = []
    for index, curve in enumerate(curves["lines"].values()):
        x, y = index % 2 * wide, index // 2 * high
        panels.append(f'<g transform="translate({x},{y})">{panel(curve, wide, high)}</g>')
    rows = -(-len(panels) // 2)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * wide} {rows * high}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(panels) + "\n</svg>\n"
    )


def panel(curve: Json, wide: int, high: int) -> str:
    """One curve: measured dots and the model's line."""
    points = [p for p in curve["points"] if p["seconds"]]
    if not points:
        return ""
    dots = [(p["x"], min(p["seconds"])) for p in points]
    line = [(p["x"], p["model"]["seconds"]) for p in points if p["model"]]
    xs, ys = [x for x, _ in dots], [y for _, y in dots + line]
    left, right, top, bottom = 44, wide - 14, 30, high - 40

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / min(xs)) / math.log(max(xs) / min(xs) or 2)
        up = math.log(y / min(ys)) / math.log(max(ys) / min(ys) or 2)
        return round(left + across * (right - left), 1), round(bottom - up * (bottom - top), 1)

    path = " ".join(f"{x},{y}" for x, y in (at(*p) for p in line))
    marks = "".join(f'<circle cx="{x}" cy="{y}" r="3" fill="#1b5e9b"/>' for x, y in (at(*p) for p in dots))
    below = "".join(
        f'<text x="{at(x, min(ys))[0]}" y="{bottom + 14}" text-anchor="middle">{short(x)}</text>' for x in xs
    )
    ends = "".join(
        f'<text x="{left - 5}" y="{at(min(xs), y)[1] + 4}" text-anchor="end">{y:.3g} s</text>'
        for y in (min(ys), max(ys))
    )
    return (
        f'<text x="{left}" y="16" font-weight="bold">{curve["title"]}</text>'
        f'<path d="M{left},{top} V{bottom} H{right}" fill="none" stroke="#999"/>'
        f'<polyline points="{path}" fill="none" stroke="#c0662b" stroke-width="1.5"/>{marks}{below}{ends}'
        f'<text x="{(left + right) / 2}" y="{bottom + 30}" text-anchor="middle">{curve["unit"]}</text>'
    )


def short(number: int) -> str:
    """1024 as 1k."""
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else f"{number}"


def spread(values: list[float], digits: int = 0) -> str:
    """A range of values, or the one."""
    low, high = (f"{edge:,.{digits}f}" for edge in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
