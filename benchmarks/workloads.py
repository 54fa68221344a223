"""What is measured: the workloads, the tokens of each, and the marks they are to reach.

A job is one side's work as JSON: the same texts and token ids go to every side, and every step has the same number of
tokens. Texts are random words that are one token each, so that a text of n words is n tokens for whoever tokenises it.
Prompts are unlike one another: they share the template's system line and nothing else.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, Literal

from ascent.inference.chat import Renderer
from ascent.records import Message

RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
BETA = 0.04
"""Weight of the KL term of GRPO on all sides, that of its paper (arXiv 2402.03300): a step scores its samples with the
reference too. TRL's default is 0, which saves that pass on every side, and is measured as a workload of its own."""
DPO_BETA = 0.1
SFT_LENGTHS = (20, 38, 62, 92, 108, 122, 134, 144, 154, 163, 172, 181, 190, 200, 214, 230)
Quantity = Literal["time", "memory", "share"]


@dataclass(frozen=True)
class Target:
    """A mark: how many times faster, or how many times less memory, than the best of `peers`; or a share of a peak."""

    quantity: Quantity
    reach: float
    peers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Workload:
    """One step's work. `prompts` of `prompt_tokens` are sampled `group` times for `new_tokens`; sft has `lengths`."""

    name: str
    title: str
    kind: Literal["grpo", "sft", "dpo", "sampling"]
    targets: tuple[Target, ...]
    peers: tuple[str, ...] = ()
    prompts: int = 0
    prompt_tokens: int = 0
    group: int = 1
    new_tokens: int = 0
    lengths: tuple[int, ...] = ()
    rank: int = RANK
    beta: float = 0.0

    @property
    def tokens(self) -> int:
        """What a step's speed is counted in: tokens of its sequences, or, when sampling, new tokens."""
        if self.kind == "sft":
            return sum(self.lengths)
        rows = self.prompts * self.group
        return rows * self.new_tokens if self.kind == "sampling" else rows * (self.prompt_tokens + self.new_tokens)


TRL, TRL_CHECKPOINTED, TRL_PACKED = "trl", "trl, gradient checkpointing", "trl, packing"
TRANSFORMERS, VLLM = "transformers generate", "vllm"


def grpo(
    name: str,
    prompt_tokens: int,
    title: str,
    targets: tuple[Target, ...] = (Target("time", 7, (TRL,)),),
    peers: tuple[str, ...] = (TRL,),
    beta: float = BETA,
) -> Workload:
    """A GRPO step on 4 prompts × 8 samples × 48 tokens."""
    return Workload(
        name, title, "grpo", targets, peers, prompts=4, prompt_tokens=prompt_tokens, group=8, new_tokens=48, beta=beta
    )


WORKLOADS = (
    grpo(
        "grpo-360",
        360,
        "GRPO step, 4 prompts of 360 tokens × 8 samples × 48 tokens",
        (Target("time", 10, (TRL,)), Target("memory", 5, (TRL,))),
        (TRL, TRL_CHECKPOINTED),
    ),
    grpo("grpo-70", 70, "GRPO step, 4 prompts of 70 tokens × 8 samples × 48 tokens"),
    grpo(
        "grpo-70-no-kl",
        70,
        "GRPO step without KL term, 4 prompts of 70 tokens × 8 samples × 48 tokens",
        beta=0.0,
    ),
    Workload(
        "sft",
        "SFT step, 16 sequences of 20 to 230 tokens, mean 139, every token a target",
        "sft",
        (Target("time", 4, (TRL, TRL_PACKED)),),
        (TRL, TRL_PACKED),
        lengths=SFT_LENGTHS,
    ),
    Workload(
        "dpo",
        "DPO step with its reference, 8 pairs, prompts of 300 tokens, answers of 60",
        "dpo",
        (Target("time", 6, (TRL,)),),
        (TRL,),
        prompts=8,
        prompt_tokens=300,
        group=2,
        new_tokens=60,
        beta=DPO_BETA,
    ),
    Workload(
        "sampling",
        "sampling 32 sequences, prompts of 300 tokens shared by 8, 48 new tokens",
        "sampling",
        (Target("time", 6, (TRANSFORMERS,)), Target("time", 1.2, (VLLM,))),
        (TRANSFORMERS, VLLM),
        prompts=4,
        prompt_tokens=300,
        group=8,
        new_tokens=48,
    ),
    Workload(
        "arithmetic",
        "training step, 8,192 tokens packed from sequences of 256, every token a target",
        "sft",
        (Target("share", 0.45),),
        lengths=(256,) * 32,
    ),
)


