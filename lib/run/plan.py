"""What would run, what is cached and why, and how long it will take: the runner's list of notebooks in order.

Per study: one training notebook per run YAML, one sweep per run with a search, measurements of times, then the analysis
of them all. How long a member trains comes from the nearest record there is: its own run's members, else those of its
study, else its YAML's own figure, put right by what was prepared here (`slowness`). Where there is nothing to go by it
is None and printed as `?`; nothing is made up.
"""

import fnmatch
import shlex
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lib import config, record
from lib.run import ideas, keys, members, runs as records

NOTEBOOKS = config.ROOT / "notebooks"
# The files that tell one record from another: of a run and its search, and of each member.
PLACES = ("*", "*/sweep", f"*/{members.TIMES}", "*/members/*", "*/sweep/trials/*")
RECORDS = [f"{place}/{name}.json" for place in PLACES for name in ("status", "done", "error")]
NOTEBOOK_SECONDS = 8.0  # a notebook's own cost besides its members: kernel, method cells, figures, HTML
TRIAL_SECONDS = 3.0  # a member of two batches, or making what a trial's members share
START_SECONDS = 7.0  # of an interpreter that imports torch
FORCED = "forced (--force)"
PLACE = ""  # options of this command that a further one needs too: --params, --results-dir, --grid


@dataclass
class Step:
    """One notebook to execute. `reason` is why; the empty string means that its record is up to date."""

    kind: str  # train, sweep, times, analysis
    study: str
    name: str  # run_id, or 'comparison'
    notebook: Path
    folder: Path
    parameters: dict
    key: str
    reason: str
    run: Any = None
    needs: list["Step"] = field(default_factory=list)
    members: int = 0  # to be trained; of times, processes that measure them
    unknown: bool = False  # nothing tells how long one trains
    seconds: float = 0.0  # predicted of its members, on one slot, and of the notebook
    inputs: set[Path] = field(default_factory=set)  # what its members to be trained share, a folder per seed
    makes: set[Path] = field(default_factory=set)  # those of them that this step is the first to need
    prepare: float = 0.0  # predicted for these
    # What the runner makes of it: "" (waiting), running, cached, succeeded, failed, blocked, postponed, interrupted
    state: str = ""
    minutes: float = 0.0
    processes: int = 0  # that measure times, those at hand included
    error: dict | None = None

    @property
    def title(self) -> str:
        return f"{self.study}/{self.name}" + (f" {self.kind}" if self.kind in ("sweep", "times") else "")

    @property
    def of_each(self) -> float:
        """Predicted seconds of one of its members, which no number of slots makes shorter."""
        return self.seconds / self.members if self.members else 0.0

    @property
    def progress(self) -> Path:
        """The folder of its run, where progress is written: a sweep's members are its run's."""
        return self.folder.parent if self.kind in ("sweep", "times") else self.folder

    @property
    def output(self) -> Path:
        return self.folder / {"train": "run.ipynb"}.get(self.kind, f"{self.kind}.ipynb")

    @property
    def command(self) -> str:
        """The command that runs exactly this step's run (of an analysis: its study) again."""
        if tried := record.read_json(self.folder.parents[1] / ideas.RECORD):
            return tried["command"]
        run = self.run or next((step.run for step in self.needs), None)
        if run is None and (last := record.read_json(self.folder / "status.json", {}).get("command")):
            return last  # an analysis of records as they are: whoever made them said how
        only = "" if self.kind == "analysis" else f" --run {shlex.quote(self.name)}"
        mode, scale = self.parameters["mode"], self.parameters["scale"]
        return f"./run_all.sh {mode} --scale {scale} --study {self.study}{only}{sets_of(run)}"

    def predict(self) -> None:
        """How long its members will train, where something tells."""
        each = process_seconds(self.run) if self.kind == "times" else member_seconds(self.run)
        self.unknown = bool(self.members) and each is None
        self.seconds = self.members * (each or 0.0) + (NOTEBOOK_SECONDS if self.reason else 0)


