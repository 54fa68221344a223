"""The remote engine: any server of the OpenAI chat protocol, such as vLLM or llama.cpp.

A request that fails for good becomes completions with `FinishReason.error`: one bad item does not end a run.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import requests

from ascent.inference.engine import Completion, Prompt, Sampling
from ascent.records import FinishReason
from ascent.records.errors import Unavailable

ATTEMPTS = 5
BACK_OFF_S = 0.5
LONGEST_WAIT_S = 60.0
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
# Wanted but not part of every server's protocol; one that a server refuses by name is left out from then on.
OPTIONAL_FIELDS = ("return_token_ids", "logprobs")


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
        """
        root = base_url.rstrip("/")
        self.url = (root if root.endswith("/v1") else f"{root}/v1") + "/chat/completions"
        self.model = model
        self.timeout_s, self.parallel, self.attempts, self.back_off_s = timeout_s, parallel, attempts, back_off_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._refused: frozenset[str] = frozenset()
        self._local = threading.local()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Return `sampling.n` completions per prompt, in prompt order; failures are completions too.

        Token ids and log-probs are filled in where the server returns both for every token (vLLM does);
        otherwise both are empty. Whether the log-probs are those at the sampling temperature is the server's
        choice. A server that answers with fewer than `n` choices is asked again for the rest. `on_done` is
        called from worker threads, one call at a time.
        """
        lock = threading.Lock()

        def work(index: int) -> list[Completion]:
            prompt = prompts[index]
            place = (
                (sampling.seed, index) if prompt.seed is None else (prompt.seed, 0)
            )  # its own stream, wherever it is
            seed = _stream_seed(*place, prompt)
            found = self._samples(prompt, seed, sampling)
            if on_done is not None:
                with lock:
                    for _ in found:
                        on_done(1)
            return found

        pool = ThreadPoolExecutor(max_workers=max(1, min(self.parallel, len(prompts))))
        try:
            return list(pool.map(work, range(len(prompts))))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _samples(self, prompt: Prompt, seed: int, sampling: Sampling) -> list[Completion]:
        # Greedy samples are all the same, and some servers refuse n > 1 for them.
        wanted = 1 if sampling.temperature == 0 else sampling.n
        found: list[Completion] = []
        while len(found) < wanted:
            missing = wanted - len(found)
            try:
                found += self._ask(self._body(prompt, sampling, missing, seed + len(found)))
            except Unavailable as error:
                found += [Completion(text="", finish=FinishReason.error, error=str(error))] * missing
        return (found * sampling.n)[: sampling.n]

    def _body(self, prompt: Prompt, sampling: Sampling, n: int, seed: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
            "n": n,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "logprobs": True,
            "return_token_ids": True,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        return body

    def _ask(self, body: dict[str, Any]) -> list[Completion]:
        """Send one request, again where that can help, and return its completions, at least one.

        Raises:
            Unavailable: the server cannot be reached, refuses, or does not answer in the protocol.
        """
        problem, attempt = "", 0
        while attempt < self.attempts:
            sent = {key: value for key, value in body.items() if key not in self._refused}
            pause = self.back_off_s * 2**attempt * random.uniform(1, 1.25)
            try:
                answer = self._session().post(self.url, json=sent, timeout=self.timeout_s)
            except requests.RequestException as error:
                problem = f"{self.url}: no answer ({error})"
            else:
                if answer.ok:
                    return _completions(answer, self.url)
                problem = f"{self.url}: the server answered {answer.status_code}: {answer.text[:300]}"
                if refused := _refused_field(answer, sent):
                    self._refused |= {refused}
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


def _refused_field(answer: requests.Response, sent: dict[str, Any]) -> str | None:
    if answer.status_code not in (400, 422):
        return None
    return next((name for name in OPTIONAL_FIELDS if name in sent and name in answer.text), None)


def _completions(answer: requests.Response, url: str) -> list[Completion]:
    try:
        reply = answer.json()
        prompt_ids = tuple(int(token) for token in reply.get("prompt_token_ids") or ())
        found = [_completion(choice, prompt_ids) for choice in reply["choices"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unavailable(f"{url}: the answer is not a chat completion ({error!r}): {answer.text[:300]}") from error
    if not found:
        raise Unavailable(f"{url}: the answer has no choices")
    return found


def _completion(choice: dict[str, Any], prompt_ids: tuple[int, ...]) -> Completion:
    content = (choice.get("logprobs") or {}).get("content") or ()
    logps = tuple(float(token["logprob"]) for token in content)
    token_ids = tuple(int(token) for token in choice.get("token_ids") or ())
    if len(token_ids) != len(logps):
        token_ids, logps = (), ()
    reason = choice.get("finish_reason")
    error = "the server's content filter stopped this answer" if reason == "content_filter" else None
    finish = FinishReason.length if reason == "length" else FinishReason.stop
    return Completion(
        text=(choice.get("message") or {}).get("content") or "",
        token_ids=token_ids,
        logps=logps,
        finish=FinishReason.error if error else finish,
        prompt_ids=prompt_ids,
        error=error,
    )


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
