r"""The remote engine: any server of the OpenAI protocol, such as vLLM or llama.cpp.

A request that fails for good becomes completions with `FinishReason.error`: one bad item does not end a run.

For a vLLM whose answers equal the embedded engine's, adapters included (tests/oracles/test_vllm.py starts one):

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve FOLDER --enable-lora --max-lora-rank 16 \
        --logprobs-mode processed_logprobs
"""

from __future__ import annotations

import hashlib
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

from ascent.inference.engine import Completion, Prompt, Sampling
from ascent.records import FinishReason, Message
from ascent.records.errors import AscentError, BadInput, Unavailable

if TYPE_CHECKING:
    from ascent.inference.chat import Renderer

ATTEMPTS = 5
BACK_OFF_S = 0.5
LONGEST_WAIT_S = 60.0
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
# Where these are absent vLLM takes them from the checkpoint's generation_config.json, llama.cpp its own defaults.
WHOLE_DISTRIBUTION = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# Wanted but not part of every server's protocol; one that a server refuses by name is left out from then on.
OPTIONAL_FIELDS = ("return_token_ids", "logprobs", "stop_token_ids", *WHOLE_DISTRIBUTION)
FULL = re.compile(r"(context|maximum model) length")
PROBE_TOP = 5
BROKEN_OFF = frozenset({"content_filter", "abort", "error"})
LENDING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and --enable-lora"
# What a server says about an adapter, whose fault that is, and what to do.
ADVICE: tuple[tuple[str, type[AscentError], str], ...] = (
    ("already been loaded", BadInput, "unload that adapter first or choose another name"),
    ("served base model", BadInput, "choose another name"),
    ("No adapter found", BadInput, "the server opens the folder itself, so it must exist there under the same path"),
    ("cannot be found", BadInput, "GET /v1/models lists what the server has loaded"),
    ("max_lora_rank", Unavailable, "start the server with a --max-lora-rank of at least the adapter's rank"),
    ("LoRA is not enabled", Unavailable, "start the server with --enable-lora"),
    ("Not Found", Unavailable, f"only vLLM lends adapters while it runs; start it with {LENDING}"),
)


