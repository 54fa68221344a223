"""Records: what crosses rooms or rests on disk. Imports pydantic only, never torch."""

from ascent.records.learning import (
    Episode,
    Feedback,
    FinishReason,
    Message,
    Preference,
    Role,
    Score,
    Task,
    Unscored,
)
from ascent.records.record import Json, Record, digest
from ascent.records.reporting import (
    Change,
    DataSource,
    Decision,
    Estimate,
    ModelCard,
    Report,
    RunCard,
    Verdict,
)

__all__ = [
    "Change",
    "DataSource",
    "Decision",
    "Episode",
    "Estimate",
    "Feedback",
    "FinishReason",
    "Json",
    "Message",
    "ModelCard",
    "Preference",
    "Record",
    "Report",
    "Role",
    "RunCard",
    "Score",
    "Task",
    "Unscored",
    "Verdict",
    "digest",
]
