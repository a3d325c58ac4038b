"""The claims of a study (params/<study>/claims.yaml) and the verdict on each of them.

A claim is supported only if three things hold: the rule of its own test on the crossed seed x question bootstrap
interval (primary), the companion t test over seeds on the same side at 5 %, one-sided, and a Holm-adjusted p below .05
over the claims evaluated together. It is refuted if the rule and the companion say so. Where primary and companion
differ, or Holm does not hold, it is `inconclusive`. The p that enters Holm is the one-sided p of the claim's own
primary test.

A claim about scores is `vacuous` where no run that it compares is shown to be above chance (`at_chance`), where all of
them diverged, or where scores vary less because they are worse (`guard`): its numbers are then shown, and decide
nothing.

With three seeds the bootstrap alone rejects a true null in up to 12 % of experiments when seeds differ more than
questions do; the companion is what keeps that at 5 %, at the price of power (lib/power.py prints both).
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, Field, model_validator

from lib import stats as st
from lib.config import Section, plain, validate
from lib.record import finite

DRAWS = 10_000
COST_DRAWS = 2_000  # each draw sorts all pairs
MIN_COST_PAIRS = 20
HOLM_LEVEL = 0.05
BEST = "best"  # in a cell: the value that is chosen on the study's validation metric
UNITS = ("question", "problem", "example", "pair")  # the column that says what one score is about
FINISHED = ("completed", "diverged")
SIDES = ("treatment", "baseline")

# ---- what claims.yaml holds
#
# A cell is named by equalities on the columns of the scores: {method: td_dpo, beta: 0.01, tau: 0.5}. A key that is
# fixed in advance by another (tau by beta) may be left out and is filled in; a cell that contradicts it is refused, so
# that nobody chooses it on the judged score.

Cell = dict[str, Annotated[float | int | str, BeforeValidator(plain)]]
Test = Literal["non_inferiority", "superiority", "equivalence", "variance_ratio", "cost_ratio", "absolute"]
Side = Literal["treatment", "baseline"]


class Fixed(Section):
    """Of `method`, the key `key` follows from the value of `by`: fixed before any score was seen."""

    method: str
    key: str
    by: str
    values: dict[float, float]


class SideComparison(Section):
    """A comparison reported with the claim that decides nothing; what is left out is as in the claim."""

    name: str
    treatment: Cell | None = None
    baseline: Cell | None = None


class Chance(Section):
    """What runs show that have learned nothing: `metric` is no better than the highest of `no_better_than` and no worse
    than `no_worse_than`, what training began with (null: worse is chance too). A number, or a column of the members.

    `what`: its name in sentences. Where all runs of a claim about scores are at chance, its verdict is `vacuous`.
    """

    metric: str
    what: str
    no_better_than: tuple[float | str, ...] = Field(min_length=1)
    no_worse_than: float | str | None = None


class Noise(Section):
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


class Claim(Section):
    """One published claim.

    margin: of the difference (non_inferiority, superiority, equivalence, absolute), the largest ratio of times
    (cost_ratio) or the largest point estimate of the ratio of variances (variance_ratio). claimed: the size that was
    claimed, on the same scale, planted in the power table. not_evaluated: why no record can decide it. baseline_name:
    what the baseline is in sentences, where `metric` is not its own score (1.22 times REACTOR's).
    """

    id: str
    sentence: str
    estimand: str
    test: Test
    treatment: Cell
    baseline: Cell | None = None
    baseline_name: str = ""
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
    beside: tuple[SideComparison, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Claim:
        if self.test == "absolute" and self.reported is None:
            raise ValueError("test absolute needs `reported`, the figure that was reported")
        if self.test != "absolute" and self.baseline is None:
            raise ValueError(f"test {self.test} needs a `baseline`")
        if (self.test == "variance_ratio") != bool(self.across):
            raise ValueError("`across` (a key and its levels) belongs to test variance_ratio and to no other")
        if len(self.across) > 1:
            raise ValueError("`across` takes one key")
        if self.margin < 0:
            raise ValueError("`margin` is not negative; what it bounds is said by `test`")
        return self


class Claims(Section):
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
            self.levels(claim, "treatment"), self.levels(claim, "baseline")
            cells = [cell for part in (claim, *claim.beside) for cell in (part.treatment, part.baseline) if cell]
            if self.choose_on is None and any(BEST in cell.values() for cell in cells):
                raise ValueError(f"claim {claim.id}: `best` needs `choose_on`, the validation metric it is chosen on")
        return self

    def fill(self, cell: Cell) -> Cell:
        """`cell` with the keys that are fixed in advance; raises ValueError where it contradicts them."""
        for fixed in self.fixed:
            if cell.get("method") != fixed.method or not isinstance(by := cell.get(fixed.by), float | int):
                continue
            if (value := fixed.values.get(by)) is None:
                raise ValueError(f"{fixed.key} of {fixed.method} is not fixed for {fixed.by} = {by:g}")
            if (given := cell.get(fixed.key, value)) != value:
                name = f"{fixed.method} at {fixed.by} = {by:g}"
                raise ValueError(f"{name} has {fixed.key} = {given:g}, but {value:g} was fixed in advance")
            cell = {**cell, fixed.key: value}
        return cell

    def levels(self, claim: Claim, side: Side) -> list[Cell]:
        """The cells of one side: one, or one for each level of `across`; none for the baseline of a figure."""
        cell = getattr(claim, side)
        if cell is None:
            return []
        if claim.test == "cost_ratio":  # a cost is measured over all cells that match
            return [cell]
        levels = [{key: value} for key, values in claim.across.items() for value in values]
        return [self.fill({**cell, **level}) for level in levels or [{}]]

    def label(self, cell: Cell) -> str:
        """`TD-DPO (beta 0.01, tau 0.5)`."""
        method = str(cell.get("method", ""))
        values = [f"{k} {v if isinstance(v, str) else format(v, 'g')}" for k, v in cell.items() if k != "method"]
        return self.names.get(method, method) + (f" ({', '.join(values)})" if values else "")


def load(path: str | Path) -> Claims:
    """Read a claims file. Raises StudyError naming file and key of every fault, with "did you mean" for unknown
    keys."""
    return validate(Claims, path)


# ---- from rows of scores to arrays of cells x seeds x questions
#
# A diverged run is a result: it gets the study's worst score on every question. A run that is missing, failed or not
# yet graded is a gap: nothing is guessed for it, and what needs it is not evaluated.


class Paired(NamedTuple):
    """`values` (cells, S, Q) for the same seeds and questions in every cell; `diverged` lists each cell's diverged
    seeds; `dropped` counts questions left out because a score is missing in some run."""

    values: np.ndarray
    seeds: list[int]
    diverged: list[list[int]]
    dropped: int


def select(frame: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """The rows of `frame` that a cell's equalities hold for; none where a column does not exist."""
    if not set(cell) <= set(frame):
        return frame.iloc[:0]
    keep = np.ones(len(frame), dtype=bool)
    for key, value in cell.items():
        if isinstance(value, str):
            keep &= (frame[key] == value).to_numpy()
        else:
            keep &= np.isclose(pd.to_numeric(frame[key], errors="coerce"), float(value), rtol=1e-9)
    return frame[keep]


def read_members(rows: pd.DataFrame, keys: Iterable[str]) -> pd.DataFrame:
    """One row per run (method, keys, seed, status), read off its scores."""
    found = rows[[c for c in ("method", *keys, "seed", "status") if c in rows]].drop_duplicates()
    return found if "status" in found else found.assign(status="completed")


def choose(study: Claims, cell: Cell, members: pd.DataFrame) -> Cell | None:
    """`cell` with each `best` replaced by the value whose runs have the best mean of the validation metric `choose_on`;
    None where a run lacks it: which would have been best is then not known. A diverged run counts as guessing."""
    open_keys = [key for key, value in cell.items() if value == BEST]
    if not open_keys:
        return study.fill(cell)
    rest = {key: value for key, value in cell.items() if key not in open_keys}
    runs = select(members, rest)
    if runs.empty or study.choose_on not in runs or not set(open_keys) <= set(runs):
        return None
    metric = pd.to_numeric(runs[study.choose_on], errors="coerce")
    metric = metric.mask(runs["status"] == "diverged", study.diverged.get("accuracy", 0.5))
    means = metric.groupby([runs[key] for key in open_keys]).mean()
    if means.empty or metric[runs[open_keys].notna().all(axis=1)].isna().any():
        return None
    best = means.idxmax()
    return study.fill({**rest, **dict(zip(open_keys, best if isinstance(best, tuple) else (best,), strict=True))})


class Missing(ValueError):
    """What is missing of the runs or the scores that a comparison needs."""

    def __str__(self) -> str:
        return f"missing: {self.args[0]}"


def pair_up(
    study: Claims, rows: pd.DataFrame, members: pd.DataFrame, cells: list[Cell], metric: str, *, all_seeds: bool = True
) -> Paired:
    """The scores of `cells` as one array: diverged runs with the worst score, questions with a gap left out of every
    run. Raises Missing.

    `all_seeds`: every seed that any of the cells has must be there in all of them; otherwise the seeds they share are
    taken.
    """
    tables, states, ready, gaps = [_scores(rows, cell, metric) for cell in cells], [], [], []
    for cell, table in zip(cells, tables, strict=True):
        runs = select(members, cell)
        gaps += _duplicates(study, cell, runs)
        state = dict(zip(runs["seed"].astype(int), runs["status"], strict=True)) if len(runs) else {}
        states.append(state)
        ready.append({s for s in state if state[s] == "diverged" or (state[s] == "completed" and s in table.index)})
    wanted = sorted(set().union(*states) if all_seeds else set.intersection(*ready))
    for cell, state, there in zip(cells, states, ready, strict=True):
        name = study.label(cell)
        gaps += [f"{name}, seed {seed}: {_gap(state.get(seed))}" for seed in wanted if there and seed not in there]
        gaps += [] if there else [f"{name}: {_gap(next(iter(state.values()), None))}"]
    if gaps:
        raise Missing("; ".join(gaps))
    if not wanted:
        raise Missing("seeds that " + " and ".join(study.label(cell) for cell in cells) + " share")
    diverged = [[seed for seed in wanted if state[seed] == "diverged"] for state in states]
    scored = [table.loc[[s for s in wanted if s not in lost]] for table, lost in zip(tables, diverged, strict=True)]
    # where every run diverged, one question stands for all
    every = pd.concat([table for table in scored if len(table)] or [pd.DataFrame({0: []})])
    complete = every.columns[every.notna().all()]
    if complete.empty:
        raise Missing(f"questions with a {metric} in every run")
    worst = study.diverged.get(metric, 0.0)
    filled = [table.reindex(index=wanted, columns=complete).astype(float).fillna(worst) for table in scored]
    return Paired(np.stack(filled), wanted, diverged, every.shape[1] - len(complete))


def _scores(rows: pd.DataFrame, cell: Cell, metric: str) -> pd.DataFrame:
    """Seeds x questions; a question's mean over its rows (turns), missing where one of them is."""
    mine = select(rows, cell)
    unit = next((name for name in UNITS if name in mine), None)
    if unit is None or metric not in mine:
        return pd.DataFrame()
    values = pd.to_numeric(mine[metric], errors="coerce").groupby([mine["seed"], mine[unit]])
    return values.mean().where(values.count() == values.size()).unstack().dropna(axis=0, how="all")


def _duplicates(study: Claims, cell: Cell, runs: pd.DataFrame) -> list[str]:
    """What to say where several members of one seed match `cell`: their mean would be nobody's score."""
    for seed, same in runs.groupby("seed", sort=False) if len(runs) else ():
        if len(same) > 1:
            names = f" ({', '.join(sorted(set(same['run_id'])))})" if "run_id" in same else ""
            return [f"{study.label(cell)}, seed {seed:g}: one member, of the {len(same)}{names} that answer to it"]
    return []


def _gap(status: str | None) -> str:
    return "no run" if status in (None, "missing") else "no scores" if status in FINISHED else status


# ---- one comparison measured: the fields of a verdict, as a dict

Names = tuple[str, str]  # of treatment and baseline, for sentences
WORD = {st.SUPPORTED: "supported", st.REFUTED: "refuted", st.INCONCLUSIVE: "inconclusive"}
RULES = {  # what the interval does where it supports and where it refutes a claim of each test
    "non_inferiority": ("the 90 % interval stays above -{m:g}", "the 95 % interval lies below -{m:g}"),
    "superiority": ("the 95 % interval reaches {m:g}", "the 95 % interval lies below {m:g}"),
    "equivalence": ("the 90 % interval lies within {m:g} of 0", "the 95 % interval lies more than {m:g} from 0"),
    "absolute": ("the 95 % interval is at most {m:g} below it", "the 95 % interval lies more than {m:g} below it"),
    "variance_ratio": ("the interval lies below 1 and the ratio is at most {m:g}", "the interval lies above {m:g}"),
    "cost_ratio": ("the interval stays at or below {m:g}", "the interval lies above {m:g}"),
}


def measure(claim: Claim, pairs: Paired, n: int, names: Names, part: str = "") -> dict:
    """Estimate, intervals, p, verdict and reason of one comparison: the first `n` cells against the rest."""
    how = _measure_variance if claim.test == "variance_ratio" else _measure_mean
    return how(claim, pairs.values[:n], pairs.values[n:], names, pairs.seeds, part)


def _rng(claim: Claim, part: str = "") -> np.random.Generator:
    """Each comparison has its own draws, so that none depends on which others were made."""
    return np.random.default_rng(zlib.crc32(f"{claim.id} {part}".encode()))


def _measured(claim: Claim, decision: st.Decision, text: str, estimate, interval95, level=0.95, **more) -> dict:
    """What every comparison has: its verdict, why, the estimate with its 95 % interval, and both p."""
    conclusion = "this leaves the claim open."
    if decision.primary != st.INCONCLUSIVE:
        conclusion = RULES[claim.test][0 if decision.primary == st.SUPPORTED else 1].format(m=claim.margin)
        companion = "stretches of pairs" if claim.test == "cost_ratio" else "seeds"
        agrees = decision.code == decision.primary
        conclusion += "." if agrees else f", but the t test over {companion} does not bear it out."
    return {
        "verdict": WORD[int(decision.code)],
        "reason": f"{text}; {conclusion}",
        "estimate": float(estimate),
        "interval95": tuple(map(float, interval95)),
        **more,
        "level": level,
        "p": float(decision.p),
        "p_companion": float(decision.p_companion),
    }


def _measure_mean(claim, treatment, baseline, names, seeds, part) -> dict:
    difference = treatment[0] - (baseline[0] if len(baseline) else claim.reported)
    primary = st.crossed_bootstrap(difference, draws=DRAWS, rng=_rng(claim, part))
    companion = st.seed_mean(difference.mean(-1))
    decision = st.decide_mean(claim.test, primary, companion, claim.margin)
    ends = {level: tuple(map(float, st.interval(primary, level))) for level in (0.95, 0.90)}
    size = abs(float(primary.value))
    digits = 2 if max(claim.margin, size) >= 0.3 else 4  # grades of 1 to 10, or shares of 1
    spans = {level: " to ".join(f"{end:+.{digits}f}" for end in both) for level, both in ends.items()}
    text = (
        f"{names[0]} scored {size:.{digits}f} {'above' if primary.value >= 0 else 'below'} {names[1]} "
        f"(95 % interval {spans[0.95]}, 90 % {spans[0.90]})"
    )
    level = 0.9 if claim.test in ("non_inferiority", "equivalence") else 0.95
    better = st.probability_of_improvement(treatment[0], baseline[0]) if len(baseline) else None
    return _measured(claim, decision, text, primary.value, ends[0.95], level, interval90=ends[0.90]) | {
        "companion_interval95": tuple(map(float, st.interval(companion, 0.95))),
        "per_seed": dict(zip(seeds, map(float, difference.mean(-1)), strict=True)),
        "probability_of_improvement": better,
    }


def _measure_variance(claim, treatment, baseline, names, seeds, part) -> dict:
    result = st.variance_ratio(treatment, baseline, draws=DRAWS, rng=_rng(claim, part))
    (key,), (ratio, low, high) = claim.across, map(float, result[:3])
    span = f"95 % interval {low:.2f} to {high:.2f}"
    text = f"across {key} the variance of {names[0]}'s scores is {ratio:.2f} times that of {names[1]} ({span})"
    decision = st.decide_variance(result, claim.margin)
    measured = _measured(claim, decision, text, ratio, (low, high))
    if not np.isfinite(ratio):
        measured["verdict"] = "inconclusive"
        measured["reason"] = f"across {key} the scores of {names[1]} vary no more than noise does"
    means, means_baseline = treatment.mean((1, 2)), baseline.mean((1, 2))
    for what, a, b in (("mean", means.mean(), means_baseline.mean()), ("best", means.max(), means_baseline.max())):
        if claim.guard is not None and a < b - claim.guard:
            measured["verdict"] = "vacuous"
            measured["reason"] = (
                f"the {what} score of {names[0]} over {key} is {a:.2f} against {b:.2f} of {names[1]}: scores that vary "
                f"less (ratio of variances {ratio:.2f}, {span}) because they are worse show nothing"
            )
    own, own_baseline = result.companion
    ratios = [float(a / b) if b > 0 else None for a, b in zip(own, own_baseline, strict=True)]
    better = st.probability_of_improvement(-own[:, None], -own_baseline[:, None])
    return measured | {"per_seed": dict(zip(seeds, ratios, strict=True)), "probability_of_improvement": better}


def _measure_cost(claim: Claim, pairs: pd.DataFrame, names: Names) -> dict:
    """Ratio of costs from pairs `metric`, `metric`_baseline, in the order in which they were measured."""
    cost, baseline = (pairs[name].to_numpy(dtype=float) for name in (claim.metric, f"{claim.metric}_baseline"))
    result = st.time_ratio(cost, baseline, draws=COST_DRAWS, rng=_rng(claim))
    span = f"95 % interval {result.low:.3f} to {result.high:.3f}, {len(pairs)} pairs"
    text = f"{names[0]} takes {result.ratio:.3f} times the {claim.metric} of {names[1]} ({span})"
    decision = st.decide_cost(result, claim.margin)
    per_seed = pd.Series(cost / baseline).groupby(pairs["seed"].to_numpy()).median() if "seed" in pairs else {}
    return _measured(claim, decision, text, result.ratio, (result.low, result.high)) | {
        "per_seed": {int(seed): float(value) for seed, value in per_seed.items()},
        "probability_of_improvement": float((cost < baseline).mean() + 0.5 * (cost == baseline).mean()),
        "n_seeds": len(per_seed),
        "n_pairs": len(pairs),
    }


# ---- a verdict and its forms


class Verdict(SimpleNamespace):
    """What one claim came to, at one scale; its attributes are what claims.json holds. Numbers that do not exist are
    None.

    `p` is the one-sided p of the claim's own primary test, `holm_p` adjusted over the claims evaluated with it,
    `p_companion` that of the t test over seeds. `per_seed` maps a seed to its own estimate. `level` is that of the
    interval which supports the claim. `scored_by` names what gave the scores. `n_pairs` counts pairs of costs,
    `n_dropped` questions left out for want of a score. `beside` and `sensitivity` hold comparisons that decide nothing.
    """

    def __init__(self, claim: Claim, scale: str) -> None:
        super().__init__(
            **{key: getattr(claim, key) for key in ("id", "sentence", "test", "metric")},
            **{"scale": scale, "verdict": "not evaluated", "reason": ""},
            **{key: getattr(claim, key) for key in ("estimand", "margin", "claimed")},
            **dict.fromkeys(("estimate", "interval95", "interval90", "level")),
            **dict.fromkeys(("p", "holm_p", "p_companion", "companion_interval95")),
            **{"per_seed": {}, "probability_of_improvement": None},
            **dict.fromkeys(("n_seeds", "n_questions", "n_pairs", "n_dropped"), 0),
            **{"premise": None, "note": claim.note, "scored_by": "", "beside": [], "sensitivity": None},
        )


def to_json(verdicts: list[Verdict]) -> list[dict]:
    """Plain data without NaN or infinities (they become null), ready for record.write_json."""
    return finite([vars(verdict) for verdict in verdicts])


def table(verdicts: list[Verdict]) -> pd.DataFrame:
    """One row per claim, for people."""

    def span(bounds: tuple | None) -> str:
        return "" if bounds is None else " to ".join(f"{b:.3g}" if math.isfinite(b) else "no bound" for b in bounds)

    columns = "id verdict estimate interval95 p holm_p probability_of_improvement per_seed n_seeds scale reason"
    rows = pd.DataFrame([vars(verdict) for verdict in verdicts]).reindex(columns=columns.split())
    rows["interval95"] = rows["interval95"].map(span)
    rows["per_seed"] = [", ".join(f"{x:.3g}" for x in v.per_seed.values() if x is not None) for v in verdicts]
    names = ["claim", "verdict", "estimate", "95 % interval", "p", "Holm p", "P(improvement)", "per seed", "seeds"]
    return rows.set_axis([*names, "scale", "why"], axis=1)


def sentence(verdict: Verdict) -> str:
    """`C1 refuted at laptop scale (oracle score): ...`."""
    by = f" ({verdict.scored_by})" if verdict.scored_by else ""
    return f"{verdict.id} {verdict.verdict} at {verdict.scale} scale{by}: {verdict.reason}"


def coverage(study: Claims, members: pd.DataFrame) -> pd.DataFrame:
    """Which runs each claim's cells have: one row per claim and cell, with the seeds of every status."""
    statuses, out = (*FINISHED, "failed", "out_of_memory", "lost", "missing"), []
    sides = [(claim, side, cell) for claim in study.claims for side in SIDES for cell in study.levels(claim, side)]
    for claim, side, cell in sides:
        # where a key is `best`, any of its runs may be it
        runs = select(members, {key: value for key, value in cell.items() if value != BEST})
        seeds = {s: runs["seed"][runs["status"] == s].astype(int) if len(runs) else [] for s in statuses}
        row = {"claim": claim.id, "side": side, "cell": study.label(cell), "runs": len(runs)}
        row["finished"] = sum(len(seeds[status]) for status in FINISHED)
        out.append(row | {status: ", ".join(map(str, sorted(set(seeds[status])))) for status in statuses})
    return pd.DataFrame(out)


# ---- from claims to verdicts


class Data(NamedTuple):
    """The tables that every claim is evaluated on; see `evaluate`."""

    rows: pd.DataFrame
    accuracy: pd.DataFrame | None
    members: pd.DataFrame
    costs: pd.DataFrame

    def scores(self, metric: str) -> pd.DataFrame:
        return self.rows if metric in self.rows or self.accuracy is None else self.accuracy


def evaluate(
    study: Claims,
    rows: pd.DataFrame,
    *,
    scale: str,
    mode: str,
    members: pd.DataFrame | None = None,
    accuracy: pd.DataFrame | None = None,
    costs: pd.DataFrame | None = None,
    scored_by: str = "",
    fix: str = "",
    absent: Mapping[str, str] | None = None,
) -> list[Verdict]:
    """A verdict for every claim of `study`, in its order.

    rows: one row per method, cell key, seed and question with `score` and `status`; `accuracy` the same for the second
    metric. members: one row per run with `status` and validation metrics (read off `rows` where not given). costs:
    pairs `seconds`, `seconds_baseline` measured interleaved. scored_by: what gave the scores, for the record. fix: said of
    a claim whose scores are missing (how to get them). absent: {metric: why it has no values}, the reason of the claims
    about it.
    """
    members = read_members(rows, study.keys) if members is None else members
    data = Data(rows, accuracy, members, pd.DataFrame() if costs is None else costs)
    verdicts = [Verdict(claim, scale) for claim in study.claims]
    for claim, verdict in zip(study.claims, verdicts, strict=True):
        try:
            verdict.reason = _no_verdict(claim, scale, mode, absent or {})
            if not verdict.reason:
                (_judge_cost if claim.test == "cost_ratio" else _judge_scores)(study, claim, data, verdict)
        except Missing as missing:
            verdict.reason = f"{missing}. {fix}" if fix and claim.test != "cost_ratio" else str(missing)
        verdict.scored_by = "" if claim.test == "cost_ratio" else scored_by
    family = [v for v in verdicts if v.p is not None]
    for verdict, adjusted in zip(family, st.holm([v.p for v in family]) if family else (), strict=True):
        verdict.holm_p = float(adjusted)
        if verdict.verdict == "supported" and adjusted >= HOLM_LEVEL:
            verdict.verdict = "inconclusive"
            verdict.reason += f" It does not stand among {len(family)} claims tested together (Holm p {adjusted:.2g})."
    return verdicts


def _no_verdict(claim: Claim, scale: str, mode: str, absent: Mapping[str, str]) -> str:
    """Why the claim is not evaluated, whatever the scores; the empty string where it is."""
    if mode == "trial":
        return "a trial shows that the study runs, not what it finds"
    if claim.not_evaluated:
        return claim.not_evaluated
    if claim.test == "absolute" and scale == "laptop":
        return "a figure of a named model says nothing about the models made at laptop scale"
    if scale not in claim.scales:
        return f"this claim is about {' and '.join(claim.scales)} scale"
    return absent.get(claim.metric, "")


class Comparison(NamedTuple):
    """The cells of a claim with their names; the first `n` are the treatment's. `pairs`: their scores."""

    cells: list[Cell]
    n: int
    names: Names
    pairs: Paired


def _compare(study: Claims, claim: Claim, data: Data, *, all_seeds: bool) -> Comparison:
    """The claim's two sides; raises Missing."""
    treatment, baseline = study.levels(claim, "treatment"), study.levels(claim, "baseline")
    cells = [choose(study, cell, data.members) for cell in [*treatment, *baseline]]
    if None in cells:
        raise Missing(f"{'a run' if all_seeds else 'runs'} with {study.choose_on}")
    pairs = pair_up(study, data.scores(claim.metric), data.members, cells, claim.metric, all_seeds=all_seeds)
    n = len(treatment)
    name = study.label(cells[0] if n == 1 else claim.treatment)
    other = claim.baseline_name or study.label(cells[n] if len(baseline) == 1 else claim.baseline or {})
    return Comparison(cells, n, (name, other if baseline else "the reported figure"), pairs)


def _judge_scores(study: Claims, claim: Claim, data: Data, verdict: Verdict) -> None:
    comparison = _compare(study, claim, data, all_seeds=True)
    _, n, names, pairs = comparison
    if len(pairs.seeds) < 2:
        verdict.reason = "one seed tells nothing about seeds: at least 2 are needed"
        return
    vars(verdict).update(measure(claim, pairs, n, names))
    verdict.n_seeds, verdict.n_questions, verdict.n_dropped = len(pairs.seeds), pairs.values.shape[2], pairs.dropped
    parts = pairs.diverged[:n], pairs.diverged[n:]
    lost, lost_baseline = (sorted({seed for seeds in part for seed in seeds}) for part in parts)
    every = [len(seeds) == len(pairs.seeds) for seeds in pairs.diverged]
    if lost:
        forbidden = claim.no_divergence and verdict.verdict == "supported"
        verdict.reason += f"{' But' if forbidden else ''} {names[0]} diverged (seed {', '.join(map(str, lost))})."
        if forbidden or (verdict.verdict == "supported" and all(every[:n])):
            verdict.verdict = "inconclusive"  # what stands for the scores of a diverged run is ours, not measured
    if claim.baseline and all(every):
        verdict.verdict, verdict.reason = "vacuous", f"every run of {names[0]} and of {names[1]} diverged"
    elif claim.baseline:  # a figure of its own (absolute) is missed by a model that learned nothing
        try:
            vars(verdict).update(at_chance(study, data, comparison, verdict.reason))
        except Missing as missing:
            verdict.note += f" Whether its runs are above chance is not known ({missing.args[0]})."
    if claim.premise:
        count, mean = f"of {len(pairs.seeds)} runs", float(pairs.values[n:].mean())
        text = f"{names[1]} did not diverge in any {count} (mean score {mean:.2f}): there was no divergence to avoid."
        text = f"{names[1]} diverged in {len(lost_baseline)} {count}." if lost_baseline else text
        verdict.premise = {"holds": bool(lost_baseline), "text": text}
    if pairs.dropped:
        verdict.note += f" {pairs.dropped} question(s) without a score in some run were left out."
    verdict.note = verdict.note.strip()
    verdict.beside = [_compare_sides(study, claim, other, data) for other in claim.beside]
    if lost or lost_baseline:
        verdict.sensitivity = _compare_completed(claim, comparison)


def _compare_sides(study: Claims, claim: Claim, other: SideComparison, data: Data) -> dict:
    """A comparison on the seeds that both sides have; with one seed, an estimate without an interval."""
    sides = {side: cell for side in SIDES if (cell := getattr(other, side))}
    asked = claim.model_copy(update=sides | ({"baseline_name": ""} if other.baseline else {}))
    out = {"name": other.name, "decides": False}
    try:
        comparison = _compare(study, asked, data, all_seeds=False)
    except ValueError as error:  # scores are missing, or it contradicts what is fixed in advance
        return {**out, "reason": str(error)}
    _, n, names, pairs = comparison
    out |= {"treatment": names[0], "baseline": names[1], "n_seeds": len(pairs.seeds)}
    if len(pairs.seeds) < 2 and claim.test == "variance_ratio":
        return {**out, "reason": "one seed tells nothing about noise"}
    if len(pairs.seeds) < 2:
        difference = float((pairs.values[0] - pairs.values[1]).mean())
        reason = f"{difference:+.2f} in the one seed that both have; no interval"
        return {**out, "estimate": difference, "reason": reason}
    measured = measure(claim, pairs, n, names, other.name)
    with contextlib.suppress(Missing):  # the claim's own note says so
        measured |= at_chance(study, data, comparison, measured["reason"])
    return out | _hide_verdict(measured)


def _compare_completed(claim: Claim, comparison: Comparison) -> dict:
    """The same comparison on the seeds in which no run diverged."""
    pairs = comparison.pairs
    keep = [i for i, seed in enumerate(pairs.seeds) if not any(seed in seeds for seeds in pairs.diverged)]
    out = {"on": "completed runs only", "n_seeds": len(keep)}
    if len(keep) < 2:
        return {**out, "reason": f"{len(keep)} seed(s) without a diverged run: nothing to compare"}
    rest = pairs._replace(values=pairs.values[:, keep], seeds=[pairs.seeds[i] for i in keep])
    return out | _hide_verdict(measure(claim, rest, comparison.n, comparison.names, "completed"))


def _hide_verdict(measured: dict) -> dict:
    """Of a comparison that decides nothing: a word of verdict here would be taken for one."""
    return {**{k: v for k, v in measured.items() if k != "verdict"}, "by_the_same_rule": measured["verdict"]}


def _judge_cost(study: Claims, claim: Claim, data: Data, verdict: Verdict) -> None:
    names = study.label(claim.treatment), study.label(claim.baseline)
    columns = [claim.metric, f"{claim.metric}_baseline"]
    pairs = data.costs if set(columns) <= set(data.costs) else pd.DataFrame(columns=columns)
    pairs = select(pairs, claim.treatment) if "method" in pairs else pairs
    pairs = pairs[(pairs[columns] > 0).all(axis=1)]
    if len(pairs) < MIN_COST_PAIRS:
        count = f"{len(pairs)} pairs, at least {MIN_COST_PAIRS} are needed"
        raise Missing(f"{claim.metric} of {names[0]} and {names[1]} measured interleaved ({count})")
    vars(verdict).update(_measure_cost(claim, pairs, names))


# ---- whether the runs that a claim compares have learned anything


def at_chance(study: Claims, data: Data, comparison: Comparison, reason: str) -> dict:
    """Verdict and reason where every cell is at chance, whatever its numbers (`reason`) say; nothing where one is not.
    Raises Missing.

    A difference between runs at chance says nothing of methods. What chance is stands in claims.yaml (`chance`), fixed
    before any score is seen. Runs are at chance unless they are shown to be above it or, where they began with
    something to lose, below that: a cell as a whole (one-sided at the companion's level, by the crossed seed x question
    standard error), or any of them alone, over its questions (at that level over the number of runs: one lucky seed of
    many shows nothing, and one that has clearly learned is no run at chance, however much the seeds differ). To diverge
    is a result, and not chance.
    """
    cells, n, names, _ = comparison
    if not (chance := study.chance):
        return {}
    pairs = pair_up(study, data.scores(chance.metric), data.members, cells, chance.metric, all_seeds=False)
    if len(pairs.seeds) < 2:
        raise Missing("one seed tells nothing about seeds")
    if any(pairs.diverged):
        return {}
    limits = [_chance_limits(study, cell, data.members) for cell in cells]
    runs, questions = len(cells) * len(pairs.seeds), pairs.values.shape[-1]
    for values, (upper, lower) in zip(pairs.values, limits, strict=True):
        alone = st.Estimate(values.mean(-1), values.std(-1) / max(1, questions - 1) ** 0.5, np.inf)
        for estimate, level in ((st.crossed_mean(values), st.COMPANION_LEVEL), (alone, st.COMPANION_LEVEL / runs)):
            if np.any(st.p_above(estimate, upper) <= level) or np.any(st.p_below(estimate, lower) <= level):
                return {}
    means, upper = pairs.values.mean((1, 2)), max(limit for limit, _ in limits)
    shown = " and ".join(
        f"{part.max():.3f} of {name}" for part, name in zip((means[:n], means[n:]), names, strict=True)
    )
    text = (
        f"no run is shown to have learnt anything: {chance.metric.replace('_', ' ')} is {shown}, not shown to be above "
        f"{upper:.3f} ({chance.what}), and differences between runs at chance show nothing"
    )
    return {"verdict": "vacuous", "reason": f"{text}. By its numbers alone: {reason}"}


def _chance_limits(study: Claims, cell: Cell, members: pd.DataFrame) -> tuple[float, float]:
    """What the metric is above where a run of `cell` has learned, and what below (minus infinity: nothing)."""
    runs, chance = select(members, cell), study.chance

    def value(level: float | str) -> float:
        own = pd.to_numeric(runs[level], errors="coerce").mean() if isinstance(level, str) and level in runs else level
        if isinstance(own, str) or np.isnan(own):
            raise Missing(f"{study.label(cell)}: no {level}")
        return float(own)

    lower = chance.no_worse_than
    return max(map(value, chance.no_better_than)), -np.inf if lower is None else value(lower)
