"""What one variable of the dataset is: name, dims, dtype, unit, clock, definition, and when it is missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Variable:
    """One variable of one group.

    Attributes
    ----------
    group, name : str
    dims : tuple of str
    dtype : str
        As NumPy spells it; ``str`` for text.
    units : str
        UDUNITS spelling; empty for text, labels and timestamps (whose unit is their dtype).
    clock : str
        The clock of a timestamp, or the one a duration was measured with; empty where no clock is involved.
    long_name, definition : str
        A title for an axis; what exactly it is, for a duration "from event A to event B".
    missing : str
        When the value may be missing, and how that looks.
    optional : bool
        The whole variable may be absent. If it is present, it means this.
    flags : tuple of str
        Meanings of a coded variable, for the CF attributes ``flag_values`` and ``flag_meanings``.
    first_flag : int
        Code of the first meaning.
    """

    group: str
    name: str
    dims: tuple[str, ...]
    dtype: str
    units: str
    clock: str
    long_name: str
    definition: str
    missing: str = "never"
    optional: bool = False
    flags: tuple[str, ...] = ()
    first_flag: int = 0

    @property
    def path(self) -> str:
        """Return ``group/name``, as messages and the markdown table spell it."""
        return f"{self.group}/{self.name}"

    def attrs(self) -> dict[str, Any]:
        """Return the attributes that the stored variable carries."""
        attrs: dict[str, Any] = {"long_name": self.long_name, "definition": self.definition, "missing": self.missing}
        if self.units:
            attrs["units"] = self.units
        if self.clock:
            attrs["clock"] = self.clock
        if self.flags:
            attrs.update(flag_attrs(self.flags, self.dtype, self.first_flag))
        return attrs


def flag_attrs(meanings: Iterable[str], dtype: str, first: int = 0) -> dict[str, Any]:
    """Return CF ``flag_values`` and ``flag_meanings``; blanks inside a meaning become underscores, as CF separates by blanks."""
    words = ["_".join(str(word).split()) or "_" for word in meanings]
    return {"flag_values": np.arange(first, first + len(words), dtype=dtype), "flag_meanings": " ".join(words)}
