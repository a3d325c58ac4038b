"""A run YAML as one typed, validated, frozen object; its members; its trial form; its checks.

A run YAML is complete: nothing is merged into it except params/wandb.yaml (entity and project) where it has no `wandb`.
Studies are the folders of lib/ that hold a config.py, which gives: Run (the typed sections), ALIASES (short name ->
dotted key), METRICS (name -> direction), PRIMARY_METRIC, VALIDATION_METRIC, PATHS (keys that may name a local file),
recognises(raw), normalise(raw) (published names -> ours), steps(run), trial_changes(run), search_changes(run) and
check(run); and, where it has them, primary_metric(run), needs(run), what only it needs on the machine before a full
run, and implied(run, values), what the values of --set bring along where --set does not say otherwise.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lib import witness
from lib.errors import StudyError
from lib.settings.faults import did_you_mean, keys, raise_faults
from lib.settings.grid import Member, first_cell, member, members, search_space, trial
from lib.settings.run_values import (
    ROOT,
    TUNABLE,
    apply,
    build,
    default_results,
    dump,
    get,
    is_hub_id,
    is_local,
    markers,
    recognise,
    resolve,
    studies,
    study_module,
)
from lib.settings.schema import CONTEXT, Finding, Marker, Run, Wandb
from lib.settings.yaml_file import load_yaml, parse_yaml

__all__ = [
    "ROOT",
    "TUNABLE",
    "Finding",
    "Marker",
    "Member",
    "Run",
    "apply",
    "check",
    "dump",
    "from_notebook",
    "get",
    "is_hub_id",
    "is_local",
    "load_folder",
    "load_run",
    "load_yaml",
    "markers",
    "member",
    "members",
    "parameters",
    "resolve",
    "restore",
    "search_space",
    "steps",
    "studies",
    "study_module",
    "trial",
    "wandb_mode",
]

NOT_RUNS = {"claims.yaml", "design.yaml", "judge.yaml", "wandb.yaml"}
NOTEBOOK_OWN = {"In", "Out", "exit", "quit", "get_ipython", "open", "display"}
PLAIN = (str, int, float, list, tuple, dict, set, bytes, type(None))


def _context(study: str, scale: str, mode: str, results_dir: str | Path | None, source: Path | None) -> dict:
    folder = Path(results_dir).expanduser() if results_dir else default_results(study, scale, mode)
    return {
        "scale": scale,
        "mode": mode,
        "results_dir": folder if folder.is_absolute() else ROOT / folder,
        "source": source,
    }


def _wandb_defaults() -> dict | None:
    path = ROOT / "params" / "wandb.yaml"
    if not path.exists():
        return None
    try:
        return Wandb.model_validate(load_yaml(path)).model_dump()
    except ValidationError as error:
        raise_faults(error, str(path), Wandb)


def load_run(
    path: str | Path,
    *,
    study: str | None = None,
    scale: str,
    mode: str,
    overrides: Mapping[str, str] | None = None,
    results_dir: str | Path | None = None,
) -> Run:
    """The run in a YAML file, `--set` overrides applied; in trial mode already in its trial form."""
    path = Path(path).absolute()
    raw = load_yaml(path)
    for key in CONTEXT:
        if key in raw:
            raise StudyError(
                f"{path}: {key}",
                "a matter of the command line, not of a YAML",
                "no such key",
                f"remove it; use --{key}" if key in ("study", "scale") else "remove it",
            )
    if study is None:
        folder = path.parent.parent.name
        study = folder if folder in studies() and path.parent.name in ("laptop", "paper") else recognise(raw, str(path))
    if raw.get("wandb") is None:
        raw["wandb"] = _wandb_defaults()
    run = build(study, raw, str(path), **_context(study, scale, mode, results_dir, path))
    values = {}
    for key, text in (overrides or {}).items():
        if key.split(".")[0] in ("run_id", *CONTEXT):
            raise StudyError(
                f"--set {key}",
                "not a setting of a run",
                "a key of the YAML or a short name",
                "copy the YAML under another run_id" if key == "run_id" else f"use --{key}",
            )
        resolve(study, key, "--set")
        values[key] = parse_yaml(text, f"--set {key}") if isinstance(text, str) else text
    if values:
        implied = getattr(study_module(study), "implied", lambda *_: {})
        dotted = {resolve(study, key): value for key, value in values.items()}
        told = " ".join(f"--set {key}={overrides[key]}" for key in values)
        run = apply(run, {**implied(run, dotted), **values}, where=f"{path} with {told}")
        run = run.model_copy(update={"overrides": {key: str(text) for key, text in overrides.items()}})
    return trial(run) if mode == "trial" else run


def restore(
    values: Mapping[str, Any], *, study: str, scale: str, mode: str, results_dir: str | Path | None = None
) -> Run:
    """The run that `dump` wrote out, as it is: nothing is shrunk or filled in."""
    return build(
        study, dict(values), str(values.get("run_id", "run")), **_context(study, scale, mode, results_dir, None)
    )


def parameters(run: Run) -> dict:
    """One papermill variable per top-level key, and where the run stands."""
    return {**dump(run), "study": run.study, "scale": run.scale, "mode": run.mode, "results_dir": str(run.results_dir)}


def steps(run: Run) -> int:
    """Optimiser steps of one member; 0 where the data's size is not known before it is read."""
    with witness.unseen():
        return study_module(run.study).steps(apply(run, first_cell(run)[0])) or 0


