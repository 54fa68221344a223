"""The server's log: one JSON object a line, or a line for people; every one of a request carries its id."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
_OWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonLines(logging.Formatter):
    """A record as JSON: time, level, logger, message, request id, and whatever was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", "") or REQUEST_ID.get():
            found["request_id"] = request_id
        found |= {name: value for name, value in vars(record).items() if name not in _OWN and name != "request_id"}
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False, default=str)


class Lines(logging.Formatter):
    """A record as a line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        at = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        extra = " ".join(f"{name}={value}" for name, value in vars(record).items() if name not in _OWN)
        request_id = REQUEST_ID.get()
        text = " ".join(part for part in (at, record.levelname, record.getMessage(), extra, request_id) if part)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def set_up(form: Literal["json", "text"], level: int = logging.INFO) -> None:
    """Send the log of this process to standard error in one form, the web server's own included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], name != "uvicorn.access"  # requests are logged once, with their ids
    for name in ("httpx", "httpcore", "botocore", "alembic", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
