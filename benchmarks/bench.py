"""The benchmark suite: our steps beside those of TRL, transformers and vLLM, on the same work in one run.

    python benchmarks/bench.py [--only NAME ...] [--steps N] [--quick] [--json FILE]

Each side runs in a process of its own with two threads on two cores, so that peak memory is its own, warms up, and then
takes the same number of steps. Ours runs before and after the others of a workload, so that a machine that changes
meanwhile shows. The peaks that floors are counted with are measured right before each workload. A side that runs out of
memory is tried again with half the rows at a time and gradient accumulation. Peers whose environment cannot be made are
left out, and the results say why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import curves
import psutil
from environments import Failed, python_of
from floors import Shape, floor
from workloads import (
    TRANSFORMERS,
    TRL,
    TRL_CHECKPOINTED,
    TRL_PACKED,
    VLLM,
    WORKLOADS,
    Workload,
    job,
    quick,
)

from ascent.inference.chat import Renderer
from ascent.inference.pull import pull
from ascent.inference.store import Store
from ascent.records.files import write_atomic

Json = dict[str, Any]
HERE = Path(__file__).parent
MODEL, OURS = "smollm2-135m-instruct", "ascent"
DISTURBED, TRIES = 0.25, 3
"""With --patience, a run during which others used more than so many cores is taken again, at most so many times."""
RESERVE = 700 << 20
"""Bytes of memory that must stay free: a side that takes them is ended before the system ends something else."""


@dataclass(frozen=True)
class Side:
    """Who does the work: a script, the environment it runs in (none: ours), and what sets it apart."""

    script: str
    environment: str = ""
    options: Json = field(default_factory=dict)


SIDES = {
    OURS: Side("with_ascent.py"),
    TRL: Side("with_trl.py", "trl"),
    TRL_CHECKPOINTED: Side("with_trl.py", "trl", {"checkpointing": True}),
    TRL_PACKED: Side("with_trl.py", "trl", {"packing": True}),
    TRANSFORMERS: Side("with_transformers.py", "trl"),
    VLLM: Side("with_vllm.py", "vllm"),
}


class Suite:
    """One run of the suite: its settings, and the interpreters of the peers' environments."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cores = sorted(os.sched_getaffinity(0))[: options.threads]
        os.sched_setaffinity(0, self.cores)
        self.folder = Path(options.model) if Path(options.model).is_dir() else pull(options.model, Store())
        self.renderer, self.shape = Renderer(self.folder), Shape.read(self.folder)
        self._pythons: dict[str, Path | str] = {"": Path(sys.executable)}
        for name in ("trl", "vllm"):
            if getattr(options, f"{name}_python"):
                self._pythons[name] = getattr(options, f"{name}_python")

    def measure(self, work: Workload) -> Json:
        """Run all sides of a workload."""
        entry: Json = {"title": work.title, "kind": work.kind, "tokens": work.tokens, "beta": work.beta}
        entry |= {"targets": [asdict(target) for target in work.targets], "rates": self.rates()}
        amount = floor(self.shape, work)
        seconds = amount.seconds(entry["rates"]["bf16"], entry["rates"]["bandwidth"])
        entry["floor"] = {"operations": amount.operations, "bytes": amount.bytes, "seconds": seconds}
        peers = [] if self.options.no_peers else list(work.peers)
        entry["sides"] = {}
        for name in [OURS, *peers, *([OURS] if peers else [])]:
            found = self.run(name, work, self.options.steps)
            before = entry["sides"].get(name)
            if before is not None and "seconds" in found:
                found |= {kind: before[kind] + found[kind] for kind in ("seconds", "tokens")}
                found |= {kind: max(found[kind], before[kind]) for kind in ("peak_mb", "others")}
            entry["sides"][name] = found
            say(f"{work.name:<12} {name:<28} {line(found)}")
        return entry

    def run(self, name: str, work: Workload, steps: int, **more: Any) -> Json:
        """Run one side; where memory does not suffice, with half the rows at a time until it does."""
        side = SIDES[name]
        python = self._python(side.environment)
        if isinstance(python, str):
            return {"failed": python}
        task = job(work, self.renderer, steps + self.options.warmup) | {"steps": steps, "warmup": self.options.warmup}
        task |= {"checkpointing": False, "packing": False} | side.options | more
        rows = work.prompts * work.group if work.kind == "grpo" else work.prompts or len(work.lengths)
        batch, notes = rows, []
        while True:
            found = self.process(python, side.script, task | {"batch": batch})
            if "out_of_memory" not in found or batch == 1 or not side.environment:
                return found | ({"notes": notes} if notes else {})
            notes.append(f"{batch} rows at a time ran out of memory at {found['peak_mb'] / 1024:.1f} GB")
            batch //= 2

    def rates(self) -> Json:
        """This machine's peaks, now."""
        task = {"kind": "rates", "model": str(self.folder), "warmup": 0, "steps": 1}
        found = self.process(Path(sys.executable), "with_ascent.py", task)
        if "failed" in found:
            raise SystemExit(f"the machine's rates cannot be measured: {found['failed']}")
        facts: Json = found["facts"]
        return facts

    def process(self, python: Path, script: str, task: Json) -> Json:
        """Run a script in its own process; with patience, in quiet, keeping the run that others disturbed least."""
        found: list[Json] = []
        for _ in range(TRIES if self.options.patience else 1):
            wait_for_quiet(self.options.patience)
            found.append(self._process(python, script, task))
            if "failed" in found[-1] or found[-1]["others"] <= DISTURBED:
                return found[-1]
        return min(found, key=lambda one: float(one["others"]))

    def _process(self, python: Path, script: str, task: Json) -> Json:
        """Return what a script wrote, or why it wrote nothing."""
        with tempfile.TemporaryDirectory() as folder:
            given, written, log = (Path(folder) / name for name in ("job.json", "result.json", "log.txt"))
            given.write_text(json.dumps(task | {"threads": len(self.cores), "cores": self.cores}), encoding="utf-8")
            with log.open("wb") as out:
                started = subprocess.Popen(
                    [python, str(HERE / "sides" / script), str(given), str(written)],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=environment(len(self.cores)),
                    cwd=folder,
                )
                try:
                    short, others = watch(started)
                finally:
                    started.kill()  # if this process is ended, so is the side; one that has ended does not mind
            if self.options.logs:
                self.options.logs.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(log, self.options.logs / f"{script.removesuffix('.py')}-{task['kind']}.txt")
            found: Json = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
            if short is not None:
                return {"failed": "out of memory", "out_of_memory": True, "peak_mb": short}
            found["others"] = round(others, 2)
            if started.returncode != 0 or not found.get("seconds"):
                last = [text for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
                return {"failed": f"ended with {started.returncode}: {last[-1][:300] if last else 'no output'}"}
            return found

    def _python(self, name: str) -> Path | str:
        """The interpreter of an environment, or why there is none."""
        if name not in self._pythons:
            say(f"environment {name}: made now, if it is not there; that takes minutes")
            try:
                self._pythons[name] = python_of(name)
            except Failed as error:
                self._pythons[name] = str(error)
        return self._pythons[name]


def watch(process: subprocess.Popen[bytes]) -> tuple[int | None, float]:
    """Wait for a process; return its size in MiB if memory ran out, and how many cores others used meanwhile.

    One that takes the machine's last memory is ended.
    """
    adjust = Path(f"/proc/{process.pid}/oom_score_adj")
    adjust.write_text("1000")  # if the system is quicker than we are, it ends this process and no other
    started, busy = time.monotonic(), busy_seconds()
    top, own, short = 0, {}, False
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            top = max(top, sum(one.memory_info().rss for one in family))
            own |= {one.pid: sum(one.cpu_times()[:2]) for one in family}
        except psutil.NoSuchProcess:
            continue
        if psutil.virtual_memory().available < RESERVE:
            short = True
            for one in reversed(family):
                one.kill()
            process.wait()
        time.sleep(0.1)
    others = (busy_seconds() - busy - sum(own.values())) / (time.monotonic() - started)
    return top >> 20 if short or process.returncode == -9 else None, max(0.0, others)


def wait_for_quiet(patience: float, over: float = 3.0) -> None:
    """Wait until others have used less than `DISTURBED` cores for a while, at most `patience` seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before = busy_seconds()
        time.sleep(over)
        if (busy_seconds() - before) / over <= DISTURBED:
            return


def busy_seconds() -> float:
    """Seconds that all cores have computed since the machine started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def environment(threads: int) -> dict[str, str]:
    """Variables of a side: its number of threads, and nothing fetched or reported over the network."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"), "1")
    return kept | offline | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def machine(cores: list[int]) -> Json:
    """What the suite ran on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    numbers = {text.partition(":")[0].strip(): text.partition(":")[2].strip() for text in lines}
    return {
        "cpu": models[0] if models else platform.processor(),
        "family": f"family {numbers.get('cpu family', '?')}, model {numbers.get('model', '?')}",
        "threads": len(cores),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def line(found: Json) -> str:
    """A result in a line."""
    if "failed" in found:
        return f"failed: {found['failed']}"
    times = sorted(found["seconds"])
    middle = times[len(times) // 2]
    return f"{middle:.2f} s ({times[0]:.2f} to {times[-1]:.2f}), {found['peak_mb'] / 1024:.2f} GB {found['facts']}"


def without_folder(argument: str) -> str:
    """An argument as it may be published: an absolute path's last part, anything else as it is."""
    return Path(argument).name if argument.startswith("/") else argument


def say(text: str) -> None:
    """Write a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    names = [work.name for work in WORKLOADS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=[*names, "curves"], help="these workloads; others stay as they were"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results.json", help="where the results go")
    parser.add_argument("--steps", type=int, default=5, help="steps of each side after its warm-up")
    parser.add_argument("--warmup", type=int, default=1, help="steps before")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default=MODEL, help="a model of the store, or a folder")
    parser.add_argument("--quick", action="store_true", help="small work and two steps, to see that everything runs")
    parser.add_argument("--no-peers", action="store_true", help="our side only")
    parser.add_argument("--trl-python", type=Path, help="an interpreter that has trl, instead of an own environment")
    parser.add_argument("--vllm-python", type=Path, help="an interpreter that has vllm, instead of an own environment")
    parser.add_argument(
        "--patience", type=float, default=0.0, help="seconds to wait for a quiet machine before each process"
    )
    parser.add_argument("--logs", type=Path, help="a folder for what the sides print")
    return parser.parse_args()


def main() -> None:
    """Run the workloads and write the results after each."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options = arguments()
    wanted = options.only or [*(work.name for work in WORKLOADS), "curves"]
    if options.quick:
        options.steps = 2
    suite = Suite(options)
    results: Json = (
        json.loads(options.json.read_text(encoding="utf-8")) if options.only and options.json.is_file() else {}
    )
    stamp = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": " ".join(["python benchmarks/bench.py", *map(without_folder, sys.argv[1:])]),
        "machine": machine(suite.cores),
        "model": suite.folder.name,
        "steps": options.steps,
        "warmup": options.warmup,
    }

    def keep(name: str, entry: Json) -> None:
        results.setdefault("workloads", {})[name] = stamp | entry
        write_atomic(options.json, json.dumps(results, indent=1, ensure_ascii=False) + "\n")

    for work in WORKLOADS:
        if work.name in wanted:
            keep(work.name, suite.measure(quick(work) if options.quick else work))
    if "curves" in wanted:
        results["curves"] = stamp | {"rates": (rates := suite.rates()), "lines": {}}
        for name, curve in curves.CURVES.items():
            results["curves"]["lines"][name] = curves.measure(suite, curve, rates, small=options.quick)
            write_atomic(options.json, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            say(f"{name:<12} {curves.line(results['curves']['lines'][name])}")


if __name__ == "__main__":
    main()
