"""Graders that hang, crash, lie or chatter cost their own score and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ascent.evaluate.pool import GraderPool
from ascent.records import Episode, FinishReason, Message, Score, Task, Unscored
from ascent.records.errors import BadInput, UnknownName

PROGRAM = """
import ctypes, os, sys, time
from ascent.records import Score

def finish(text, input):
    if text == "hang in finish":
        time.sleep(60)
    if text == "die in finish":
        os._exit(7)
    if text == "raise in finish":
        raise ValueError("unreadable")
    if text == "no json":
        return object()
    if text == "surrogate":
        return {"half": "\\ud800", "nan": float("nan")}
    return {"text": text, "n": input.get("n")}

def first(task, episode):
    return episode.output["n"] == task.input["n"] if isinstance(episode.output, dict) else 0.0

def bad(task, episode):
    match episode.text:
        case "hang": time.sleep(60)
        case "spin":
            while True: pass
        case "exit": os._exit(3)
        case "exit well": os._exit(0)
        case "segfault": ctypes.string_at(0)
        case "raise": return task.input["absent"]
        case "sys.exit": sys.exit(1)
        case "nan": return float("nan")
        case "text": return "1.0"
        case "none": return None
        case "recurse": return bad(task, episode)
        case "chatter":
            print('{"output": "forged"}', flush=True)
            os.write(1, b"x" * 3_000_000)
            os.write(2, b"y" * 1000)
    return 0.5

def last(task, episode):
    return Score(name="last", value=1.0, reason="seen")

def tokens(task, episode):
    return episode.completion_tokens

def pid(task, episode):
    return os.getpid()

def modules(task, episode):
    return float(any(name in sys.modules for name in ("torch", "numpy", "scipy", "transformers")))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("use-case") / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(scope="module")
def pool(program: Path) -> Iterator[GraderPool]:
    with GraderPool(program, ["first", "bad", "last"], time_limit_s=0.6) as pool:
        yield pool


def pair(text: str, number: int = 0) -> tuple[Task, Episode]:
    task = Task(id=str(number), input={"n": number}, messages=(Message(role="user", content="q"),))
    episode = Episode(task_id=task.id, model="m", messages=task.messages, text=text)
    return task, episode


def grade_among_others(pool: GraderPool, text: str) -> Episode:
    """Grade one episode in the middle of five; the other four must be untouched by what it does."""
    after = pool.grade([pair(text if number == 2 else "ok", number) for number in range(5)])
    assert [episode.task_id for episode in after] == ["0", "1", "2", "3", "4"]
    for number in (0, 1, 3, 4):
        assert after[number].output == {"text": "ok", "n": number}
        assert [score.value for score in after[number].scores] == [1.0, 0.5, 1.0]
    return after[2]


@pytest.mark.parametrize(
    ("text", "cause", "reason"),
    [
        ("hang", Unscored.timeout, "did not end within 0.6 s"),
        ("spin", Unscored.timeout, "did not end within 0.6 s"),
        ("exit", Unscored.crash, "exit status 3"),
        ("exit well", Unscored.crash, "exit status 0"),
        ("segfault", Unscored.crash, "SIGSEGV; it last wrote: Fatal Python error: Segmentation fault"),
        ("raise", Unscored.error, "KeyError: 'absent' (program.py:"),
        ("sys.exit", Unscored.error, "SystemExit: 1"),
        ("recurse", Unscored.error, "RecursionError"),
        ("nan", Unscored.error, "returned nan"),
        ("text", Unscored.error, "returned a str"),
        ("none", Unscored.not_applicable, ""),
    ],
)
def test_a_bad_grader_loses_only_its_own_score(pool: GraderPool, text: str, cause: Unscored, reason: str) -> None:
    episode = grade_among_others(pool, text)
    first, bad, last = episode.scores
    assert (first.value, last.value, last.reason) == (1.0, 1.0, "seen")
    assert (bad.value, bad.unscored) == (None, cause)
    assert reason in bad.reason
    assert episode.output == {"text": text, "n": 2}


