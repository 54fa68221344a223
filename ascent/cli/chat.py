"""`ascent chat`: a conversation with a model."""

from __future__ import annotations

import sys

import click

from ascent.cli.console import note, say

END = ("/exit", "/quit")


@click.command("chat")
@click.argument("model")
@click.option("-m", "--message", help="Ask this once and print the answer, instead of a conversation.")
@click.option("--system", default="", help="The system message.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Longest answer.")
@click.option(
    "--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 always says the likeliest."
)
@click.option("--seed", default=0, show_default=True, help="Seeds sampling when the temperature is above 0.")
def command(model: str, message: str | None, system: str, max_tokens: int, temperature: float, seed: int) -> None:
    """Talk to MODEL: a name or id in the store, a model folder, or remote:URL#MODEL.

    A model of the catalogue is fetched when it is not here. A conversation ends with Ctrl-D or /exit.
    """
    from ascent.cli.engines import open_engine
    from ascent.inference.engine import Engine, Prompt, Sampling
    from ascent.records import Message
    from ascent.records.errors import Unavailable

    engine: Engine = open_engine(model)
    turns = [Message(role="system", content=system)] if system else []

    def answer(text: str) -> None:
        turns.append(Message(role="user", content=text))
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        completion = engine.generate([Prompt(tuple(turns))], sampling)[0][0]
        if completion.error:
            raise Unavailable(completion.error)
        turns.append(Message(role="assistant", content=completion.text))
        say(completion.text)

    if message is not None:
        answer(message)
        return
    note(f"{engine.model}; end with Ctrl-D or {END[0]}")
    while (text := _ask()) is not None:
        if text in END:
            return
        if text:
            answer(text)


def _ask() -> str | None:
    """Read the user's next turn; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
