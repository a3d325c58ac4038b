"""`./run_all.sh compose design.yaml`: a design's run YAMLs and claims.yaml, validated as `plan` and `check` do, then
written: all of them, or none. A file that differs from what its design writes is kept without --force; what differs is
said."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lib import config, record
from lib.commands.compose import claims, runs
from lib.commands.compose.design import load
from lib.config import parse_yaml
from lib.errors import StudyError
from lib.run import check
from lib.run.check import named

SHOWN = 6  # differing keys of a file that are named


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="./run_all.sh compose", description="Write the run YAMLs and claims.yaml of a design."
    )
    top.add_argument("design", nargs="*", type=Path, help="a design.yaml (default: those of all studies in params/)")
    top.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write into DIR/laptop, DIR/paper and DIR/claims.yaml (default: "
        "beside the design); --params DIR runs them",
    )
    top.add_argument("--force", action="store_true", help="overwrite files that differ")
    top.add_argument("--dry-run", action="store_true", help="write nothing; show the lines that would change")
    return top


def main(argv: list[str]) -> int:
    """The command: nothing is written before every design's files are known to be valid, and to be new or as they
    are."""
    options = parser().parse_args(argv)
    paths = options.design or sorted((config.ROOT / "params").glob("*/design.yaml"))
    if options.out and len(paths) > 1:
        raise StudyError("--out", f"{len(paths)} designs", "one: their runs would share a folder", "name the design")
    to_write: dict[Path, str] = {}
    told: list[str] = []
    for path in paths:
        changed, lines = changes(path, (options.out or path.parent).absolute(), options)
        to_write |= changed
        told += lines
    if options.dry_run:
        told.append("nothing was written (--dry-run)")
    else:
        write(to_write)
        told.append(f"written: {len(to_write)}" if to_write else "nothing to do: every file is as its design writes it")
    print("\n".join(told))
    return 0


def changes(path: Path, out: Path, options: argparse.Namespace) -> tuple[dict[Path, str], list[str]]:
    """({file: text} that this design would write and that is not there like that, what to say of it). Refused: a design
    with a fault, and one that would overwrite what differs without being told to."""
    files = {out / name: text for name, text in composed(path).items()}
    study = load(path).study
    validate(study, path, out, files)
    changed = {file: text for file, text in files.items() if _old(file) != text}
    differing = {file: text for file, text in changed.items() if file.exists()}
    if differing and not options.force and not options.dry_run:
        refuse(path, differing)
    told = [
        f"{named(path.absolute())}: {len(files)} files; {len(changed) - len(differing)} new, {len(differing)} "
        f"{'differ' if options.dry_run else 'overwritten'}, {len(files) - len(changed)} as they are"
    ]
    for file, text in changed.items():
        told.append(f"  {'differs' if file in differing else 'new'}: {named(file)}")
        if options.dry_run:
            told += difflib.unified_diff(
                _old(file).splitlines(), text.splitlines(), named(file), "composed", lineterm=""
            )
    told += [f"  not in this design, left alone: {named(file)}" for file in strangers(out, files)]
    read = config.ROOT / "params" / study / "claims.yaml"
    if out / "claims.yaml" in files and out / "claims.yaml" != read:
        told.append(f"  {named(out / 'claims.yaml')} is not what an analysis reads: that is {named(read)}")
    return changed, told


def composed(path: Path) -> dict[str, str]:
    """{laptop/<run_id>.yaml, paper/<run_id>.yaml, claims.yaml: text} of a design."""
    design = load(path)
    made, text = runs.texts(design), claims.text(design)
    return made if text is None else made | {"claims.yaml": text}


def validate(study: str, path: Path, out: Path, files: Mapping[Path, str]) -> None:
    """Refuse what `plan` or `check` would refuse, before anything is written: the files are loaded from another
    folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / study
        for file, text in files.items():
            place = folder / file.relative_to(out)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, "utf-8")
        wrong = []
        for scale in ("laptop", "paper"):
            if (folder / scale).is_dir():
                found = check.load_folder(folder / scale, scale, "full")
                wrong += check.yaml_findings(found)
                if (folder / "claims.yaml").exists():
                    read = [run for _, run, _ in found if not isinstance(run, StudyError)]
                    wrong += check.claims_findings(study, read, scale, folder / "claims.yaml")
        wrong = [finding for finding in dict.fromkeys(wrong) if finding.level == "error"]
        if wrong:
            told = "".join(f"\n  {finding.file}: {finding.key}: {finding.what}" for finding in wrong)
            told = told.replace(str(folder), named(out))
            raise StudyError(
                named(path.absolute()),
                f"in what it writes, faults: {len(wrong)}{told}",
                "run YAMLs and claims that ./run_all.sh check takes",
                wrong[0].fix,
            )


def strangers(out: Path, files: Mapping[Path, str]) -> list[Path]:
    """Run YAMLs that lie where this design writes, and that it does not write."""
    return [file for scale in ("laptop", "paper") for file in sorted((out / scale).glob("*.y*ml")) if file not in files]


def refuse(path: Path, differing: Mapping[Path, str]) -> None:
    told = "".join(f"\n  {named(file)}: {difference(_old(file), text)}" for file, text in differing.items())
    many = "1 file differs" if len(differing) == 1 else f"{len(differing)} files differ"
    raise StudyError(
        named(path.absolute()),
        f"{many} from what it writes (file -> design){told}",
        "new files, or files as they are",
        "--force, to overwrite; --dry-run, to see the lines; or bring into the "
        "design what was changed in the files by hand",
    )


def difference(old: str, new: str) -> str:
    """What is different, by keys where it is in the values, else by the first line."""
    try:
        before, after = _flat(parse_yaml(old, "")), _flat(parse_yaml(new, ""))
    except StudyError as error:
        return f"cannot be read ({error.found})"
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key, _flat) != after.get(key, _flat)]
    told = [f"{key}: {_shown(before, key)} -> {_shown(after, key)}" for key in keys[:SHOWN]]
    if keys:
        return "; ".join(told) + (f"; and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
    pairs = enumerate(zip([*old.splitlines(), ""], [*new.splitlines(), ""], strict=False), 1)
    return f"comments or layout, from line {next((i for i, (a, b) in pairs if a != b), 1)}"


def write(files: Mapping[Path, str]) -> None:
    """All of them or, where one cannot be written, none: what was there is put back."""
    before: dict[Path, bytes | None] = {}
    made = [folder for folder in dict.fromkeys(f.parent for f in files) if not folder.exists()]
    try:
        for file, text in files.items():
            old = file.read_bytes() if file.exists() else None
            record.write_text(file, text)
            before[file] = old
    except BaseException:
        for file, old in before.items():
            with contextlib.suppress(OSError):
                file.unlink() if old is None else record.write_bytes(file, old)
        for folder in made:
            with contextlib.suppress(OSError):  # not made, or somebody put something into it
                folder.rmdir()
        raise


def _old(file: Path) -> str:
    return file.read_text("utf-8", errors="replace") if file.exists() else ""


def _shown(values: dict, key: str) -> str:
    value = values.get(key, "(not there)")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(value, prefix: str = "") -> dict:
    """{dotted key: value}; a list of claims by their ids."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "id" in item for item in value):
        value = {item["id"]: item for item in value}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    dotted = {f"{prefix}.{name}" if prefix else str(name): item for name, item in value.items()}
    return {key: leaf for name, item in dotted.items() for key, leaf in _flat(item, name).items()}
