"""One tuning run: an embedder and pairs become an embedder that finds better, with the measurement that says so."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor

from ascent.customize.data.check import check_leakage
from ascent.customize.data.load import Loaded
from ascent.customize.embeddings.data import Document, Pair, RetrievalSet
from ascent.customize.embeddings.embedder import Embedder, Precision, by_length
from ascent.customize.embeddings.negatives import mine
from ascent.customize.embeddings.objective import ContrastiveBatch, contrastive_batch, info_nce
from ascent.customize.order import items_at
from ascent.customize.recipes import OptimSpec, Part
from ascent.customize.run import StepReport, TrainingRun
from ascent.customize.train import run_card
from ascent.customize.trainer import Optim, Trainer
from ascent.customize.yamlfile import load_yaml
from ascent.evaluate.retrieval import rank, retrieval_report
from ascent.evaluate.statistics import compare
from ascent.records import Change, DataSource, Estimate, Record, Report, RunCard, digest
from ascent.records.errors import BadInput
from ascent.records.files import folder_atomic, recover_folder, sha256_file

CARD = "embedding.json"
METRICS = ("ndcg@10", "recall@10", "mrr@10")
DEPTH = 100


class EmbeddingRecipe(Part):
    """Contrastive tuning of an embedder; all its weights train."""

    model: str
    """Start embedder: a name or id in the store, or a folder."""
    data: Path
    """Pairs: rows with `query`, `positive` and optionally `negatives`."""
    corpus: Path | None = None
    """Documents that hard negatives are also mined from, besides the pairs' own texts."""
    seed: int = 0
    """Seeds the order of the data."""
    precision: Precision = "fp32"
    """Compute type of matrix products; weights, vectors and the loss are fp32 in both."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the pairs."""
    batch_size: int = Field(default=64, ge=2)
    """Pairs per step; every other pair's positive is a negative, so larger batches teach more."""
    chunk: int = Field(default=32, ge=1)
    """Texts computed at once: bounds memory, never changes the result."""
    temperature: float = Field(default=0.05, gt=0)
    """Divides the scores; small values look at the nearest negatives only."""
    negatives: int = Field(default=1, ge=0)
    """Hard negatives per pair: those of its row, then mined ones."""
    mine_every: int = Field(default=25, ge=1)
    """Steps after which negatives are mined anew with the model as it is by then."""
    margin: float = Field(default=0.05, ge=0, le=1)
    """A mined negative scores lower than the positive by this share at least; guards against unmarked answers."""
    checkpoint_every: int = Field(default=25, ge=1)
    """Steps between checkpoints."""
    optim: OptimSpec = OptimSpec(lr=2e-5, schedule="linear", warmup_fraction=0.1)
    """Optimizer."""


class EmbeddingCard(Record):
    """What an embedder was tuned from, on what, and what that changed.

    `weights` is the sha256 of model.safetensors. `before`, `after` and `changes` are empty when nothing was measured;
    they are on the judgements named by `test`, which the training pairs do not touch.
    """

    run: RunCard
    weights: str
    test: DataSource | None = None
    before: dict[str, Estimate] = Field(default_factory=dict)
    after: dict[str, Estimate] = Field(default_factory=dict)
    changes: tuple[Change, ...] = ()


class EmbeddingTrainer(Trainer):
    """The trainer with a contrastive step; optimizer, checkpoints and resuming are those of `Trainer`."""

    def __init__(self, embedder: Embedder, optim: Optim, total_steps: int) -> None:
        super().__init__(cast("Any", embedder), optim, total_steps)
        self.embedder = embedder

    def backward(
        self, batch: ContrastiveBatch, ids: Sequence[Sequence[int]], *, temperature: float, chunk: int
    ) -> tuple[float, float]:
        """Add the gradient of the batch's loss to the parameters; return loss and share of queries that are right.

        Texts pass `chunk` at a time through the encoder, twice: without gradient to get all vectors, then, with the
        loss's gradient at the vectors known, each chunk to carry that on to the weights. By the chain rule that is the
        gradient of the whole batch (Gao et al. 2021, arXiv 2101.06983, section 3), whose activations never exist at
        once.

        Args:
            batch: indices of queries and documents.
            ids: token ids of the batch's texts, queries before documents.
            temperature: of the loss.
            chunk: texts computed at once.
        """
        order = by_length(ids)
        parts = [order[start : start + chunk] for start in range(0, len(order), chunk)]
        whole = len(parts) == 1
        with torch.set_grad_enabled(whole):
            vectors = torch.cat([self.embedder.embed([ids[i] for i in part]) for part in parts])
        leaf = vectors if whole else vectors.requires_grad_()
        placed = leaf[torch.argsort(torch.tensor(order))]
        count = len(batch.queries)
        device = placed.device
        loss, right = info_nce(
            placed[:count], placed[count:], batch.targets_N.to(device), batch.excluded_NC.to(device), temperature
        )
        loss.backward()  # type: ignore[no-untyped-call]
        if not whole:
            gradient = cast("Tensor", leaf.grad)
            for part, slope in zip(parts, torch.split(gradient, chunk), strict=True):
                torch.autograd.backward(self.embedder.embed([ids[i] for i in part]), slope)
        return loss.item(), right.item() / count

    def learn(
        self, batch: ContrastiveBatch, ids: Sequence[Sequence[int]], *, temperature: float, chunk: int
    ) -> dict[str, float]:
        """One optimizer step on a batch. Returns loss, accuracy within the batch, gradient norm and learning rate."""
        loss, accuracy = self.backward(batch, ids, temperature=temperature, chunk=chunk)
        lr = self.optim.lr_at(self.step, self.total_steps)
        for group in self._adam.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self.embedder.parameters, self.optim.clip_norm)
        if torch.isfinite(norm):
            self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": loss, "accuracy": accuracy, "grad_norm": norm.item(), "lr": lr}