def wandb_mode(run: Run) -> str:
    """online, offline or disabled: the YAML's word, else online at paper scale and offline at laptop scale."""
    if run.mode == "trial":
        return "disabled"
    return (run.wandb.mode if run.wandb else None) or ("online" if run.scale == "paper" else "offline")


def check(run: Run) -> list[Finding]:
    """What a person should know before the run starts; an error keeps it from starting."""
    from lib.settings.checks import shared_findings

    found = shared_findings(run)
    try:
        typical = apply(run, first_cell(run)[0])
    except StudyError:  # what is wrong with the cell is among the findings already
        return found
    with witness.unseen():
        return found + ([] if markers(typical) else study_module(run.study).check(typical))


def load_folder(
    folder: str | Path,
    scale: str,
    mode: str,
    overrides: Mapping[str, str] | None = None,
    results_dir: str | Path | None = None,
) -> list[tuple[Path, Run | StudyError, list[Finding]]]:
    """Every run YAML under a folder (params/<study>/<scale>/ or flat) with its findings, checked in its full form."""
    from lib.settings.checks import folder_findings

    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise StudyError(str(folder), "no such folder", "a folder of run YAMLs", "check --params")
    other = {"laptop", "paper"} - {scale}
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".yaml", ".yml")
        and path.name not in NOT_RUNS
        and not other & set(path.relative_to(folder).parts[:-1])
    ]
    found: list[tuple[Path, Run | StudyError, list[Finding]]] = []
    for path in paths:
        try:
            run = load_run(path, scale=scale, mode="full", overrides=overrides, results_dir=results_dir)
            findings = check(run)
            if mode == "trial" and not any(finding.level == "error" for finding in findings):
                run = trial(run)
            found.append((path, run, findings))
        except StudyError as error:
            found.append((path, error, []))
    return folder_findings(found)


def _assigned_beside(sources: list[str], name: str) -> set[str] | None:
    """Names assigned by the cells that assign `name` (the parameters cells); None where no cell does."""
    found: set[str] = set()
    for source in sources:
        try:
            body = ast.parse(source).body
        except SyntaxError:  # magics
            continue
        names = {
            node.id
            for statement in body
            if isinstance(statement, (ast.Assign, ast.AnnAssign))
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        if name in names:
            found |= names
    return found or None


def from_notebook(namespace: Mapping[str, Any]) -> Run:
    """The run described by a notebook's parameters: `from_notebook(globals())` in the cell after them.

    Unknown parameters are refused. In JupyterLab, where this cell may run again after later ones, only names that the
    parameters cells assigned are looked at; under the runner (which passes a nonce) every name of plain data is.
    """
    where = "notebook parameters"
    given = {
        key: value
        for key, value in namespace.items()
        if not key.startswith("_") and key not in NOTEBOOK_OWN and isinstance(value, PLAIN)
    }
    if not given.get("nonce") and isinstance(namespace.get("In"), list):
        written = _assigned_beside(namespace["In"], "run_id")
        given = {key: value for key, value in given.items() if written is None or key in written}
    study = given.pop("study", None) or recognise(given, where)
    module = study_module(study)
    given.pop("nonce", None)
    known = [key for key in module.Run.model_fields if key not in ("source", "overrides", "study")]
    for key in given:
        if key not in known:
            near = did_you_mean(module.ALIASES.get(key, key), known + keys(module.Run))
            raise StudyError(f"{where}: {key}", "unknown parameter", "one of " + ", ".join(known), near)
    for key in known:
        if not isinstance(namespace.get(key), PLAIN):
            raise StudyError(
                f"{where}: {key}",
                f"holds a {type(namespace[key]).__name__}",
                "the parameter of that name",
                "run the parameters cell again, and give the other object another name",
            )
    mode, scale = given.pop("mode", "full"), given.pop("scale", "laptop")
    context = _context(study, scale, mode, given.pop("results_dir", None), None)
    if given.get("wandb") is None:
        given["wandb"] = _wandb_defaults()
    run = build(study, given, where, **context)
    return trial(run) if mode == "trial" else run
