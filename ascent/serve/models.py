"""The directory of what can be called: base models of the store, and deployments that come and go while others run."""

from __future__ import annotations

import asyncio
import builtins
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ascent.inference.engines.named import remote_address
from ascent.inference.export import adapter_base
from ascent.inference.store import ADAPTER_MARK, Store
from ascent.records import ModelCard
from ascent.records.errors import BadInput, UnknownName
from ascent.serve.chat.metered import Metered, Shadowed
from ascent.serve.chat.remote import RemoteModel
from ascent.serve.chat.types import CallRecord, ChatModel
from ascent.serve.wire.arns import id_of

if TYPE_CHECKING:
    from ascent.customize.embeddings.embedder import Embedder
    from ascent.inference.serving.engine import ServingEngine
    from ascent.inference.serving.request import EngineStats
    from ascent.serve.chat.local import LocalModel, Voice
    from ascent.serve.wire import Caller

EVERYONE = "*"
"""The owner of deployments that all callers may call."""
DRAIN_S = 600.0  # the longest that an engine without deployments waits for its last requests

MakeEngine = Callable[[Path, str], "ServingEngine"]
Route = Callable[[str, "Caller"], tuple[str, str | None] | None]
"""From a called id to the one that answers, and perhaps one that only sees the request; None for what is no alias."""


@dataclass(frozen=True)
class Target:
    """What a deployment answers with: a model of the store or its folder, or `remote:URL#MODEL`.

    `key` is the bearer key that a remote server asks for.
    """

    model: str
    key: str | None = None


@dataclass(frozen=True)
class Deployment:
    """What can be called under `name`. `kind` is base, merged, adapter, remote or embedder; `created` is in seconds."""

    name: str
    owner: str
    target: Target
    kind: str
    created: float


