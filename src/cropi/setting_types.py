"""Types of settings: a frozen pydantic table, and the ranges of its values."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Table(BaseModel):
    """A frozen table of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _as_json(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError):
        raise ValueError("must be a finite number, a text, true, false, null, a list or a table") from None
    return value


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range that NumPy takes
PositiveNumber = Annotated[float, Field(gt=0, ge=1e-9, le=1e6)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]  # also the name of a folder
FreeTable = dict[str, Annotated[Any, AfterValidator(_as_json)]]  # its keys belong to another library
