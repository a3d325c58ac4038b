"""Whether run YAMLs and claims.yaml are what the design beside them writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lib.commands.check.finding import Finding, named, of_error
from lib.commands.compose import command
from lib.errors import StudyError


def findings(loaded: list[tuple[Path, object, list]]) -> Iterator[Finding]:
    """Of every design.yaml that lies where these run YAMLs do, or above their folder for a scale. A design that writes
    something else is a warning: the files are what runs."""
    for folder in dict.fromkeys(home(path) for path, _, _ in loaded):
        design = folder / "design.yaml"
        if not design.exists():
            continue
        try:
            files = {folder / name: text for name, text in command.composed(design).items()}
        except StudyError as error:
            yield of_error(error, named(design))
            continue
        again = f"./run_all.sh compose {named(design)}"
        for file, text in files.items():
            old = file.read_text("utf-8", errors="replace") if file.exists() else None
            if old is None:
                yield Finding("warning", named(file), "", "its design writes it, and it is not there", again)
            elif old != text:
                key, _, change = command.difference(old, text).partition(": ")
                yield Finding(
                    "warning",
                    named(file),
                    key,
                    f"differs from its design{change and f' ({change})'}",
                    f"{again} --force, or change the design to what the file says",
                )
        for file in command.strangers(folder, files):
            yield Finding(
                "warning",
                named(file),
                "",
                "not in the design beside it",
                "write it into the design, or keep it in a folder of its own, for --params",
            )


def home(path: Path) -> Path:
    return path.parent.parent if path.parent.name in ("laptop", "paper") else path.parent
