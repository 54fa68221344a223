"""Oracle: a real vLLM server. The remote engine's answers equal the embedded engine's, adapters included, in fp32.

The server is started from `ASCENT_VLLM_PYTHON`, or from the environment that `make bench` makes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ascent.inference.chat import Renderer
from ascent.inference.decoder import load_decoder
from ascent.inference.engine import Completion, Prompt, Sampling
from ascent.inference.engines.remote import RemoteEngine
from ascent.inference.engines.torch import TorchEngine
from ascent.inference.lora import LoraConfig, attach, load_adapter, merge, save_adapter
from ascent.records import FinishReason, Message
from ascent.records.errors import BadInput, Unavailable

ENVIRONMENT = Path(__file__).parents[2] / "benchmarks/.envs/vllm/bin/python"
PYTHON = Path(os.environ.get("ASCENT_VLLM_PYTHON", ENVIRONMENT))
NAME, CONTEXT, TOLERANCE, START_S = "tiny", 256, 1e-3, 200
OPTIONS = f"""
    --host 127.0.0.1 --served-model-name {NAME} --dtype float32 --max-model-len {CONTEXT} --max-num-seqs 16
    --enforce-eager --enable-lora --max-lora-rank 16 --logprobs-mode processed_logprobs
""".split()
SETTINGS = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else "auto",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
GREEDY = Sampling(max_tokens=12, temperature=0)
QUESTIONS = ["Name a tree.", "How many tablets a day?", "The quick brown fox jumps over"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM at {PYTHON}; `make bench` makes its environment"),
]


@dataclass(frozen=True)
class Served:
    """The server's address, what it serves, and three adapters for it."""

    address: str
    folder: Path
    adapters: dict[str, Path]

    def remote(self, renderer: Renderer | None = None) -> RemoteEngine:
        return RemoteEngine(self.address, NAME, renderer=renderer)

    def embedded(self, adapter: str = "") -> TorchEngine:
        decoder = load_decoder(self.folder, torch.float32)
        if adapter:
            load_adapter(decoder, self.adapters[adapter])
            merge(decoder)
        return TorchEngine(decoder, Renderer(self.folder), NAME)


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("vllm")
    folder = write_model(home / "model", tiny_model)
    adapters = {"a": 16, "b": 8, "wide": 32}
    for seed, (name, rank) in enumerate(adapters.items(), 1):
        write_adapter(home / name, folder, rank, seed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not `vllm serve`: that asks for the version of a package named vllm, and vllm-cpu is not.
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--port", str(port), *OPTIONS]
    settings = {"VLLM_CACHE_ROOT": str(home / "cache"), "VLLM_CONFIG_ROOT": str(home / "config"), **SETTINGS}
    log = home / "log.txt"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, env=os.environ | settings, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield Served(f"http://127.0.0.1:{port}", folder, {name: home / name for name in adapters})
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)  # its engine too, which runs in a process of its own
            server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.5)
    pytest.fail(f"vLLM did not start:\n{log.read_text()[-4000:]}")


def write_model(folder: Path, tokenizer: Path) -> Path:
    """A random Llama whose heads are wide enough for vLLM, and whose generation config asks for greedy answers."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder)
    torch.manual_seed(0)
    base = LlamaConfig.from_pretrained(tokenizer).to_dict()
    wider = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    model = LlamaForCausalLM(LlamaConfig(**base | wider)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.12)
    model.save_pretrained(folder)
    config = folder / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"top_k": 1, "repetition_penalty": 1.5}))
    return folder


def write_adapter(folder: Path, base: Path, rank: int, seed: int) -> None:
    """An adapter that moves the answers: both of its matrices are random."""
    decoder, config = load_decoder(base, torch.float32), LoraConfig(rank=rank, alpha=rank)
    generator = torch.Generator().manual_seed(seed)
    for parameter in attach(decoder, config, seed=seed):
        parameter.data.normal_(0, 0.1, generator=generator)
    save_adapter(decoder, config, folder, NAME)


def asked(*texts: str) -> list[Prompt]:
    return [Prompt((Message(role="system", content="Be short."), Message(role="user", content=text))) for text in texts]


def assert_same(found: list[list[Completion]], wanted: list[list[Completion]]) -> None:
    """The same tokens, texts and endings, and log-probs within the tolerance."""
    for (mine,), (theirs,) in zip(found, wanted, strict=True):
        assert mine.error is None
        assert mine.token_ids == theirs.token_ids and mine.prompt_ids == theirs.prompt_ids
        assert mine.finish == theirs.finish
        # vLLM holds back a character of which not all bytes came; the embedded engine shows it as replaced.
        assert mine.text.rstrip("\ufffd") == theirs.text.rstrip("\ufffd")
        torch.testing.assert_close(torch.tensor(mine.logps), torch.tensor(theirs.logps), atol=TOLERANCE, rtol=0)


def test_greedy_answers_equal_the_embedded_engines(served: Served) -> None:
    wanted = served.embedded().generate(asked(*QUESTIONS), GREEDY)
    assert len({one.token_ids for (one,) in wanted}) == len(QUESTIONS)
    assert_same(served.remote().generate(asked(*QUESTIONS), GREEDY), wanted)
    assert_same(served.remote(Renderer(served.folder)).generate(asked(*QUESTIONS), GREEDY), wanted)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_log_probs_are_those_at_the_temperature(served: Served, temperature: float) -> None:
    """Scored by transformers; under the generation config's own `top_k` every one would be 0."""
    model = LlamaForCausalLM.from_pretrained(served.folder, dtype=torch.float32).eval()
    sampling = Sampling(n=3, max_tokens=8, temperature=temperature, seed=5)
    for group in served.remote().generate(asked(*QUESTIONS), sampling):
        for one in group:
            ids = torch.tensor([one.prompt_ids + one.token_ids])
            with torch.no_grad():
                logits = model(ids).logits[0, len(one.prompt_ids) - 1 : -1]
            scored = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
            assert len(one.logps) == len(one.token_ids) > 0
            torch.testing.assert_close(torch.tensor(one.logps), scored, atol=TOLERANCE, rtol=0)


