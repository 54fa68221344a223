"""The embedded engine: our decoder, in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ascent.inference.chat import Renderer
from ascent.inference.decoder import Decoder, load_decoder
from ascent.inference.engine import Completion, Prompt, Sampling
from ascent.inference.export import adapter_base
from ascent.inference.lora import load_adapter, merge, policy_hash
from ascent.inference.sampler import Ending, Row, sample_rows
from ascent.inference.sampling.weights import Packed
from ascent.inference.store import ADAPTER_MARK, Store
from ascent.records import FinishReason
from ascent.records.errors import BadInput

ROWS_IN_FLIGHT = 128
SPARE_TOKENS = 8  # a stop string has at most one token a byte; these more may be markers that decode to nothing


class TorchEngine:
    """Samples from a `Decoder`. `model` names the policy; `policy` is the hash of what was last synchronised."""

    def __init__(
        self, decoder: Decoder, renderer: Renderer, model: str, *, rows_in_flight: int = ROWS_IN_FLIGHT
    ) -> None:
        self.decoder, self.renderer, self.model = decoder, renderer, model
        self.rows_in_flight = rows_in_flight
        self.policy = ""
        self._packed = Packed()

    @classmethod
    def load(cls, folder: Path, model: str, dtype: torch.dtype = torch.bfloat16) -> TorchEngine:
        """Load a Hugging Face folder, or an adapter's, merged into its base.

        Raises:
            BadInput: the decoder cannot run the architecture, or the adapter's base is not known.
        """
        if not (folder / ADAPTER_MARK).is_file():
            return cls(load_decoder(folder, dtype), Renderer(folder), model)
        base = adapter_base(folder, Store())
        decoder = load_decoder(base, dtype)
        load_adapter(decoder, folder)
        merge(decoder)
        return cls(decoder, Renderer(base), model)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_done: Callable[[int], None] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample; `on_group` gets the place of a prompt and its completions while others are still sampled.

        Raises:
            BadInput: a fresh prompt and `max_tokens` together exceed the model's context.
        """
        ids = [self.renderer.tokens_of(prompt) for prompt in prompts]
        room = [len(tokens) + sampling.max_tokens <= self.decoder.config.context for tokens in ids]
        for index, (prompt, fits) in enumerate(zip(prompts, room, strict=True)):
            if not fits and not prompt.token_ids:
                raise BadInput(
                    f"prompt {index} has {len(ids[index])} tokens and max_tokens is {sampling.max_tokens}; together "
                    f"they exceed the context of {self.decoder.config.context}. Shorten the prompt or lower max_tokens"
                )
        fitting = [index for index, fits in enumerate(room) if fits]
        done: dict[int, list[Completion]] = {}

        def finish(index: int, completions: list[Completion]) -> None:
            done[index] = completions
            if on_group is not None:
                on_group(index, completions)

        for index in sorted(set(range(len(prompts))) - set(fitting)):
            full = Completion("", finish=FinishReason.length, prompt_ids=tuple(ids[index]))
            finish(index, [full] * sampling.n)
            if on_done is not None:
                on_done(sampling.n)
        self._sample(prompts, ids, fitting, sampling, on_done, finish)
        return [done[index] for index in range(len(prompts))]

    def _sample(
        self,
        prompts: Sequence[Prompt],
        ids: Sequence[list[int]],
        fitting: Sequence[int],
        sampling: Sampling,
        on_done: Callable[[int], None] | None,
        finish: Callable[[int, list[Completion]], None],
    ) -> None:
        """Sample the prompts at the `fitting` places and hand each one's completions to `finish`."""
        if not fitting:
            return

        def on_group(place: int, rows: list[Row]) -> None:
            index = fitting[place]
            finish(index, [self._completion(row, ids[index], sampling) for row in rows])

        sample_rows(
            self.decoder,
            [ids[index] for index in fitting],
            sampling,
            Ending(frozenset(self.renderer.end_ids), self._stopper(sampling.stop)),
            seeds=[_seed_of(prompts[index], sampling.seed, ids[index], index) for index in fitting],
            rows_in_flight=self.rows_in_flight,
            on_done=on_done,
            on_group=on_group,
            packed=self._packed,
        )

    def synchronise(self, trained: Decoder) -> str:
        """Copy the trained policy (base + adapter, merged) into this sampling copy and return its hash."""
        with torch.no_grad():
            for (_, mine), (_, theirs) in zip(self.decoder.linears(), trained.linears(), strict=True):
                delta = theirs.delta()
                merged = theirs.weight if delta is None else theirs.weight.float() + delta
                mine.weight.copy_(merged)
            if trained.embedding.requires_grad:
                for mine_p, theirs_p in zip(_other_weights(self.decoder), _other_weights(trained), strict=True):
                    mine_p.copy_(theirs_p)
        self.policy = policy_hash(trained)
        return self.policy

    def _completion(self, row: Row, prompt_ids: list[int], sampling: Sampling) -> Completion:
        tokens = row.tokens
        stopped = tokens[-1] in self.renderer.end_ids
        text = self.renderer.decode(tokens[:-1] if stopped else tokens)
        cut = self._cut(tokens, sampling.stop) if sampling.stop else None
        finish = FinishReason.stop if stopped or cut is not None else FinishReason.length
        return Completion(
            text=text if cut is None else cut,
            token_ids=tuple(tokens),
            logps=tuple(row.logps),
            finish=finish,
            prompt_ids=tuple(prompt_ids),
        )

    def _stopper(self, stop: tuple[str, ...]) -> Callable[[list[int]], bool] | None:
        """What says whether a stop string has just been completed, from the last tokens that can hold one."""
        if not stop:
            return None
        reach = max(len(word.encode()) for word in stop) + SPARE_TOKENS
        return lambda tokens: self._cut(tokens[-reach:], stop) is not None

    def _cut(self, tokens: list[int], stop: tuple[str, ...]) -> str | None:
        """Return the text before the first stop string, or None when there is none."""
        text = self.renderer.decode(tokens)
        places = [at for at in (text.find(word) for word in stop) if at >= 0]
        return text[: min(places)] if places else None


def stream_seed(seed: int, tokens: Sequence[int], index: int) -> int:
    """A seed for one prompt that depends on the call's seed, the prompt's tokens and its place, nothing else."""
    text = f"{seed}:{index}:{','.join(map(str, tokens))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def _seed_of(prompt: Prompt, seed: int, tokens: Sequence[int], index: int) -> int:
    return stream_seed(seed, tokens, index) if prompt.seed is None else stream_seed(prompt.seed, tokens, 0)


def _other_weights(model: Decoder) -> list[torch.Tensor]:
    """Weights outside the linear layers, which only full fine-tuning changes."""
    weights: list[torch.Tensor] = [model.embedding, model.norm.weight]
    if model.head is not None:
        weights.append(model.head)
    for layer in model.blocks:
        weights += [norm.weight for norm in (layer.norm_attention, layer.norm_mlp, layer.norm_q, layer.norm_k) if norm]
        weights += [part.bias for part in (layer.qkv, layer.out) if part.bias is not None]
    return weights
