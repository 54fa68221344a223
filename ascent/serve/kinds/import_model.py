"""The import job: a safetensors folder, a GGUF file or a LoRA adapter becomes a model of the store and the registry."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from ascent import __version__
from ascent.inference.store import ADAPTER_MARK, Store
from ascent.inference.versions import Lineage
from ascent.records import DataSource, digest
from ascent.records.errors import BadInput
from ascent.records.files import write_atomic
from ascent.serve.kinds.home import begin, open_registry, own_model, read_state
from ascent.serve.kinds.places import Rules, fetch_all

if TYPE_CHECKING:
    from ascent.jobs.context import JobContext

SUFFIXES = (".safetensors", ".gguf", ".json", ".model", ".txt", ".jinja")
"""What is copied of a folder; pickled weights can run code and are left."""
SAVED = "saved.json"


def run(job: JobContext) -> dict[str, Any]:
    """Import the model at the payload's `uri` under its `name`.

    Returns:
        `version` in the registry, `model` in the store, and its architecture.

    Raises:
        BadInput: what lies there is no model, or an adapter of a base that is not here.
        Corrupt: a file is cut off or not what its name says.
    """
    from ascent.inference.convert import import_model, inspect_folder
    from ascent.inference.registry import SOURCE

    payload, store = job.payload, Store()
    registry = open_registry(payload)
    if (saved := read_state(job.folder, SAVED)) is None:
        begin(job, "fetching")
        arrived = job.folder / "arrived"
        files = fetch_all(payload["uri"], arrived, Rules(**payload["rules"]), suffixes=SUFFIXES)
        job.log(f"fetched {len(files)} files, {sum(file.size for file in files):,} bytes")
        ggufs = [file for file in files if file.path.suffix == ".gguf"]
        if len(ggufs) > 1:
            raise BadInput(f"{payload['uri']} holds {len(ggufs)} GGUF files; give the address of one of them")
        begin(job, "importing")
        config = arrived / ADAPTER_MARK
        if config.is_file():
            base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
            own_model(registry, store.card(base).id, job.owner) if base else None
        name = f"{payload['name'].lower()}-{job.id}"
        place = ggufs[0].path if ggufs else arrived
        folder = import_model(place, name, store, source=f"{SOURCE}{payload['uri']}")
        marks = {file.path.relative_to(arrived).as_posix(): file.sha256 for file in files}
        facts = inspect_folder(folder)
        saved = {
            "model": folder.name,
            "sha256": digest(marks),
            "files": len(files),
            "architecture": facts.family,
            "kind": facts.kind,
        }
        write_atomic(job.folder / SAVED, json.dumps(saved))
        shutil.rmtree(arrived, ignore_errors=True)
    begin(job, "registering")
    card = store.card(saved["model"])
    source = DataSource(name="model", path=payload["uri"], rows=saved["files"], sha256=saved["sha256"])
    lineage = Lineage(method="import", data=(source,), code=__version__, details={"licence": card.licence})
    version = registry.add(
        payload["name"],
        saved["model"],
        job.owner,
        lineage=lineage,
        base=card.parent,
        job=job.id,
        kind=payload["registered_as"],
    )
    return {"version": version.id, "model": version.model, "architecture": saved["architecture"]}
