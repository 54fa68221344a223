"""Where an online run's reward comes from: a grader of the program, a reward model, a judge, or a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ascent.customize.agentic.harness import Harness
from ascent.customize.agentic.multiturn import harness_of
from ascent.customize.batch import TrainSequence, collate
from ascent.customize.judging import open_judge
from ascent.customize.loops.online import Sample
from ascent.customize.policy import DTYPES, HEAD, zero_head
from ascent.customize.recipes import OnlineRecipe
from ascent.customize.rollout import Group, reward_of, rollout
from ascent.evaluate.judge import BatchGrader, grade_with
from ascent.evaluate.pool import GraderPool
from ascent.inference.chat import Renderer
from ascent.inference.decoder import load_decoder
from ascent.inference.engine import Engine, Sampling
from ascent.inference.tensors import read_tensors
from ascent.records import Episode, Score, Task, Unscored
from ascent.records.errors import BadInput

REWARD_MODEL = "reward_model"
ENVIRONMENT = "environment"
"""The name under which an environment's own score is a reward."""


class RewardModel:
    """A model that `reward_model` trained, as a grader of whole batches of episodes."""

    name = REWARD_MODEL

    def __init__(self, folder: Path, renderer: Renderer, precision: str = "bf16", token_budget: int = 4096) -> None:
        """Load a reward model's folder.

        Raises:
            BadInput: the folder has no reward head, or its tokenizer is not the policy's.
        """
        if not (folder / HEAD).is_file():
            raise BadInput(f"{folder} has no {HEAD}, so it is no reward model; train one with algorithm: reward_model")
        theirs = Renderer(folder)
        if theirs.tokenizer.get_vocab() != renderer.tokenizer.get_vocab():
            raise BadInput(
                f"{folder} has another tokenizer than the policy, so it would read other words than were written; "
                f"train the "
                "reward model from the policy's own family"
            )
        self._decoder = load_decoder(folder, DTYPES[precision])
        self._head = zero_head(self._decoder)
        self._head.load_state_dict(read_tensors(folder / HEAD))
        self._token_budget = token_budget

    @torch.no_grad()
    def grade(self, pairs: Sequence[tuple[Task, Episode]]) -> list[Score]:
        """Return one score per episode: the head's value at its last token."""
        scores = [Score(name=self.name, unscored=Unscored.no_output)] * len(pairs)
        kept = [i for i, (_, episode) in enumerate(pairs) if episode.token_ids]
        for begin in range(0, len(kept), 64):
            part = kept[begin : begin + 64]
            sequences = [TrainSequence(pairs[i][1].token_ids, pairs[i][1].loss_mask) for i in part]
            batch = collate(sequences)
            hidden = self._decoder.hidden_packed(batch.tokens_T.to(self._decoder.device), batch.tree)
            values = self._head(hidden[batch.last_N.to(hidden.device)].float()).squeeze(-1)
            for i, value in zip(part, values.tolist(), strict=True):
                scores[i] = Score(name=self.name, value=value)
        return scores


@dataclass(frozen=True)
class Rewards:
    """An open source of rewards. `reward` names the score; `batch` grades whole rollouts where workers cannot.

    A `harness` runs each prompt as an episode of an environment instead of asking it once.
    """

    reward: str
    pool: GraderPool
    batch: BatchGrader | None = None
    harness: Harness | None = None

    def sampler(self, engine: Engine) -> Sample:
        """Return what samples and grades groups for the online loop."""

        def sample(tasks: Sequence[Task], sampling: Sampling) -> tuple[list[Group], dict[str, float]]:
            groups = rollout(engine, tasks, self.pool, sampling, self.reward, harness=self.harness)
            graded = groups if self.batch is None else self._graded(groups)
            if self.harness is None:
                return graded, {}
            return graded, {
                "lost": float(sum(group.lost for group in groups)),
                "refilled": float(sum(group.refilled for group in groups)),
            }

        return sample

    def _graded(self, groups: Sequence[Group]) -> list[Group]:
        assert self.batch is not None
        pairs = [(group.task, episode) for group in groups for episode in group.episodes]
        graded = iter(grade_with([self.batch], pairs))
        found = []
        for group in groups:
            episodes = tuple(next(graded) for _ in group.episodes)
            rewards = tuple(reward_of(episode, self.reward) for episode in episodes)
            found.append(replace(group, episodes=episodes, rewards=rewards))
        return found


@contextlib.contextmanager
def open_rewards(
    recipe: OnlineRecipe, renderer: Renderer, folder: Path, announce: Callable[[dict[str, object]], None]
) -> Iterator[Rewards]:
    """Open a recipe's source of rewards; its grader and environment processes end with the block.

    Raises:
        BadInput: the reward model, the judge or the environment cannot be used.
    """
    spec, harness = recipe.reward, None
    graders = [name for name in (spec.grader, spec.gold) if name not in (None, ENVIRONMENT)]
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(GraderPool(recipe.program, [str(name) for name in graders]))
        if recipe.harness is not None:
            h = recipe.harness
            harness = stack.enter_context(harness_of(h.program, h.environment, h.max_turns, h.step_seconds))
        if spec.model is not None:
            model = RewardModel(spec.model, renderer, recipe.precision)
            yield Rewards(model.name, pool, model, harness)
        elif spec.judge is not None:
            judge, check = open_judge(spec.judge, folder)
            announce(
                {
                    "judge": judge.engine.model,
                    "agreement": check.value if check else f"overridden: {spec.judge.override}",
                }
            )
            yield Rewards(judge.name, pool, judge, harness)
        else:
            yield Rewards(spec.grader or "none", pool, harness=harness)
