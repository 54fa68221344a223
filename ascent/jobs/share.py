"""How much of a machine jobs take."""

from __future__ import annotations

from ascent.inference.machine import Machine

CORES_PER_SLOT = 4
"""Training of small models gains little from more threads than this, and loses much with fewer than all of two."""
SHARE = 0.8
"""Of the memory; the rest is the system's, the server's and the worker's own."""


def slots_of(machine: Machine) -> int:
    """Return how many jobs run at a time."""
    return max(1, machine.cores // CORES_PER_SLOT)


def memory_mb_of(machine: Machine) -> int:
    """Return the MiB that all jobs together may hold."""
    return int(machine.memory * SHARE) >> 20
