"""The search over a run's YAML space, with Optuna: space -> cost -> trials -> sensitivity -> best.

A trial is a member: it is trained in a slot of the pool, resumed and cached like any other, and a grid cell's trial
reads that cell's record instead of training it again. The notebook that runs this is the only one that asks and tells;
it asks in batches of a fixed size, so the proposals depend on the seed and not on how many slots there are.
"""

import contextlib
import operator
from pathlib import Path

import optuna
import pandas as pd
import yaml
from optuna.storages.journal import JournalFileBackend

from lib import config, record
from lib.errors import StudyError
from lib.run import keys, members

BATCH = 4  # trials proposed at a time; fixed, or the same seed would search differently on another machine
optuna.logging.set_verbosity(optuna.logging.WARNING)


# ---- the space, and the grid's cells in it


def distributions(run) -> dict[str, optuna.distributions.BaseDistribution]:
    """The search space as Optuna's distributions, keyed as the YAML names them."""
    space = {}
    for name, d in run.optuna.search_space.items():
        if d.type == "categorical":
            space[name] = optuna.distributions.CategoricalDistribution(d.choices)
        elif d.type == "int":
            space[name] = optuna.distributions.IntDistribution(int(d.low), int(d.high), step=int(d.step or 1))
        else:
            space[name] = optuna.distributions.FloatDistribution(d.low, d.high, log=d.type == "loguniform", step=d.step)
    return space


def value_at(run, name: str):
    """The run's own value of a searched key: what an enqueued grid cell has where the grid does not set it."""
    return operator.attrgetter(config.resolve(run.study, name))(run)


def cells(run) -> list[dict]:
    """The grid's cells (in the place of a tuned one, the run's own values) as points of the search space; a cell outside
    the space is no trial."""
    space, points = distributions(run), []
    for member in config.members(config.tune(run)):
        point = {name: value_at(member.run, name) for name in space}
        with contextlib.suppress(ValueError):  # as Optuna says of a point outside the space
            optuna.trial.create_trial(params=point, distributions=space, value=0.0)
            points += [point] * (point not in points)
    return points


# ---- Optuna's study


def open_study(run, folder: Path) -> optuna.Study:
    """The run's study in its journal. StudyError where it was made with another direction.

    Its name has a digest of what a trial's value depends on besides its point: trials of other settings, data, code or
    objective do not count.
    """
    journal, name = folder / "journal.log", f"{Path(run.results_dir).parent.name}/{run.study}/{run.run_id}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = keys.member_key(config.members(config.tune(run))[0])["all"], config.dump(run)["optuna"]["search_space"]
    study = optuna.create_study(
        study_name=f"{name}@{record.digest([*settings, run.optuna.objective_metric])}",
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
        direction=run.optuna.direction,
        load_if_exists=True,
    )
    if (kept := study.direction.name.lower()) != run.optuna.direction:  # Optuna keeps the old one and says nothing
        expected = f"one that would {run.optuna.direction}"
        raise StudyError(str(journal), f"a study that would {kept}", expected, f"rm {journal}")
    return study


def completed_trials(study: optuna.Study) -> list:
    """The trials that count: finished with a value."""
    return study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])


def start(run, folder: Path) -> optuna.Study:
    """The run's study, ready to be asked: what an earlier, killed search finished is kept, what it left RUNNING has failed
    and is queued again with the same parameters, and the cells of the grid are queued."""
    study = open_study(run, folder)
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        print(f"trial {trial.number} of a killed search is queued again")
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params or trial.system_attrs.get("fixed_params", {}))
    for point in cells(run):
        study.enqueue_trial(point, skip_if_exists=True)
    return study


# ---- ask, train; the notebook tells


def ask_batch(run, study: optuna.Study) -> list[optuna.Trial]:
    """The next trials; none when `optuna.n_trials` are finished."""
    finished = len(completed_trials(study))
    # A sampler's state dies with its process; seeding it by the position makes a resumed search the same.
    study.sampler = optuna.samplers.TPESampler(seed=run.optuna.seed + finished, constant_liar=True, n_startup_trials=4)
    return [study.ask(distributions(run)) for _ in range(min(BATCH, run.optuna.n_trials - finished))]


def trial_member(run, point: dict):
    """The member that a point of the search space stands for, and its folder: one seed, a pilot's where there are any,
    and no judged answers (the search reads validation pairs only). A point on the grid is the grid's own member."""
    seed = (run.pilot_seeds or run.seed_list)[0]
    cell = {config.resolve(run.study, k): round_sampled(v) for k, v in point.items()}
    for member in config.members(run):
        if member.seed == seed and all(value_at(member.run, key) == value for key, value in cell.items()):
            return member, "members"
    cheap = config.study_module(run.study).search_changes(run)
    return config.cell_members(config.apply(run, {**cheap, "grid": None}), cell, [seed])[0], "sweep/trials"


def round_sampled(value):
    """A sampled float at three significant digits: a name that a person can read, and the value that is trained."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def train(run, trials: list[optuna.Trial]) -> list[float]:
    """What these trials come to: the objective of the members that their points stand for, trained where they are not
    cached."""
    wanted, rows = [trial_member(run, trial.params) for trial in trials], {}
    for subfolder in ("members", "sweep/trials"):
        if here := {member.id: member for member, place in wanted if place == subfolder}:
            job = members.submit(run, list(here.values()), subfolder=subfolder)
            members.watch(job)
            rows |= {(subfolder, row["member"]): row for row in members.collect(job)}
    values = [rows[place, member.id].get(run.optuna.objective_metric) for member, place in wanted]
    worst = 0.0 if run.optuna.direction == "maximize" else float("inf")
    # A diverged member has no validation score: that is a bad point, not a missing one.
    return [worst if value is None else value for value in values]


# ---- what came of it


def table(study: optuna.Study):
    """The finished trials as a DataFrame, best first."""
    trials = completed_trials(study)
    rows = [{"trial": t.number, **{k: round_sampled(v) for k, v in t.params.items()}, "value": t.value} for t in trials]
    return pd.DataFrame(rows).sort_values("value", ascending=study.direction.name == "MINIMIZE", ignore_index=True)


def write_best(run, study: optuna.Study, folder: Path):
    """best.yaml: a complete run YAML of the best trial, with the seeds of the grid's first cells. Returns (its Run, its
    members; none where the best is the run's cell `tuned`, which the run's own notebook trains)."""
    point = {config.resolve(run.study, k): round_sampled(v) for k, v in study.best_params.items()}
    seeds = run.grid[0].seeds if run.grid else None
    best = config.apply(run, {**point, "grid": [{"cells": [point], "seeds": seeds}], "optuna.n_trials": 0})
    record.write_text(folder / "best.yaml", yaml.safe_dump(config.dump(best), sort_keys=False, allow_unicode=True))
    return best, [] if run.has_tuned else config.members(best)