def sets_of(run) -> str:
    """The options that made this run of its YAML, and what else a further command needs."""
    overrides = getattr(run, "overrides", None) or {}
    return "".join(f" --set {shlex.quote(f'{key}={value}')}" for key, value in overrides.items()) + PLACE


def notebooks(study: str, results: Path | None = None) -> dict[str, Path]:
    """A study's notebooks, by the kind of step that executes them; those of a try where `results` are one's."""
    folder = "try" if claims_of(study, results).parent == results else study
    own = {kind: NOTEBOOKS / folder / f"{kind}.ipynb" for kind in ("train", "analysis")}
    return {**own, "sweep": NOTEBOOKS / "sweep.ipynb"}


def claims_of(study: str, results: Path | None = None) -> Path:
    """A study's claims; those of a try (lib/run/ideas.py) where `results` are one's."""
    own = results and results / "claims.yaml"
    return own if own and own.exists() else config.ROOT / "params" / study / "claims.yaml"


def matches(options, run_id: str, study: str = "") -> bool:
    """Whether --run (by any of its patterns) and --study name this run, each where it is given."""
    of_study = not study or not options.study or study in options.study
    return of_study and any(fnmatch.fnmatch(run_id, pattern) for pattern in options.run or ["*"])


def member_seconds(run) -> float | None:
    """Expected seconds of one member on one slot; None where nothing tells: neither a record nor its YAML (no
    `seconds_per_step`, or epochs over data that was not read yet)."""
    if run.mode == "trial":
        return TRIAL_SECONDS
    own = config.steps(run) * run.compute.seconds_per_step
    if found := _seconds(run, f"{run.run_id}/members/*"):
        return statistics.median(seconds for seconds, _ in found)
    if found := _seconds(run, "*/members/*"):  # of other methods: by how much their YAMLs were wrong
        wrong = [seconds / said for seconds, said in found if said]
        return statistics.median(wrong) * own if wrong and own else statistics.median(s for s, _ in found)
    return own * slowness(run) or None


def _seconds(run, pattern: str) -> list[tuple[float, float]]:
    """(seconds, what its YAML says of them) of the members that a run's study has a record of."""
    found = []
    for path in Path(run.results_dir).glob(f"{pattern}/metrics.json"):
        if seconds := record.read_json(path, {}).get("seconds"):
            compute = record.read_json(path.with_name("member.json"), {}).get("config", {}).get("compute", {})
            found.append((seconds, config.steps(run) * (compute.get("seconds_per_step") or 0.0)))
    return found


def prepare_seconds(run) -> float:
    """Expected seconds to make what a seed's members share."""
    if run.mode == "trial":
        return TRIAL_SECONDS
    found = [seconds for seconds, _ in _prepared(run, run.study)]
    return statistics.median(found) if found else run.compute.prepare_seconds * slowness(run)


def _prepared(run, study: str) -> list[tuple[float, float | None]]:
    """(seconds, what its YAML said of them) of what a seed's members of a study ("*": of any) share, made here."""
    made = (record.read_json(path, {}) for path in members.CACHE.glob(f"{study}/*/complete.json"))
    return [(m["seconds"], m.get("said")) for m in made if (m.get("scale"), m.get("mode")) == (run.scale, run.mode)]


def process_seconds(run) -> float:
    """Expected seconds of one process that measures times: it starts, and its steps are about half a member's, but 150 at
    most (some tens of rounds)."""
    share = min(0.5, 150 / (config.steps(run) or 1))
    return TRIAL_SECONDS if run.mode == "trial" else START_SECONDS + (member_seconds(run) or 0.0) * share


def slowness(run) -> float:
    """How much longer work takes here than YAMLs say, by what was prepared here; 1 where nothing was yet, or where
    members train on GPUs."""
    known = [] if run.compute.gpus else [seconds / said for seconds, said in _prepared(run, "*") if said]
    return statistics.median(known) if known else 1.0


