"""The price list: exact decimals from a YAML file, and what some use costs in millionths of the currency."""

from __future__ import annotations

import fnmatch
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ascent.records.errors import BadFile, nearest

MICROS = 1_000_000
FREE = Path(__file__).with_name("prices.yaml")


class Price(BaseModel):
    """Amounts of the currency: per 1,000 tokens of each kind, and per second."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Decimal = Field(default=Decimal(0), ge=0)
    completion: Decimal = Field(default=Decimal(0), ge=0)
    cached: Decimal = Field(default=Decimal(0), ge=0)
    training: Decimal = Field(default=Decimal(0), ge=0)
    second: Decimal = Field(default=Decimal(0), ge=0)


class PriceList(BaseModel):
    """Prices by model name or pattern; the first that fits counts, then the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    default: Price = Price()
    models: dict[str, Price] = {}

    def of(self, model: str) -> Price:
        """Return what a model's use costs."""
        fitting = (price for pattern, price in self.models.items() if fnmatch.fnmatchcase(model, pattern))
        return next(fitting, self.default)

    def cost_micros(
        self, model: str, *, prompt: int, completion: int, cached: int, training: int, milliseconds: int
    ) -> int:
        """Return the cost in millionths of the currency, rounded once, half to even.

        `cached` tokens are a part of `prompt` and are charged at their own price instead.
        """
        price = self.of(model)
        thousandths = (
            (prompt - cached) * price.prompt
            + cached * price.cached
            + completion * price.completion
            + training * price.training
            + milliseconds * price.second
        )
        return int((thousandths * MICROS / 1000).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


def load_prices(file: Path | None = None) -> PriceList:
    """Read a price list; without a file the packaged one, in which everything is free.

    Raises:
        BadFile: it cannot be read, or does not fit; with line and field where they are known.
    """
    file = file or FREE
    try:
        # The base loader leaves every scalar a text, so no amount ever is a binary fraction.
        found: Any = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
        return PriceList.model_validate({} if found is None else found)
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"the price list cannot be read ({error}); check the path", file=file) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise BadFile(f"not valid YAML: {error.problem}", file=file, line=line) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        known = [*PriceList.model_fields, *Price.model_fields]
        hint = nearest(str(first["loc"][-1]), known) if first["type"] == "extra_forbidden" else ""
        raise BadFile(
            f"{first['msg']}{hint}; write such as in ascent/jobs/prices.yaml", file=file, field=field
        ) from error
