"""Data parallelism: processes that hold the same policy, each take a share of every batch, and sum their gradients.

All processes run the same loop on the same data in the same order; what differs is which micro-batches they compute,
which prompts they sample and that only the first one writes. Weights of a batch contain 1/N of the whole batch, so
that sums over processes are sums over micro-batches: any width trains the same model up to rounding.

Where no group of processes was opened every function does what one process alone needs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ascent.customize.batch import TokenBatch
from ascent.inference.tree import dealt
from ascent.records.errors import AscentError, BadInput

T = TypeVar("T")
BACKEND = "cpu:gloo,cuda:nccl"
END_LIMIT_S = 10.0


def rank() -> int:
    """This process's number, 0 for the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def width() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(sizes: Sequence[int]) -> list[list[int]]:
    """Deal work of these sizes to the processes, the largest first to whoever has least; indices by process."""
    return [sorted(part) for part in dealt(sizes, width())]


def my_batches(batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """This process's share of a global batch."""
    return [batches[index] for index in share([batch.tree.nodes for batch in batches])[rank()]]


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Add the gradients of all processes, so that each has that of the global batch; one message for all of them."""
    if width() == 1:
        return  # a parameter without a gradient keeps none, and AdamW leaves it alone
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def gathered(mine: T) -> list[T]:
    """What each process gives, in the order of their numbers."""
    if width() == 1:
        return [mine]
    found: list[Any] = [None] * width()
    dist.all_gather_object(found, mine)
    return found


def to_first(mine: T) -> list[T]:
    """What each process gives, for the first one only; the others get nothing."""
    if width() == 1:
        return [mine]
    found: list[Any] | None = [None] * width() if rank() == 0 else None
    dist.gather_object(mine, found)
    return found or []


def spread(parameters: Sequence[Tensor], owners: Sequence[Sequence[int]]) -> None:
    """Send each parameter from the process that owns it to all others."""
    if width() == 1:
        return
    for owner, indices in enumerate(owners):
        chosen = [parameters[index] for index in indices]
        if not chosen:
            continue
        flat = torch.cat([p.detach().flatten() for p in chosen])
        dist.broadcast(flat, src=owner)
        for parameter, part in zip(chosen, torch.split(flat, [p.numel() for p in chosen]), strict=True):
            parameter.data.copy_(part.view_as(parameter))


def collected(results: dict[int, T], count: int) -> list[T]:
    """Put results that processes computed by index together again."""
    merged: dict[int, T] = {}
    for part in gathered(results):
        merged.update(part)
    return [merged[index] for index in range(count)]


def agreed(flag: bool) -> bool:
    """Whether any process says so: what one is told by a signal all must know before they go on."""
    return any(gathered(flag))


def launch(work: Callable[..., T], arguments: tuple[Any, ...], processes: int) -> T:
    """Run `work(*arguments)` in so many processes that train together and return what the first one returns.

    They meet through a file and talk over the loopback interface only. Cores are divided among them. When one fails,
    the others are ended and its error is raised here.

    Raises:
        BadInput: there are fewer cores than processes.
        AscentError: what a process raised, or that it died.
    """
    cores = max(os.cpu_count() or 1, torch.cuda.device_count())
    if not 1 <= processes <= cores:
        raise BadInput(f"{processes} processes do not fit this machine's {cores} cores; give at most one per core")
    context = multiprocessing.get_context("spawn")
    lines: dict[Connection, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ascent-parallel-") as folder:
        try:
            for number in range(processes):
                mine, theirs = context.Pipe(duplex=False)
                place = (number, processes, Path(folder) / "meet", max(1, torch.get_num_threads() // processes))
                process = context.Process(target=_member, args=(theirs, place, work, arguments))
                process.start()
                theirs.close()
                lines[mine] = process
            with _deaf():
                result: T = _listen(lines)
            for process in lines.values():
                process.join(END_LIMIT_S)
            return result
        finally:
            for process in lines.values():
                _end(process)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Leave Ctrl-C to the processes, which write a checkpoint and then report."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _listen(lines: dict[Connection, Any]) -> Any:
    """Wait until all processes have reported; return what the first one did, raise the first error."""
    waiting = list(lines)
    first = waiting[0]
    result = None
    while waiting:
        for line in wait(waiting):
            assert isinstance(line, Connection)
            waiting.remove(line)
            try:
                kind, value = line.recv()
            except EOFError as error:
                raise AscentError(
                    "a process of the run died; above stands what it said last. Where that is nothing, look for a lack "
                    "of memory; go on with --resume"
                ) from error
            if kind == "error":
                raise value
            result = value if line is first else result
    return result


def _end(process: Any) -> None:
    """End a process of ours that may still wait for the others."""
    for end in (process.terminate, process.kill):
        if process.is_alive():
            end()
            process.join(END_LIMIT_S)


def _member(line: Connection, place: tuple[int, int, Path, int], work: Callable[..., Any], arguments: Any) -> None:
    number, processes, meet, threads = place
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)
    try:
        with together(number, processes, meet):
            line.send(("done", work(*arguments)))
    except AscentError as error:
        line.send(("error", error))


@contextlib.contextmanager
def together(number: int, processes: int, meet: Path) -> Iterator[None]:
    """Be process `number` of a group that meets in a file."""
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    backend = BACKEND if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meet}", rank=number, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()