@dataclass(frozen=True)
class _Texts:
    """Pairs as indices into tokenised queries and documents. `given` are the negatives of each pair's row."""

    query_ids: list[tuple[int, ...]]
    document_ids: list[tuple[int, ...]]
    pairs: list[tuple[int, int]]
    given: list[list[int]]
    relevant: dict[int, set[int]]

    @classmethod
    def of(cls, pairs: Sequence[Pair], corpus: Sequence[Document], embedder: Embedder) -> _Texts:
        """Number the texts; equal ones are one."""
        queries: dict[str, int] = {}
        documents: dict[str, int] = {}

        def number(seen: dict[str, int], text: str) -> int:
            return seen.setdefault(text, len(seen))

        indexed = [(number(queries, pair.query), number(documents, pair.positive)) for pair in pairs]
        relevant: dict[int, set[int]] = {}
        for query, positive in indexed:
            relevant.setdefault(query, set()).add(positive)
        given = [[number(documents, text) for text in pair.negatives] for pair in pairs]
        for document in corpus:
            number(documents, document.text)
        return cls(
            embedder.tokenise(list(queries), "query"),
            embedder.tokenise(list(documents), "document"),
            indexed,
            given,
            relevant,
        )


def load_embedding_recipe(path: Path) -> EmbeddingRecipe:
    """Read a recipe file; relative paths in it are relative to it.

    Raises:
        BadRecipe: a malformed file, an unknown key (with the nearest valid one) or a value out of range, with its line.
    """
    recipe = load_yaml(path, EmbeddingRecipe)
    changes: dict[str, Any] = {"data": path.parent / recipe.data}
    if recipe.corpus is not None:
        changes["corpus"] = path.parent / recipe.corpus
    if (path.parent / recipe.model).is_dir():
        changes["model"] = str(path.parent / recipe.model)
    return recipe.model_copy(update=changes)


