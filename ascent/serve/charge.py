"""Calls entered in the ledger behind the callers' backs: no answer waits for a disk."""

from __future__ import annotations

import logging
import queue
import threading
import uuid

from ascent.jobs.ledger import Ledger, Usage
from ascent.serve.chat.types import CallRecord

LOG = logging.getLogger(__name__)
AT_ONCE = 500
SHUT_S = 10.0


class Charges:
    """Takes call records from any thread and enters them in the order they came, many to a transaction.

    What a killed process had not entered yet, a fraction of a second of calls, is not charged.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: queue.SimpleQueue[Usage | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="charges", daemon=True)
        self._thread.start()

    def __call__(self, record: CallRecord) -> None:
        """Enter a call soon."""
        self._waiting.put(
            Usage(
                key=f"call/{uuid.uuid4()}",
                owner=record.owner,
                key_id=record.key_id,
                deployment=record.deployment,
                model=record.model,
                operation=record.operation,
                prompt_tokens=record.prompt_tokens,
                completion_tokens=record.completion_tokens,
                cached_tokens=record.cached_tokens,
                seconds=record.seconds,
            )
        )

    def close(self) -> None:
        """Enter what is waiting, and end."""
        self._waiting.put(None)
        self._thread.join(SHUT_S)

    def _run(self) -> None:
        ended = False
        while not ended:
            batch = [self._waiting.get()]
            while len(batch) < AT_ONCE and not self._waiting.empty():
                batch.append(self._waiting.get())
            ended = None in batch
            self._enter([usage for usage in batch if usage is not None])

    def _enter(self, usages: list[Usage]) -> None:
        from sqlalchemy.exc import SQLAlchemyError

        if not usages:
            return
        try:
            self._ledger.record(*usages)
        except SQLAlchemyError as error:
            lost = [f"{usage.owner}: {usage.prompt_tokens} + {usage.completion_tokens} tokens" for usage in usages]
            LOG.error("calls could not be charged", extra={"cause": str(error), "calls": lost})
