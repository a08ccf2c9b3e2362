"""The base of every configuration section.

Invariant: sections are frozen, unknown keys are errors, and so are numbers given as text, infinities and
NaN, so that what a run records is exactly what it was asked for.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen pydantic model that forbids unknown keys; a field's docstring is its documentation."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )
