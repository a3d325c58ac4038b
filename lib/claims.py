"""The verdict on each published claim of a study.

A claim is supported only if three things hold: the rule of its own test on the crossed seed x question bootstrap
interval (primary), the companion t test over seeds on the same side at 5 %, one-sided, and a Holm-adjusted p below .05
over the claims evaluated together. It is refuted if the rule and the companion say so. Where primary and companion
differ, or Holm does not hold, it is `inconclusive`. The p that enters Holm is the one-sided p of the claim's own
primary test.

A claim about scores is `vacuous` where no run that it compares is shown to be above chance (`at_chance`),
where all of them diverged, or where scores vary less because they are worse (`guard`): its numbers are then told, and
decide nothing.

With three seeds the bootstrap alone rejects a true null in up to 12 % of experiments when seeds differ more than
questions do; the companion is what keeps that at 5 %, at the price of power (lib/power.py prints both).
"""

from __future__ import annotations

import difflib
import json
import math
import typing
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from lib import stats as st
from lib.errors import StudyError
from lib.record import finite
from lib.settings.schema import Frozen, plain
from lib.settings.yaml_file import load_yaml

# ---- what claims.yaml holds

Cell = dict[str, Annotated[float | int | str, BeforeValidator(plain)]]
Test = Literal["non_inferiority", "superiority", "equivalence", "variance_ratio", "cost_ratio", "absolute"]
BEST = "best"


class Fixed(Frozen):
    """Of `method`, the key `key` follows from the value of `by`: fixed before any score was seen."""

    method: str
    key: str
    by: str
    values: dict[float, float]


class Beside(Frozen):
    """A comparison reported beside the claim and deciding nothing; what is left out is as in the claim."""

    name: str
    treatment: Cell | None = None
    baseline: Cell | None = None


class Chance(Frozen):
    """What runs show that have learnt nothing: `metric` is no better than the highest of `no_better_than` and no worse
    than
    `no_worse_than`, what training began with (null: worse is chance too). A number, or a column of the members.

    `what`: its name in sentences. Where all runs of a claim about scores are at chance, its verdict is `vacuous`.
    """

    metric: str
    what: str
    no_better_than: tuple[float | str, ...] = Field(min_length=1)
    no_worse_than: float | str | None = None


class Noise(Frozen):
    """The experiment that the power table simulates. All standard deviations are on the score's scale.

    seed: between seeds of one cell; question: of a question for all methods (it cancels in pairs); interaction: of a
    question for one method, the same in every seed; answer: what is left, one answer in one seed; time: of one pair's
    log ratio of step times. spread: standard deviation across levels of the baseline, for claims about variance.
    """

    seed_sds: tuple[float, ...] = (0.05, 0.15)
    question_sd: float = 1.5
    interaction_sd: float = 0.3
    answer_sd: float = 1.2
    time_sd: float = 0.05
    time_pairs: int = 120
    spread: float = 2.0
    seeds: int = 3
    questions: int = 80
    simulations: int = 2000


