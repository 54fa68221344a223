"""`ascent init`: a use case of the user's own, copied from the starter and ready to climb."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ascent.ladder.usecase import FILE, load_usecase
from ascent.ladder.workspace import generate_data
from ascent.records.errors import BadInput
from ascent.records.files import folder_atomic

STARTER = Path(__file__).parent / "starter"
FILES = (FILE, "program.py", "generate.py", "README.md")


def scaffold(folder: Path, name: str | None = None) -> list[str]:
    """Write the starter use case and its generated data into `folder`; return the files, relative to it.

    Args:
        folder: must be empty or absent. It appears whole or not at all.
        name: what the use case is called; default: what the folder is called.

    Raises:
        BadInput: the folder holds something, or the name cannot be used.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise BadInput(f"{folder} is not empty, and nothing of yours is overwritten; give a new or empty folder")
    called = name if name is not None else _name_of(folder)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", called):
        raise BadInput(f"{called!r} cannot name a use case; use letters, digits, '.', '_' and '-' (at most 80)")
    with folder_atomic(folder.absolute()) as scratch:
        for file in FILES:
            shutil.copyfile(STARTER / file, scratch / file)
        text = (scratch / FILE).read_text(encoding="utf-8")
        (scratch / FILE).write_text(re.sub(r"(?m)^name: .*$", f"name: {called}", text, count=1), encoding="utf-8")
        generate_data(load_usecase(scratch))
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _name_of(folder: Path) -> str:
    """Return a folder's name with every character that a use case cannot have made a dash."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "use-case"