class Models:
    """Finds what answers a model id, and keeps the engines that do.

    Engines are loaded when first called, one for each base folder, and shared by all adapters of it. One that nothing
    can call any more is closed after its last answer.

    Args:
        store: where models lie.
        engine: makes the engine of a folder; the default takes `ServingEngine`'s own settings.
        route: resolves aliases before anything is looked up.
        longest_s: the most seconds that an answer may take, waiting included; None sets no limit.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        engine: MakeEngine | None = None,
        route: Route | None = None,
        longest_s: float | None = None,
    ):
        self.store, self.route, self._longest_s = store or Store(), route, longest_s
        self.on_call: list[Callable[[CallRecord], None]] = []
        self._make_engine = engine or _serving_engine
        self._lock = threading.RLock()
        self._deployed: dict[tuple[str, str], tuple[Deployment, ChatModel | None]] = {}
        # Held by the models that answer with them: an engine goes when the last of those has.
        self._engines: weakref.WeakValueDictionary[Path, _Loaded] = weakref.WeakValueDictionary()
        self._bases: dict[str, ChatModel] = {}
        self._embedders: dict[Path, Embedder] = {}
        self._loading: dict[Path, threading.Lock] = {}
        self._number = itertools.count()
        self._known: tuple[int, builtins.list[ModelCard]] = (-1, [])

    def deploy(self, name: str, target: Target, owner: str) -> Deployment:
        """Make a model callable under `name`; its weights are loaded before this returns.

        A deployment of the same name is replaced: calls from now on meet the new one, running ones end with the old.

        Raises:
            UnknownName: there is no such model.
            BadInput: the model cannot be served, or is an adapter of another base.
        """
        if (address := remote_address(target.model)) is not None:
            return self._enter(name, owner, target, "remote", RemoteModel(*address, id=name, key=target.key))
        folder = self.store.resolve(target.model)
        if (folder / "modules.json").is_file():
            self._embedder(folder)
            return self._enter(name, owner, target, "embedder", None)
        if (folder / ADAPTER_MARK).is_file():
            base = adapter_base(folder, self.store)
            return self._enter(name, owner, target, "adapter", self._adapter(base, folder, name))
        kind = "base" if (card := self._card(folder.name)) is None else card.kind
        return self._enter(name, owner, target, kind, self._whole(folder, name))

    def undeploy(self, name: str, owner: str) -> None:
        """Take a deployment away. Running answers end as if nothing had happened; then what it used is let go.

        Raises:
            UnknownName: the owner has no such deployment.
        """
        with self._lock:
            if self._deployed.pop((owner, name), None) is None:
                raise UnknownName("deployment", name, [known for whose, known in self._deployed if whose == owner])

    def find(self, model_id: str, caller: Caller) -> ChatModel:
        """Return the model of an id or ARN: the caller's own deployment, one for everyone, or a base model.

        May load weights, which takes seconds.

        Raises:
            UnknownName: there is none that this caller may see.
            BadInput: it is an embedder.
        """
        name = id_of(model_id)
        with self._lock:
            if (found := self._visible(name, caller)) is not None:
                if found[1] is None:
                    raise BadInput(f"{name!r} is an embedder and cannot chat; ask /v1/embeddings")
                return found[1]
        card = self._stored(name, caller)
        if card.kind == "embedder":
            raise BadInput(f"{name!r} is an embedder and cannot chat; ask /v1/embeddings")
        folder = self.store.models / card.id
        if (model := self._bases.get(card.id)) is None:
            if card.kind == "adapter":
                model = self._adapter(adapter_base(folder, self.store), folder, name)
            else:
                model = self._whole(folder, name)
            model = self._bases.setdefault(card.id, model)
        return model

    def open(self, model_id: str, caller: Caller, operation: str) -> ChatModel:
        """Return the model that a call of `operation` meets, aliases resolved; each answer is reported when it ends.

        Raises:
            UnknownName, BadInput: as `find`.
        """
        name = id_of(model_id)
        chosen, shadow = (self.route(name, caller) if self.route is not None else None) or (name, None)
        model = self.find(chosen, caller)
        metered = Metered(model, name, caller, operation, self._report, self._longest_s)
        if shadow is None:
            return metered
        other = Metered(self.find(shadow, caller), name, caller, "Shadow", self._report, self._longest_s)
        return Shadowed(metered, other)

    async def opened(self, model_id: str, caller: Caller, operation: str) -> ChatModel:
        """As `open`, without holding up the event loop where weights must be loaded or a registry asked."""
        if self.route is None and self._warm(id_of(model_id), caller):
            return self.open(model_id, caller, operation)
        return await asyncio.to_thread(self.open, model_id, caller, operation)

    def deployment(self, name: str, caller: Caller) -> Deployment | None:
        """Return what is deployed under a name for this caller, if anything is."""
        with self._lock:
            found = self._visible(name, caller)
        return None if found is None else found[0]

    def embedder(self, model_id: str, caller: Caller) -> Embedder:
        """Return an embedder of the store, or a deployed one. May load weights.

        Raises:
            UnknownName: there is none that this caller may see.
            BadInput: the model is no embedder.
        """
        name = id_of(model_id)
        with self._lock:
            found = self._visible(name, caller)
        if found is not None and found[0].kind == "embedder":
            return self._embedder(self.store.resolve(found[0].target.model))
        card = None if found is not None else self._stored(name, caller)
        if card is None or card.kind != "embedder":
            raise BadInput(f"{name!r} makes no embeddings; `ascent models list` shows which models are embedders")
        return self._embedder(self.store.models / card.id)

    def report_embedding(self, model_id: str, caller: Caller, tokens: int, seconds: float) -> None:
        """Report a call of an embedder, which has a prompt only."""
        name = id_of(model_id)
        self._report(
            CallRecord(caller.owner, caller.key_id, name, name, "openai:Embeddings", tokens, 0, 0, seconds, None, "ok")
        )

    def list(self, caller: Caller) -> builtins.list[Deployment]:  # `list` is this method's name in the class
        """Return what this caller may call: deployments first, then base models and embedders of the store."""
        with self._lock:
            found = [each for (owner, _), (each, _) in self._deployed.items() if caller.admin or owner in _own(caller)]
        names = {each.name for each in found}
        for card in self._cards():
            name = card.id.partition("@")[0]
            if name not in names and _public(card, caller):
                found.append(Deployment(name, EVERYONE, Target(card.id), card.kind, _seconds(card.created)))
                names.add(name)
        return found

    def stats(self) -> dict[str, EngineStats]:
        """Return the statistics of each engine that runs, by its folder's name."""
        with self._lock:
            return {folder.name: loaded.engine.stats() for folder, loaded in self._engines.items()}

    def drain(self, timeout_s: float) -> bool:
        """Wait until no engine has a request; False when some still had one after `timeout_s`."""
        until = time.monotonic() + timeout_s
        with self._lock:
            engines = [loaded.engine for loaded in self._engines.values()]
        for engine in engines:
            engine.drain(0.0)  # none takes more while another one still has some
        return all([engine.drain(max(0.0, until - time.monotonic())) for engine in engines])

    def close(self) -> None:
        """Stop all engines; what still runs ends as cancelled."""
        with self._lock:
            loaded = list(self._engines.values())
            self._deployed.clear()
            self._bases.clear()
            self._engines.clear()
        for each in loaded:
            if each.retire is not None and each.retire.detach() is not None:
                each.engine.close()

    def _warm(self, name: str, caller: Caller) -> bool:
        """Whether a model can be given without loading anything."""
        with self._lock:
            if self._visible(name, caller) is not None:
                return True
        card = self._card(name)
        return card is None or card.id in self._bases

    def _cards(self) -> builtins.list[ModelCard]:
        """The store's cards, read again when a model came or went."""
        try:
            changed = self.store.models.stat().st_mtime_ns
        except FileNotFoundError:
            return []
        if changed != self._known[0]:
            self._known = (changed, self.store.list())
        return self._known[1]

    def _enter(self, name: str, owner: str, target: Target, kind: str, model: ChatModel | None) -> Deployment:
        deployment = Deployment(name, owner, target, kind, time.time())
        with self._lock:
            self._deployed[owner, name] = (deployment, model)
        return deployment

    def _visible(self, name: str, caller: Caller) -> tuple[Deployment, ChatModel | None] | None:
        for owner in _own(caller):
            if (found := self._deployed.get((owner, name))) is not None:
                return found
        if caller.admin:
            return next((found for (_, known), found in self._deployed.items() if known == name), None)
        return None

    def _card(self, name: str) -> ModelCard | None:
        """A card by its id or its name up to the `@`, never by a path: names come from callers."""
        found = [card for card in self._cards() if name in (card.id, card.id.partition("@")[0])]
        return found[-1] if found else None

    def _stored(self, name: str, caller: Caller) -> ModelCard:
        card = self._card(name)
        if card is None or not _public(card, caller):
            raise UnknownName("model", name, sorted(each.name for each in self.list(caller)))
        return card

    def _whole(self, folder: Path, name: str) -> ChatModel:
        loaded = self._loaded(folder)
        return loaded.model(None, name)

    def _adapter(self, base: Path, folder: Path, name: str) -> ChatModel:
        loaded = self._loaded(base)
        key = f"{name}#{next(self._number)}"  # its own, so that a replaced one can end its answers
        loaded.engine.load_adapter(key, folder)
        model = loaded.model(key, name)
        # Whoever still answers with it holds it: the adapter leaves when the last answer has.
        weakref.finalize(model, _unload, loaded.engine, key).atexit = False
        return model

    def _loaded(self, folder: Path) -> _Loaded:
        """Return the engine of a folder, loaded once however many ask at the same time."""
        folder = folder.resolve()
        with self._lock:
            lock = self._loading.setdefault(folder, threading.Lock())
        with lock:
            if (loaded := self._engines.get(folder)) is None:
                from ascent.serve.chat.local import Voice

                engine = self._make_engine(folder, folder.name)
                loaded = _Loaded(engine, Voice(engine))
                loaded.retire = weakref.finalize(loaded, _retire, engine)
                loaded.retire.atexit = False
                with self._lock:
                    self._engines[folder] = loaded
            return loaded

    def _embedder(self, folder: Path) -> Embedder:
        from ascent.customize.embeddings.embedder import Embedder

        with self._lock:
            lock = self._loading.setdefault(folder, threading.Lock())
        with lock:
            if folder not in self._embedders:
                self._embedders[folder] = Embedder.load(folder)
            return self._embedders[folder]

    def _report(self, record: CallRecord) -> None:
        for listener in self.on_call:
            listener(record)