def tune(
    recipe: EmbeddingRecipe,
    start: Path,
    pairs: Loaded[Pair],
    folder: Path,
    *,
    corpus: Loaded[Document] | None = None,
    test: RetrievalSet | None = None,
    report: StepReport | None = None,
) -> EmbeddingCard:
    """Tune and write `folder/model`: a folder in sentence-transformers layout with its card, `embedding.json`.

    A finished run is not repeated: its card is read back. An unfinished one goes on from its checkpoint, bit for bit
    as if it had not stopped (same machine, same number of threads).

    Args:
        recipe: how.
        start: the embedder's folder.
        pairs: what to learn from.
        folder: where the run goes.
        corpus: further documents to mine negatives from.
        test: measured before and after; none of its queries may be among the pairs'.
        report: hears of every step.

    Raises:
        BadData: a training query repeats or resembles one of the test's.
        BadInput: there are fewer than two pairs, or the folder holds a run of another recipe or of other data.
        Interrupted: Ctrl-C; the state is in the checkpoint.
    """
    model = folder / "model"
    identity = _identity(recipe, start, pairs, corpus, test)
    recover_folder(model)
    if (model / CARD).is_file():
        card = EmbeddingCard.from_json((model / CARD).read_bytes())
        if card.run.id != identity:
            raise BadInput(f"{folder} holds the finished run {card.run.id}, not {identity}; give another folder")
        return card
    if len({pair.positive for pair in pairs}) < 2:
        raise BadInput("pairs with at least two different positives are needed, for each is the others' negative")
    if test is not None:
        check_leakage(pairs, test.queries)
    torch.manual_seed(recipe.seed)
    embedder = Embedder.load(start, recipe.precision)
    before = measure(embedder, test, recipe.model, "before") if test else None
    steps = max(1, math.ceil(recipe.epochs * len(pairs) / recipe.batch_size))
    trainer = EmbeddingTrainer(embedder, recipe.optim.optim, steps)
    run = TrainingRun(folder, checkpoint_every=recipe.checkpoint_every, identity=identity, report=report)
    train_contrastive(trainer, recipe, pairs.rows, corpus.rows if corpus else (), run)
    after = measure(embedder, test, f"{recipe.model}+{identity}", "after") if test else None
    sources = (pairs.source, *((corpus.source,) if corpus else ()))
    with folder_atomic(model) as scratch:
        embedder.save(start, scratch)
        card = EmbeddingCard(
            run=run_card("embedding", recipe, recipe.model, recipe.seed, sources, run, trainer.step),
            weights=sha256_file(scratch / "model.safetensors"),
            test=test.source if test else None,
            before=before.metrics if before else {},
            after=after.metrics if after else {},
            changes=tuple(compare(before, after, metric) for metric in METRICS) if before and after else (),
        )
        (scratch / CARD).write_text(card.to_json(indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(run.checkpoint, ignore_errors=True)
    return card


def train_contrastive(
    trainer: EmbeddingTrainer,
    recipe: EmbeddingRecipe,
    pairs: Sequence[Pair],
    corpus: Sequence[Document],
    run: TrainingRun,
) -> None:
    """Train for the trainer's total steps; the negatives in use rest in the run's state, so that resuming is exact."""
    embedder = trainer.embedder
    texts = _Texts.of(pairs, corpus, embedder)
    for step in run.steps(trainer):
        if recipe.negatives and step % recipe.mine_every == 0:
            run.state["negatives"] = _negatives(embedder, texts, recipe)
        rows = items_at(step * recipe.batch_size, recipe.batch_size, len(pairs), recipe.seed)
        hard = [run.state["negatives"][row] if recipe.negatives else [] for row in rows]
        batch = contrastive_batch([texts.pairs[row] for row in rows], hard, texts.relevant)
        ids = [*(texts.query_ids[at] for at in batch.queries), *(texts.document_ids[at] for at in batch.documents)]
        metrics = trainer.learn(batch, ids, temperature=recipe.temperature, chunk=recipe.chunk)
        run.log(step, trainer.total_steps, sum(len(row) for row in ids), metrics)


def measure(embedder: Embedder, test: RetrievalSet, model: str, stage: str) -> Report:
    """Return how well an embedder finds the judged documents of a test's queries in its whole corpus."""
    started = time.monotonic()
    queries, corpus = test.queries.rows, test.corpus.rows
    asked = embedder.encode([query.query for query in queries], role="query")
    texts = embedder.encode([document.text for document in corpus], role="document")
    ranked = rank(asked, texts, [document.id for document in corpus], DEPTH)
    return retrieval_report(
        {query.id: query.query for query in queries},
        dict(zip((query.id for query in queries), ranked, strict=True)),
        test.qrels,
        model=model,
        stage=stage,
        data=test.source,
        metrics=METRICS,
        groups={query.id: query.group for query in queries if query.group is not None},
        seconds=time.monotonic() - started,
    )


def _negatives(embedder: Embedder, texts: _Texts, recipe: EmbeddingRecipe) -> list[list[int]]:
    """The negatives of every pair: those of its row first, then mined ones up to the recipe's number."""
    kept = [row[: recipe.negatives] for row in texts.given]
    if all(len(row) == recipe.negatives for row in kept):
        return kept
    queries_QD = embedder.embed_all(texts.query_ids, recipe.chunk).numpy()
    documents_CD = embedder.embed_all(texts.document_ids, recipe.chunk).numpy()
    mined = mine(
        queries_QD[[query for query, _ in texts.pairs]],
        documents_CD,
        texts.pairs,
        texts.relevant,
        count=recipe.negatives,
        margin=recipe.margin,
    )
    return [list(dict.fromkeys([*own, *found]))[: recipe.negatives] for own, found in zip(kept, mined, strict=True)]


def _identity(
    recipe: EmbeddingRecipe,
    start: Path,
    pairs: Loaded[Pair],
    corpus: Loaded[Document] | None,
    test: RetrievalSet | None,
) -> str:
    """Name a run by recipe, start weights and the bytes of its data; where the files lie does not matter."""
    content = recipe.model_dump(mode="json", exclude={"model", "data", "corpus", "chunk", "checkpoint_every"})
    files = [pairs.source.sha256, corpus.source.sha256 if corpus else ""]
    judged = [test.source.sha256, test.queries.source.sha256, test.corpus.source.sha256] if test else []
    weights = [sha256_file(file) for file in sorted(start.glob("*.safetensors"))]
    return f"embedding-{digest([content, weights, files, judged])[:12]}"
