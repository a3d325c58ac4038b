"""An idea of one's own against a shipped baseline: what `./run_all.sh try` makes runs and a claim of.

    ./run_all.sh try IDEA.py --against dpo --gain 0.3

IDEA.py holds one function, and its name says which study judges it: `loss` (td_dpo), `adapter` (iw_lora) or `schedule`
(graff); IDEA in lib/<study>/study.py is how it is called. In outputs/<scale>-try,<idea>-<digest>/ are then a copy of the
file, two run YAMLs made of shipped ones (the idea's is the baseline's but for its function), a claims.yaml with one
claim, and try.json. From there on it is a study like the shipped ones: members, keys, looks, resume and pages are
theirs.
"""

import inspect
import os
import re
import runpy
import shlex
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lib import config, record
from lib.errors import StudyError

RECORD = "try.json"  # of a try, in its folder


# ---- the function in a file


def load(path: Path) -> tuple[str, Callable]:
    """(study, function) of an idea's file. Raises StudyError where it cannot be read, or holds another function."""
    modules = {study: config.study_module(study) for study in config.studies()}
    wanted = {module.IDEA: study for study, module in modules.items() if hasattr(module, "IDEA")}
    try:
        scope = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise _fault(path, error) from None
    found = [text for text in wanted if text.partition("(")[0] in scope]
    if len(found) != 1:
        raise StudyError(str(path), f"{len(found)} of the functions that are tried", f"one of {'; '.join(wanted)}")
    name, *asked = re.findall(r"\w+", found[0])
    own = inspect.signature(scope[name])
    if asked != [p.name for p in own.parameters.values() if p.default is p.empty or p.name in asked]:
        raise StudyError(str(path), f"{name}{own}", f"{found[0]}; what more it takes has defaults")
    return wanted[found[0]], scope[name]


