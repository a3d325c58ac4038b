"""The search over a run's YAML space, with Optuna: space -> cost -> trials -> sensitivity -> best.

A trial is a member: it is trained in a slot of the pool, resumed and cached like any other, and a grid cell's trial
reads that cell's record instead of training it again. The notebook that runs this is the only one that asks and tells;
it asks in batches of a fixed size, so the proposals depend on the seed and not on how many slots there are.
"""

import os
import platform
import time
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import psutil
from optuna.trial import TrialState

from lib import config, record
from lib.errors import StudyError
from lib.run import keys, members, storage

BATCH = 4  # trials proposed at a time; fixed, or the same seed would search differently on another machine
POLL = 10.0  # seconds between two looks at trials that other machines still train
ABANDONED = timedelta(days=1)  # after which another machine's trial counts as killed
optuna.logging.set_verbosity(optuna.logging.WARNING)


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


def fingerprint(run) -> str:
    """What a trial's value depends on besides its point: trials of other settings, data, code or objective do not
    count."""
    first, optuna_section = members.key(config.members(run)[0])["all"], config.dump(run)["optuna"]
    return keys.digest([first, optuna_section["search_space"], run.optuna.objective_metric])


def open_study(run, folder: Path) -> optuna.Study:
    """The run's study in its journal or data base. Raises StudyError where it was made with another direction."""
    study = optuna.create_study(
        study_name=f"{storage.study_name(run)}@{fingerprint(run)}",
        storage=storage.open_storage(run, folder),
        direction=run.optuna.direction,
        load_if_exists=True,
    )
    if (kept := study.direction.name.lower()) != run.optuna.direction:  # Optuna keeps the old one and says nothing
        where = run.optuna.storage or f"{folder}/journal.log"
        expected = f"one that would {run.optuna.direction} {run.optuna.objective_metric}"
        fix = f"delete the study {study.study_name} there" if run.optuna.storage else f"remove {where}"
        raise StudyError(where, f"a study that would {kept}", expected, fix)
    return study


def value_at(run, name: str):
    """The run's own value of a searched key: what an enqueued grid cell has where the grid does not set it."""
    value = run
    for part in config.resolve(run.study, name).split("."):
        value = getattr(value, part)
    return value


def cells(run) -> list[dict]:
    """The grid's cells as points of the search space; a cell outside the space is no trial."""
    space, points = distributions(run), []
    for member in config.members(run):
        point = {name: member.cell.get(config.resolve(run.study, name), value_at(member.run, name)) for name in space}
        if point not in points and all(holds(d, point[n]) for n, d in space.items()):
            points.append(point)
    return points


def holds(space: optuna.distributions.BaseDistribution, value) -> bool:
    try:
        return space._contains(space.to_internal_repr(value))
    except ValueError:  # what a categorical one says of a value that is none of its choices
        return False


def heal(study: optuna.Study) -> int:
    """Trials left RUNNING by a killed process: failed, and queued again with the same parameters. Returns how many."""
    stale = [t for t in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]) if not elsewhere(t)]
    for trial in stale:
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params or trial.system_attrs.get("fixed_params", {}))
    return len(stale)


def elsewhere(trial) -> bool:
    """Whether another process that shares the data base may still be training this trial: one of this machine that
    lives, or one of another machine within a day."""
    machine, _, pid = trial.user_attrs.get("asked_by", "").rpartition(":")
    if not machine:
        return False
    if machine == platform.node():
        return int(pid) != os.getpid() and psutil.pid_exists(int(pid))
    return datetime.now() - trial.datetime_start < ABANDONED


def ask(study: optuna.Study, space: dict, shared: bool) -> optuna.Trial:
    """The next trial; in a shared data base it carries who trains it."""
    trial = study.ask(space)
    if shared:
        trial.set_user_attr("asked_by", f"{platform.node()}:{os.getpid()}")
    return trial