def quick(workload: Workload) -> Workload:
    """The same kind of work, small: to see that everything runs."""
    small = {"prompts": min(workload.prompts, 2), "prompt_tokens": min(workload.prompt_tokens, 64)}
    small |= {"group": min(workload.group, 2), "new_tokens": min(workload.new_tokens, 8)}
    return Workload(**{**vars(workload), **small, "lengths": tuple(n // 4 for n in workload.lengths[:4])})


def job(workload: Workload, renderer: Renderer, steps: int, *, seed: int = 0) -> dict[str, Any]:
    """Return a workload as JSON, with texts and token ids for `steps` steps (the warm-up included)."""
    words = Words(renderer, seed)
    found: dict[str, Any] = {
        "kind": workload.kind,
        "model": str(renderer.folder),
        "rank": workload.rank,
        "alpha": workload.rank * ALPHA / RANK,
        "lr": LEARNING_RATE,
        "beta": workload.beta,
        "prompts": workload.prompts,
        "group": workload.group,
        "prompt_tokens": workload.prompt_tokens,
        "new_tokens": workload.new_tokens,
        "tokens": workload.tokens,
    }
    if workload.kind == "sft":
        found["sequences"] = [[words.ids(n) for n in workload.lengths] for _ in range(steps)]
    elif workload.kind == "dpo":
        found["pairs"] = [words.pair(workload) for _ in range(workload.prompts)]
    elif workload.kind == "sampling":
        found["prompt_ids"] = [
            [words.ids(workload.prompt_tokens) for _ in range(workload.prompts)] for _ in range(steps)
        ]
    else:
        found["questions"] = [words.question(workload.prompt_tokens) for _ in range(steps * workload.prompts)]
    return found


class Words:
    """Draws texts of an exact number of tokens."""

    def __init__(self, renderer: Renderer, seed: int) -> None:
        self._renderer, self._dice = renderer, random.Random(seed)
        vocabulary = sorted(renderer.tokenizer.get_vocab().items(), key=lambda item: item[1])
        plain = [f" {token[1:]}" for token, _ in vocabulary if re.fullmatch("Ġ[a-z]+", token)]
        self._pool = [word for word in plain if len(self._encoded(word)) == 1]

    def text(self, tokens: int) -> str:
        """A text of so many tokens."""
        text = "".join(self._dice.choices(self._pool, k=tokens))
        assert len(self._encoded(text)) == tokens
        return text

    def ids(self, tokens: int) -> list[int]:
        """A text's token ids."""
        return self._encoded(self.text(tokens))

    def question(self, tokens: int) -> str:
        """What a user says for the whole prompt, template included, to have so many tokens."""
        around = len(self._prompt(self._pool[0])) - 1
        text = self.text(max(1, tokens - around))
        assert len(self._prompt(text)) == max(tokens, around + 1)
        return text

    def pair(self, workload: Workload) -> dict[str, Any]:
        """A prompt and two answers that end with the end token, as texts and as ids."""
        end = self._renderer.tokenizer.eos_token
        texts = {"prompt": self.text(workload.prompt_tokens)}
        texts |= {name: self.text(workload.new_tokens - 1) + end for name in ("chosen", "rejected")}
        return texts | {f"{name}_ids": self._encoded(text) for name, text in texts.items()}

    def _encoded(self, text: str) -> list[int]:
        return list(self._renderer.tokenizer.encode(text, add_special_tokens=False))

    def _prompt(self, text: str) -> list[int]:
        return self._renderer.prompt_ids([Message(role="user", content=text)])
