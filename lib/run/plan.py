"""What would run, what is cached and why, and what it will cost: the runner's list of notebooks in order.

Per study: one training notebook per run YAML, one sweep per run with a search, then the analysis of them all.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from lib import config, record
from lib.errors import StudyError
from lib.run import forecast, keys, members, reach

NOTEBOOKS = config.ROOT / "notebooks"
# The files that tell one record from another: of a run and its search, and of each member.
RECORDS = (
    "*/status.json",
    "*/done.json",
    "*/sweep/status.json",
    "*/sweep/done.json",
    "*/members/*/done.json",
    "*/members/*/error.json",
    "*/sweep/trials/*/done.json",
)
NOTEBOOK_SECONDS = 8.0  # a notebook's own cost besides its members: kernel, method cells, figures, HTML


@dataclass
class Step:
    """One notebook to execute. `reason` is why; the empty string means that its record stands."""

    kind: str  # train, sweep, analysis
    study: str
    name: str  # run_id, or 'comparison'
    notebook: Path
    folder: Path
    parameters: dict
    key: str
    reason: str
    run: object = None
    needs: list["Step"] = field(default_factory=list)
    members: int = 0  # to be trained
    unknown: bool = False  # nothing tells how long one trains
    training: float = 0.0  # predicted seconds of its members, on one slot
    seconds: float = 0.0  # the same with the notebook's own
    prepare: float = 0.0  # predicted for what its members share, where this step is the first to need it
    again: str = ""  # the command that executes it, where its run does not say

    @property
    def title(self) -> str:
        return f"{self.study}/{self.name}" + ("" if self.kind != "sweep" else " sweep")

    @property
    def progress(self) -> Path:
        """Where its members' progress is told: a sweep's members are its run's."""
        return self.folder.parent if self.kind == "sweep" else self.folder

    @property
    def output(self) -> Path:
        return self.folder / {"train": "run.ipynb", "sweep": "sweep.ipynb", "analysis": "analysis.ipynb"}[self.kind]


def steps(runs: list, scale: str, mode: str, *, force: bool = False) -> list[Step]:
    """The steps for these runs (config.Run objects), each study's in order: train, sweep, analysis."""
    planned = []
    for study in dict.fromkeys(run.study for run in runs):
        mine = [run for run in runs if run.study == study]
        for path in (
            NOTEBOOKS / study / "train.ipynb",
            NOTEBOOKS / "sweep.ipynb",
            NOTEBOOKS / study / "analysis.ipynb",
            config.ROOT / "params" / study / "claims.yaml",
        ):
            if not path.exists():
                name = os.path.relpath(path, config.ROOT)
                raise StudyError(
                    name,
                    "not there",
                    "the study's notebooks and claims",
                    f"leave this study out (--study), or add it (git checkout -- {name})",
                )
        train = [_train(run, force) for run in mine]
        unmade = {members.inputs_folder(s.run): s for s in reversed(train) if s.members}
        for folder, first in unmade.items():
            first.prepare = 0.0 if (folder / "complete.json").exists() else forecast.prepare_seconds(first.run)
        sweeps = [_sweep(step, force) for step in train if step.run.optuna.n_trials or mode == "trial"]
        planned += [*train, *sweeps, _analysis(study, train, sweeps, scale, mode, force)]
    return planned


def _why(step_key: str, folder: Path, output: Path, status_name: str, force: bool) -> str:
    """Why a notebook has to be executed again, from its last status."""
    status = record.read_json(folder / status_name)
    if force:
        return "forced (--force)"
    if not status:
        return "never run"
    if status.get("status") != "succeeded":
        return f"last attempt {status.get('status')}"
    if not output.exists():
        return f"{output.name} is gone"
    if not record.read_json(folder / "done.json") or record.read_json(folder / "metrics.json") is None:
        return "its record is incomplete"
    return "" if status.get("key") == step_key else "its notebook or what it reads changed"


