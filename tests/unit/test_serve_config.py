"""The server's configuration: which source wins, and that nothing unsafe or misspelt is accepted."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from ascent.records.errors import BadInput, BadRecipe
from ascent.serve.config import ServerConfig, load_config
from ascent.serve.logs import REQUEST_ID, JsonLines


def test_options_win_over_variables_over_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: 1\nhost: 127.0.0.2\nengine: {rows: 4, waiting: 5}\n")
    variables = {"ASCENT_SERVER_PORT": "2", "ASCENT_SERVER_ENGINE__ROWS": "8", "ASCENT_HOME": "elsewhere"}
    found = load_config(file, {"port": 3}, variables)
    assert (found.port, found.host, found.engine.rows, found.engine.waiting) == (3, "127.0.0.2", 8, 5)
    assert load_config(file, {}, variables).port == 2
    assert load_config(None, {}, {}) == ServerConfig()
    assert load_config(None, {}, {"ASCENT_SERVER_DATA": '["/srv", "s3://b"]'}).data == ("/srv", "s3://b")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prot: 80\n", r"server.yaml:1 \[prot\].*did you mean 'port'"),
        ("port: 80\njobs: {slot: 1}\n", r"server.yaml:2 \[jobs.slot\].*did you mean 'slots'"),
        ("port: 70000\n", r"server.yaml:1 \[port\]"),
        ("tls_cert: a.pem\n", "tls_cert and tls_key belong together"),
    ],
)
def test_a_mistake_in_the_file_is_named_by_line_and_key(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    with pytest.raises(BadRecipe, match=told):
        load_config(file, {}, {})


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ASCENT_SERVER_PROT", "1", "did you mean 'port'"),
        ("ASCENT_SERVER_PORT", "many", "port"),
        ("ASCENT_SERVER_PORT__X", "1", "names no field"),
        ("ASCENT_SERVER_JOBS__SLOTS", "-1", "jobs.slots"),
        ("ASCENT_SERVER_DATA", "[/srv", "no list in JSON"),
    ],
)
def test_a_mistake_in_a_variable_is_named(name: str, value: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        load_config(None, {}, {name: value})


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.9.9.9", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_what_only_this_machine_can_reach(host: str, loopback: bool) -> None:
    assert ServerConfig(host=host).loopback is loopback


def test_a_line_of_the_log_is_json_with_its_request(caplog: pytest.LogCaptureFixture) -> None:
    token = REQUEST_ID.set("r-1")
    try:
        try:
            raise ValueError("a\nb")
        except ValueError:
            record = logging.getLogger("x").makeRecord(
                "x", logging.ERROR, "f", 1, "broke %s", ("é\n",), sys.exc_info(), extra={"job": 3}
            )
        line = JsonLines().format(record)
    finally:
        REQUEST_ID.reset(token)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["message"], found["level"], found["request_id"], found["job"]) == ("broke é\n", "error", "r-1", 3)
    assert found["exception"].endswith("ValueError: a\nb")