class RemoteEngine:
    """Samples from an OpenAI-compatible server. `model` is the model's name on that server."""

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        timeout_s: float = 60,
        parallel: int = 8,
        *,
        attempts: int = ATTEMPTS,
        back_off_s: float = BACK_OFF_S,
        renderer: Renderer | None = None,
    ) -> None:
        """Describe the server; nothing is sent yet.

        Args:
            base_url: with or without the closing `/v1`.
            model: the model's name on that server.
            api_key: sent as a bearer token.
            timeout_s: how long the server may stay silent, per request.
            parallel: requests in flight at once.
            attempts: tries per request when the server is overloaded, failing or out of reach.
            back_off_s: pause before the second try; it doubles with each further one. A `Retry-After` header
                goes before it. No pause is longer than 60 s.
            renderer: of the checkpoint that the server runs. With it prompts are rendered here and sent as token
                ids, so that continued prompts are never tokenised again; the server must take those (vLLM does).
        """
        root = base_url.rstrip("/")
        self.url = root if root.endswith("/v1") else f"{root}/v1"
        self.model = self._base = model
        self.renderer = renderer
        self.timeout_s, self.parallel, self.attempts, self.back_off_s = timeout_s, parallel, attempts, back_off_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._refused: frozenset[str] = frozenset()
        self._used: frozenset[str] = frozenset()
        self._scaled: bool | None = None
        self._local = threading.local()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_done: Callable[[int], None] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Return `sampling.n` completions per prompt, in prompt order; failures are completions too.

        Token ids and log-probs are filled in where the server returns both for every token (vLLM does) and the
        log-probs are those at the sampling temperature before any `top_p` cut; otherwise both are empty. vLLM gives
        them at temperature 1 unless it runs with `--logprobs-mode processed_logprobs`, and then after the cut; two
        requests of one token find out which, when it matters. A continued prompt goes to the completions endpoint
        as token ids when it is whole or there is a renderer, and as messages otherwise. A server that answers with
        fewer than `n` choices is asked again for the rest. `on_done` and `on_group` are called from worker threads,
        one call at a time.

        Raises:
            BadInput: the renderer cannot render a prompt.
        """
        lock = threading.Lock()
        logps = bool(prompts) and self._gives_logps(sampling)

        def work(index: int) -> list[Completion]:
            prompt = prompts[index]
            # a prompt's own seed is its own stream, wherever the prompt stands
            place = (sampling.seed, index) if prompt.seed is None else (prompt.seed, 0)
            seed = _stream_seed(*place, prompt)
            found = self._samples(prompt, seed, sampling, logps)
            with lock:
                if on_done is not None:
                    for _ in found:
                        on_done(1)
                if on_group is not None:
                    on_group(index, found)
            return found

        pool = ThreadPoolExecutor(max_workers=max(1, min(self.parallel, len(prompts))))
        try:
            return list(pool.map(work, range(len(prompts))))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def load_adapter(self, name: str, folder: Path) -> str:
        """Load a PEFT adapter into the running vLLM and return `name`, the model of this engine's later requests.

        The server reads `folder` now, and again when other adapters had pushed this one out of its memory: leave it
        as it is until it is unloaded. vLLM also keeps what it computed of prompts under an adapter's name and folder
        beyond its unloading, so every new adapter of an engine needs a new name.

        Raises:
            BadInput: the name was used before, or the server finds no adapter in the folder.
            Unavailable: the server cannot be reached, or cannot load this adapter or any.
        """
        if name in self._used:
            raise BadInput(
                f"the adapter name {name!r} was used before, and the server may still hold prompts computed with "
                f"that adapter; choose a new name, such as one with the step's number"
            )
        self._adapter_call("load", {"lora_name": name, "lora_path": str(Path(folder).absolute())})
        self._used |= {name}
        self.model = name
        return name

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter from the server. Where it was this engine's model, that is the first one again.

        Raises:
            BadInput: the server has no such adapter.
            Unavailable: the server cannot be reached or has no adapters.
        """
        self._adapter_call("unload", {"lora_name": name})
        if self.model == name:
            self.model = self._base

    def _adapter_call(self, verb: str, body: dict[str, str]) -> None:
        url = f"{self.url}/{verb}_lora_adapter"
        try:
            answer = self._session().post(url, json=body, timeout=self.timeout_s)
        except requests.RequestException as error:
            raise Unavailable(f"{url}: no answer ({error})") from error
        if answer.ok:
            return
        said = _said(answer)
        kind, advice = next(((kind, advice) for sign, kind, advice in ADVICE if sign in said), (Unavailable, ""))
        problem = f"{url}: adapter {body['lora_name']!r}: the server answered {answer.status_code}: {said}"
        raise kind(f"{problem.rstrip('. ')}; {advice}" if advice else problem)

    def _gives_logps(self, sampling: Sampling) -> bool:
        """Whether the server's log-probs are what `Completion.logps` promises for this sampling."""
        cut = sampling.top_p < 1 and sampling.temperature > 0
        if sampling.temperature in (0, 1) and not cut:
            return True
        if sampling.temperature != 1 and cut:
            return False
        if self._scaled is None:
            self._scaled = self._probe()
        return self._scaled is not None and self._scaled != cut

    def _probe(self) -> bool | None:
        """Whether log-probs follow the temperature: from 1 to 2 the distances between tokens halve, or they stay.

        False when the server shows none, None when it cannot be asked.
        """
        spoken = Prompt((Message(role="user", content="Hello"),))
        seen: list[dict[str, float]] = []
        try:
            for temperature in (1.0, 2.0):
                body = self._body(spoken, Sampling(max_tokens=1, temperature=temperature), 1, 0, True)
                body |= {"logprobs": PROBE_TOP} if "prompt" in body else {"top_logprobs": PROBE_TOP}
                seen.append(_top_logps(self._send(body).json()["choices"][0]))
        except Unavailable:
            return None
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return False
        first, second = ([logps[token] for token in seen[0].keys() & seen[1].keys()] for logps in seen)
        return bool(first) and max(second) - min(second) < 0.75 * (max(first) - min(first))

    def _samples(self, prompt: Prompt, seed: int, sampling: Sampling, logps: bool) -> list[Completion]:
        # Greedy samples are all the same, and some servers refuse n > 1 for them.
        wanted = 1 if sampling.temperature == 0 else sampling.n
        found: list[Completion] = []
        while len(found) < wanted:
            missing = wanted - len(found)
            body = self._body(prompt, sampling, missing, seed + len(found), logps)
            try:
                found += self._ask(body)
            except Unavailable as error:
                if prompt.token_ids and FULL.search(str(error)):
                    failed = Completion("", finish=FinishReason.length, prompt_ids=tuple(body.get("prompt", ())))
                else:
                    failed = Completion("", finish=FinishReason.error, error=str(error))
                found += [failed] * missing
        return (found * sampling.n)[: sampling.n]

    def _body(self, prompt: Prompt, sampling: Sampling, n: int, seed: int, logps: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "n": n,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            **WHOLE_DISTRIBUTION,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if self.renderer is not None:
            body |= {"prompt": self.renderer.tokens_of(prompt), "stop_token_ids": sorted(self.renderer.end_ids)}
        elif prompt.token_ids and not _continues(prompt):
            body["prompt"] = list(prompt.token_ids)
        else:
            body["messages"] = [{"role": message.role, "content": message.content} for message in prompt.messages]
        if logps:
            body |= {"logprobs": 1 if "prompt" in body else True, "return_token_ids": True}
        return body

    def _ask(self, body: dict[str, Any]) -> list[Completion]:
        """Send one request and return its completions, at least one.

        Raises:
            Unavailable: as `_send`, or the server does not answer in the protocol.
        """
        answer = self._send(body)
        try:
            reply = answer.json()
            prompt_ids = body.get("prompt") or reply.get("prompt_token_ids") or ()
            found = [_completion(choice, prompt_ids) for choice in reply["choices"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Unavailable(f"{answer.url}: the answer is not a completion ({error!r}): {_said(answer)}") from error
        if not found:
            raise Unavailable(f"{answer.url}: the answer has no choices")
        return found

    def _send(self, body: dict[str, Any]) -> requests.Response:
        """Send one request, again where that can help.

        Raises:
            Unavailable: the server cannot be reached or refuses.
        """
        url = f"{self.url}/completions" if "prompt" in body else f"{self.url}/chat/completions"
        problem, attempt = "", 0
        while attempt < self.attempts:
            sent = {key: value for key, value in body.items() if key not in self._refused}
            pause = self.back_off_s * 2**attempt * random.uniform(1, 1.25)
            try:
                answer = self._session().post(url, json=sent, timeout=self.timeout_s)
            except requests.RequestException as error:
                problem = f"{url}: no answer ({error})"
            else:
                if answer.ok:
                    return answer
                problem = f"{url}: the server answered {answer.status_code}: {_said(answer)}"
                if refused := _refused_fields(answer, sent):
                    self._refused |= refused
                    continue
                if answer.status_code not in RETRIED:
                    raise Unavailable(problem)
                asked = _retry_after(answer)
                pause = pause if asked is None else asked
            attempt += 1
            if attempt < self.attempts:
                time.sleep(min(pause, LONGEST_WAIT_S))
        raise Unavailable(f"{problem} (after {self.attempts} attempts)")

    def _session(self) -> requests.Session:
        """Return this thread's session; sharing one between threads is not safe."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.headers.update(self._headers)
        session: requests.Session = self._local.session
        return session


def _continues(prompt: Prompt) -> bool:
    """Whether messages follow the assistant's last turn, which only a renderer can turn into tokens."""
    roles = [message.role for message in prompt.messages]
    return "assistant" in roles and roles[-1] != "assistant"


def _refused_fields(answer: requests.Response, sent: dict[str, Any]) -> frozenset[str]:
    if answer.status_code not in (400, 422):
        return frozenset()
    named = set(re.findall(r"\w+", answer.text))
    return frozenset(name for name in OPTIONAL_FIELDS if name in sent and name in named)


def _said(answer: requests.Response) -> str:
    """The message of an error body in OpenAI's or FastAPI's form, or the beginning of any other text."""
    try:
        reply = answer.json()
        said = reply["error"]["message"] if "error" in reply else reply["detail"]
    except (ValueError, TypeError, KeyError):
        said = answer.text
    return str(said)[:300]


def _completion(choice: dict[str, Any], prompt_ids: Sequence[int]) -> Completion:
    logprobs = choice.get("logprobs") or {}
    if "token_logprobs" in logprobs:
        logps = tuple(float(logp) for logp in logprobs["token_logprobs"])
    else:
        logps = tuple(float(token["logprob"]) for token in logprobs.get("content") or ())
    token_ids = tuple(int(token) for token in choice.get("token_ids") or ())
    if len(token_ids) != len(logps):
        token_ids, logps = (), ()
    reason = choice.get("finish_reason")
    error = f"the server ended this answer: {reason}" if reason in BROKEN_OFF else None
    finish = FinishReason.length if reason == "length" else FinishReason.stop
    text = choice["text"] if "text" in choice else (choice.get("message") or {}).get("content")
    return Completion(
        text=text or "",
        token_ids=token_ids,
        logps=logps,
        finish=FinishReason.error if error else finish,
        prompt_ids=tuple(int(token) for token in prompt_ids),
        error=error,
    )


def _top_logps(choice: dict[str, Any]) -> dict[str, float]:
    """The likeliest first tokens of a choice and their log-probs."""
    logprobs = choice["logprobs"]
    if "token_logprobs" in logprobs:
        return dict(logprobs["top_logprobs"][0])
    return {str(one["token"]): float(one["logprob"]) for one in logprobs["content"][0]["top_logprobs"]}


def _retry_after(answer: requests.Response) -> float | None:
    """Return the seconds that a `Retry-After` header asks for, given as a number or as a date."""
    text = answer.headers.get("Retry-After", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _stream_seed(seed: int, index: int, prompt: Prompt) -> int:
    """Give each prompt its own stream, so that two equal prompts of one call do not get equal answers."""
    text = f"{seed}:{index}:{[(message.role, message.content) for message in prompt.messages]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % (1 << 30)
