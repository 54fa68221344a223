"""`ascent keys`: who may call the server, and what they may do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ascent.cli.console import facts, say, table

if TYPE_CHECKING:
    from ascent.serve.keys import Keys

CONFIG = click.option("--config", type=click.Path(path_type=Path), help="The server's YAML file; see docs/serving.md.")


@click.group("keys")
def command() -> None:
    """Make, list and revoke the keys that callers of `ascent serve` need.

    A key has an access key for AWS clients (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and a bearer key for OpenAI
    clients (OPENAI_API_KEY). Scopes are patterns over SERVICE:OPERATION.
    """


@command.command("create")
@click.option("--name", required=True, help="What the key is for; in lists and logs.")
@click.option("--owner", required=True, help="Who jobs and models made with the key belong to.")
@click.option(
    "--scope",
    "scopes",
    required=True,
    multiple=True,
    metavar="SERVICE:OPERATION",
    help="What it may do, such as 'bedrock-runtime:*', 'bedrock:Get*', 'openai:*' or '*'; repeatable. "
    "'admin:*' shows it other owners' resources too.",
)
@click.option(
    "--days", type=click.FloatRange(min=0, min_open=True), help="How long it is good for; without it, always."
)
@CONFIG
def create(name: str, owner: str, scopes: tuple[str, ...], days: float | None, config: Path | None) -> None:
    """Make a key and print it, this once: its secrets are not kept in a form that can be shown again."""
    import time

    expires = None if days is None else time.time() + days * 24 * 3600
    key = _keys(config).create(owner, name, scopes, expires)
    facts(
        (
            ("access key id", key.access_key_id),
            ("secret access key", key.secret),
            ("bearer key", key.bearer),
            ("owner", key.owner),
            ("scopes", " ".join(sorted(key.scopes))),
            ("good until", _day(key.expires)),
        )
    )


@command.command("list")
@click.option("--owner", help="Only this owner's.")
@CONFIG
def list_keys(owner: str | None, config: Path | None) -> None:
    """List the keys, without their secrets."""
    rows = [
        (key.key_id, key.name, key.owner, " ".join(sorted(key.scopes)), _day(key.created), _day(key.expires), key.state)
        for key in _keys(config).list(owner)
    ]
    table(("key", "name", "owner", "scopes", "made", "good until", "state"), rows)


@command.command("revoke")
@click.argument("key_id")
@CONFIG
def revoke(key_id: str, config: Path | None) -> None:
    """Refuse a key from now on; a running server notices within a second.

    KEY_ID is the access key id, as `ascent keys list` shows it.
    """
    _keys(config).revoke(key_id)
    say(f"{key_id} is revoked")


def _keys(config: Path | None) -> Keys:
    from ascent.serve.config import load_config
    from ascent.serve.keys import open_keys

    return open_keys(load_config(config))


def _day(seconds: float | None) -> str:
    from datetime import datetime

    return "always" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
