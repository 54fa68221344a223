"""The serving engine: one thread that runs the requests of all callers and adapters as one batch.

Each step runs every answering row's last token and a stretch of the waiting prompts through the model, draws, and hands
the tokens over. Requests enter in the order they came and leave when they end, are cancelled or run out of time.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ascent.inference.chat import Renderer
from ascent.inference.decoder import load_decoder
from ascent.inference.machine import this_machine
from ascent.inference.sampling.weights import Packed, Weights
from ascent.inference.serving.adapters import AdaptedWeights, Adapter
from ascent.inference.serving.choose import Choice, allowed_tokens, choose
from ascent.inference.serving.forward import PagedCache, Part, forward
from ascent.inference.serving.kernels import release_threads
from ascent.inference.serving.pages import PAGE, Pages
from ascent.inference.serving.request import EngineStats, Finish, Generation, Running, Token, wake
from ascent.inference.serving.schedule import Row, Rows
from ascent.records.errors import AscentError, BadInput, Busy, Unavailable, UnknownName

CACHE_BYTES, CACHE_SHARE = 2 << 30, 0.25  # of the free memory at most, unless `cache_tokens` says otherwise
STALL_S = 0.08  # what prompts may add to a step while others answer
ALONE, LEAST = 512, 32  # prompt tokens of a step when nobody answers, and at least
STEADY = 0.2  # weight of the newest step in running means
RETRY_S = (1.0, 60.0)
COUNTED = ("requests", "finished", "cancelled", "prompt_tokens", "completion_tokens", "cached_tokens", "steps")


class ServingEngine:
    """Runs one base and its adapters. All methods may be called from any thread.

    Attributes:
        name: the base's name, which adapters must name as theirs.
        renderer: the chat renderer of the base.
        context, vocab: tokens a prompt and its answer may have together; ids are below `vocab`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        rows: int = 32,
        waiting: int = 256,
        cache_tokens: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Load a Hugging Face folder of the store and start the engine's thread.

        Args:
            folder: the base's folder.
            name: the base's name.
            rows: requests that run at once.
            waiting: requests that may wait beside them before `submit` raises `Busy`.
            cache_tokens: tokens whose keys and values are held, of running requests and for reuse; default: 2 GiB
                worth, less where that is more than a quarter of the free memory or than all rows can use.
            dtype: the compute type.
        """
        decoder = load_decoder(folder, dtype)
        config = decoder.config
        self.name, self.renderer = name, Renderer(folder)
        self.context, self.vocab = config.context, config.vocab
        self._bases = (name, folder.name)
        self._weights = AdaptedWeights(Weights(decoder, Packed()))
        token_bytes = 2 * config.layers * config.kv_heads * config.head_size * dtype.itemsize
        if cache_tokens is None:
            held = int(min(CACHE_BYTES, CACHE_SHARE * this_machine().free)) // token_bytes
            cache_tokens = min(held, rows * self.context)
        self._pages = Pages(max(1, cache_tokens // PAGE))
        like = torch.empty(0, dtype=dtype, device=decoder.device)
        self._cache = PagedCache(config, self._pages.count, like)
        self._rows, self._limit = Rows(self._pages, rows), waiting
        self._root = self._pages.root()
        self._roots: dict[tuple[int, str], int] = {}  # of the prefix cache, by those of base or adapter, and tenant
        self._adapters: dict[str, Adapter] = {}
        self._counts: Counter[str] = Counter()
        self._rate, self._answers_s, self._service_s = 2000.0, 0.02, 1.0
        self._steps = threading.Condition()  # guards everything below, the waiting rows and the adapters
        self._incoming: list[Row] = []
        self._draining = self._closing = False
        self._failure: BaseException | None = None
        self._threads = torch.get_num_threads()
        release_threads()
        self._thread = threading.Thread(target=self._run, name=f"serving {name}", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread runs."""
        return self._failure is None and self._thread.is_alive()

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make an adapter callable; one of the same name is replaced for new requests. Running requests go on.

        Raises:
            BadInput: it was made for another base.
            Corrupt: a file of it is missing or malformed.
        """
        with self._steps:
            root = self._pages.root()
        adapter = self._weights.load(name, folder, self._bases, root)
        release_threads()
        with self._steps:
            self._forget(name)
            self._adapters[name] = adapter

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests of an adapter; its memory is free when those that run have ended.

        Raises:
            UnknownName: no adapter of that name is loaded.
        """
        with self._steps:
            if name not in self._adapters:
                raise UnknownName("adapter", name, self._adapters)
            self._forget(name)

    def submit(self, generation: Generation) -> Running:
        """Queue a request.

        Raises:
            BadInput: it has an unknown token or exceeds the context or the cache; or its adapter is not loaded.
            Busy: as many requests as may wait are waiting.
            Unavailable: the engine was drained or closed, or has failed.
        """
        self._check(generation)
        row = Row(Running(generation), None, self._root, _uniforms(generation), list(generation.prompt_ids))
        with self._steps:
            if not self.healthy:
                raise Unavailable(f"the engine of {self.name!r} has failed or was closed; start it again")
            if self._draining:
                raise Unavailable(f"the engine of {self.name!r} is shutting down; try again later or elsewhere")
            if generation.adapter is not None:
                row.adapter = self._adapters.get(generation.adapter)
                if row.adapter is None:
                    raise UnknownName("adapter", generation.adapter, self._adapters)
                row.root = row.adapter.root
            row.root = self._roots.setdefault((row.root, generation.tenant), self._pages.root())
            waiting = len(self._incoming) + len(self._rows.waiting)
            room = max(0, self._rows.limit - len(self._rows.flying))
            if waiting >= self._limit + room:
                wait_s = min(max(self._service_s * (waiting + 1) / self._rows.limit, RETRY_S[0]), RETRY_S[1])
                raise Busy(
                    f"{waiting} requests are waiting for {self.name!r} already; try again in {wait_s:.0f} s",
                    retry_after_s=wait_s,
                )
            self._incoming.append(row)
            self._counts["requests"] += 1
            self._steps.notify_all()
        return row.run

    def stats(self) -> EngineStats:
        """Return counts since the start and what is there now."""
        with self._steps:
            rows, pages, counts = self._rows, self._pages, self._counts
            return EngineStats(
                running=len(rows.flying),
                waiting=len(self._incoming) + len(rows.waiting),
                preempted=rows.preempted,
                cache_tokens=pages.count * PAGE,
                cache_used=pages.used * PAGE,
                cache_kept=pages.kept * PAGE,
                adapters=tuple(sorted(self._adapters)),
                **{name: counts[name] for name in COUNTED},
            )

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the others to end; return whether they did in time."""
        with self._steps:
            self._draining = True
            return self._steps.wait_for(lambda: not self.healthy or not self._busy(), timeout_s)

    def close(self) -> None:
        """End the thread; requests that still run fail with `Unavailable`. Drain first to let them end."""
        with self._steps:
            self._closing = True
            self._steps.notify_all()
        self._thread.join()

    def _forget(self, name: str) -> None:
        if (gone := self._adapters.pop(name, None)) is not None:
            self._roots = {key: root for key, root in self._roots.items() if key[0] != gone.root}

    def _check(self, generation: Generation) -> None:
        prompt, most = generation.prompt_ids, generation.max_tokens
        total = len(prompt) + most
        if total > self.context:
            raise BadInput(
                f"the prompt has {len(prompt)} tokens and max_tokens is {most}; together they exceed the context of "
                f"{self.context}. Shorten the prompt or lower max_tokens"
            )
        if total > self._pages.count * PAGE:
            raise BadInput(
                f"the prompt has {len(prompt)} tokens and max_tokens is {most}; together they exceed the "
                f"{self._pages.count * PAGE} tokens of this engine's cache. Lower max_tokens, or give the engine more "
                f"cache_tokens"
            )
        if min(prompt) < 0 or max(prompt) >= self.vocab:
            raise BadInput(f"prompt token ids must be from 0 to {self.vocab - 1}; got {min(prompt)} to {max(prompt)}")

    def _busy(self) -> bool:
        return bool(self._incoming or self._rows.flying or self._rows.waiting)

    def _run(self) -> None:
        """The thread. A failure of it ends every request and is shown by `threading.excepthook`."""
        torch.set_num_threads(self._threads)  # a new thread would begin with the machine's number
        try:
            with torch.inference_mode():
                while self._next():
                    self._step()
        except BaseException as error:
            with self._steps:
                self._failure = error
            self._fail(f"the engine of {self.name!r} failed ({type(error).__name__}: {error}); start it again")
            raise
        self._fail(f"the engine of {self.name!r} was closed; ask again elsewhere")

    def _next(self) -> bool:
        """Wait for work, take what was submitted, and let go what is over; False when the engine closes."""
        with self._steps:
            if not self._busy():
                release_threads()
            self._steps.wait_for(lambda: self._closing or self._busy())
            if self._closing:
                return False
            self._rows.waiting += self._incoming
            self._incoming.clear()
            now = time.monotonic()
            over = [(row, finish) for row in self._rows.all() if (finish := _over(row, now)) is not None]
            self._end(over, now)
            self._rows.enter(now)
        wake(row.run for row, _ in over)
        return True

    def _step(self) -> None:
        """Compute the next tokens of the rows in flight, draw where a row's tokens are all computed, and deliver."""
        began = time.monotonic()
        with self._steps:
            answering = any(row.answers for row in self._rows.flying)
            budget = max(LEAST, min(ALONE, int(self._rate * STALL_S))) // LEAST * LEAST
            planned = self._rows.plan(budget if answering else ALONE)
        if not planned:
            return
        planned.sort(key=lambda one: -1 if one[0].adapter is None else one[0].adapter.root)
        parts = [
            Part(row.tokens[row.computed : row.computed + count], row.computed, row.pages, row.adapter)
            for row, count in planned
        ]
        drawing = [at for at, (row, count) in enumerate(planned) if row.computed + count == len(row.tokens)]
        hidden_BD = forward(self._weights, self._cache, parts, drawing)
        rows = [planned[at][0] for at in drawing]
        over: list[tuple[Row, Finish | AscentError]] = []
        choices, faults = self._choices(rows)
        tokens = choose(hidden_BD, self._weights.weights, choices) if rows else []
        now = time.monotonic()
        with self._steps:
            for row, count in planned:
                self._rows.advance(row, count)
            for row, token in zip(rows, tokens, strict=True):
                finish = faults.get(row) or self._deliver(row, token, now)
                if finish is not None:
                    over.append((row, finish))
            self._end(over, now)
            self._counts["steps"] += 1
            self._measure(sum(count for row, count in planned if count > 1), now - began)
        wake(row.run for row in rows)

    def _measure(self, prefilled: int, seconds: float) -> None:
        """Learn how fast prompts are computed beside the answers of a step."""
        if prefilled >= LEAST:
            self._rate += STEADY * (prefilled / max(seconds - self._answers_s, seconds / 4) - self._rate)
        elif not prefilled:
            self._answers_s += STEADY * (seconds - self._answers_s)

    def _choices(self, rows: Sequence[Row]) -> tuple[list[Choice], dict[Row, AscentError]]:
        """How each row draws, and the rows whose constraint failed."""
        choices: list[Choice] = []
        faults: dict[Row, AscentError] = {}
        for row in rows:
            generation, allowed = row.run.generation, None
            if generation.constraint is not None:
                try:
                    mask = generation.constraint.allowed()
                    allowed = None if mask is None else allowed_tokens(mask, self.vocab)
                except (ValueError, RuntimeError) as error:
                    faults[row] = _broken(row, error)
            uniform = row.uniforms[row.drawn] if generation.temperature > 0 else 0.0
            choices.append(Choice(generation.temperature, generation.top_p, uniform, generation.top_logprobs, allowed))
        return choices, faults

    def _deliver(self, row: Row, token: Token, now: float) -> Finish | AscentError | None:
        """Give a row its token and say why it is over, if it is."""
        generation = row.run.generation
        if not row.drawn:
            row.first_token_s = now - row.run.submitted_s
            self._counts["prompt_tokens"] += len(generation.prompt_ids)
            self._counts["cached_tokens"] += row.cached
        row.tokens.append(token.id)
        row.run.put(token)
        self._counts["completion_tokens"] += 1
        if generation.constraint is not None:
            try:
                generation.constraint.accept(token.id)
            except (ValueError, RuntimeError) as error:
                return _broken(row, error)
        if token.id in self.renderer.end_ids or token.id in generation.stop_ids:
            return Finish.stop
        return Finish.length if row.drawn == generation.max_tokens else None

    def _end(self, over: Sequence[tuple[Row, Finish | AscentError]], now: float) -> None:
        """Free the places of rows that are over and say so to those who wait for them."""
        self._rows.remove(row for row, _ in over)
        for row, finish in over:
            row.run.finish(finish if isinstance(finish, AscentError) else row.ended(finish, now))
            self._counts["cancelled" if finish is Finish.cancelled else "finished"] += 1
            if finish in (Finish.stop, Finish.length) and row.entered_s is not None:
                self._service_s += STEADY * (now - row.entered_s - self._service_s)
        if over and not self._busy():
            self._steps.notify_all()

    def _fail(self, message: str) -> None:
        with self._steps:
            rows = [*self._rows.all(), *self._incoming]
            self._incoming.clear()
            self._rows.remove(rows)
            for row in rows:
                row.run.finish(Unavailable(message))
            self._steps.notify_all()
        wake(row.run for row in rows)


def _over(row: Row, now: float) -> Finish | None:
    """Whether a row is to leave before it has ended by itself."""
    if row.run.cancelled:
        return Finish.cancelled
    deadline_s = row.run.generation.deadline_s
    return Finish.timeout if deadline_s is not None and now - row.run.submitted_s > deadline_s else None


def _broken(row: Row, error: Exception) -> BadInput:
    return BadInput(f"the constraint failed after {row.drawn} tokens: {error}; correct the schema or grammar")


def _uniforms(generation: Generation) -> list[float]:
    """The request's own uniform numbers, one a token, as in `sampler.py`."""
    if generation.temperature == 0:
        return []
    seed = secrets.randbits(48) if generation.seed is None else generation.seed
    generator = torch.Generator().manual_seed((seed * 1_000_003) % (1 << 63))
    drawn: list[float] = torch.rand(generation.max_tokens, generator=generator).tolist()
    return drawn