def test_log_probs_after_a_cut_are_left_out(served: Served) -> None:
    """This server gives log-probs of what `top_p` leaves, and a completion's are those before the cut."""
    (one,) = served.remote().generate(asked("Name a tree."), Sampling(top_p=0.5, max_tokens=4))[0]
    assert one.text and one.error is None and (one.token_ids, one.logps) == ((), ())


def test_seeds_repeat_the_samples_and_every_sample_has_its_own(served: Served) -> None:
    def tokens(seed: int) -> list[tuple[int, ...]]:
        groups = served.remote().generate(asked("Same.", "Same."), Sampling(n=3, max_tokens=8, seed=seed))
        return [one.token_ids for group in groups for one in group]

    once = tokens(1)
    assert len(set(once)) == 6 and once == tokens(1) and not set(once) & set(tokens(2))


def test_stop_strings_end_the_same_answers(served: Served) -> None:
    embedded = served.embedded()
    whole = embedded.generate(asked(QUESTIONS[0]), GREEDY)[0][0].text
    stop = Sampling(max_tokens=12, temperature=0, stop=(whole[3:5],))
    wanted = embedded.generate(asked(QUESTIONS[0]), stop)
    assert wanted[0][0].finish is FinishReason.stop and len(wanted[0][0].text) <= 3
    assert_same(served.remote().generate(asked(QUESTIONS[0]), stop), wanted)


def test_continued_prompts_are_fed_as_they_were_sampled(served: Served) -> None:
    renderer, embedded = Renderer(served.folder), served.embedded()
    first = embedded.generate(asked(QUESTIONS[0]), GREEDY)[0][0]
    ids = first.prompt_ids + first.token_ids
    said = (*asked(QUESTIONS[0])[0].messages, Message(role="assistant", content=first.text))
    turn = [Prompt((*said, Message(role="user", content="And another?")), ids)]
    assert_same(served.remote(renderer).generate(turn, GREEDY), embedded.generate(turn, GREEDY))
    assert_same(served.remote().generate([Prompt(said, ids)], GREEDY), embedded.generate([Prompt(said, ids)], GREEDY))
    full = [Prompt(said, ids * (CONTEXT // len(ids)) + ids)]
    assert served.remote().generate(full, GREEDY) == embedded.generate(full, GREEDY)


def test_refusals_are_completions_with_the_servers_reason(served: Served) -> None:
    (long,) = served.remote().generate(asked("word " * CONTEXT), GREEDY)[0]
    assert long.finish is FinishReason.error and long.error is not None and "maximum" in long.error
    (unknown,) = RemoteEngine(served.address, "nobody").generate(asked("One."), GREEDY)[0]
    assert unknown.error is not None and "answered 404: The model `nobody` does not exist." in unknown.error


def test_loaded_adapters_answer_as_if_merged(served: Served) -> None:
    remote, base = served.remote(), served.embedded().generate(asked(*QUESTIONS), GREEDY)
    answers = {name: served.embedded(name).generate(asked(*QUESTIONS), GREEDY) for name in ("a", "b")}
    for before, after in zip([*base, *answers["a"]], [*answers["a"], *answers["b"]], strict=True):
        assert before[0].token_ids != after[0].token_ids
    for step, name in enumerate(("a", "b"), 1):
        assert remote.load_adapter(f"step-{step}", served.adapters[name]) == remote.model == f"step-{step}"
        assert_same(remote.generate(asked(*QUESTIONS), GREEDY), answers[name])
    remote.unload_adapter("step-1")
    assert remote.model == "step-2"
    remote.unload_adapter("step-2")
    assert remote.model == NAME
    assert_same(remote.generate(asked(*QUESTIONS), GREEDY), base)
    (gone,) = RemoteEngine(served.address, "step-1").generate(asked("One."), GREEDY)[0]
    assert gone.error is not None and "`step-1` does not exist" in gone.error


def test_what_cannot_be_loaded_is_refused_with_advice(served: Served) -> None:
    remote = served.remote()
    remote.load_adapter("taken", served.adapters["a"])
    with pytest.raises(BadInput, match="choose a new name"):
        remote.load_adapter("taken", served.adapters["b"])
    with pytest.raises(BadInput, match=r"already been loaded.*unload that adapter first"):
        served.remote().load_adapter("taken", served.adapters["b"])
    with pytest.raises(BadInput, match="choose another name"):
        remote.load_adapter(NAME, served.adapters["b"])
    with pytest.raises(Unavailable, match=r"rank 32 is greater.*--max-lora-rank"):
        remote.load_adapter("wide", served.adapters["wide"])
    with pytest.raises(BadInput, match="must exist there under the same path"):
        remote.load_adapter("missing", served.folder / "nothing")
    with pytest.raises(BadInput, match="cannot be found"):
        remote.unload_adapter("missing")
    assert remote.model == "taken"