class Forecast(NamedTuple):
    """Of a list of steps. `wall_seconds` with the slots at hand, and `at_least` where some of their members train for
    as many steps as their data turns out to have; `device_hours`: of a GPU where members train on one, else of a
    core."""

    wall_seconds: float
    device_hours: float
    at_least: bool = False


def forecast(planned: list[Step], slots: int) -> Forecast:
    """Preparation, training and searches share the slots; measurements and analyses do not."""
    training = [s for s in planned if s.kind in ("train", "sweep") and s.reason]
    wide = sum(s.seconds * min(s.run.compute.devices, slots) + s.prepare for s in training)  # a sharded member is wide
    alone = sum(s.seconds for s in planned if s.kind in ("times", "analysis"))
    devices = max((s.run.compute.gpus for s in training), default=0)
    longest = max((s.of_each for s in training), default=0.0)
    hours = sum(s.seconds * max(1, devices) + s.prepare for s in training) / 3600
    return Forecast(max(wide / max(1, slots), longest) + alone, hours, any(s.members and s.unknown for s in training))


def steps(
    runs: list, *, forced: Collection[str] = (), searched: Iterable = (), measured: Mapping[str, int] | None = None
) -> list[Step]:
    """The steps for these runs (config.Run objects), each study's in order: train, sweep, times, analysis. `forced`: the
    titles of steps to do again; `searched`: runs to search for; `measured`: {study/run_id: processes that measure times}."""
    planned = []
    for study in dict.fromkeys(run.study for run in runs):
        mine = [run for run in runs if run.study == study]
        train = {run.run_id: _train(run, forced) for run in mine}
        for folder, first in {folder: step for step in reversed(train.values()) for folder in step.inputs}.items():
            if not (folder / "complete.json").exists():
                first.makes.add(folder)
                first.prepare += prepare_seconds(first.run)
        wanted = [run for run in searched if run.study == study]
        # a trial's search has no trials: that of one run shows what all of them would
        wanted = wanted[:1] if mine[0].mode == "trial" else [run for run in wanted if run.optuna.n_trials]
        searches = {run.run_id: _sweep(train[run.run_id], run, forced) for run in wanted}
        first = [step for step in searches.values() if not step.needs]  # their runs wait for what they find
        for step in first:
            train[step.name].needs = [step]
            train[step.name].reason = train[step.name].reason or "its search is to be done" * bool(step.reason)
        mine = [*first, *train.values(), *(step for step in searches.values() if step.needs)]
        mine += [_times(step, n, forced) for step in train.values() if (n := (measured or {}).get(step.title))]
        planned += [*mine, _analysis(mine, forced)]
    return planned


def _why(step: Step, forced: Collection[str]) -> str:
    """Why a notebook has to be executed again, from its last status."""
    status = record.read_json(step.folder / "status.json")
    if step.title in forced:
        return FORCED
    if not status:
        return "never run"
    if status.get("status") != "succeeded":
        return f"last attempt {status.get('status')}"
    if not step.output.exists():
        return f"{step.output.name} is gone"
    if not record.read_json(step.folder / "done.json") or record.read_json(step.folder / "metrics.json") is None:
        return "its record is incomplete"
    return "" if status.get("key") == step.key else "its notebook or what it reads changed"


def _train(run, forced: Collection[str]) -> Step:
    folder, every = Path(run.results_dir) / run.run_id, config.members(records.settle(run, guess=True))
    notebook, cells = notebooks(run.study, folder.parent)["train"], config.cells(run)
    # without what pilots choose, which depends on these, or a search
    own = [keys.member_key(m)["all"] for m in every if m.seed in cells.get(m.cell_name, ({}, []))[1]]
    key = record.digest([*own, keys.notebook_code(notebook), config.dump(run)])
    step = Step("train", run.study, run.run_id, notebook, folder, config.parameters(run), key, "", run)
    is_forced = step.title in forced
    stale = [(m, why) for m in every if (why := FORCED if is_forced else members.stale(m, folder / "members" / m.id))]
    step.inputs = {members.inputs_folder(member.run) for member, _ in stale}
    step.members, step.reason = len(stale), _why(step, forced)
    if stale and step.reason != "never run" and not is_forced:
        step.reason = f"{len(stale)} of {len(every)} members: {stale[0][1]}"
    step.predict()
    return step


