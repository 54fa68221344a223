"""Chat rendering: messages in, token ids and loss mask out, for training, sampling and serving alike.

The checkpoint's own template decides the text. Where the policy spoke is found by rendering the conversation
up to each assistant turn with the generation prompt; what follows, up to and including the first end token,
is that turn.

A conversation without a system message gets whatever the template puts there: SmolLM2 and Qwen introduce
themselves. Callers who do not want that pass a system message, as every prompt of a use case does.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascent.inference.engine import Prompt
from ascent.records import Message
from ascent.records.errors import BadInput

PAD_TOKENS = ("<|endoftext|>", "<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
_PROBE = (Message(role="user", content="x"), Message(role="assistant", content="y"))
_SPOKEN = "\u2042answer\u2042"  # stands for an assistant text; no user text of a probe contains it


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens; `loss_mask[i]` is True where token i belongs to an assistant turn.

    Each turn's mask covers its text and exactly one end token. White space that the template writes after the
    end token is outside the mask, and is left out altogether after the last turn.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


class Renderer:
    """The chat renderer of one checkpoint.

    Attributes:
        tokenizer: the checkpoint's tokenizer (transformers).
        end_ids: every id that ends an assistant turn: the tokenizer's and the generation config's end tokens,
            and the one that the template writes.
        pad_id: the padding id; it is no end token unless the vocabulary has nothing else to offer.
    """

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer and chat template of a model folder.

        Raises:
            BadInput: the folder has no tokenizer or no chat template, or its template ends no assistant turn.
        """
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{folder}: no tokenizer can be loaded ({error}); give a model folder") from error
        if not self.tokenizer.chat_template:
            raise BadInput(
                f"{folder}: the tokenizer has no chat template, so this is a base model; use an "
                f"instruction-tuned release, or put its chat_template.jinja into the folder"
            )
        separate_pad(self.tokenizer)
        self.folder = folder
        self._special = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.end_ids = self._find_end_ids()
        pad = self.tokenizer.pad_token_id
        self.pad_id = int(pad) if pad is not None else min(self.end_ids)
        self._control = self._find_control_tokens()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation up to where the assistant is to speak.

        Raises:
            BadInput: there is no message, the last one is the assistant's, or the template refuses the
                conversation.
        """
        if not messages or messages[-1].role == "assistant":
            raise BadInput("a prompt must end with a message to the assistant, not by it")
        return self._tokens(messages, generation=True)[0]

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """Return the tokens to sample from: rendered messages, or the prompt's own tokens and what was said since.

        Raises:
            BadInput: as `prompt_ids` and `continuation_ids`.
        """
        if not prompt.token_ids:
            return self.prompt_ids(prompt.messages)
        turns = [index for index, message in enumerate(prompt.messages) if message.role == "assistant"]
        since = prompt.messages[turns[-1] + 1 :] if turns else ()
        if not since:
            return list(prompt.token_ids)
        return [*prompt.token_ids, *self.continuation_ids(since, ended=prompt.token_ids[-1] in self.end_ids)]

    def continuation_ids(self, messages: Sequence[Message], *, ended: bool = True) -> list[int]:
        """Return what the template adds after an assistant turn: glue, `messages`, and the next turn's opening.

        With `ended` the turn already has its end token, else (it was cut short) the end token comes first. The
        turn itself is not looked at, so a template that would rewrite it when others follow does no harm. Control
        tokens inside a text are broken by a space: what a tool says must neither forge a turn nor end the run.

        Raises:
            BadInput: the template refuses messages of these roles after an assistant turn, or drops the turn.
        """
        said = [message.model_copy(update={"content": self._defused(message.content)}) for message in messages]
        text = self._text((_PROBE[0], Message(role="assistant", content=_SPOKEN), *said), True)
        if _SPOKEN not in text:
            raise BadInput(f"{self.folder}: the chat template drops earlier assistant turns; it cannot hold several")
        ids = self._encode(text[text.index(_SPOKEN) + len(_SPOKEN) :])
        end = self._turn_end(ids, 0)
        return ids[end:] if ended else ids[end - 1 :]

    def answer_ids(self, text: str) -> list[int]:
        """Return the tokens of an assistant turn, its end token included, as a model would have to sample them.

        Raises:
            BadInput: as `render`.
        """
        turn = self.render((_PROBE[0], Message(role="assistant", content=text)))
        return [token for token, said in zip(turn.token_ids, turn.loss_mask, strict=True) if said]

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Return a whole conversation as tokens, with the mask of what the assistant said.

        The tokens are those of the tokenizer's `apply_chat_template(tokenize=True)`, less white space after
        the last end token. There is one exception: where an assistant text begins with white space that the
        tokenizer would merge with the generation prompt, the prompt's tokens are kept as they are at
        sampling, because a model can only ever continue those. The tokens before a turn equal `prompt_ids` of
        the messages before it.

        Raises:
            BadInput: the template refuses the conversation, rewrites earlier turns when later ones follow, or
                ends no assistant turn; or a text contains one of the template's control tokens.
        """
        ids, starts = self._tokens(messages, generation=False)
        mask = [False] * len(ids)
        end = 0
        for start in starts:
            end = self._turn_end(ids, start)
            mask[start:end] = [True] * (end - start)
        if messages and messages[-1].role == "assistant" and not self.tokenizer.decode(ids[end:]).strip():
            ids, mask = ids[:end], mask[:end]
        return Rendered(tuple(ids), tuple(mask))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of sampled tokens, without special tokens and otherwise unchanged."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tokens(self, messages: Sequence[Message], *, generation: bool) -> tuple[list[int], list[int]]:
        """Return the conversation's tokens and the positions at which assistant turns begin."""
        self._refuse_control_tokens(messages)
        text = self._text(messages, generation)
        prompts = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                if index == 0:
                    raise BadInput("a conversation cannot begin with an assistant message")
                prompts.append(self._text(messages[:index], True))
                turn = self._text(messages[: index + 1], False) if index + 1 < len(messages) else text
                if not (text.startswith(prompts[-1]) and text.startswith(turn)):
                    raise BadInput(
                        f"{self.folder}: the chat template writes message {index + 1} differently once "
                        "others follow, so the tokens of a turn cannot be told apart; train on "
                        "conversations with one assistant turn, or use a template that keeps earlier turns "
                        "as they were"
                    )
        ids = self._encode(text)
        heads = [self._encode(prompt) for prompt in prompts]
        if all(ids[: len(head)] == head for head in heads):
            return ids, [len(head) for head in heads]
        cuts = [0, *(len(prompt) for prompt in prompts), len(text)]
        ids, starts = [], []
        for begin, end in itertools.pairwise(cuts):
            starts.append(len(ids))
            ids += self._encode(text[begin:end])
        return ids, starts[1:]

    def _turn_end(self, ids: list[int], start: int) -> int:
        for position in range(start, len(ids)):
            if ids[position] in self.end_ids:
                return position + 1
        raise BadInput(
            f"{self.folder}: the chat template writes no end token after an assistant turn, so a model "
            f"trained on it would never stop; correct the template or the tokenizer's eos_token"
        )

    def _text(self, messages: Sequence[Message], generation: bool) -> str:
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise BadInput(f"{self.folder}: the chat template refuses a conversation of {roles}: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _find_end_ids(self) -> frozenset[int]:
        ends = {self.tokenizer.eos_token_id}
        for name in ("generation_config.json", "config.json"):
            ends |= _end_ids_of(self.folder / name)
        ends.discard(None)
        # Some checkpoints end turns with another token than their eos (Gemma's <end_of_turn>): take the
        # template's.
        head = len(self._encode(self._text(_PROBE[:1], True)))
        turn = self._encode(self._text(_PROBE, False))[head:]
        written = next((token for token in turn if token in self._special), None)
        if written is not None:
            ends.add(written)
        if not ends:
            raise BadInput(f"{self.folder}: neither tokenizer nor template has an end token; set eos_token")
        return frozenset(int(end) for end in ends)

    def _find_control_tokens(self) -> tuple[str, ...]:
        """Return the special tokens that structure a conversation; inside a text they would forge a turn."""
        used = set(self._encode(self._text(_PROBE, False))) & self._special
        return tuple(self.tokenizer.convert_ids_to_tokens(sorted(used | (self.end_ids & self._special))))

    def _defused(self, text: str) -> str:
        for token in self._control:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages, 1):
            for token in self._control:
                if token in message.content:
                    raise BadInput(
                        f"message {number} ({message.role}) contains {token!r}, which this model reads as "
                        f"the border of a turn; remove it from the text"
                    )


def separate_pad(tokenizer: Any) -> bool:
    """Give `tokenizer` a pad token that is not an end token; return whether it had to be changed.

    A tokenizer whose vocabulary has no usable pad token is left as it is: then masks must come from lengths,
    which is what Ascent's own batches do in any case.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return False
    vocabulary = tokenizer.get_vocab()
    for token in PAD_TOKENS:
        if token in vocabulary and vocabulary[token] != tokenizer.eos_token_id:
            tokenizer.pad_token = token
            return True
    return False


def _end_ids_of(path: Path) -> set[int]:
    if not path.is_file():
        return set()
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path}: is not a JSON object ({error}); fetch the model again") from error
    return set(found) if isinstance(found, list) else {found} - {None}
