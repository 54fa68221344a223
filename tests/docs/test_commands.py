"""The commands that README and docs show: all parse, the quick ones run, and links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ascent.cli.main import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "ascent" / "ladder" / "starter" / "README.md"]
)
RUN = "<!-- run -->\n"
BLOCK = re.compile(r"(<!-- run -->\n)?^```(?:bash|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown(page: Path) -> list[str]:
    """Return the command lines of a page: in bash blocks, and indented ones that begin with ascent or make."""
    text = page.read_text(encoding="utf-8")
    lines = [line for match in BLOCK.finditer(text) for line in match[2].splitlines()]
    lines += re.findall(r"^ {4}((?:ascent|make) .*)$", text, re.MULTILINE)
    return [line.strip() for line in lines if line.strip()]


COMMANDS = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in shown(page)]


def test_readme_shows_commands() -> None:
    readme = [line for page, line in COMMANDS if page == "README.md"]
    assert {"make quickstart", "make test"} <= {line.partition("#")[0].strip() for line in readme}
    assert any(line.startswith("ascent climb") for line in readme)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_shown_commands_exist(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"{page}: {line}: the Makefile has no such target"
        return
    assert words[0] == "ascent", f"{page}: {line}"
    command: click.Command = cli
    rest = words[1:]
    while isinstance(command, click.Group):
        context = click.Context(command)
        found = command.get_command(context, rest[0])
        assert found is not None, f"{page}: {line}: no command {rest[0]!r}"
        command, rest = found, rest[1:]
    parser = command.make_parser(click.Context(command))
    _, left, _ = parser.parse_args(list(rest))
    assert not left, f"{page}: {line}: {left} is one argument too many"


def test_quick_commands_run(tmp_path: Path) -> None:
    """The blocks of the README that are marked to run, in order, in an empty folder."""
    blocks = [match[2] for match in BLOCK.finditer((ROOT / "README.md").read_text(encoding="utf-8")) if match[1] == RUN]
    assert blocks
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["ASCENT_HOME"] = str(tmp_path / "home")
    for line in "".join(blocks).splitlines():
        done = subprocess.run(
            shlex.split(line), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {head.lower().replace(" ", "-") for head in heads}, f"{page.name}: {target}"