def _train(run, force: bool) -> Step:
    folder = Path(run.results_dir) / run.run_id
    notebook = NOTEBOOKS / run.study / "train.ipynb"
    every = config.members(run)
    stale = [(m, why) for m in every if (why := "forced" if force else members.stale(m, folder / "members" / m.id))]
    key = keys.digest([*(members.key(m)["all"] for m in every), keys.notebook_code(notebook), config.dump(run)])
    reason = _why(key, folder, folder / "run.ipynb", "status.json", force)
    if stale and not reason.startswith("forced"):
        reason = f"{len(stale)} of {len(every)} members: {stale[0][1]}" if reason != "never run" else reason
    step = Step(
        "train", run.study, run.run_id, notebook, folder, config.parameters(run), key, reason, run, members=len(stale)
    )
    _predict(step)
    step.seconds = step.training + (NOTEBOOK_SECONDS if reason else 0)
    return step


def _predict(step: Step) -> None:
    """How long its members will train, where something tells."""
    each = forecast.member_seconds(step.run)
    step.unknown, step.training = bool(step.members) and each is None, step.members * (each or 0.0)


def _sweep(train: Step, force: bool) -> Step:
    run, folder, notebook = train.run, train.folder / "sweep", NOTEBOOKS / "sweep.ipynb"
    key = keys.digest([train.key, keys.notebook_code(notebook), reach.modules("lib.run.sweep")])
    reason = (
        "its run is to be done" if train.reason else _why(key, folder, folder / "sweep.ipynb", "status.json", force)
    )
    step = Step(
        "sweep", run.study, run.run_id, notebook, folder, config.parameters(run), key, reason, run, needs=[train]
    )
    if reason:
        step.members = max(0, run.optuna.n_trials - len({m.cell_name for m in config.members(run)}))
        _predict(step)
        step.seconds = step.training + NOTEBOOK_SECONDS
    return step


def _analysis(study: str, train: list[Step], sweeps: list[Step], scale: str, mode: str, force: bool) -> Step:
    results = Path(train[0].run.results_dir)
    folder, notebook = results / "comparison", NOTEBOOKS / study / "analysis.ipynb"
    key = analysis_key(study, results)
    before = any(s.reason for s in [*train, *sweeps])
    reason = "its runs are to be done" if before else _why(key, folder, folder / "analysis.ipynb", "status.json", force)
    parameters = {"study": study, "scale": scale, "mode": mode, "results_dir": str(results)}
    step = Step("analysis", study, "comparison", notebook, folder, parameters, key, reason, needs=[*train, *sweeps])
    last = record.read_json(folder / "status.json") or {}
    known = last["minutes"] * 60 if last.get("status") == "succeeded" else NOTEBOOK_SECONDS * 2
    step.seconds = known if reason else 0
    return step


def analysis_key(study: str, results: Path) -> str:
    """What an analysis depends on: its code, its claims, and the records that lie in `results` (whichever runs were
    asked for), each told by the attempts that made it, and by what a judge graded since."""
    claims, folder = config.ROOT / "params" / study / "claims.yaml", results / "comparison"
    paths = [path for pattern in RECORDS for path in sorted(results.glob(pattern)) if folder not in path.parents]
    records = {path.relative_to(results).as_posix(): _made_by(path) for path in paths}
    graded = [path.read_text() for path in sorted(results.glob("*/members/*/judged.json"))]
    return keys.digest(
        [
            records,
            record.read_json(folder / "runs.json"),
            claims.read_text(),
            *([graded] if graded else []),
            keys.notebook_code(NOTEBOOKS / study / "analysis.ipynb", imports=True),
        ]
    )


def refresh(step: Step) -> None:
    """Give an analysis that is about to be executed its key anew: its runs have ended, and the records are what they
    are."""
    if step.kind == "analysis":
        step.key = analysis_key(step.study, step.folder.parent)


def _made_by(path: Path) -> tuple:
    """Of a status, a sentinel or an error that a record holds: what is another one after another attempt."""
    told = record.read_json(path) or {}
    return told.get("status"), told.get("nonce"), told.get("key"), told.get("exception")


def analysis(study: str, results: Path, scale: str, mode: str, *, why: str = "its records came from W&B") -> Step:
    """The analysis of a folder of records as they are, whoever made them."""
    parameters = {"study": study, "scale": scale, "mode": mode, "results_dir": str(results)}
    key = analysis_key(study, results)
    again = (record.read_json(results / "comparison" / "status.json") or {}).get("command", "")
    return Step(
        "analysis",
        study,
        "comparison",
        NOTEBOOKS / study / "analysis.ipynb",
        results / "comparison",
        parameters,
        key,
        why,
        again=again,
    )
