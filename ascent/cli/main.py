"""The command line: which commands there are, and how every kind of failure ends.

Help must be quick, so nothing heavy is imported here: a command's module is imported when the command is asked for, and
imports what it needs when it runs.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from ascent import __version__

DEBUG = "ASCENT_DEBUG"
UNEXPECTED = 70
"""Exit code of a defect in Ascent (EX_SOFTWARE in sysexits.h)."""
INTERRUPTED = 130

COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("ascent.cli.init", "Write a small use case of your own into a folder."),
    "climb": ("ascent.cli.climb", "Take a use case up the ladder, stage by stage."),
    "advise": ("ascent.cli.advise", "Say which stage is justified next, and why."),
    "plan": ("ascent.cli.plan", "Say what a training recipe will take, before it starts."),
    "train": ("ascent.cli.train", "Run one training recipe."),
    "search": ("ascent.cli.search", "Search for the best values of a recipe's fields."),
    "embed": ("ascent.cli.embed", "Tune an embedder for retrieval."),
    "eval": ("ascent.cli.eval", "Measure a model on a data file."),
    "compare": ("ascent.cli.compare", "Compare two measured models, item by item."),
    "report": ("ascent.cli.report", "Write the report of a run again."),
    "mirror": ("ascent.cli.mirror", "Copy a finished run to an MLflow server."),
    "models": ("ascent.cli.models", "List, fetch, show, export and import models."),
    "chat": ("ascent.cli.chat", "Talk to a model."),
    "serve": ("ascent.cli.serve", "Serve models and jobs through the AWS API and the OpenAI protocol."),
    "registry": ("ascent.cli.registry", "List, show and promote the models of the server."),
    "keys": ("ascent.cli.keys", "Make, list and revoke the keys that callers need."),
    "doctor": ("ascent.cli.doctor", "Say what this machine can do and what is missing."),
}
"""Command → (module, short help). Every module has a click command called `command`."""


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that was typed, or fail with the nearest one."""
        typed = args[0]
        if typed not in COMMANDS and not typed.startswith("-"):
            near = difflib.get_close_matches(typed, COMMANDS, n=1)
            ctx.fail(f"no command is called {typed!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ascent")
def cli() -> None:
    """Post-train a language model for one task, and prove every step by measurement.

    Begin with `ascent doctor`, then `ascent init DIR` and `ascent climb DIR`.

    Exit codes: 0 fine, 1 a check said no (climb --strict, doctor), 2 bad input, 70 a defect in Ascent, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Every failure of every command is worded here."""
    try:
        code = cli.main(args=arguments, prog_name="ascent", standalone_mode=False)
    except click.Abort:
        _complain("interrupted. Whatever was being written is as it was before; climb and train go on with --resume")
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:
        return _explain(error)
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> int:
    """Print one paragraph on an exception and return the exit code."""
    from ascent.records.errors import AscentError  # loads pydantic, which help does not need

    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    if isinstance(error, AscentError):
        _complain(str(error))
        return error.exit_code
    if isinstance(error, OSError) and (reason := _machine_refuses(error)):
        _complain(reason)
        return AscentError.exit_code
    if isinstance(error, MemoryError) or "not enough memory" in str(error) or "out of memory" in str(error):
        _complain(
            f"the machine ran out of memory ({_last_line(error)}). Lower token_budget in the recipe, shorten the rows, "
            f"or use a smaller model; finished stages and checkpoints are kept"
        )
        return AscentError.exit_code
    _complain(
        f"this should not have happened, and is a defect in Ascent rather than in your input: {_last_line(error)}. "
        f"Run the same command with {DEBUG}=1 to see where, and report that text"
    )
    return UNEXPECTED


def _machine_refuses(error: OSError) -> str:
    """Return what a full disk or a missing permission means for the user; empty for other causes."""
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the disk{place}. Free some, then run the same command again with --resume"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return f"the system refuses access{place}: {error.strerror}. Check the owner and the permissions"
    return ""


def _last_line(error: Exception) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]


def _complain(text: str) -> None:
    click.echo(f"ascent: {text}", err=True)