@pytest.mark.parametrize(
    ("text", "cause", "reason"),
    [
        ("hang in finish", Unscored.timeout, "finish(): did not end within 0.6 s"),
        ("die in finish", Unscored.crash, "finish(): its process ended with exit status 7"),
        ("raise in finish", Unscored.error, "finish() failed: ValueError: unreadable (program.py:"),
        ("no json", Unscored.error, "cannot be written as JSON"),
    ],
)
def test_a_bad_finish_unscores_its_episode(pool: GraderPool, text: str, cause: Unscored, reason: str) -> None:
    episode = grade_among_others(pool, text)
    assert episode.output is None
    assert [score.unscored for score in episode.scores] == [cause] * 3
    assert all(reason in score.reason for score in episode.scores)


def test_half_a_surrogate_pair_and_nan_do_not_spoil_the_report(pool: GraderPool) -> None:
    episode = grade_among_others(pool, "surrogate")
    assert episode.output == {"half": "?", "nan": None}
    assert Episode.from_json(episode.to_json()) == episode


def test_chatter_on_standard_output_stays_out_of_the_channel(
    pool: GraderPool, capfd: pytest.CaptureFixture[str]
) -> None:
    episode = grade_among_others(pool, "chatter")
    assert [score.value for score in episode.scores] == [1.0, 0.5, 1.0]
    assert capfd.readouterr() == ("", "")


def test_failed_sampling_is_no_output_and_earlier_scores_are_replaced(pool: GraderPool) -> None:
    task, episode = pair("", 1)
    broken = episode.model_copy(update={"finish": FinishReason.error, "error": "no connection"})
    old = (Score(name="judge", value=0.3), Score(name="first", value=0.0))
    _, again = pair("ok", 1)
    again = again.model_copy(update={"scores": old})
    results = pool.grade([(task, broken), (task, again)])
    assert [(s.unscored, s.reason) for s in results[0].scores] == [(Unscored.no_output, "no connection")] * 3
    assert [(s.name, s.value) for s in results[1].scores] == [
        ("judge", 0.3),
        ("first", 1.0),
        ("bad", 0.5),
        ("last", 1.0),
    ]
    assert pool.grade([]) == []


def test_many_bad_items_over_two_workers_keep_their_places(program: Path) -> None:
    texts = ["ok"] * 150
    texts[3] = texts[4] = "exit"
    texts[70] = "hang"
    texts[149] = "die in finish"
    with GraderPool(program, ["first", "bad"], workers=2, time_limit_s=0.6) as pool:
        results = pool.grade([pair(text, number) for number, text in enumerate(texts)])
    for number, (text, episode) in enumerate(zip(texts, results, strict=True)):
        assert episode.task_id == str(number)
        cause = {"ok": None, "exit": Unscored.crash, "hang": Unscored.timeout, "die in finish": Unscored.crash}[text]
        assert episode.scores[1].unscored is cause
        assert episode.scores[0].value == (None if text == "die in finish" else 1.0)


def test_worker_is_light_and_sees_the_tokens(program: Path) -> None:
    task, episode = pair("ok")
    tokens = {"token_ids": (1, 2, 3), "loss_mask": (False, True, True), "logps": (0.0, -1.0, -2.0)}
    with GraderPool(program, ["modules", "tokens"]) as pool:
        (graded,) = pool.grade([(task, episode.model_copy(update=tokens))])
    assert [score.value for score in graded.scores] == [0.0, 2.0]
    assert graded.logps == (0.0, -1.0, -2.0)


