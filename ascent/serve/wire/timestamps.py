"""Timestamps of the wire: seconds since 1970, ISO 8601, or an HTTP date."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def parse_timestamp(raw: str | float) -> datetime:
    """Return the time in UTC. All three forms are read wherever one is expected; a time without a zone is UTC.

    Raises:
        ValueError: it is no time, or lies outside the years 1 to 9999.
    """
    try:
        if not isinstance(raw, str):
            return EPOCH + timedelta(seconds=raw)
        found = _parse_text(raw.strip())
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"no time: {error}") from error


def _parse_text(text: str) -> datetime:
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            return parse(text)
        except (ValueError, TypeError, IndexError):
            continue
    return EPOCH + timedelta(seconds=float(text))


def format_timestamp(value: datetime, form: str) -> str | float:
    """Return `value` as `iso8601`, `rfc822` (whole seconds) or `unixtimestamp`; a time without a zone is UTC."""
    value = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    if form == "iso8601":
        return value.isoformat().replace("+00:00", "Z")
    if form == "rfc822":
        return format_datetime(value, usegmt=True)
    seconds = (value - EPOCH).total_seconds()
    return int(seconds) if seconds.is_integer() else seconds
