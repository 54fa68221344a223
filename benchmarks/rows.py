"""Online rows side by side: from one start model, on one task, with an equal budget of samples.

    python benchmarks/rows.py examples/pharmacy --start examples/pharmacy/runs/seed0/stages/sft/model --out runs/rows

The first row trains for `--steps` steps; a row that draws prompts again for dead groups (dapo) should come first, since
the others then get as many steps as its samples are worth. Every model is measured greedily on the test items and
compared with the start model, item by item.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from ascent.customize.data import load_tasks
from ascent.customize.recipes import OnlineRecipe
from ascent.customize.train import TrainingData, train
from ascent.evaluate.program import Program
from ascent.evaluate.statistics import compare
from ascent.ladder.measure import mark_tuned, measure
from ascent.ladder.usecase import load_usecase
from ascent.records import Report
from ascent.records.files import read_jsonl

GROUPS, SAMPLES = 8, 8


def main() -> None:
    """Train and measure each row; print a Markdown table and write JSON."""
    options = arguments()
    usecase = load_usecase(options.usecase)
    program = usecase.path(usecase.program)
    assert usecase.data.prompts is not None
    tasks = load_tasks(usecase.path(usecase.data.prompts), program=Program.load(program), system=usecase.prompt.system)
    test = usecase.path(usecase.data.test)
    before = measure(options.usecase, str(options.start), test, stage="start")
    found, steps = [], options.steps
    for name in options.rows:
        recipe = OnlineRecipe(
            algorithm=name,
            model=str(options.start),
            seed=options.seed,
            system=usecase.prompt.system,
            program=program,
            prompts=str(usecase.data.prompts),
            reward=usecase.reward,
            steps=steps,
            prompts_per_step=GROUPS,
            group_size=SAMPLES,
            max_tokens=usecase.sampling.max_tokens,
            optim={"lr": options.lr, "schedule": "constant", "warmup_fraction": 0.1},
        )
        folder = options.out / f"{name}-s{options.seed}"
        card = train(recipe, options.start, TrainingData(tasks=tasks.rows, sources=(tasks.source,)), folder)
        mark_tuned(folder / "model", usecase, name, "rows")
        after = measure(options.usecase, str(folder / "model"), test, stage=name)
        curve = list(read_jsonl(folder / "metrics.jsonl"))
        drawn = sum(row["prompts_drawn"] for row in curve)
        if name == options.rows[0]:
            steps = math.ceil(drawn / GROUPS)
        found.append(line(name, before, after, curve) | {"samples": int(drawn * SAMPLES), "seconds": card.seconds})
        sys.stderr.write(f"{found[-1]}\n")
    sys.stdout.write(table(before, found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def line(name: str, before: Report, after: Report, curve: list[dict[str, Any]]) -> dict[str, Any]:
    """What is told of one row."""
    change, metric = compare(before, after, "exact_match"), after.metrics["exact_match"]
    third = max(1, len(curve) // 3)
    return {
        "row": name,
        "steps": len(curve),
        "value": metric.value,
        "low": metric.low,
        "high": metric.high,
        "change": change.difference,
        "change_low": change.low,
        "change_high": change.high,
        "p": change.p_value,
        "fixed": len(change.fixed),
        "broken": len(change.broken),
        "reward_first": sum(row["reward"] for row in curve[:third]) / third,
        "reward_last": sum(row["reward"] for row in curve[-third:]) / third,
        "mismatch_kl": sum(row["mismatch_kl"] for row in curve) / len(curve),
        "clip_fraction": sum(row["clip_fraction"] for row in curve) / len(curve),
        "entropy_last": sum(row["entropy"] for row in curve[-third:]) / third,
    }


def table(before: Report, found: list[dict[str, Any]]) -> str:
    """The lines as a Markdown table."""
    start = before.metrics["exact_match"]
    head = "row | steps | samples | exact match (95 %) | change to the start (95 %) | fixed / broken | p | "
    head += "reward, first to last third"
    lines = [f"| {head} | clipped | seconds |", "|" + "---|" * 10]
    lines.append(f"| start | | | {start.value:.1%} ({start.low:.1%} to {start.high:.1%}) | | | | | | |")
    for row in found:
        lines.append(
            f"| {row['row']} | {row['steps']} | {row['samples']:,} | {row['value']:.1%} ({row['low']:.1%} to "
            f"{row['high']:.1%}) "
            f"| {row['change']:+.1%} ({row['change_low']:+.1%} to {row['change_high']:+.1%}) | {row['fixed']} / "
            f"{row['broken']} "
            f"| {row['p']:.3f} | {row['reward_first']:.3f} to {row['reward_last']:.3f} | {row['clip_fraction']:.2%} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("usecase", type=Path)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=["dapo", "grpo", "gspo", "ppo"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