def searched(study: optuna.Study) -> list:
    """The trials that count: finished with a value."""
    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])


def enqueue_cells(study: optuna.Study, run) -> None:
    states = [TrialState.COMPLETE, TrialState.WAITING, TrialState.RUNNING]
    known = [t.params or t.system_attrs.get("fixed_params") for t in study.get_trials(deepcopy=False, states=states)]
    for point in cells(run):
        if point not in known:
            study.enqueue_trial(point)


def trial_member(run, point: dict):
    """The member that a point of the search space stands for: one seed, and no judged answers (the search reads
    validation pairs only). A point on the grid is the grid's own member."""
    seed = run.seed_list[0]
    cell = {config.resolve(run.study, name): _short(value) for name, value in point.items()}
    for member in config.members(run):
        if member.seed == seed and all(value_at(member.run, k) == v for k, v in cell.items()):
            return member, "members"
    cheap = getattr(config.study_module(run.study), "search_changes", lambda run: {})(run)
    return config.member(config.apply(run, {**cheap, "grid": None}), cell, seed), "sweep/trials"


def _short(value):
    """Three significant digits of a sampled float: a name a person can read, and the value that is trained."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def start(run, folder: Path) -> optuna.Study:
    """The run's study, ready to be asked: what an earlier, killed search finished is kept, and the cells of the grid
    are queued."""
    study = open_study(run, folder)
    if healed := heal(study):
        print(f"{healed} trials of a killed search are queued again")
    enqueue_cells(study, run)
    return study


def ask_batch(run, study: optuna.Study) -> list[optuna.Trial]:
    """The next trials; none when `optuna.n_trials` are finished. In a shared data base they are those of all machines,
    and the last of them is waited for."""
    space, shared = distributions(run), run.optuna.storage is not None
    while (left := run.optuna.n_trials - len(searched(study))) > 0:
        left -= sum(elsewhere(t) for t in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]))
        if left > 0:
            # A sampler's state dies with its process; seeding it by the position makes a resumed search the same.
            seed = run.optuna.seed + len(study.get_trials(deepcopy=False) if shared else searched(study))
            study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=4)
            return [ask(study, space, shared) for _ in range(min(BATCH, left))]
        time.sleep(POLL)
        heal(study)
    return []


def train(run, trials: list[optuna.Trial]) -> list[float]:
    """What these trials come to: the objective of the members that their points stand for, trained where they are not
    cached."""
    places = [trial_member(run, trial.params) for trial in trials]
    rows = {}
    for subfolder in ("members", "sweep/trials"):
        if wanted := list({member.id: member for member, place in places if place == subfolder}.values()):
            job = members.submit(run, wanted, subfolder=subfolder)
            members.watch(job)
            rows |= {(subfolder, row["member"]): row for row in members.collect(job)}
    values = [rows[place, member.id].get(run.optuna.objective_metric) for member, place in places]
    worst = 0.0 if run.optuna.direction == "maximize" else float("inf")
    # A diverged member has no validation score: that is a bad point, not a missing one.
    return [worst if value is None else value for value in values]


def table(study: optuna.Study):
    """The finished trials as a DataFrame, best first."""
    import pandas as pd

    rows = [
        {"trial": t.number, **{k: _short(v) for k, v in t.params.items()}, "value": t.value} for t in searched(study)
    ]
    return pd.DataFrame(rows).sort_values("value", ascending=study.direction.name == "MINIMIZE", ignore_index=True)


def write_best(run, study: optuna.Study, folder: Path):
    """best.yaml: a complete run YAML of the best trial. Returns (its Run, its members)."""
    import yaml

    point = {config.resolve(run.study, k): _short(v) for k, v in study.best_params.items()}
    best = config.apply(run, {**point, "grid": [{"cells": [point]}], "optuna.n_trials": 0})
    record.write_text(folder / "best.yaml", yaml.safe_dump(config.dump(best), sort_keys=False, allow_unicode=True))
    return best, config.members(best)
