"""Where a package index keeps a wheel: the simple index protocol (PEP 503 and 691), under pip's settings.

pip itself can only fetch wheels whole. Finding the address first makes a large download resumable; pip
remains the way out for indexes that this module cannot read (local folders, credentials from a keyring).
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import requests
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from ascent.records.errors import PullFailed

PYPI = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
INDEX_TIMEOUT_S = (15.0, 60.0)
PIP_TIMEOUT_S = 1800


class Refused(PullFailed):
    """A server said no, or no index that can be read here has the wheel: asking again is useless."""


@dataclass(frozen=True)
class Remote:
    """A file on a web server.

    Attributes:
        url: its address.
        sha256: what it must hash to, when that is known.
        headers: what to send along.
        certificates: a bundle to trust instead of the usual one.
    """

    url: str
    sha256: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    certificates: str | None = None


def locate_wheel(requirement: str) -> Remote:
    """Return where the wheel of `NAME==VERSION` that runs anywhere is, in the first index that has it.

    Raises:
        Refused: no index that is read here has it.
    """
    settings = pip_settings()
    name, _, version = requirement.partition("==")
    reasons = []
    for index in _indexes(settings):
        page = f"{index.rstrip('/')}/{canonicalize_name(name)}/"
        try:
            links = _links(page, settings.get("cert"))
        except (requests.RequestException, ValueError, KeyError) as error:
            reasons.append(f"{_public(page)}: {error}")
            continue
        for file, url, sha256 in links:
            if _fits(file, name, version):
                headers = _credentials(index) if urlsplit(url).hostname == urlsplit(index).hostname else {}
                return Remote(url, sha256, headers, settings.get("cert"))
        reasons.append(f"{_public(page)}: has no wheel of {requirement} for every platform")
    raise Refused("; ".join(reasons) or "pip is set to use no web index")


def pip_download(requirement: str, folder: Path) -> Path:
    """Let pip fetch the wheel into `folder` by its own means, without dependencies, and return its path."""
    run_pip("download", "--quiet", "--no-deps", "--only-binary=:all:", f"--dest={folder}", requirement)
    return next(folder.glob("*.whl"))


def pip_settings() -> dict[str, str]:
    """Return pip's settings by their plain names: environment before commands, commands before global."""
    ranked: dict[str, tuple[int, str]] = {}
    for line in run_pip("config", "list").splitlines():
        key, _, quoted = line.partition("=")
        section, _, name = key.partition(".")
        section, name = (":env:", name) if key.startswith(":env:") else (section, name)
        rank = {"global": 0, "install": 1, "download": 2, ":env:": 3}.get(section)
        if rank is not None and rank >= ranked.get(name, (0, ""))[0]:
            ranked[name] = (rank, str(ast.literal_eval(quoted)))
    return {name: value for name, (_, value) in ranked.items()}


def run_pip(*arguments: str) -> str:
    """Run pip in this interpreter's environment and return what it prints.

    Raises:
        PullFailed: pip failed or is not installed; the message holds its own words.
    """
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise PullFailed(f"pip {arguments[0]} took longer than {PIP_TIMEOUT_S} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = " ".join((lines or done.stderr.splitlines())[:3]) or "it gave no reason"
        raise PullFailed(f"pip {arguments[0]} {arguments[-1]} failed: {why}")
    return done.stdout


def certificates() -> str | bool:
    """Return the certificate bundle that the environment names, or True for the one of requests."""
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "PIP_CERT"):
        if (path := os.environ.get(variable)) and Path(path).exists():
            return path
    return True


class _Anchors(HTMLParser):
    """Collects the addresses of an index page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the address of an anchor."""
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _links(page: str, bundle: str | None) -> list[tuple[str, str, str | None]]:
    """Return (file name, address, sha256) of everything an index page offers."""
    answer = requests.get(page, headers={"Accept": ACCEPT}, timeout=INDEX_TIMEOUT_S, verify=bundle or certificates())
    answer.raise_for_status()
    base = _public(answer.url)
    if "json" in answer.headers.get("Content-Type", ""):
        files: list[dict[str, Any]] = answer.json()["files"]
        return [(file["filename"], urljoin(base, file["url"]), file.get("hashes", {}).get("sha256")) for file in files]
    anchors = _Anchors()
    anchors.feed(answer.text)
    found = []
    for href in anchors.found:
        url, fragment = urldefrag(urljoin(base, href))
        sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
        found.append((unquote(Path(urlsplit(url).path).name), url, sha256))
    return found


def _fits(file: str, name: str, version: str) -> bool:
    try:
        found, number, _, tags = parse_wheel_filename(file)
        wanted = Version(version)
    except (InvalidWheelFilename, InvalidVersion):
        return False
    return found == canonicalize_name(name) and number == wanted and any(tag.platform == "any" for tag in tags)


def _indexes(settings: Mapping[str, str]) -> list[str]:
    if settings.get("no-index", "false").lower() in ("1", "true", "yes", "on"):
        return []
    found = [settings.get("index-url", PYPI), *settings.get("extra-index-url", "").split()]
    return [url for url in found if urlsplit(url).scheme in ("http", "https")]


def _credentials(index: str) -> dict[str, str]:
    parts = urlsplit(index)
    if not parts.username:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {b64encode(pair.encode()).decode()}"}


def _public(url: str) -> str:
    """Return an address without the password in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