class Claim(Frozen):
    """One published claim.

    margin: of the difference (non_inferiority, superiority, equivalence, absolute), the largest ratio of times
    (cost_ratio) or the largest point estimate of the ratio of variances (variance_ratio). claimed: the size that was
    claimed, on the same scale, planted in the power table. not_evaluated: why no record can decide it.
    """

    id: str
    sentence: str
    estimand: str
    test: Test
    treatment: Cell
    baseline: Cell | None = None
    baseline_name: str = (
        ""  # what the baseline is in sentences, where `metric` is not its own score (1.22 times REACTOR's)
    )
    across: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    metric: str = "score"
    margin: float
    claimed: float = 0.0
    reported: float | None = None
    no_divergence: bool = False
    premise: bool = False
    guard: float | None = None
    not_evaluated: str = ""
    note: str = ""
    scales: tuple[str, ...] = ("laptop", "paper")
    beside: tuple[Beside, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Claim:
        if self.test == "absolute":
            if self.reported is None:
                raise ValueError("test absolute needs `reported`, the figure that was reported")
        elif self.baseline is None:
            raise ValueError(f"test {self.test} needs a `baseline`")
        if (self.test == "variance_ratio") != bool(self.across):
            raise ValueError("`across` (a key and its levels) belongs to test variance_ratio and to no other")
        if len(self.across) > 1:
            raise ValueError("`across` takes one key")
        if self.margin < 0:
            raise ValueError("`margin` is not negative; what it bounds is said by `test`")
        return self


class Claims(Frozen):
    study: str
    names: dict[str, str] = Field(default_factory=dict)
    keys: tuple[str, ...] = ()
    diverged: dict[str, float] = Field(default_factory=lambda: {"score": 1.0, "accuracy": 0.5})
    choose_on: str | None = None
    chance: Chance | None = None
    fixed: tuple[Fixed, ...] = ()
    noise: Noise = Noise()
    claims: tuple[Claim, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Claims:
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) < len(ids):
            raise ValueError(f"claim ids are not unique: {', '.join(ids)}")
        for claim in self.claims:
            self.levels(claim, "treatment")
            if claim.baseline is not None:
                self.levels(claim, "baseline")
            for cell in [
                claim.treatment,
                claim.baseline,
                *(c for b in claim.beside for c in (b.treatment, b.baseline)),
            ]:
                if cell and BEST in cell.values() and self.choose_on is None:
                    raise ValueError(
                        f"claim {claim.id}: `best` needs `choose_on`, the validation metric it is chosen on"
                    )
        return self

    def filled(self, cell: Cell) -> Cell:
        """`cell` with the keys that are fixed in advance; raises ValueError where it contradicts them."""
        for fixed in self.fixed:
            if cell.get("method") != fixed.method or not isinstance(by := cell.get(fixed.by), float | int):
                continue
            if by not in fixed.values:
                raise ValueError(f"{fixed.key} of {fixed.method} is not fixed for {fixed.by} = {by:g}")
            value = fixed.values[by]
            if cell.get(fixed.key, value) != value:
                raise ValueError(
                    f"{fixed.method} at {fixed.by} = {by:g} has {fixed.key} = {cell[fixed.key]:g}, but "
                    f"{value:g} was fixed in advance"
                )
            cell = {**cell, fixed.key: value}
        return cell

    def levels(self, claim: Claim, side: Literal["treatment", "baseline"]) -> list[Cell]:
        """The cells of one side: one, or one for each level of `across`."""
        cell = getattr(claim, side)
        if not claim.across:
            # a cost is measured over all cells that match
            return [cell if claim.test == "cost_ratio" else self.filled(cell)]
        ((key, values),) = claim.across.items()
        return [self.filled({**cell, key: value}) for value in values]

    def label(self, cell: Cell) -> str:
        """`TD-DPO (beta 0.01, tau 0.5)`."""
        method = str(cell.get("method", ""))
        rest = ", ".join(
            f"{k} {v:g}" if isinstance(v, float | int) else f"{k} {v}" for k, v in cell.items() if k != "method"
        )
        name = self.names.get(method, method)
        return f"{name} ({rest})" if rest else name


def _known_keys(location: tuple) -> list[str]:
    """The keys of the section that an unknown key stands in: walks the types along the error's location."""
    model = Claims
    for part in location[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        found = [field.annotation] if field else []
        while found:
            kind = found.pop()
            if isinstance(kind, type) and not typing.get_args(kind) and issubclass(kind, BaseModel):
                model = kind
            found += typing.get_args(kind)
    return list(model.model_fields)


def load(path: str | Path) -> Claims:
    """Read a claims file. Raises StudyError naming file and key of every fault, with "did you mean" for unknown
    keys."""
    raw = load_yaml(path)
    try:
        return Claims.model_validate(raw)
    except ValidationError as error:
        # unknown keys first: a slip of the pen is why another key is missing
        errors = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
        faults = [_fault(item) for item in errors]
    key, found, expected, mend = faults[0]
    others = "".join(f"\n  {k}: {f}; expected {e}" for k, f, e, _ in faults[1:])
    raise StudyError(f"{path}: {key}", found + others, expected, mend)


def _fault(item: dict) -> tuple[str, str, str, str]:
    """(key, found, expected, mend) of one of pydantic's errors."""
    key = ".".join(map(str, item["loc"])) or "(top level)"
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        return key, "unknown key", f"one of {', '.join(known)}", f"did you mean {close[0]}?" if close else "remove it"
    if item["type"] == "missing":
        return key, "missing", "this key", f"write {key}: ..."
    if item["type"] == "value_error":
        return key, str(item["ctx"]["error"]), "a claim that can be decided", ""
    return key, repr(item["input"])[:80], item["msg"].removeprefix("Input should be "), ""


# ---- from rows of scores to arrays

UNITS = ("question", "problem", "example", "pair")  # the column that tells what one score is about
FINISHED = ("completed", "diverged")


class Paired(NamedTuple):
    """`values` (cells, S, Q) for the same seeds and questions in every cell; `diverged` lists each cell's diverged
    seeds;
    `dropped` counts questions left out because a score is missing in some run."""

    values: np.ndarray
    seeds: list[int]
    diverged: list[list[int]]
    dropped: int


def select(frame: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """The rows of `frame` that a cell's equalities hold for; none where a column does not exist."""
    keep = np.ones(len(frame), dtype=bool)
    for key, value in cell.items():
        if key not in frame:
            return frame.iloc[:0]
        column = frame[key]
        if isinstance(value, str):
            keep &= (column == value).to_numpy()
        else:
            keep &= np.isclose(pd.to_numeric(column, errors="coerce"), float(value), rtol=1e-9)
    return frame[keep]


def members_of(rows: pd.DataFrame, keys: Iterable[str]) -> pd.DataFrame:
    """One row per run (method, keys, seed, status), read off its scores."""
    columns = [c for c in ("method", *keys, "seed", "status") if c in rows]
    found = rows[columns].drop_duplicates()
    return found if "status" in found else found.assign(status="completed")


def choose(study: Claims, cell: Cell, members: pd.DataFrame) -> Cell | None:
    """`cell` with each `best` replaced by the value whose runs have the best mean of the validation metric `choose_on`;
    None where a run lacks it: which would have been best is then not known. A diverged run counts as guessing."""
    open_keys = [key for key, value in cell.items() if value == BEST]
    if not open_keys:
        return study.filled(cell)
    rest = {key: value for key, value in cell.items() if key not in open_keys}
    found = select(members, rest)
    if study.choose_on not in found or not set(open_keys) <= set(found):
        return None
    metric = pd.to_numeric(found[study.choose_on], errors="coerce")
    metric = metric.mask(found["status"] == "diverged", study.diverged.get("accuracy", 0.5))
    if found.empty or metric[found[open_keys].notna().all(axis=1)].isna().any():
        return None
    means = metric.groupby([found[key] for key in open_keys]).mean()
    if means.empty:
        return None
    best = means.idxmax()
    return study.filled({**rest, **dict(zip(open_keys, best if isinstance(best, tuple) else (best,), strict=True))})


def _scores(rows: pd.DataFrame, cell: Cell, metric: str) -> pd.DataFrame:
    """Seeds x questions; a question's mean over its rows (turns), missing where one of them is."""
    found = select(rows, cell)
    unit = next((name for name in UNITS if name in found), None)
    if unit is None or metric not in found:
        return pd.DataFrame()
    values = pd.to_numeric(found[metric], errors="coerce").groupby([found["seed"], found[unit]])
    table = values.mean().where(values.count() == values.size()).unstack()
    return table.dropna(axis=0, how="all")


def pair_up(
    study: Claims,
    rows: pd.DataFrame,
    members: pd.DataFrame,
    cells: list[Cell],
    metric: str,
    *,
    seeds: Iterable[int] = (),
    all_seeds: bool = True,
) -> Paired | list[str]:
    """The scores of `cells` as one array, or the list of what is missing.

    `all_seeds`: every seed that any of the cells has, and every one in `seeds`, must be there in all of them; otherwise
    the seeds they share are taken.
    """
    tables, states, gaps = [], [], []
    for cell in cells:
        runs = select(members, cell)
        gaps += _mixed(study, cell, runs)
        states.append(dict(zip(runs["seed"].astype(int), runs["status"], strict=True)) if len(runs) else {})
        tables.append(_scores(rows, cell, metric))
    ready = [
        {
            seed
            for seed, status in state.items()
            if status == "diverged" or (status == "completed" and seed in table.index)
        }
        for state, table in zip(states, tables, strict=True)
    ]
    wanted = set().union(*states, seeds) if all_seeds else set.intersection(*ready)
    for cell, state, there in zip(cells, states, ready, strict=True):
        if not there:
            why = f": {_why(next(iter(state.values())))}" if state else ""
            gaps.append(f"{study.label(cell)}{why}" if state else f"{study.label(cell)}: no run")
            continue
        gaps += [f"{study.label(cell)}, seed {seed}: {_why(state.get(seed))}" for seed in sorted(wanted - there)]
    if gaps:
        return gaps
    if not wanted:
        return ["seeds that " + " and ".join(study.label(cell) for cell in cells) + " share"]
    return _stack(study, tables, states, sorted(wanted), metric)


def _mixed(study: Claims, cell: Cell, runs: pd.DataFrame) -> list[str]:
    """What to say where several members of one seed answer to `cell`: their mean would be nobody's score."""
    twice = runs[runs["seed"].duplicated(keep=False)] if len(runs) else runs
    if twice.empty:
        return []
    twice = twice[twice["seed"] == twice["seed"].iloc[0]]
    names = f" ({', '.join(sorted(set(twice['run_id'])))})" if "run_id" in twice else ""
    return [
        f"{study.label(cell)}, seed {twice['seed'].iloc[0]:g}: one member, of the {len(twice)}{names} that answer to it"
    ]


def _why(status: str | None) -> str:
    return "no run" if status in (None, "missing") else "no scores" if status in FINISHED else status


def _stack(
    study: Claims, tables: list[pd.DataFrame], states: list[dict], seeds: list[int], metric: str
) -> Paired | list[str]:
    """Fill the array: diverged runs with the worst score, questions with a gap left out of every run."""
    diverged = [[seed for seed in seeds if state[seed] == "diverged"] for state in states]
    scored = [
        table.loc[[seed for seed in seeds if state[seed] != "diverged"]]
        for table, state in zip(tables, states, strict=True)
        if len(table)
    ]
    scored = [table for table in scored if len(table)]
    if scored:
        every = pd.concat(scored, axis=0)
        complete = every.columns[every.notna().all()]
        if complete.empty:
            return [f"questions with a {metric} in every run"]
        dropped = every.shape[1] - len(complete)
    else:  # every run diverged: one question stands for all
        complete, dropped = pd.Index([0]), 0
    values = np.full((len(tables), len(seeds), len(complete)), study.diverged.get(metric, 0.0))
    for i, (table, state) in enumerate(zip(tables, states, strict=True)):
        for j, seed in enumerate(seeds):
            if state[seed] != "diverged":
                values[i, j] = table.loc[seed, complete].to_numpy(dtype=float)
    return Paired(values, seeds, diverged, int(dropped))


# ---- one comparison measured

WORD = {st.SUPPORTED: "supported", st.REFUTED: "refuted", st.INCONCLUSIVE: "inconclusive"}
Names = tuple[str, str]  # of treatment and baseline, for sentences


def _rng(claim: Claim, part: str = "") -> np.random.Generator:
    """Each comparison has its own draws, so that none depends on which others were made."""
    return np.random.default_rng(zlib.crc32(f"{claim.id} {part}".encode()))


def measure(claim: Claim, pairs: Paired, n: int, names: Names, draws: int, part: str = "") -> dict:
    """Estimate, intervals, p, verdict and reason of one comparison: the first `n` cells against the rest."""
    treatment, baseline = pairs.values[:n], pairs.values[n:]
    if claim.test == "variance_ratio":
        return _measure_variance(claim, treatment, baseline, names, pairs.seeds, draws, part)
    return _measure_mean(claim, treatment[0], baseline[0] if len(baseline) else None, names, pairs.seeds, draws, part)


def decide_mean(claim: Claim, primary: st.Estimate, companion: st.Estimate) -> st.Decision:
    """The rule of a claim about a mean (difference); the simulations of lib/power.py decide by it too."""
    if claim.test == "absolute":  # a figure is reached to within the margin
        return st.superiority(primary, companion, -claim.margin)
    return {"non_inferiority": st.non_inferiority, "superiority": st.superiority, "equivalence": st.equivalence}[
        claim.test
    ](primary, companion, claim.margin)


def _measure_mean(claim, treatment, baseline, names, seeds, draws, part) -> dict:
    difference = treatment - (claim.reported if baseline is None else baseline)
    primary = st.crossed_bootstrap(difference, draws=draws, rng=_rng(claim, part))
    companion = st.over_seeds(difference.mean(-1))
    decision = decide_mean(claim, primary, companion)
    code, low95, high95 = int(decision.code), *map(float, st.interval(primary, 0.95))
    low90, high90 = map(float, st.interval(primary, 0.90))
    estimate = float(primary.value)
    side = "above" if estimate >= 0 else "below"
    m = claim.margin
    digits = 2 if max(m, abs(estimate)) >= 0.3 else 4  # grades of 1 to 10, or shares of 1
    reason = f"{names[0]} scored {abs(estimate):.{digits}f} {side} {names[1]}"
    reason += (
        f" (95 % interval {low95:+.{digits}f} to {high95:+.{digits}f}, "
        f"90 % {low90:+.{digits}f} to {high90:+.{digits}f}); "
    )
    support, refute = {
        "non_inferiority": (f"the 90 % interval stays above -{m:g}", f"the 95 % interval lies below -{m:g}"),
        "superiority": (f"the 95 % interval reaches {m:g}", f"the 95 % interval lies below {m:g}"),
        "equivalence": (f"the 90 % interval lies within {m:g} of 0", f"the 95 % interval lies more than {m:g} from 0"),
        "absolute": (
            f"the 95 % interval is at most {m:g} below it",
            f"the 95 % interval lies more than {m:g} below it",
        ),
    }[claim.test]
    reason += _because(decision, support, refute)
    against = {"non_inferiority": -m, "superiority": m, "absolute": -m, "equivalence": None}[claim.test]
    p_companion = (
        max(float(st.p_above(companion, -m)), float(st.p_below(companion, m)))
        if against is None
        else float(st.p_above(companion, against))
    )
    improvement = None if baseline is None else st.probability_of_improvement(treatment, baseline)
    return {
        "verdict": WORD[code],
        "reason": reason,
        "estimate": estimate,
        "interval95": (low95, high95),
        "interval90": (low90, high90),
        "level": 0.9 if claim.test in ("non_inferiority", "equivalence") else 0.95,
        "p": float(decision.p),
        "p_companion": p_companion,
        "companion_interval95": tuple(map(float, st.interval(companion, 0.95))),
        "per_seed": dict(zip(seeds, map(float, difference.mean(-1)), strict=True)),
        "probability_of_improvement": improvement,
    }


def _because(decision: st.Decision, support: str, refute: str, companion: str = "the t test over seeds") -> str:
    primary = int(decision.primary)
    if primary == st.INCONCLUSIVE:
        return "this leaves the claim open."
    text = support if primary == st.SUPPORTED else refute
    return f"{text}." if decision.agrees else f"{text}, but {companion} does not bear it out."


def _measure_variance(claim, treatment, baseline, names, seeds, draws, part) -> dict:
    result = st.variance_ratio(treatment, baseline, draws=draws, rng=_rng(claim, part))
    decision = st.lower_variance(result, claim.margin)
    ratio, low, high = float(result.ratio), float(result.low), float(result.high)
    (key,) = claim.across
    reason = f"across {key} the variance of {names[0]}'s scores is {ratio:.2f} times that of {names[1]}"
    reason += f" (95 % interval {low:.2f} to {high:.2f}); "
    reason += _because(
        decision,
        f"the interval lies below 1 and the ratio is at most {claim.margin:g}",
        f"the interval lies above {claim.margin:g}",
    )
    word = WORD[int(decision.code)]
    if not np.isfinite(ratio):
        word, reason = "inconclusive", f"across {key} the scores of {names[1]} vary no more than noise does"
    means, means_baseline = treatment.mean((1, 2)), baseline.mean((1, 2))
    if claim.guard is not None:
        for what, a, b in (("best", means.max(), means_baseline.max()), ("mean", means.mean(), means_baseline.mean())):
            if a < b - claim.guard:
                word = "vacuous"
                reason = (
                    f"the {what} score of {names[0]} over {key} is {a:.2f} against {b:.2f} of {names[1]}: scores that "
                    f"vary less (ratio of variances {ratio:.2f}, 95 % interval {low:.2f} to {high:.2f}) because they "
                    "are worse show nothing"
                )
                break
    own, own_baseline = (v for v in result.per_seed)
    own_ratio = [float(a / b) if b > 0 else None for a, b in zip(own, own_baseline, strict=True)]
    lower = own[:, None] - own_baseline[None, :]
    return {
        "verdict": word,
        "reason": reason,
        "estimate": ratio,
        "interval95": (low, high),
        "level": 0.95,
        "p": float(decision.p),
        "p_companion": float(st.p_below(st.over_seeds(own - own_baseline), 0.0)),
        "per_seed": dict(zip(seeds, own_ratio, strict=True)),
        "probability_of_improvement": float((lower < 0).mean() + 0.5 * (lower == 0).mean()),
    }


def measure_cost(claim: Claim, pairs: pd.DataFrame, names: Names, draws: int) -> dict:
    """Ratio of costs from pairs `metric`, `metric`_baseline, in the order in which they were measured."""
    cost, baseline = (pairs[name].to_numpy(dtype=float) for name in (claim.metric, f"{claim.metric}_baseline"))
    result = st.time_ratio(cost, baseline, draws=draws, rng=_rng(claim))
    decision = st.cost_at_most(result, claim.margin)
    ratio, low, high = float(result.ratio), float(result.low), float(result.high)
    reason = f"{names[0]} takes {ratio:.3f} times the {claim.metric} of {names[1]}"
    reason += f" (95 % interval {low:.3f} to {high:.3f}, {len(pairs)} pairs); "
    reason += _because(
        decision,
        f"the interval stays at or below {claim.margin:g}",
        f"the interval lies above {claim.margin:g}",
        companion="the t test over stretches of pairs",
    )
    per_seed = {}
    if "seed" in pairs:
        per_seed = (pairs[claim.metric] / pairs[f"{claim.metric}_baseline"]).groupby(pairs["seed"]).median()
    return {
        "verdict": WORD[int(decision.code)],
        "reason": reason,
        "estimate": ratio,
        "interval95": (low, high),
        "level": 0.95,
        "p": float(decision.p),
        "p_companion": float(st.p_below(st.over_seeds(result.blocks), np.log(claim.margin))),
        "per_seed": {int(seed): float(value) for seed, value in per_seed.items()},
        "probability_of_improvement": float((cost < baseline).mean() + 0.5 * (cost == baseline).mean()),
        "n_seeds": len(per_seed),
        "n_pairs": len(pairs),
    }


# ---- whether runs have learned anything


class Unknown(Exception):
    """What is missing to tell."""


def at_chance(
    study: Claims, rows: pd.DataFrame, members: pd.DataFrame, cells: list[Cell], n: int, names: tuple[str, str]
) -> str:
    """The sentence that says it, where every one of `cells` (the first `n` called names[0], the rest names[1]) is at
    chance; the empty string where one is not. Raises Unknown where that cannot be told. `study` has a `chance`."""
    chance = study.chance
    pairs = pair_up(study, rows, members, cells, chance.metric, all_seeds=False)
    if not isinstance(pairs, Paired):
        raise Unknown("; ".join(pairs))
    if len(pairs.seeds) < 2:
        raise Unknown("one seed tells nothing about seeds")
    if any(pairs.diverged):
        return ""
    limits = [_limits(study, chance, cell, members) for cell in cells]
    runs, questions = len(cells) * len(pairs.seeds), pairs.values.shape[-1]
    for values, (upper, lower) in zip(pairs.values, limits, strict=True):
        alone = st.Estimate(values.mean(-1), values.std(-1) / max(1, questions - 1) ** 0.5, np.inf)
        for estimate, level in ((st.crossed(values), st.COMPANION_LEVEL), (alone, st.COMPANION_LEVEL / runs)):
            if np.any(st.p_above(estimate, upper) <= level):
                return ""
            if lower is not None and np.any(st.p_below(estimate, lower) <= level):
                return ""
    means, upper = pairs.values.mean((1, 2)), max(limit for limit, _ in limits)
    of = [f"{part.max():.3f} of {name}" for part, name in zip((means[:n], means[n:]), names, strict=True)]
    return (
        f"no run is shown to have learnt anything: {chance.metric.replace('_', ' ')} is {' and '.join(of)}, not shown to "
        f"be above {upper:.3f} ({chance.what}), and differences between runs at chance show nothing"
    )


def _limits(study: Claims, chance: Chance, cell: Cell, members: pd.DataFrame) -> tuple[float, float | None]:
    found = select(members, cell)

    def value(level: float | str) -> float:
        if not isinstance(level, str):
            return float(level)
        column = pd.to_numeric(found[level], errors="coerce").dropna() if level in found else []
        if not len(column):
            raise Unknown(f"{study.label(cell)}: no {level}")
        return float(np.mean(column))

    return max(map(value, chance.no_better_than)), None if chance.no_worse_than is None else value(chance.no_worse_than)


# ---- a verdict and its forms

VERDICTS = ("supported", "refuted", "inconclusive", "vacuous", "not evaluated")


@dataclass
class Verdict:
    """What one claim came to, at one scale. Numbers that do not exist are None.

    `p` is the one-sided p of the claim's own primary test, `holm_p` adjusted over the claims evaluated with it,
    `p_companion` that of the t test over seeds. `per_seed` maps a seed to its own estimate. `level` is that of the
    interval which supports the claim. `scored_by` names what gave the scores. `n_pairs` counts pairs of costs,
    `n_dropped` questions left out for want of a score.
    """

    id: str
    sentence: str
    test: str
    metric: str
    scale: str
    verdict: str
    reason: str
    estimand: str = ""
    margin: float | None = None
    claimed: float | None = None
    estimate: float | None = None
    interval95: tuple[float, float] | None = None
    interval90: tuple[float, float] | None = None
    level: float | None = None
    p: float | None = None
    holm_p: float | None = None
    p_companion: float | None = None
    companion_interval95: tuple[float, float] | None = None
    per_seed: dict = field(default_factory=dict)
    probability_of_improvement: float | None = None
    n_seeds: int = 0
    n_questions: int = 0
    n_pairs: int = 0
    n_dropped: int = 0
    premise: dict | None = None
    note: str = ""
    scored_by: str = ""
    beside: list[dict] = field(default_factory=list)
    sensitivity: dict | None = None


def to_json(verdicts: list[Verdict]) -> list[dict]:
    """Plain data without NaN or infinities (they become null), ready for record.write_json."""
    return json.loads(json.dumps([finite(asdict(verdict)) for verdict in verdicts], allow_nan=False))


def _span(bounds: tuple | None) -> str:
    return "" if bounds is None else " to ".join(f"{b:.3g}" if math.isfinite(b) else "no bound" for b in bounds)


def table(verdicts: list[Verdict]) -> pd.DataFrame:
    """One row per claim, for people."""
    return pd.DataFrame(
        [
            {
                "claim": v.id,
                "verdict": v.verdict,
                "estimate": v.estimate,
                "95 % interval": _span(v.interval95),
                "p": v.p,
                "Holm p": v.holm_p,
                "P(improvement)": v.probability_of_improvement,
                "per seed": ", ".join(f"{value:.3g}" for value in v.per_seed.values() if value is not None),
                "seeds": v.n_seeds,
                "scale": v.scale,
                "why": v.reason,
            }
            for v in verdicts
        ]
    )


def sentence(verdict: Verdict) -> str:
    """`C1 refuted at laptop scale (oracle score): ...`."""
    by = f" ({verdict.scored_by})" if verdict.scored_by else ""
    return f"{verdict.id} {verdict.verdict} at {verdict.scale} scale{by}: {verdict.reason}"


# ---- from claims to verdicts


DRAWS = 10_000
MIN_COST_PAIRS = 20
HOLM_LEVEL = 0.05
MISSING = "missing: "  # how the reason of a claim begins whose scores are not all there


class Data(NamedTuple):
    """The tables that every claim is evaluated on; see `evaluate`."""

    rows: pd.DataFrame
    accuracy: pd.DataFrame | None
    members: pd.DataFrame
    costs: pd.DataFrame
    seeds: tuple[int, ...]
    draws: int


def evaluate(
    study: Claims,
    rows: pd.DataFrame,
    *,
    scale: str,
    mode: str,
    members: pd.DataFrame | None = None,
    accuracy: pd.DataFrame | None = None,
    costs: pd.DataFrame | None = None,
    seeds: Iterable[int] = (),
    draws: int = DRAWS,
    scored_by: str = "",
    mend: str = "",
    absent: Mapping[str, str] | None = None,
) -> list[Verdict]:
    """A verdict for every claim of `study`, in its order.

    rows: one row per method, cell key, seed and question with `score` and `status`; `accuracy` the same for the second
    metric. members: one row per run with `status` and validation metrics (read off `rows` where not given). costs:
    pairs
    `seconds`, `seconds_baseline` measured in turns. seeds: those that a claim's cells must have, beyond those they
    have. scored_by: what gave the scores, for the record. mend: said of a claim whose scores are missing (how to get
    them). absent: {metric: why it has no values}, the reason of the claims about it.
    """
    if members is None:
        members = members_of(rows, study.keys)
    data = Data(rows, accuracy, members, pd.DataFrame() if costs is None else costs, tuple(seeds), draws)
    verdicts = [_evaluate_one(study, claim, data, scale, mode, absent or {}) for claim in study.claims]
    for verdict in verdicts:
        if verdict.test != "cost_ratio":
            verdict.scored_by = scored_by
            verdict.reason += f". {mend}" if mend and verdict.reason.startswith(MISSING) else ""
    family = [v for v in verdicts if v.p is not None]
    for verdict, adjusted in zip(family, st.holm([v.p for v in family]) if family else (), strict=True):
        verdict.holm_p = float(adjusted)
        if verdict.verdict == "supported" and adjusted >= HOLM_LEVEL:
            verdict.verdict = "inconclusive"
            verdict.reason += f" It does not stand among {len(family)} claims tested together (Holm p {adjusted:.2g})."
    return verdicts


def coverage(study: Claims, members: pd.DataFrame) -> pd.DataFrame:
    """Which runs each claim's cells have: one row per claim and cell, with the seeds of every status."""
    out = []
    for claim in study.claims:
        for side in ("treatment", "baseline"):
            for cell in study.levels(claim, side) if getattr(claim, side) else ():
                found = select(
                    members, {key: value for key, value in cell.items() if value != BEST}
                )  # any of them may be it
                by_status = {status: sorted(group["seed"].astype(int)) for status, group in found.groupby("status")}
                done = len(by_status.get("completed", [])) + len(by_status.get("diverged", []))
                out.append(
                    {
                        "claim": claim.id,
                        "side": side,
                        "cell": study.label(cell),
                        "runs": len(found),
                        "finished": done,
                        **{
                            status: ", ".join(map(str, sorted(set(by_status.get(status, [])))))
                            for status in ("completed", "diverged", "failed", "out_of_memory", "lost", "missing")
                        },
                    }
                )
    return pd.DataFrame(out)


def _evaluate_one(study: Claims, claim: Claim, data: Data, scale: str, mode: str, absent: Mapping[str, str]) -> Verdict:
    verdict = Verdict(
        claim.id,
        claim.sentence,
        claim.test,
        claim.metric,
        scale,
        "not evaluated",
        "",
        claim.estimand,
        claim.margin,
        claim.claimed,
        note=claim.note,
    )
    if mode == "trial":
        verdict.reason = "a trial shows that the study runs, not what it finds"
    elif claim.not_evaluated:
        verdict.reason = claim.not_evaluated
    elif claim.test == "absolute" and scale == "laptop":
        verdict.reason = "a figure of a named model says nothing about the models made at laptop scale"
    elif scale not in claim.scales:
        verdict.reason = f"this claim is about {' and '.join(claim.scales)} scale"
    elif claim.metric in absent:
        verdict.reason = absent[claim.metric]
    elif claim.test == "cost_ratio":
        _judge_cost(study, claim, data, verdict)
    else:
        _judge_scores(study, claim, data, verdict)
    return verdict


# ---- claims about scores


def _rows(data: Data, metric: str) -> pd.DataFrame:
    return data.rows if metric in data.rows or data.accuracy is None else data.accuracy


def _pairs(study: Claims, claim: Claim, data: Data, cells: list[Cell], *, all_seeds: bool) -> Paired | list[str]:
    return pair_up(
        study,
        _rows(data, claim.metric),
        data.members,
        cells,
        claim.metric,
        seeds=data.seeds if all_seeds else (),
        all_seeds=all_seeds,
    )


def _judge_scores(study: Claims, claim: Claim, data: Data, verdict: Verdict) -> None:
    treatment = study.levels(claim, "treatment")
    baseline = study.levels(claim, "baseline") if claim.baseline else []
    chosen = [choose(study, cell, data.members) for cell in [*treatment, *baseline]]
    pairs = (
        ["a run with " + str(study.choose_on)] if None in chosen else _pairs(study, claim, data, chosen, all_seeds=True)
    )
    if not isinstance(pairs, Paired):
        verdict.reason = MISSING + "; ".join(pairs)
        return
    if len(pairs.seeds) < 2:
        verdict.reason = "one seed tells nothing about seeds: at least 2 are needed"
        return
    n = len(treatment)
    names = study.label(chosen[0] if n == 1 else claim.treatment), _baseline_name(study, claim, chosen[n:])
    _set(verdict, measure(claim, pairs, n, names, data.draws))
    verdict.n_seeds, verdict.n_questions, verdict.n_dropped = len(pairs.seeds), pairs.values.shape[2], pairs.dropped
    lost = sorted({seed for seeds in pairs.diverged[:n] for seed in seeds})
    lost_baseline = sorted({seed for seeds in pairs.diverged[n:] for seed in seeds})
    if claim.no_divergence and lost and verdict.verdict == "supported":
        verdict.verdict = "inconclusive"
        verdict.reason += f" But {names[0]} diverged (seed {', '.join(map(str, lost))})."
    elif lost:
        verdict.reason += f" {names[0]} diverged (seed {', '.join(map(str, lost))})."
    if verdict.verdict == "supported" and all(len(seeds) == len(pairs.seeds) for seeds in pairs.diverged[:n]):
        verdict.verdict = "inconclusive"  # what stands for its scores is ours, not measured
    if baseline and all(len(seeds) == len(pairs.seeds) for seeds in pairs.diverged):
        verdict.verdict, verdict.reason = "vacuous", f"every run of {names[0]} and of {names[1]} diverged"
    if (
        baseline and verdict.verdict != "vacuous"
    ):  # a figure of its own (absolute) is missed by a model that learnt nothing
        _ask_for_chance(study, data, chosen, n, names, verdict)
    if claim.premise:
        verdict.premise = _premise(names[1], len(lost_baseline), len(pairs.seeds), float(pairs.values[n:].mean()))
    if pairs.dropped:
        verdict.note = f"{verdict.note} {pairs.dropped} question(s) without a score in some run were left out.".strip()
    verdict.beside = [_beside(study, claim, other, data) for other in claim.beside]
    if lost or lost_baseline:
        verdict.sensitivity = _completed_only(claim, pairs, n, names, data.draws)


def _at_chance(study: Claims, data: Data, cells: list[Cell], n: int, names: tuple[str, str]) -> str:
    return at_chance(study, _rows(data, study.chance.metric), data.members, cells, n, names) if study.chance else ""


def _ask_for_chance(
    study: Claims, data: Data, cells: list[Cell], n: int, names: tuple[str, str], verdict: Verdict
) -> None:
    """`vacuous` where every run of the claim is at chance, whatever its numbers say."""
    try:
        said = _at_chance(study, data, cells, n, names)
    except Unknown as missing:
        verdict.note = f"{verdict.note} Whether its runs are above chance is not known ({missing}).".strip()
        return
    if said:
        verdict.verdict, verdict.reason = "vacuous", f"{said}. By its numbers alone: {verdict.reason}"


def _baseline_name(study: Claims, claim: Claim, cells: list[Cell]) -> str:
    if claim.baseline is None:
        return "the reported figure"
    if claim.baseline_name:
        return claim.baseline_name
    return study.label(cells[0] if len(cells) == 1 else claim.baseline)


def _premise(name: str, diverged: int, runs: int, mean: float) -> dict:
    if diverged:
        return {"holds": True, "text": f"{name} diverged in {diverged} of {runs} runs."}
    return {
        "holds": False,
        "text": f"{name} did not diverge in any of {runs} runs (mean score {mean:.2f}): there was no "
        "divergence to avoid.",
    }


def _beside(study: Claims, claim: Claim, other: Beside, data: Data) -> dict:
    """A comparison on the seeds that both sides have; with one seed, an estimate without an interval."""
    asked = claim.model_copy(
        update={
            "treatment": other.treatment or claim.treatment,
            "baseline": other.baseline or claim.baseline,
            "baseline_name": "" if other.baseline else claim.baseline_name,
        }
    )
    out = {"name": other.name, "decides": False}
    try:
        treatment, baseline = study.levels(asked, "treatment"), study.levels(asked, "baseline")
    except ValueError as error:
        return {**out, "reason": str(error)}
    cells = [choose(study, cell, data.members) for cell in [*treatment, *baseline]]
    if None in cells:
        return {**out, "reason": f"missing: runs with {study.choose_on}"}
    pairs = _pairs(study, claim, data, cells, all_seeds=False)
    if not isinstance(pairs, Paired):
        return {**out, "reason": "missing: " + "; ".join(pairs)}
    n = len(treatment)
    names = study.label(cells[0] if n == 1 else asked.treatment), _baseline_name(study, asked, cells[n:])
    out |= {"treatment": names[0], "baseline": names[1], "n_seeds": len(pairs.seeds)}
    if len(pairs.seeds) < 2:
        if claim.test == "variance_ratio":
            return {**out, "reason": "one seed tells nothing about noise"}
        difference = float((pairs.values[0] - pairs.values[1]).mean())
        return {
            **out,
            "estimate": difference,
            "reason": f"{difference:+.2f} in the one seed that both have; no interval",
        }
    measured = measure(claim, pairs, n, names, data.draws, other.name)
    try:
        if said := _at_chance(study, data, cells, n, names):
            measured |= {"verdict": "vacuous", "reason": f"{said}. By its numbers alone: {measured['reason']}"}
    except Unknown:
        pass  # the claim's own note says so
    # a word of verdict here would be taken for one
    measured["by_the_same_rule"] = measured.pop("verdict")
    return {**out, **measured}


def _completed_only(claim: Claim, pairs: Paired, n: int, names: tuple[str, str], draws: int) -> dict:
    """The same comparison on the seeds in which no run diverged."""
    lost = {seed for seeds in pairs.diverged for seed in seeds}
    keep = [i for i, seed in enumerate(pairs.seeds) if seed not in lost]
    out = {"on": "completed runs only", "n_seeds": len(keep)}
    if len(keep) < 2:
        return {**out, "reason": f"{len(keep)} seed(s) without a diverged run: nothing to compare"}
    rest = Paired(pairs.values[:, keep], [pairs.seeds[i] for i in keep], [[] for _ in pairs.diverged], pairs.dropped)
    measured = measure(claim, rest, n, names, draws, "completed")
    measured["by_the_same_rule"] = measured.pop("verdict")
    return {**out, **measured}


# ---- claims about cost


def _judge_cost(study: Claims, claim: Claim, data: Data, verdict: Verdict) -> None:
    names = study.label(claim.treatment), study.label(claim.baseline)
    columns = [claim.metric, f"{claim.metric}_baseline"]
    pairs = data.costs if set(columns) <= set(data.costs) else pd.DataFrame(columns=columns)
    if "method" in pairs:
        pairs = select(pairs, claim.treatment)
    pairs = pairs[(pairs[columns] > 0).all(axis=1)]
    if len(pairs) < MIN_COST_PAIRS:
        verdict.reason = (
            f"missing: {claim.metric} of {names[0]} and {names[1]} measured in turns ({len(pairs)} pairs, at "
            f"least {MIN_COST_PAIRS} are needed)"
        )
        return
    _set(verdict, measure_cost(claim, pairs, names, max(200, data.draws // 5)))  # each draw sorts all pairs


def _set(verdict: Verdict, fields: dict) -> None:
    for name, value in fields.items():
        setattr(verdict, name, value)