def _fault(path: Path, error: BaseException) -> StudyError:
    """What an idea raised and in which of its lines or, of an error that is not its own, what is wrong with it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = (lines or [getattr(error, "lineno", None)])[-1]  # of a SyntaxError its own
    said = f"raises {type(error).__name__}: {error}"
    if not line and isinstance(error, ValueError | OSError):
        said = getattr(error, "strerror", None) or error
    where, expected = f"{path}:{line}" if line else str(path), "a function that can be tried; nothing was trained"
    return StudyError(where, " ".join(str(said).split()), expected)


def adopt(run) -> None:
    """Have a run's idea, if it has one, in the place of its method's own function in this process."""
    if run.idea:
        config.study_module(run.study).adopt(load(Path(run.idea))[1])


# ---- a try: its runs, its claim and its record


def tries(outputs: Path, **about: Any) -> list[dict]:
    """The record of every try below `outputs` that is `about` this, with its `folder`, in the order they were begun."""
    found = [{**record.read_json(path, {}), "folder": path.parent} for path in outputs.glob(f"*-try,*/{RECORD}")]
    return sorted((e for e in found if about.items() <= e.items()), key=lambda e: e["number"])


def prepare(options, outputs: Path, sets: dict[str, str], argv: list[str], fetch: Callable) -> Path:
    """Write what a try is made of; returns its folder. The same idea goes on in the folder that it has; another gets
    seeds that no try against this baseline has had or, with --same-seeds, those of the first one. `fetch` gets the models
    that runs start from."""
    path, scale, against, gain, same = options.idea, options.scale, options.against, options.gain, options.same_seeds
    study, function = load(path)
    module, shipped = config.study_module(study), config.ROOT / "params" / study
    files = {file.stem: file for file in sorted((shipped / scale).glob("*.yaml"))}
    if against not in files:
        found, near = f"no run of {study} at {scale} scale", config.did_you_mean(against, files, "")
        raise StudyError(f"--against {against}", found, f"one of {', '.join(files)}", near)
    content = config.load_yaml(shipped / "claims.yaml")
    metric = content["noise"].get("metric", "score")
    if gain >= (most := 9 if metric == "score" else 1):
        expected = f"a gain of {metric}, {'on a scale from 1 to 10' if most > 1 else 'a share: 0.01 is a point'}"
        raise StudyError(f"--gain {gain:g}", f"not below {most}", expected)
    baseline = config.load_run(files[against], study=study, scale=scale, mode="full", overrides=sets)
    cells = [*config.cells(baseline.model_copy(update={"grid": baseline.grid and baseline.grid[:1]})).values()]
    cell = cells[(len(cells) - 1) // 2][0]  # the middle one of the first block, around which grids are laid out
    stem = re.sub(r"[^a-z0-9]+", "_", path.stem.lower()).strip("_")
    text, about = path.read_text(encoding="utf-8"), {"study": study, "scale": scale, "against": against}
    root = outputs / f"{scale}-try,{stem[:40]}-{record.digest([text, about, gain, sets, same])[:8]}"
    if not (made := record.read_json(root / RECORD, {})):
        before, seeds = tries(outputs, **about), [*baseline.seed_list]
        taken, width = {seed for each in before for seed in each["seeds"]}, max(seeds) - min(seeds) + 1
        while taken & {*seeds} and not same:
            seeds = [seed + width for seed in seeds]
        again = [each["number"] for each in before if {*each["seeds"]} & {*seeds}]
        made = {**about, "idea": path.name, "run_id": f"idea_{stem}", "number": len(before) + 1, "gain": gain}
        made |= {"seeds": seeds, "again": again}
    run_id, kept = made["run_id"], root / "idea" / path.name
    mine = config.apply(baseline, cell | module.IDEA_RUN | _members({}, made["seeds"]) | {"role": "proposed"})
    mine = mine.model_copy(update={"run_id": run_id, "method": run_id, "idea": str(kept)})
    other = config.apply(baseline, cell | _members(cell, made["seeds"]) | {"role": "comparative"})
    fetch([mine])
    try:
        with warnings.catch_warnings(action="ignore"):
            module.try_out(function, config.members(mine)[0].run)
    except (Exception, SystemExit) as error:
        raise _fault(path, error) from None
    record.write_text(kept, text)
    written = {f"params/{study}/{scale}/{run.run_id}.yaml": config.dump(run) for run in (mine, other)}
    written[f"{study}/claims.yaml"] = _claims(content, metric, made, other, cell)
    for name, content in written.items():
        record.write_text(root / name, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    there = kept.relative_to(config.ROOT) if kept.is_relative_to(config.ROOT) else kept  # wherever the given file was
    argv = [str(there) if Path(word) == path else word for word in argv]
    record.write_json(root / RECORD, {**made, "command": f"./run_all.sh {shlex.join(argv)}"})
    return root


def _members(cell: dict, seeds: list[int]) -> dict[str, Any]:
    """What trains one cell with these seeds, without a search and without W&B."""
    grid, nothing = [{"cells": [cell]}] if cell else None, {"optuna.n_trials": 0, "optuna.search_space": {}}
    return {"grid": grid, "seed_list": seeds, "pilot_seeds": None, "wandb": {"mode": "disabled"}, **nothing}


def _claims(shipped: dict, metric: str, made: dict, baseline, cell: dict) -> dict:
    """The study's claims.yaml with one claim in place of its own."""
    names, seeds = shipped["names"], made["seeds"]
    at = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in cell.items())
    name = f"{names.get(baseline.method, baseline.method)}{' at ' * bool(at)}{at}"
    on = f"on seeds that no idea before it had ({min(seeds)} and on)"
    if made["again"]:
        on = f"on the same seeds as idea {', '.join(map(str, made['again']))}: trying again is tuning on the judge"
    claim = {"id": "idea", "sentence": f"{made['idea']} gains {made['gain']:g} over {name}.", "metric": metric}
    claim |= {"estimand": f"mean {metric} less that of the baseline, over questions and seeds", "gain": made["gain"]}
    claim |= {"treatment": made["run_id"], "baseline": baseline.method, "baseline_name": name}
    claim |= {"note": f"Idea {made['number']} tried against {made['against']}, {on}.", "scales": [made["scale"]]}
    return {**shipped, "names": {**names, made["run_id"]: made["idea"]}, "fixed": [], "claims": [claim]}


def announcement(root: Path) -> str:
    """What a try is about to do, in a line."""
    from lib import claims  # with pandas

    made = record.read_json(root / RECORD)
    study = claims.load(root / made["study"] / "claims.yaml")
    (claim,), looks = study.claims, ", ".join(map(str, study.looks_of(made["scale"])))
    tested = f"Tested is {claim.threshold_text}, after {looks} seeds."
    return f"{claim.sentence} {tested} {claim.note} Its record: {os.path.relpath(root)}"


def summary(root: Path, prepare: float) -> Iterator[str]:
    """What a try came to, in lines; `prepare`: seconds of what the members of one seed share."""
    folder = root / record.read_json(root / RECORD)["study"] / "comparison"
    if record.read_json(folder / "status.json", {}).get("status") == "succeeded":
        claim = record.read_json(folder / "claims.json")[0]
        yield claim["reason"] if claim["reason"].startswith("identical: ") else f"{claim['verdict']}: {claim['reason']}"
        shared = prepare * (claim["n_seeds"] or 0) / 60
        spent = f"Training took {claim['minutes'] or 0:.1f} minutes of one core, and what its seeds share {shared:.1f}"
        yield f"{claim['note']} {spent}, where it was not there yet."
        yield f"page: {os.path.relpath(folder / 'analysis.html')}"
