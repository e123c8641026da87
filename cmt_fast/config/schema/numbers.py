"""Numbers that a recipe may hold, and the decorator of every part of the schema: frozen, no unknown key, no NaN."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

schema = dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
