"""The blind trainer: it sums micro-batch losses, steps the optimizer, and can be stopped and resumed bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ascent.customize import parallel
from ascent.customize.batch import TokenBatch
from ascent.customize.objectives.losses import Objective
from ascent.customize.policy import Policy
from ascent.inference.tensors import read_tensors, write_tensors
from ascent.records import digest
from ascent.records.errors import Corrupt
from ascent.records.files import folder_atomic, recover_folder, sha256_file

Schedule = Literal["constant", "linear", "cosine"]
STATE, TENSORS = "state.json", "state.safetensors"


@dataclass(frozen=True)
class Optim:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with warm-up and a schedule over all steps."""

    lr: float
    schedule: Schedule = "cosine"
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0…total−1: linear warm-up, then the schedule down to a tenth (cosine) or zero."""
        warmup = max(1, round(self.warmup_fraction * total))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - warmup) / max(1, total - warmup)
        if self.schedule == "linear":
            return self.lr * (1 - done)
        return self.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


class Trainer:
    """Owns the optimizer state of a policy.

    Processes that train together each keep the moments of their own share of the parameters (ZeRO stage 1, Rajbhandari
    et al. 2020, arXiv 1910.02054 §5.1), update those, and send them to the others.

    A resumed run repeats an uninterrupted one bit for bit on the same machine with the same number of threads: sums
    over threads round by their number.
    """

    def __init__(self, policy: Policy, optim: Optim, total_steps: int) -> None:
        self.policy, self.optim, self.total_steps = policy, optim, total_steps
        self.step = 0
        self._owners = parallel.share([parameter.numel() for parameter in policy.parameters])
        self._owned = self._owners[parallel.rank()]
        self._adam = torch.optim.AdamW(
            [policy.parameters[index] for index in self._owned],
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            foreach=True,
        )

    def update(
        self,
        batches: Sequence[TokenBatch],
        objective: Objective,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> dict[str, float]:
        """One optimizer step over the micro-batches of one global batch.

        The weights inside the batches contain 1/N of the global batch, so losses and gradients are summed.

        Returns:
            loss, gradient norm, learning rate and the objective's metrics.
        """
        sums: dict[str, list[float]] = {}
        loss = 0.0
        for batch in parallel.my_batches(batches):
            out = objective(self.policy.measure(batch, temperature=temperature, entropy=entropy), batch)
            out.loss.backward()  # type: ignore[no-untyped-call]
            loss += out.loss.item()
            for name, (numerator, denominator) in out.metrics.items():
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += numerator.item()
                total[1] += denominator.item()
        parallel.sum_gradients(self.policy.parameters)
        loss, sums = _summed(parallel.gathered((loss, sums)))
        lr = self.optim.lr_at(self.step, self.total_steps)
        for group in self._adam.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters, self.optim.clip_norm)
        if torch.isfinite(norm):
            self._adam.step()
            parallel.spread(self.policy.parameters, self._owners)
        for parameter in self.policy.parameters:
            parameter.grad = None
        self.step += 1
        ratios = {name: top / bottom if bottom else math.nan for name, (top, bottom) in sums.items()}
        return {"loss": loss, "grad_norm": norm.item(), "lr": lr, **ratios}

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write an atomic checkpoint: trainable tensors, optimizer moments, step, RNG and the loop's `extra` state.

        Of processes that train together all must call it, and the first one writes.
        """
        moments = {
            f"adam.{index}.{name}": value.detach().contiguous()
            for index in self._owned
            for name, value in self._adam.state.get(self.policy.parameters[index], {}).items()
        }
        parts = parallel.to_first(moments)
        if parallel.rank() != 0:
            return
        with folder_atomic(folder) as scratch:
            tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
            for index, parameter in enumerate(self.policy.parameters):
                tensors[f"parameter.{index}"] = parameter.detach().contiguous()
            for part in parts:
                tensors |= part
            write_tensors(scratch / TENSORS, tensors)
            state = {"step": self.step, "extra": extra, "tensors": sha256_file(scratch / TENSORS)}
            (scratch / STATE).write_text(json.dumps({"state": state, "sha256": digest(state)}), encoding="utf-8")

    def load(self, folder: Path) -> dict[str, Any] | None:
        """Restore a run's own checkpoint and return its `extra`, or None when there is no checkpoint.

        Raises:
            Corrupt: as `restore`.
        """
        recover_folder(folder)
        if not folder.exists():
            return None
        extra: dict[str, Any] = self.restore(folder)["extra"]
        return extra

    def restore(self, folder: Path) -> dict[str, Any]:
        """Restore a checkpoint and return its state: step, tensors' sha256 and `extra`. The folder is only read.

        Raises:
            Corrupt: a file of the checkpoint is missing, was changed, or does not belong to this policy.
        """
        state = read_state(folder)
        tensors = read_tensors(folder / TENSORS)
        count = len(self.policy.parameters)
        stored = [tensors.get(f"parameter.{index}") for index in range(count)]
        shapes = [None if tensor is None else tensor.shape for tensor in stored]
        if f"parameter.{count}" in tensors or shapes != [parameter.shape for parameter in self.policy.parameters]:
            raise Corrupt(f"{folder} was written for another model or recipe; delete it to start again")
        for index, parameter in enumerate(self.policy.parameters):
            parameter.data.copy_(tensors[f"parameter.{index}"])
            prefix = f"adam.{index}."
            moments = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
            if moments and index in self._owned:
                self._adam.state[parameter] = moments
        torch.set_rng_state(tensors["rng"])
        self.step = state["step"]
        return state


def _summed(parts: Sequence[tuple[float, dict[str, list[float]]]]) -> tuple[float, dict[str, list[float]]]:
    """Add losses, and numerators and denominators of metrics, over processes."""
    sums: dict[str, list[float]] = {}
    for _, part in parts:
        for name, pair in part.items():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += pair[0]
            total[1] += pair[1]
    return sum(loss for loss, _ in parts), sums


def read_state(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's state after checking it and the tensors beside it against their checksums."""
    remedy = "delete the folder to start again"
    try:
        stored = json.loads((folder / STATE).read_bytes())
        state: dict[str, Any] = stored["state"]
        if stored["sha256"] != digest(state):
            raise Corrupt(f"{folder / STATE} does not match its checksum; {remedy}")
        if sha256_file(folder / TENSORS) != state["tensors"]:
            raise Corrupt(f"{folder / TENSORS} does not match its checksum; {remedy}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{folder} is not a whole checkpoint ({error!r}); {remedy}") from error
    return state
