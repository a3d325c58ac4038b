"""Whether run YAMLs and claims.yaml are what the design beside them writes."""

from __future__ import annotations

from collections.abc import Iterator

from lib.commands.compose import command
from lib.config import Finding
from lib.errors import StudyError
from lib.run.check import Loaded, named, of_error


def findings(loaded: list[Loaded]) -> Iterator[Finding]:
    """Of every design.yaml that lies where these run YAMLs do, or above their folder for a scale. A design that writes
    something else is a warning: the files are what runs."""
    homes = [path.parent.parent if path.parent.name in ("laptop", "paper") else path.parent for path, _, _ in loaded]
    for folder in dict.fromkeys(homes):
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
                yield Finding("warning", "", "its design writes it, and it is not there", again, named(file))
            elif old != text:
                key, _, change = command.difference(old, text).partition(": ")
                what = f"differs from its design{change and f' ({change})'}"
                fix = f"{again} --force, or change the design to what the file says"
                yield Finding("warning", key, what, fix, named(file))
        for file in command.strangers(folder, files):
            fix = "write it into the design, or keep it in a folder of its own, for --params"
            yield Finding("warning", "", "not in the design beside it", fix, named(file))