def _sweep(train: Step, run, forced: Collection[str]) -> Step:
    """Of the run as it was before open claims got more seeds: a search does not depend on them."""
    notebook, every = notebooks(run.study)["sweep"], config.members(run)
    made_of = [keys.member_key(m)["all"] for m in every], config.dump(run), keys.notebook_code(notebook)
    key, folder = record.digest([made_of, keys.modules("lib.run.sweep")]), train.folder / "sweep"
    step = Step("sweep", run.study, run.run_id, notebook, folder, config.parameters(run), key, "", run)
    step.needs = [] if run.has_tuned else [train]
    step.reason = "its run is to be done" if train.members and not run.has_tuned else _why(step, forced)
    if step.reason:
        of_grid = {m.cell_name for m in every if m.seed == (run.pilot_seeds or run.seed_list)[0]}
        step.members = max(0, run.optuna.n_trials - len(of_grid))
        step.predict()
    return step


def trials_left(run) -> int:
    """Trials that the run's search still lacks."""
    done = len(list((Path(run.results_dir) / run.run_id).glob("sweep/trials/*/done.json")))
    return 0 if records.found_by_search(run) else max(0, run.optuna.n_trials - done)


def _times(train: Step, processes: int, forced: Collection[str]) -> Step:
    """Measures the times that claims compare, alone on the machine and in so many processes."""
    run, folder, key = train.run, train.folder / members.TIMES, keys.measurement_key(train.run, members.TIMES)
    step = Step("times", run.study, run.run_id, train.notebook, folder, config.parameters(run), key, "", run)
    step.needs, step.processes = [train], processes
    step.members = sum(members.measured(folder / str(i)) != key for i in range(processes))
    if step.title in forced:
        step.reason, step.members = FORCED, processes
    elif step.members:
        step.reason = f"{step.members} of {processes} processes"
    step.predict()
    return step


def _analysis(needs: list[Step], forced: Collection[str]) -> Step:
    run = needs[0].run
    step = analysis(run.study, Path(run.results_dir), run.scale, run.mode, needs=needs)
    step.reason = "its runs are to be done" if any(s.reason for s in step.needs) else _why(step, forced)
    if step.reason:
        last = record.read_json(step.folder / "status.json", {})
        step.seconds = last["minutes"] * 60 if last.get("status") == "succeeded" else NOTEBOOK_SECONDS * 2
    return step


def analysis(study: str, results: Path, scale: str, mode: str, *, why: str = "read from W&B", **more) -> Step:
    """The analysis of a folder of records as they are, whoever made them."""
    parameters = {"study": study, "scale": scale, "mode": mode, "results_dir": str(results)}
    key, notebook, folder = analysis_key(study, results), notebooks(study, results)["analysis"], results / "comparison"
    return Step("analysis", study, "comparison", notebook, folder, parameters, key, why, **more)


def analysis_key(study: str, results: Path) -> str:
    """What an analysis depends on: its code, its claims, and the records that lie in `results` (whichever runs were
    asked for), each known by the attempts that made it, and by what a judge graded since."""
    folder = results / "comparison"
    paths = [path for pattern in RECORDS for path in sorted(results.glob(pattern)) if folder not in path.parents]
    records = {path.relative_to(results).as_posix(): record.read_json(path) for path in paths}
    graded = [path.read_text() for path in sorted(results.glob("*/members/*/judged.json"))]
    code = keys.notebook_code(notebooks(study, results)["analysis"], with_imports=True)
    runs = record.read_json(folder / "runs.json")
    return record.digest([records, runs, claims_of(study, results).read_text(), *([graded] if graded else []), code])
