"""Run YAMLs and claims as they are written: everything that lib/config.py refuses, and claims whose cells nobody
trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from lib import config, record
from lib.claims import BEST, load, select
from lib.commands.check.finding import Finding, named, of_error
from lib.errors import StudyError

Loaded = list[tuple[Path, "config.Run | StudyError", list]]


def findings(loaded: Loaded) -> Iterator[Finding]:
    """Of run YAMLs as check.load_folder gives them; each is also shrunk to its trial form and split into its
    members."""
    for path, run, told in loaded:
        if isinstance(run, StudyError):
            yield of_error(run, named(path))
            continue
        for each in told:
            yield Finding(each.level, named(path), each.key, each.what, each.fix)
        try:
            config.members(run)
            config.trial(run)
        except StudyError as error:
            if not any(each.level == "error" for each in told):
                yield of_error(error, named(path))


def claims(study: str, runs: list, scale: str, path: Path | None = None) -> Iterator[Finding]:
    """The study's claims (in `path`, or as shipped): they load, their metrics exist and, where `runs` are the study's
    own as they lie beside it, at this scale their cells are trained. Of somebody's own runs, or with --set, claims may
    stay open: that is a warning, and their analysis says so too."""
    path = path or config.ROOT / "params" / study / "claims.yaml"
    try:
        published = load(path)
    except StudyError as error:
        yield of_error(error, named(path))
        return
    module = config.study_module(study)
    if published.choose_on and published.choose_on not in module.METRICS:
        yield Finding(
            "error",
            named(path),
            "choose_on",
            f"{published.choose_on} is no metric of {study}",
            ", ".join(module.METRICS),
        )
    if published.chance and published.chance.metric not in module.CLAIM_METRICS:
        yield Finding(
            "error",
            named(path),
            "chance.metric",
            f"{published.chance.metric} is in no table of {study}'s analysis",
            "one of: " + ", ".join(module.CLAIM_METRICS),
        )
    open_claims: dict[str, str] = {}
    shipped = all(run.source and run.source.is_relative_to(path.parent) and not run.overrides for run in runs)
    members = pd.DataFrame([_row(member) for run in runs for member in _members(run)])
    for claim in published.claims:
        if scale not in claim.scales or claim.not_evaluated:
            continue
        if claim.metric not in module.CLAIM_METRICS:
            yield Finding(
                "error",
                named(path),
                f"{claim.id}.metric",
                f"{claim.metric} is in no table of {study}'s analysis",
                "one of: " + ", ".join(module.CLAIM_METRICS),
            )
        for side in ("treatment", "baseline"):
            for cell in published.levels(claim, side) if getattr(claim, side) else ():
                known = {key: value for key, value in cell.items() if value != BEST}
                if members.empty or not select(members, known).empty:
                    continue
                if not shipped:
                    open_claims.setdefault(claim.id, published.label(cell))
                else:
                    yield Finding(
                        "error",
                        named(path),
                        f"{claim.id}.{side}",
                        f"no run at {scale} scale trains {published.label(cell)}",
                        f"a run in params/{study}/{scale}/ with this cell, or scales: of the claim without {scale}",
                    )
    if open_claims:
        first = next(iter(open_claims.values()))
        yield Finding(
            "warning",
            named(path),
            ", ".join(open_claims),
            f"not decided by these runs, of which none trains {first}"
            + (" and others" if len(open_claims) > 1 else ""),
            "nothing, if they are not what these runs are for",
        )


def _members(run) -> list:
    """None where its grid is wrong, which is a finding of the YAML."""
    try:
        return config.members(run)
    except StudyError:
        return []


def _row(member) -> dict:
    """A member as the tables of an analysis name it: its cell's keys by their own names and by the study's short
    ones."""
    aliases = config.study_module(member.run.study).ALIASES.items()
    short = {alias: member.cell[dotted] for alias, dotted in aliases if dotted in member.cell}
    return short | record.identity(_spec(member))


def _spec(member) -> dict:
    return {
        "run_id": member.run_id,
        "config": config.dump(member.run),
        "study": member.run.study,
        "cell": member.cell,
        "cell_name": member.cell_name,
        "seed": member.seed,
    }
