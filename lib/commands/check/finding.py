"""One reason why a study may not be ready, with where it is and what mends it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lib.config import ROOT
from lib.errors import StudyError


@dataclass(frozen=True)
class Finding:
    """`place`: the YAML's key, the notebook's cell, or the line of code; empty for a whole file. An error means not
    ready."""

    severity: Literal["error", "warning"]
    file: str
    place: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        where = f"{self.file}: {self.place}" if self.place else self.file
        return f"{self.severity}: {where}: {self.what}" + (f"\n    fix: {self.fix}" if self.fix else "")

    def to_json(self) -> dict:
        return asdict(self)


def named(path: str | Path) -> str:
    """A path as a person types it here: relative to the repository where it lies in it."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def of_error(error: StudyError, file: str, place: str = "") -> Finding:
    """A refusal of the configuration layer as a finding."""
    where = error.where.removeprefix(str(ROOT) + "/").removeprefix(file).lstrip(": ")
    return Finding("error", file, place or where, f"{error.found}; expected {error.expected}", error.fix)
