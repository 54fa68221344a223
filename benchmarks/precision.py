"""Loss trajectories with a bf16 and with an fp32 base: the same recipe, data order and adapter, for several seeds.

    python benchmarks/precision.py examples/pharmacy --out runs/precision

With bf16 the adapter's masters, moments and log-probs are fp32 all the same. What rounding changes is measured against
what another seed changes: rounding is noise if the two curves of one seed lie much nearer than those of two seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from ascent.customize.data import load_texts
from ascent.customize.recipes import SupervisedRecipe
from ascent.customize.train import TrainingData, train
from ascent.evaluate.program import Program
from ascent.inference.store import Store
from ascent.ladder.usecase import load_usecase
from ascent.ladder.workspace import generate_data
from ascent.records.files import read_jsonl

BATCH, PRECISIONS = 8, ("fp32", "bf16")


def main() -> None:
    """Train each precision and seed; print and write how far the curves lie apart."""
    options = arguments()
    usecase = load_usecase(options.usecase)
    generate_data(usecase)
    file = usecase.path(usecase.data.train)
    texts = load_texts(file, program=Program.load(usecase.path(usecase.program)), system=usecase.prompt.system)
    data = TrainingData(conversations=[row.messages for row in texts.rows], sources=(texts.source,))
    curves: dict[str, dict[int, list[float]]] = {precision: {} for precision in PRECISIONS}
    for precision, seed in itertools.product(PRECISIONS, options.seeds):
        recipe = SupervisedRecipe(
            algorithm="sft",
            model=usecase.model,
            seed=seed,
            precision=precision,
            data=str(file),
            epochs=options.steps * BATCH / len(texts.rows),
            batch_size=BATCH,
            optim={"lr": options.lr},
        )
        folder = options.out / f"{precision}-s{seed}"
        card = train(recipe, Store().resolve(usecase.model), data, folder)
        curves[precision][seed] = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl")]
        sys.stderr.write(
            f"{precision}, seed {seed}: last loss {curves[precision][seed][-1]:.4f}, {card.seconds:.0f} s\n"
        )
    text = json.dumps(summary(curves), indent=1)
    (options.out / "precision.json").write_text(text)
    sys.stdout.write(text + "\n")


def summary(curves: dict[str, dict[int, list[float]]]) -> dict[str, float]:
    """Mean distances over steps, and the mean loss of the last quarter of the steps."""
    seeds = list(curves["fp32"])
    rounding = [apart(curves["fp32"][seed], curves["bf16"][seed]) for seed in seeds]
    pairs = [apart(curves["fp32"][a], curves["fp32"][b]) for a, b in itertools.combinations(seeds, 2)]
    found = {"bf16 to fp32, same seed": mean(rounding), "seed to seed, fp32": mean(pairs)}
    for precision, by_seed in curves.items():
        last = [mean(curve[-(len(curve) // 4) :]) for curve in by_seed.values()]
        found |= {f"{precision}, last quarter": mean(last), f"{precision}, lowest": min(last)}
        found |= {f"{precision}, highest": max(last)}
    return found


def apart(first: list[float], second: list[float]) -> float:
    """Mean absolute difference of two curves."""
    return mean([abs(a - b) for a, b in zip(first, second, strict=True)])


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("usecase", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
