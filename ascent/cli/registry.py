"""`ascent registry`: versions of models, what speaks for them, and which one is champion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ascent.cli.console import facts, say, table

if TYPE_CHECKING:
    from ascent.inference.registry import Registry
    from ascent.inference.versions import Version

OWNER = click.option("--owner", help="Whose; needed where several owners have the name.")


@click.group("registry")
def command() -> None:
    """List the server's models, show where one came from, and promote one to champion.

    MODEL is a version's id, or NAME (its latest), NAME@NUMBER or NAME:ALIAS.
    """


@command.command("list")
@OWNER
def list_versions(owner: str | None) -> None:
    """List all versions, with their verdicts and the aliases that point at them."""
    registry, rows = _registry(), []
    for version in registry.versions(owner=owner):
        routes = registry.routes(version.name, version.owner)
        aliases = [
            alias if len(weights) == 1 else f"{alias} {weights[version.id]:.0%}"
            for alias, (weights, _) in routes.items()
            if version.id in weights
        ]
        verdicts = registry.evidence(version.id).verdicts
        verdict = verdicts[-1].decision.value if verdicts else "-"
        day = version.created.strftime("%Y-%m-%d %H:%M")
        name = f"{version.name}@{version.number}"
        rows.append((version.id, name, version.owner, version.lineage.method, verdict, ", ".join(aliases) or "-", day))
    table(("id", "version", "owner", "method", "verdict", "aliases", "made"), rows)


@command.command("show")
@click.argument("model")
@OWNER
def show(model: str, owner: str | None) -> None:
    """Show a version's lineage, data, reports and verdicts."""
    registry = _registry()
    version = _find(registry, model, owner)
    evidence = registry.evidence(version.id)
    lines: list[tuple[str, object]] = [
        ("id", version.id),
        ("version", f"{version.name}@{version.number} of {version.owner}"),
        ("model", version.model),
        ("base", version.base or "none"),
    ]
    lines += [
        ("lineage" if at == 0 else "", f"{each.name}@{each.number} {each.id} ({each.lineage.method})")
        for at, each in enumerate(registry.ancestry(version.id))
    ]
    lines += [("data", f"{part.path}, {part.rows:,} rows, sha256 {part.sha256}") for part in version.lineage.data]
    lines += [("run", version.lineage.run or "none"), ("code", version.lineage.code or "not known")]
    for report in evidence.reports:
        shown = ", ".join(f"{name} {found.value:.4g}" for name, found in report.metrics.items())
        lines.append(("report", f"{report.model}: {shown}"))
    lines += [("verdict", f"{each.decision.value}: {' '.join(each.reasons)}") for each in evidence.verdicts]
    lines += [("override", f"{reason} (by {by})") for reason, by in evidence.overrides]
    lines.append(("in use by", ", ".join(registry.holders(version.id)) or "nothing"))
    facts(lines)


@command.command("promote")
@click.argument("model")
@click.argument("alias")
@click.option("--override", help="Why it is promoted without a GO verdict; recorded.")
@click.option("--by", required=True, help="Who decides; recorded.")
@OWNER
def promote(model: str, alias: str, override: str | None, by: str, owner: str | None) -> None:
    """Point ALIAS, such as champion, at a version. A running server follows at once."""
    registry = _registry()
    version = _find(registry, model, owner)
    registry.promote(version.name, alias, version.id, owner=version.owner, by=by, override=override)
    say(f"{version.name}:{alias} is {version.name}@{version.number}")


@command.command("history")
@click.argument("name")
@OWNER
def history(name: str, owner: str | None) -> None:
    """Show all that was decided about a name."""
    registry = _registry()
    version_owner = _find(registry, name, owner).owner
    rows = [
        (
            event.at.strftime("%Y-%m-%d %H:%M:%S"),
            event.event,
            event.version or "-",
            event.alias or "-",
            event.by,
            event.reason,
        )
        for event in registry.history(name, version_owner)
    ]
    table(("when", "what", "version", "alias", "by", "why"), rows)


def _find(registry: Registry, model: str, owner: str | None) -> Version:
    """Return the version that `model` means, of the only owner who has it unless one is named.

    Raises:
        BadInput: several owners have it.
        UnknownName: nobody has it.
    """
    from ascent.records.errors import BadInput, UnknownName

    found: list[Version] = []
    owners = [owner] if owner is not None else sorted({version.owner for version in registry.versions()})
    for each in owners:
        try:
            found.append(registry.find(model, each))
        except UnknownName:
            continue
    if len(found) > 1:
        raise BadInput(f"{', '.join(version.owner for version in found)} have a {model!r}; say whose with --owner")
    if not found:
        raise UnknownName("model", model, {version.name for version in registry.versions(owner=owner)})
    return found[0]


def _registry() -> Registry:
    from ascent.inference.registry import Registry
    from ascent.inference.store import Store
    from ascent.observe.database import open_database
    from ascent.serve.config import load_config

    config, store = load_config(), Store()
    home = config.home or store.root / "server"
    return Registry(open_database(config.database or home / "ascent.db"), store)
