"""The scripted engine: written answers from a mapping or a function, for tests and for replays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ascent.inference.chat import Renderer
from ascent.inference.engine import Completion, Prompt, Sampling
from ascent.records import FinishReason
from ascent.records.errors import BadInput

Script = Mapping[str, str | Sequence[str]] | Callable[[Prompt], str | Sequence[str]]


class ScriptedEngine:
    """Gives written answers instead of sampling.

    A mapping goes from the text of the last message to one answer or several; a function is given the prompt.
    With fewer answers than samples they repeat in turn. Answers are cut at stop strings and at `max_tokens`,
    as a real engine would; the latter needs a renderer, as do token ids (with a log-prob of 0: scripted
    answers are certain).
    """

    def __init__(self, script: Script, renderer: Renderer | None = None, *, model: str = "scripted") -> None:
        """Take the script and, where tokens are wanted, the renderer of a checkpoint."""
        self.script, self.renderer, self.model = script, renderer, model

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_done: Callable[[int], None] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Return `sampling.n` answers per prompt.

        Raises:
            BadInput: the script has no answer to a prompt.
        """
        found = []
        for index, prompt in enumerate(prompts):
            answers = self._answers(prompt)
            group = []
            for sample in range(sampling.n):
                group.append(self._completion(prompt, answers[sample % len(answers)], sampling))
                if on_done is not None:
                    on_done(1)
            found.append(group)
            if on_group is not None:
                on_group(index, group)
        return found

    def _answers(self, prompt: Prompt) -> Sequence[str]:
        question = prompt.messages[-1].content
        answers = self.script(prompt) if callable(self.script) else self.script.get(question, ())
        answers = (answers,) if isinstance(answers, str) else answers
        if not answers:
            raise BadInput(f"the script has no answer to {question!r}; add one")
        return answers

    def _completion(self, prompt: Prompt, text: str, sampling: Sampling) -> Completion:
        places = [at for at in (text.find(word) for word in sampling.stop) if at >= 0]
        text = text[: min(places)] if places else text
        if self.renderer is None:
            return Completion(text=text)
        prompt_ids = tuple(self.renderer.tokens_of(prompt))
        tokens = tuple(self.renderer.answer_ids(text))
        finish = FinishReason.stop
        if len(tokens) > sampling.max_tokens:
            tokens, finish = tokens[: sampling.max_tokens], FinishReason.length
            text = self.renderer.decode(tokens)
        return Completion(text, tokens, (0.0,) * len(tokens), finish, prompt_ids)
