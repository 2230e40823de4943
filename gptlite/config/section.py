"""What every part of a config is, frozen and strict, and the types that its fields share."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1, lt=2**40)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the run: frozen, and strict about names and types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
