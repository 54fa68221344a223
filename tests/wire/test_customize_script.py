"""The example that goes from data to a deployed model's answer with nothing but boto3, as its own process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from laws.helpers import write_tiny_model
from wire.served import make_key, serving

from ascent.inference.convert import import_model
from ascent.inference.store import Store

SCRIPT = Path(__file__).parents[2] / "examples" / "pharmacy" / "customize_with_boto3.py"


def run_script(home: Path, folder: Path, model: str, prices: Path) -> str:
    """Run a server and the script against it; returns what the script printed."""
    key = make_key(home, "pharmacy")
    with serving(home, ["--jobs", "1"], environment={"ASCENT_SERVER_PRICES": str(prices)}) as server:
        server.wait_ready()
        done = subprocess.run(
            [
                sys.executable,
                str(SCRIPT),
                "--endpoint",
                server.address,
                "--model",
                model,
                "--short",
                "--folder",
                str(folder),
            ],
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ
            | {
                "AWS_ACCESS_KEY_ID": key.access_key_id,
                "AWS_SECRET_ACCESS_KEY": key.secret,
                "AWS_REGION": "us-east-1",
                "OMP_NUM_THREADS": "1",
            },
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log.read_text()[-2000:]}"
    return done.stdout


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    """A price list of one cent for a thousand training tokens, in a currency of its own."""
    file = tmp_path / "prices.yaml"
    file.write_text("currency: EUR\ndefault: {prompt: 0.01, completion: 0.01, training: 0.01}\n")
    return file


def test_a_job_becomes_a_deployed_model_that_answers_and_is_charged(
    tmp_path: Path, prices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCENT_HOME", str(tmp_path / "store"))
    import_model(write_tiny_model(tmp_path / "tiny", context=2048), "tiny", Store())
    told = run_script(tmp_path / "store" / "server", tmp_path / "run", "tiny", prices)
    assert "  Completed\n" in told and "  Active\n" in told and "answered: " in told
    [tokens] = re.findall(r"job cost: [^\n]* for (\d+) tokens", told)
    [cost] = re.findall(r"job cost: EUR ([\d.]+)|job cost: ([\d.]+) EUR", told) or [("", "")]
    assert float("".join(cost)) == pytest.approx(int(tokens) * 1e-5, rel=0.02)