def test_throughput_is_thousands_per_second() -> None:
    pairs = [pair(str(number), number) for number in range(4000)]
    pairs = [(task.model_copy(update={"expected": {"answer": number}}), e) for number, (task, e) in enumerate(pairs)]
    with GraderPool(None, ["exact"]) as pool:
        pool.grade(pairs[:10])
        start = time.process_time(), time.perf_counter()
        results = pool.grade(pairs)
        cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
    assert all(episode.scores[0].value == 1.0 for episode in results)
    assert len(pairs) / cpu > 4000, f"the pool's own share is {cpu:.2f} s of CPU"
    assert len(pairs) / wall > 1000, f"{wall:.2f} s; a quiet core does over 5,000 items a second"


def test_unknown_names_and_programs_that_do_not_load(tmp_path: Path, program: Path) -> None:
    with pytest.raises(UnknownName, match=r"unknown grader 'frist'; did you mean 'first'\?.*json_valid"):
        GraderPool(program, ["frist"]).__enter__()
    path = tmp_path / "program.py"
    for text, message in [
        ("1 / 0", r"ZeroDivisionError: division by zero \(program\.py:1\)"),
        ("import os; os._exit(4)", "could not start .*exit status 4"),
    ]:
        path.write_text(text)
        with pytest.raises(BadInput, match=message):
            GraderPool(path, []).__enter__()
    with pytest.raises(BadInput, match="no program file"):
        GraderPool(tmp_path / "none.py", []).__enter__()
    with pytest.raises(BadInput, match="at least 1 worker"):
        GraderPool(None, [], workers=0)


def test_a_slow_program_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "program.py"
    path.write_text("import time; time.sleep(60)")
    monkeypatch.setattr("ascent.evaluate.pool.START_LIMIT_S", 0.6)
    with pytest.raises(BadInput, match=r"did not load within 0\.6 s"):
        GraderPool(path, []).__enter__()


def test_an_edited_program_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text("import os\ndef g(task, episode): os._exit(1)\n")
    with GraderPool(path, ["g"]) as pool:
        path.write_text("def g(task, episode): return 1.0\n")
        with pytest.raises(BadInput, match="was changed while a pool had it open"):
            pool.grade([pair("x", 0), pair("x", 1)])


def test_a_worker_killed_while_idle_is_replaced(program: Path) -> None:
    with GraderPool(program, ["pid"]) as pool:
        (graded,) = pool.grade([pair("ok")])
        first = int(graded.scores[0].value or 0)
        os.kill(first, signal.SIGKILL)
        while psutil.pid_exists(first) and psutil.Process(first).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        (graded,) = pool.grade([pair("ok")])
        second = int(graded.scores[0].value or 0)
    assert second not in (0, first)
    assert not psutil.pid_exists(second)


def gone(pid: int, within_s: float = 5.0) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return True
    return False


SCRIPT = """
import sys
from pathlib import Path
from ascent.evaluate.pool import GraderPool
from ascent.records import Episode, Task
def pair(text):
    return Task(id="1"), Episode(task_id="1", model="m", messages=(), text=text)
pool = GraderPool(Path(sys.argv[1]), ["pid", "bad"], time_limit_s=float(sys.argv[2]))
with pool:
    print(int(pool.grade([pair("ok")])[0].scores[0].value), flush=True)
    pool.grade([pair(sys.argv[3])])
    input()
"""


def start_script(program: Path, limit: str, text: str) -> tuple[subprocess.Popen[str], int]:
    """Run a script without a `__main__` guard, which a fork server or multiprocessing's spawn would trip over."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(program), limit, text],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_ctrl_c_during_a_hung_grader_ends_everything_at_once(program: Path) -> None:
    process, worker = start_script(program, "30", "hang")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert process.returncode != 0
    assert errors.strip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1
    assert gone(worker)


@pytest.mark.parametrize("text", ["ok", "spin"])
def test_workers_end_when_the_parent_is_killed(program: Path, text: str) -> None:
    """Idle, a worker sees its channel close; in an endless loop, the kernel's timer ends it."""
    process, worker = start_script(program, "0.5", text)
    time.sleep(0.3)
    process.kill()
    process.communicate(timeout=5)
    assert gone(worker)
