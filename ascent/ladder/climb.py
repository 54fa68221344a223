"""The climb: stage by stage, each justified before it starts and measured before it counts.

    for each stage:  gate before → train → measure on the held-out items → gate after → maybe a new champion

Every stage's outcome rests on disk before the next begins; `--resume` reads it back and never runs it twice.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascent.ladder.evidence import Evidence, Inventory, Probe, Spend, VerifierCheck
from ascent.ladder.gates import after_stage, before_stage
from ascent.ladder.measure import Candidate, calibrate, engine_of, mark_tuned, tuned_candidate
from ascent.ladder.runs import CLIMB, USECASE, ClimbRecord, StageRecord, read_climb, read_stage_report
from ascent.ladder.stages import pairs_from_samples, recipe_of
from ascent.ladder.usecase import StageSpec, UseCase
from ascent.ladder.workspace import Workspace, check_context, open_workspace
from ascent.observe.progress import Progress
from ascent.records import Decision, Preference, Report, RunCard, Verdict
from ascent.records.errors import BadInput
from ascent.records.files import write_atomic

if TYPE_CHECKING:
    from ascent.customize.rollout import Group

SAMPLES_PER_PROMPT = 8
"""Samples per training prompt for preference pairs and for measuring reinforcement's head-room."""

VERIFIER_ITEMS = 100
Say = Callable[[str], None]
StartProgress = Callable[[str, int | None], Progress]


@dataclass(frozen=True)
class ClimbResult:
    """How a climb ended. `stopped` tells that at least one gate said no."""

    run_folder: Path
    champion: str
    champion_folder: Path
    verdicts: tuple[Verdict, ...]
    report_html: Path
    stopped: bool


def climb(
    folder: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    progress: StartProgress = Progress,
    say: Say = lambda line: None,
) -> ClimbResult:
    """Climb the use case in `folder` and write its report.

    Args:
        folder: holds `usecase.yaml`; the run goes to `folder/runs/`.
        seed: seeds adapter initialisation, data order and sampling.
        resume: go on with the latest unfinished run of this seed instead of starting a new one.
        progress: makes the progress line of a task.
        say: hears one line per event.

    Raises:
        BadInput: something in the use case cannot be used; nothing was started.
        Interrupted: Ctrl-C during training; `resume=True` continues from the checkpoint.
    """
    workspace = open_workspace(folder)
    for stage in workspace.usecase.stages:
        if stage.kind != "prompt":  # a bad override is found before anything runs
            recipe_of(workspace.usecase, stage, workspace.usecase.model, seed)
    check_context(workspace, base_folder(workspace.usecase.model, progress))
    run_folder, record = _open_run(workspace, seed, resume)
    ascent = _Ascent(workspace, run_folder, record, progress, say)
    for stage in workspace.usecase.stages:
        ascent.take(stage)
    return ascent.finish()


