"""`ascent models`, `chat`, `eval` and `train` on a tiny real model; transformers and peft judge what is exported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from laws.helpers import write_tiny_model
from safetensors.numpy import load_file

from ascent.cli.main import run
from ascent.ladder.scaffold import scaffold

SCRIPT = Path(sys.executable).parent / "ascent"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for a prompt with examples."""
    return write_tiny_model(tmp_path_factory.mktemp("cli") / "tiny", context=2048)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASCENT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def stored(home: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["models", "import", str(tiny), "--name", "tiny", "--licence", "MIT"]) == 0
    return capsys.readouterr().out.strip()


def recipe(folder: Path, tiny: Path, **changes: object) -> Path:
    """Write a recipe and its data: short demonstrations, eight steps."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"{n}", "input": {"prompt": f"say {n}"}, "target": f"{n}{n}"} for n in range(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "algorithm": "sft",
        "model": str(tiny),
        "data": "data.jsonl",
        "batch_size": 4,
        "epochs": 2,
        "precision": "fp32",
        "lora": {"rank": 4, "alpha": 8},
        **changes,
    }
    file = folder / "recipe.yaml"
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in content.items()))
    return file


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.float()(torch.arange(5, 25)[None]).logits
    return found


def test_list_and_show(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["MODEL", "SIZE", "LICENCE"]
    assert next(line.split() for line in lines if line.startswith("tiny@"))[0] == stored
    assert any(line.startswith("smollm2-135m-instruct ") and " no " in line for line in lines)
    assert run(["models", "show", "tiny"]) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert shown["id"] == stored
    assert shown["licence"] == "MIT"
    assert shown["sha256"].startswith(stored.partition("@")[2])


def test_verify_notices_a_changed_byte(stored: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "verify", "tiny"]) == 0
    file = home / "models" / stored / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert run(["models", "verify", "tiny"]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_export_of_a_base_model(stored: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    assert run(["models", "export", "tiny", str(out)]) == 0
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(AutoModelForCausalLM.from_pretrained(tiny))
    )
    assert not (out / "card.json").exists()
    assert run(["models", "export", "tiny", str(out)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert run(["models", "export", "tiny", str(tmp_path / "adapter"), "--adapter"]) == 2
    assert not (tmp_path / "adapter").exists()


def test_a_trained_adapter_means_the_same_everywhere(
    home: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged folder in transformers, the adapter in peft, and the adapter imported and merged again agree."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert run(["models", "import", str(tiny), "--name", "tiny"]) == 0
    file = recipe(tmp_path, tiny, model="tiny")
    assert run(["train", str(file), "--out", str(tmp_path / "run")]) == 0
    trained = str(tmp_path / "run" / "model")
    assert run(["models", "export", trained, str(tmp_path / "merged")]) == 0
    assert run(["models", "export", trained, str(tmp_path / "adapter"), "--adapter"]) == 0
    assert run(["models", "import", str(tmp_path / "adapter"), "--name", "tuned"]) == 0
    assert run(["models", "export", "tuned", str(tmp_path / "again")]) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny)
    before = logits(base)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    attached = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    again = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    assert (merged - before).abs().max() > 0.01
    torch.testing.assert_close(merged, attached, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, again, rtol=0, atol=0)
    assert run(["chat", "tuned", "-m", "say 3", "--max-tokens", "4"]) == 0


def test_train_refuses_what_it_cannot_continue(
    home: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = recipe(tmp_path, tiny), tmp_path / "run"
    assert run(["train", str(file), "--out", str(out)]) == 0
    first = weights(out / "model")
    assert run(["train", str(file), "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    recipe(tmp_path, tiny, epochs=3)
    assert run(["train", str(file), "--out", str(out), "--resume"]) == 2
    assert "another recipe" in capsys.readouterr().err
    recipe(tmp_path, tiny)
    assert run(["train", str(file), "--out", str(out), "--resume"]) == 0
    assert all(np.array_equal(first[name], tensor) for name, tensor in weights(out / "model").items())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    assert run(["train", str(file), "--out", str(tmp_path / "other")]) == 2


def test_train_names_the_nearest_key(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(recipe(tmp_path, tiny, epoch=3))]) == 2
    shown = capsys.readouterr().err
    assert "epochs" in shown
    assert "recipe.yaml:8 [epoch]" in shown


def test_ctrl_c_writes_a_checkpoint_and_resume_ends_the_same(home: Path, tiny: Path, tmp_path: Path) -> None:
    """The interrupted and resumed run has bit for bit the weights of one that was left alone."""
    file = recipe(tmp_path, tiny, epochs=60, checkpoint_every=1000)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [str(SCRIPT), "train", str(file), "--out"]
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(cut)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if (cut / "metrics.jsonl").is_file() and (cut / "metrics.jsonl").read_text().count("\n") > 5:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert not (cut / "run.json").exists()
    subprocess.run([*command, str(cut), "--resume"], check=True, capture_output=True)
    expected, found = weights(whole / "model"), weights(cut / "model")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_eval_writes_the_report_and_its_summary(
    home: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    desk, out = tmp_path / "desk", tmp_path / "deep" / "out.json"
    scaffold(desk)
    rows = [json.loads(line) for line in (desk / "data" / "test.jsonl").read_text().splitlines()[:6]]
    del rows[0]["expected"]["queue"]
    data = tmp_path / "six.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", str(desk), "--model", str(tiny), "--data", str(data), "--json", str(out), "--stage", "base"]
    assert run(command) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("exact_match")
    written = json.loads(out.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert written["summary"]["stage"] == written["stage"] == "base"
    assert len(written["items"]) == written["summary"]["items"] == 6
    queue, exact = written["summary"]["metrics"]["queue"], written["summary"]["metrics"]["exact_match"]
    assert (queue["n"], queue["not_applicable"], exact["n"]) == (5, 1, 6)
    grades = [score["value"] for item in written["items"] for score in item["scores"] if score["name"] == "queue"]
    assert sum(grade for grade in grades if grade is not None) / 5 == pytest.approx(queue["value"])


def test_eval_of_bad_rows_names_the_line(
    home: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaffold(tmp_path / "desk")
    data = tmp_path / "bad.jsonl"
    data.write_text('{"id": "1", "input": {"message": "a"}}\n{"id": "1", "input"\n')
    out = tmp_path / "out.json"
    command = ["eval", str(tmp_path / "desk"), "--model", str(tiny), "--data", str(data), "--json", str(out)]
    assert run(command) == 2
    assert "bad.jsonl:2" in capsys.readouterr().err
    assert not out.exists()


def test_chat_in_a_pipe_keeps_the_conversation(home: Path, tiny: Path) -> None:
    """Two turns in one conversation; the second answer differs from that to the same words said first."""
    command = [str(SCRIPT), "chat", str(tiny), "--max-tokens", "8"]
    done = subprocess.run(command, input="one\n\ntwo\n/exit\nthree\n", capture_output=True, text=True, check=True)
    alone = subprocess.run([*command, "-m", "two"], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") >= 2
    assert not done.stdout.endswith(alone.stdout)
    assert "end with Ctrl-D" in done.stderr