@dataclass(eq=False)
class _Loaded:
    """An engine and what its models share."""

    engine: ServingEngine
    voice: Voice
    retire: weakref.finalize[..., _Loaded] | None = None

    def model(self, adapter: str | None, id: str) -> LocalModel:
        """Return a model that keeps this engine alive."""
        from ascent.serve.chat.local import LocalModel

        model = LocalModel(self.engine, adapter, id, self.voice)
        model.holds = self
        return model


def _serving_engine(folder: Path, name: str) -> ServingEngine:
    from ascent.inference.serving.engine import ServingEngine

    return ServingEngine(folder, name)


def _own(caller: Caller) -> tuple[str, str]:
    """The owners whose deployments a caller sees, the caller's own first."""
    return caller.owner, EVERYONE


def _public(card: ModelCard, caller: Caller) -> bool:
    """Whether a caller may call a model of the store by its name: what somebody tuned is theirs to deploy."""
    return (card.kind in ("base", "embedder") and not card.source.startswith("registry:")) or caller.admin


def _seconds(created: str) -> float:
    try:
        return datetime.fromisoformat(created).timestamp()
    except ValueError:
        return 0.0


def _unload(engine: ServingEngine, adapter: str) -> None:
    threading.Thread(target=engine.unload_adapter, args=(adapter,), name="unload", daemon=True).start()


def _retire(engine: ServingEngine) -> None:
    """Close an engine that nothing can call any more, once its last requests have ended."""

    def close() -> None:
        engine.drain(DRAIN_S)
        engine.close()

    threading.Thread(target=close, name="retire", daemon=True).start()