@dataclass
class _Ascent:
    """The state of one climb: where it is, who is champion, what was spent."""

    workspace: Workspace
    run_folder: Path
    record: ClimbRecord
    progress: StartProgress
    say: Say
    _samples: dict[str, list[Group]] = field(default_factory=dict)

    @property
    def usecase(self) -> UseCase:
        """What is climbed."""
        return self.workspace.usecase

    def take(self, stage: StageSpec) -> None:
        """Take one stage, or skip it when it is already done."""
        done = next((s for s in self.record.stages if s.name == stage.name and s.status != "running"), None)
        if done is not None:
            self.say(f"{stage.name}: finished earlier ({done.status})")
            return
        started = time.monotonic()
        self._write(StageRecord(name=stage.name, row=stage.row, status="running"))
        before = self._before(stage)
        self._tell(before)
        if before.decision is not Decision.GO:
            seconds = time.monotonic() - started
            self._write(
                StageRecord(
                    name=stage.name,
                    row=stage.row,
                    status="refused",
                    verdict_before=before,
                    seconds=seconds,
                    cost=self.usecase.costs.machine(seconds),
                )
            )
            return
        training = time.monotonic()
        candidate, card = self._train(stage)
        unseen = 0.0 if card is None else max(0.0, card.seconds - (time.monotonic() - training))
        candidate, doubt = self._calibrate(stage, candidate)
        report = self._measure(stage, candidate)
        verdict = after_stage(self._champion_report(), report, self.usecase)
        verdict = verdict.model_copy(update={"reasons": (*verdict.reasons, *doubt)})
        self._tell(verdict)
        seconds = time.monotonic() - started + unseen  # a resumed stage also spent time in an earlier process
        from ascent.evaluate.log import write_report

        path = write_report(report, self.run_folder / "reports")
        promoted = verdict.decision is Decision.GO
        if promoted:
            self.record = self.record.model_copy(update={"champion": stage.name})
        self._write(
            StageRecord(
                name=stage.name,
                row=stage.row,
                status="champion" if promoted else "kept out",
                verdict_before=before,
                verdict_after=verdict,
                report=path.relative_to(self.run_folder).as_posix(),
                run_card=f"stages/{stage.name}/run.json" if card else None,
                model=candidate.name,
                seconds=seconds,
                cost=self.usecase.costs.machine(seconds),
            )
        )

    def finish(self) -> ClimbResult:
        """Register the champion in the model store and write the report."""
        from ascent.ladder.report import build_report

        if self.record.champion is None:
            raise BadInput("no stage could be measured, so there is no champion; see the verdicts above")
        candidate = self._candidate(self.record.champion)
        assert candidate.folder is not None
        place = self._register(candidate)
        stamp = self.record.finished or datetime.now(UTC).isoformat(timespec="seconds")
        self.record = self.record.model_copy(update={"finished": stamp})
        self._save()
        html, _ = build_report(self.run_folder)
        verdicts = tuple(
            verdict
            for stage in self.record.stages
            for verdict in (stage.verdict_before, stage.verdict_after)
            if verdict is not None
        )
        stopped = any(verdict.decision is not Decision.GO for verdict in verdicts)
        return ClimbResult(self.run_folder, candidate.name, place, verdicts, html, stopped)

    # ── gates ──────────────────────────────────────────────────────────────────────────────────────────────

    def _before(self, stage: StageSpec) -> Verdict:
        """Gather the evidence for a stage and ask the gate.

        The gate is asked twice where sampling is needed to answer it: sampling costs minutes, and a target that is
        already met makes it pointless.
        """
        champion = self._champion_report()
        spent = Spend(sum(s.seconds for s in self.record.stages), sum(s.cost for s in self.record.stages))
        evidence = Evidence(stage, self.usecase, champion, self.workspace.inventory(), spent=spent)
        needs_samples = stage.kind == "online" or (stage.kind == "dpo" and self.workspace.preferences is None)
        if stage.kind == "prompt":
            return before_stage(evidence)
        if stage.kind == "online":
            evidence = replace(evidence, verifier=self._check_verifier())
        quick = before_stage(replace(evidence, inventory=_plenty(evidence.inventory)) if needs_samples else evidence)
        if quick.decision is not Decision.GO or not needs_samples:
            return before_stage(replace(evidence, forecast=self._forecast(stage)))
        groups = self._sample_champion()
        if stage.kind == "dpo":
            pairs = len(pairs_from_samples(groups))
            evidence = replace(evidence, inventory=replace(evidence.inventory, pairs=pairs))
        else:
            evidence = replace(evidence, probe=probe_of(groups))
        return before_stage(replace(evidence, forecast=self._forecast(stage)))

    def _check_verifier(self) -> VerifierCheck | None:
        """Try the reward on reference answers: the right one must score above another item's answer."""
        from ascent.evaluate.pool import GraderPool
        from ascent.inference.engine import Completion

        train, labelled, reward = self.workspace.train, self.workspace.labelled, self.usecase.reward
        if train is None or labelled is None or reward is None:
            return None
        shown_by_id = {shown.id: shown for shown in train}
        known = [(t, shown_by_id[t.id]) for t in labelled if t.expected and t.id in shown_by_id][:VERIFIER_ITEMS]
        pairs, others = [], []
        for index, (task, shown) in enumerate(known):
            wrong = next((d for t, d in known[index + 1 :] + known[:index] if t.expected != task.expected), None)
            if wrong is not None:
                pairs.append((task, Completion(shown.messages[-1].content)))
                others.append((task, Completion(wrong.messages[-1].content)))
        from ascent.customize.rollout import reward_of
        from ascent.evaluate.suite import episode_of

        with GraderPool(self.workspace.program_path, [reward]) as pool:
            graded = pool.grade([(task, episode_of(task, c, "reference")) for task, c in pairs + others])
        values = [reward_of(episode, reward) for episode in graded]
        half = len(pairs)
        agreed = sum(right > wrong for right, wrong in zip(values[:half], values[half:], strict=True))
        return VerifierCheck(items=half, agreed=agreed)

    def _forecast(self, stage: StageSpec) -> Spend:
        """Forecast a stage from its own data on this machine; nothing where the data is not there yet."""
        from ascent.customize.plan import plan

        sampled = stage.kind == "dpo" and self.workspace.preferences is None
        if sampled and str(self.record.champion) not in self._samples:
            return Spend()
        needed = {"sft": self.workspace.train, "online": self.workspace.prompts}.get(stage.kind, ())
        if needed is None:
            return Spend()
        start = self._candidate(str(self.record.champion))
        assert start.folder is not None
        recipe = recipe_of(self.usecase, stage, start.name, self.record.seed)
        data = self._training_data(stage)
        if not (data.conversations or data.preferences or data.tasks):
            return Spend()
        found = plan(recipe, start.folder, data, price_per_hour=self.usecase.costs.machine_per_hour)
        return Spend(seconds=found.total_seconds, cost=found.cost or 0.0)

    # ── work ───────────────────────────────────────────────────────────────────────────────────────────────

    def _train(self, stage: StageSpec) -> tuple[Candidate, RunCard | None]:
        """Train the stage from the champion's weights; the prompted stage trains nothing."""
        if stage.kind == "prompt":
            return self._candidate(stage.name), None
        from ascent.customize.plan import plan, record_outcome
        from ascent.customize.train import train

        start = self._candidate(str(self.record.champion))
        assert start.folder is not None
        recipe = recipe_of(self.usecase, stage, start.name, self.record.seed)
        folder = self.run_folder / "stages" / stage.name
        data = self._training_data(stage)
        with self.progress(f"{stage.name}: training", None) as line:

            def report(step: int, total: int, numbers: dict[str, float]) -> None:
                tokens = int(numbers.pop("tokens", 0))
                shown = {k: v for k, v in numbers.items() if k in SHOWN}
                line.update(step, total=total, tokens=tokens, **shown)

            def announce(facts: dict[str, object]) -> None:
                self.say(f"{stage.name}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))

            planned = plan(recipe, start.folder, data)
            card = train(recipe, start.folder, data, folder, report=report, announce=announce)
            record_outcome(planned, card, folder)
        mark_tuned(folder / "model", self.usecase, stage.name, self.run_folder.name)
        gc.collect()
        return self._candidate(stage.name), card

    def _training_data(self, stage: StageSpec) -> Any:
        from ascent.customize.train import TrainingData

        workspace = self.workspace
        if stage.kind == "sft":
            assert workspace.train is not None
            conversations = [row.messages for row in workspace.train]
            return TrainingData(conversations=conversations, sources=(workspace.relative(workspace.train.source),))
        if stage.kind == "dpo":
            if workspace.preferences is not None:
                pairs: list[Preference] = list(workspace.preferences)
                return TrainingData(preferences=pairs, sources=(workspace.relative(workspace.preferences.source),))
            return TrainingData(preferences=pairs_from_samples(self._sample_champion()), sources=self._prompt_source())
        assert workspace.prompts is not None
        return TrainingData(tasks=workspace.prompts.rows, sources=self._prompt_source())

    def _calibrate(self, stage: StageSpec, candidate: Candidate) -> tuple[Candidate, tuple[str, ...]]:
        """Give a tuned model its abstention threshold, and say in a sentence what it rests on."""
        validation = self.workspace.validation
        if self.usecase.abstain is None or validation is None or not candidate.tuned or candidate.folder is None:
            return candidate, ()
        with self.progress(f"{stage.name}: calibrating", len(validation)) as line:
            chosen = calibrate(engine_of(candidate), self.usecase, validation, line.advance)
        mark_tuned(candidate.folder, self.usecase, stage.name, self.run_folder.name, chosen.below)
        return self._candidate(stage.name), (chosen.sentence,)

    def _measure(self, stage: StageSpec, candidate: Candidate) -> Report:
        """Answer every held-out item greedily and grade it."""
        from ascent.evaluate.pool import GraderPool
        from ascent.evaluate.suite import evaluate
        from ascent.inference.engine import Sampling

        tests = self.workspace.test_tuned if candidate.tuned else self.workspace.test_prompted
        engine = engine_of(candidate)
        with (
            GraderPool(self.workspace.program_path, self.workspace.graders) as pool,
            self.progress(f"{stage.name}: measuring", len(tests)) as line,
        ):
            return evaluate(
                engine,
                tests.rows,
                pool,
                sampling=Sampling(max_tokens=self.usecase.sampling.max_tokens, temperature=0),
                data=self.workspace.relative(tests.source),
                stage=stage.name,
                on_done=line.advance,
                abstain_below=candidate.abstain_below,
            )

    def _sample_champion(self) -> list[Group]:
        """Sample the champion on the training prompts, once for each champion."""
        champion = str(self.record.champion)
        if champion in self._samples:
            return self._samples[champion]
        from ascent.customize.rollout import rollout
        from ascent.evaluate.pool import GraderPool
        from ascent.inference.engine import Sampling

        prompts, reward = self.workspace.prompts, self.usecase.reward
        if prompts is None or reward is None:
            return []
        candidate = self._candidate(champion)
        sampling = Sampling(n=SAMPLES_PER_PROMPT, max_tokens=self.usecase.sampling.max_tokens, seed=self.record.seed)
        graders = [reward, self.usecase.metrics.primary.name]
        with (
            GraderPool(self.workspace.program_path, graders) as pool,
            self.progress(f"{champion}: sampling", len(prompts) * sampling.n) as line,
        ):
            groups = rollout(engine_of(candidate), prompts.rows, pool, sampling, reward, line.advance)
        self._samples = {champion: groups}
        return groups

    # ── books ──────────────────────────────────────────────────────────────────────────────────────────────

    def _candidate(self, stage: str) -> Candidate:
        spec = self.usecase.stage(stage)
        assert spec is not None
        if spec.kind == "prompt":
            return Candidate(self.record.model, base_folder(self.record.model, self.progress), False)
        name = f"{self.usecase.name}-{stage}-seed{self.record.seed}"
        return tuned_candidate(name, self.run_folder / "stages" / stage / "model", self.usecase)

    def _champion_report(self) -> Report | None:
        found = next((s for s in self.record.stages if s.name == self.record.champion), None)
        return None if found is None else read_stage_report(self.run_folder, found)

    def _prompt_source(self) -> tuple[Any, ...]:
        prompts = self.workspace.prompts
        return () if prompts is None else (self.workspace.relative(prompts.source),)

    def _register(self, candidate: Candidate) -> Path:
        """Copy the champion into the model store; the prompted base is there already."""
        from ascent.inference.store import Store
        from ascent.records import ModelCard

        assert candidate.folder is not None
        if not candidate.tuned:
            return candidate.folder
        store = Store()
        base = store.card(self.record.model)
        card = ModelCard(
            id=candidate.name,
            family=base.family,
            source=f"tuned from {base.id}",
            licence=base.licence,
            sha256="",
            kind="merged",
            parent=base.id,
            parameters=base.parameters,
            dtype="bfloat16",
            context=base.context,
            run=self.run_folder.name,
        )
        return store.add(candidate.folder, card)

    def _tell(self, verdict: Verdict) -> None:
        extra = f" {verdict.collect:,}" if verdict.decision is Decision.COLLECT else ""
        self.say(f"{verdict.stage}, gate {verdict.phase}: {verdict.decision.value}{extra}")
        for reason in verdict.reasons:
            self.say(f"  {reason}")

    def _write(self, stage: StageRecord) -> None:
        others = [s for s in self.record.stages if s.name != stage.name]
        self.record = self.record.model_copy(update={"stages": (*others, stage)})
        self._save()

    def _save(self) -> None:
        write_atomic(self.run_folder / CLIMB, self.record.to_json(indent=1))


SHOWN = ("loss", "reward", "kl", "entropy", "clip_fraction", "informative_groups", "margin", "accuracy", "nll")


def probe_of(groups: list[Group]) -> Probe:
    """Measure reinforcement's head-room on sampled groups: mixed rewards, pass@1 and pass@k of the primary metric."""
    from ascent.evaluate.statistics import pass_at_k

    k = len(groups[0].episodes) if groups else 1
    primary = [name for name in (s.name for s in groups[0].episodes[0].scores)][-1] if groups else ""
    pass_1, pass_k = [], []
    for group in groups:
        scores = [episode.score(primary) for episode in group.episodes]
        right = sum(1 for score in scores if score is not None and score.value == 1)
        pass_1.append(right / k)
        pass_k.append(pass_at_k(k, right, k))
    count = max(1, len(groups))
    return Probe(
        groups=len(groups),
        informative=sum(group.informative for group in groups),
        k=k,
        pass_1=sum(pass_1) / count,
        pass_k=sum(pass_k) / count,
    )


def base_folder(model: str, progress: StartProgress) -> Path:
    """Find the base model in the store, pulling it when the catalogue has it."""
    from ascent.inference.pull import pull
    from ascent.inference.store import Store
    from ascent.records.errors import UnknownName

    store = Store()
    try:
        return store.resolve(model)
    except UnknownName:
        if model not in store.catalogue():
            raise
    with progress(f"pulling {model}", None) as line:
        return pull(model, store, lambda done, total: line.update(done, total=total))


def _open_run(workspace: Workspace, seed: int, resume: bool) -> tuple[Path, ClimbRecord]:
    """Start a run folder, or find the one to resume."""
    runs = workspace.usecase.folder / "runs"
    stem = f"seed{seed}"
    taken = sorted((p for p in runs.glob(f"{stem}*") if (p / CLIMB).is_file()), key=lambda p: read_climb(p).started)
    if resume and taken:
        return taken[-1], read_climb(taken[-1])
    number = len(list(runs.glob(f"{stem}*"))) + 1
    folder = runs / (stem if number == 1 else f"{stem}-{number}")
    folder.mkdir(parents=True, exist_ok=False)
    write_atomic(folder / USECASE, workspace.usecase.model_dump_json(indent=1))
    from ascent.customize.train import machine, package_versions

    record = ClimbRecord(
        use_case=workspace.usecase.name,
        model=workspace.usecase.model,
        seed=seed,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        data=workspace.sources(),
        commands=(f"ascent climb {workspace.usecase.folder.name} --seed {seed}",),
        machine=machine(),
        versions=package_versions(),
    )
    write_atomic(folder / CLIMB, record.to_json(indent=1))
    return folder, record


def _plenty(inventory: Inventory) -> Inventory:
    """The inventory as if pairs were abundant: tells whether another reason already speaks against sampling."""
    return replace(inventory, pairs=1_000_000)
