"""The claims of a study (params/<study>/claims.yaml) and the verdict on each of them.

A claimed gain is tested against two thirds of itself (ratios on the log scale), parity and non-inferiority against a
margin. The repeated confidence interval of lib/stats.py decides both words: a claim is supported where it lies on the
claim's side of what is tested, refuted where it lies on the other, and else inconclusive. A word also needs a
Holm-adjusted p below .05 over the study's claims at this scale. Looks are taken at the numbers of seeds that `looks` says,
each on the first so many seeds, all of them there.

A claim about scores is `vacuous` where no run that it compares is shown to be above chance (`at_chance`), where all of
them diverged, where every difference is exactly 0, or where scores vary less because they are worse (`guard`): its
numbers are then shown, and decide nothing.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, Field, model_validator

from lib import stats as st
from lib.config import BEST, TUNED, Section, plain, validate
from lib.record import FINISHED, finite

CHANCE_LEVEL = 0.05  # one-sided, at which runs are shown to be above chance
SHARE = 2 / 3  # of a claimed gain is what is tested
MOST_DROPPED = 0.05  # of the questions may lack a score in some run
MIN_PROCESSES = 8  # between which a ratio of times varies
FAR = 100  # more seeds than this are out of reach, and their number is a guess
UNITS = ("question", "problem", "example", "pair")  # the column that says what one score is about
SIDES = ("treatment", "baseline")

# ---- what claims.yaml holds
#
# A cell is named by equalities on the columns of the scores: {method: td_dpo, beta: 0.01, tau: 0.5}; a name alone is a
# method. A key that is fixed in advance by another (tau by beta) may be left out and is filled in; a cell that
# contradicts it is refused, so that nobody chooses it on the judged score. `cell: tuned` is what the search of a run
# found, whatever its values: it answers to that name alone.


def _as_cell(value: object) -> object:
    return {"method": value} if isinstance(value, str) else value


Cell = Annotated[dict[str, Annotated[float | int | str, BeforeValidator(plain)]], BeforeValidator(_as_cell)]
Test = Literal["non_inferiority", "superiority", "equivalence", "variance_ratio", "cost_ratio", "absolute"]
RATIOS = ("variance_ratio", "cost_ratio")
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
    """What `check` and the power table assume of a paired difference: its standard deviations between seeds (several:
    each is tried), between questions and of what is left, for claims about scores; between seeds of the log ratio of
    variances; between processes of the log ratio of times. `metric`: that it is about."""

    metric: str = "score"
    seed_sds: tuple[float, ...] = (0.1, 0.3)
    question_sd: float = 0.5
    residual_sd: float = 1.0
    variance_sd: float = 0.8
    time_sd: float = 0.02
    questions: int | dict[str, int] = 80  # or by scale
    simulations: int = 500


class Claim(Section):
    """One published claim.

    gain: the size that was claimed, of a difference (superiority) or as a ratio (variance_ratio, cost_ratio); two
    thirds of it are tested. margin: what is tested where no gain is claimed: the largest difference of parity
    (equivalence) and the largest loss (non_inferiority, absolute), or a limit of its own. factor: the baseline's scores
    are multiplied by it ("22 % above": 1.22), two thirds of it too. across: a key and its levels, whose variance is
    compared or, in other tests, over which the difference is averaged: every level counts alike, on questions of its own.
    not_evaluated: why no record can decide it.
    baseline_name: what the baseline is in sentences, where it is not a method's own score.
    """

    id: str
    sentence: str = ""
    estimand: str = ""
    test: Test = "superiority"
    treatment: Cell
    baseline: Cell | None = None
    baseline_name: str = ""
    across: dict[str, tuple[float | str, ...]] = Field(default_factory=dict)
    metric: str = "score"
    gain: float | None = None
    margin: float | None = None
    factor: float = Field(1.0, gt=0)
    reported: float | None = None
    no_divergence: bool = False
    premise: bool = False
    guard: float | None = None
    not_evaluated: str = ""
    note: str = ""
    scales: tuple[str, ...] = ("laptop", "paper")
    beside: tuple[SideComparison, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.test == "absolute" and self.reported is None:
            raise ValueError("test absolute needs `reported`, the figure that was reported")
        if self.test != "absolute" and self.baseline is None:
            raise ValueError(f"test {self.test} needs a `baseline`")
        allowed = {"variance_ratio": (1,), "cost_ratio": (0,), "absolute": (0,)}.get(self.test, (0, 1))
        if len(self.across) not in allowed:
            raise ValueError("`across`: one key and its levels for variance_ratio, none for cost_ratio and absolute")
        if (self.gain is None) == (self.margin is None):
            raise ValueError("one of `gain` (what was claimed; two thirds are tested) and `margin` (what is tested)")
        if self.factor != 1 and (self.test != "superiority" or self.gain is not None or self.margin):
            raise ValueError("`factor` is what superiority claims, with a `margin` of 0")
        if self.gain is not None and self.test not in ("superiority", *RATIOS):
            raise ValueError(f"test {self.test} takes a `margin`: no gain is claimed")
        for name in ("gain", "margin"):
            if (value := getattr(self, name)) is not None and (value < 0 or (self.test in RATIOS and value == 0)):
                raise ValueError(f"`{name}` is not negative, and a ratio is not 0; what it bounds is said by `test`")
        return self

    @property
    def tested(self) -> float:
        """The threshold: `margin`, or two thirds of the claimed gain, of a ratio on the log scale."""
        if self.gain is None:
            return float(self.margin or 0)
        return self.gain**SHARE if self.test in RATIOS else self.gain * SHARE

    @property
    def threshold_text(self) -> str:
        """What is tested, in words."""
        thirds = "" if self.gain is None else f", two thirds of the claimed {self.gain:g}"
        thirds += " on the log scale" if thirds and self.test in RATIOS else ""
        m = f"{self.tested:.3g}"
        if self.factor != 1:
            tested, claimed = f"{self.factor**SHARE:.3g}", f"{self.factor:g}"
            return f"above {tested} times the baseline's, two thirds of the claimed {claimed} times"
        return {
            "superiority": f"at least {m}{thirds}" if self.tested else "above 0",
            "non_inferiority": f"at most {m} below",
            "equivalence": f"within {m} of 0",
            "absolute": f"at most {m} below the reported {self.reported}",
        }.get(self.test, f"a ratio of at most {m}{thirds}")


class Claims(Section):
    """A study's claims. looks: the numbers of seeds at which they are judged, by scale or for any."""

    study: str = ""
    names: dict[str, str] = Field(default_factory=dict)
    keys: tuple[str, ...] = ()
    looks: dict[str, tuple[int, ...]] | tuple[int, ...] = (5, 8, 12, 20)
    diverged: dict[str, float] = Field(default_factory=lambda: {"score": 1.0, "accuracy": 0.5})
    choose_on: str | None = None
    chance: Chance | None = None
    fixed: tuple[Fixed, ...] = ()
    noise: Noise = Noise()
    claims: tuple[Claim, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) < len(ids):
            raise ValueError(f"claim ids are not unique: {', '.join(ids)}")
        for looks in self.looks.values() if isinstance(self.looks, dict) else [self.looks]:
            if list(looks) != sorted({n for n in looks if n > 1}) or not looks:
                raise ValueError(f"`looks` are growing numbers of seeds from 2 on, not {list(looks)}")
        for claim in self.claims:
            self.levels(claim, "treatment"), self.levels(claim, "baseline")
            cells = [cell for part in (claim, *claim.beside) for cell in (part.treatment, part.baseline) if cell]
            if self.choose_on is None and any(BEST in cell.values() for cell in cells):
                raise ValueError(f"claim {claim.id}: `best` needs `choose_on`, the validation metric it is chosen on")
        return self

    def looks_of(self, scale: str) -> tuple[int, ...]:
        """The numbers of seeds at which claims are judged at this scale."""
        return self.looks.get(scale, (5, 8, 12, 20)) if isinstance(self.looks, dict) else self.looks

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
# yet graded is a gap: nothing is guessed for it, and a look that needs it is not taken.


class Paired(NamedTuple):
    """`values` (cells, S, Q) for the same seeds and questions in every cell; `diverged` lists each cell's diverged
    seeds; `dropped` counts questions left out because a score is missing in some run."""

    values: np.ndarray
    seeds: list[int]
    diverged: list[list[int]]
    dropped: int
    parts: int = 1  # that were averaged, in each of which a seed may have diverged

    def of(self, seeds: list[int]) -> Self:
        """Of these seeds alone."""
        kept = [place for place, seed in enumerate(self.seeds) if seed in seeds]
        values, diverged = self.values[:, kept], [[s for s in each if s in seeds] for each in self.diverged]
        return self._replace(values=values, seeds=[self.seeds[place] for place in kept], diverged=diverged)


def select(frame: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """The rows of `frame` that a cell's equalities hold for; none where a column does not exist."""
    if not set(cell) <= set(frame):
        return frame.iloc[:0]
    keep = np.ones(len(frame), dtype=bool)
    if "cell" in frame and "cell" not in cell:
        keep &= (frame["cell"] != TUNED).to_numpy()
    for key, value in cell.items():
        if isinstance(value, str):
            keep &= (frame[key] == value).to_numpy()
        else:
            keep &= np.isclose(pd.to_numeric(frame[key], errors="coerce"), float(value), rtol=1e-9)
    return frame[keep]


def select_any(frame: pd.DataFrame, claim: Claim, cell: Cell) -> pd.DataFrame:
    """The rows that a cell of the claim may be about: with a key that is `best`, whichever; of a cost, tuned ones too."""
    rows = frame.drop(columns="cell", errors="ignore") if claim.test == "cost_ratio" else frame
    return select(rows, {key: value for key, value in cell.items() if value != BEST})


def is_pilot(frame: pd.DataFrame) -> pd.Series:
    """Whether a row is of a seed that chooses a cell, and is never judged."""
    return frame["pilot"].fillna(False).astype(bool) if "pilot" in frame else pd.Series(False, frame.index)


def judged_rows(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[~is_pilot(frame)]


def read_members(rows: pd.DataFrame, keys: Iterable[str]) -> pd.DataFrame:
    """One row per run (its name, method, keys, seed, status), read off its scores."""
    columns = dict.fromkeys(("run_id", "method", *keys, "seed", "status", "pilot"))
    found = rows[[c for c in columns if c in rows]].drop_duplicates()
    return found if "status" in found else found.assign(status="completed")


def choosing(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that a `best` is chosen by: the pilots, and all of them where there are none."""
    pilots = is_pilot(runs)
    return runs[pilots] if pilots.any() else runs


def choose(study: Claims, cell: Cell, members: pd.DataFrame) -> Cell | None:
    """`cell` with each `best` replaced by the value whose pilots (without pilots: whose runs) have the best mean of the
    validation metric `choose_on`; None where a run lacks it, or where pilots choose in other runs and this one's are not
    trained yet: which would have been best is then not known. A diverged run counts as `diverged` says."""
    open_keys = [key for key, value in cell.items() if value == BEST]
    if not open_keys:
        return study.fill(cell)
    rest = {key: value for key, value in cell.items() if key not in open_keys}
    runs = select(members, rest)
    if runs.empty or study.choose_on not in runs or not set(open_keys) <= set(runs):
        return None
    pilots = is_pilot(runs)
    if not pilots.any() and is_pilot(members).any():
        return None
    asked = choosing(runs)
    metric = _numbers(asked[study.choose_on])
    metric = metric.mask(asked["status"] == "diverged", study.diverged.get("accuracy", 0.5))
    means = metric.groupby([asked[key] for key in open_keys]).mean()
    if means.empty or metric[asked[open_keys].notna().all(axis=1)].isna().any():
        return None
    # what a run has chosen among its pilots stands (runs.settle): its other cells have no judged runs
    trained = means[means.index.isin(runs[~pilots].groupby(open_keys).size().index)]
    best = (trained if len(trained) else means).idxmax()
    return study.fill({**rest, **dict(zip(open_keys, best if isinstance(best, tuple) else (best,), strict=True))})


def at_edge(study: Claims, claim: Claim, cells: list[Cell], members: pd.DataFrame) -> Iterator[str]:
    """What `choose` took from the end of three numbers or more: a better one may lie beyond them. `cells`: the claim's,
    as they were chosen."""
    for cell, chosen in zip((each for side in SIDES for each in study.levels(claim, side)), cells, strict=True):
        runs = choosing(select(members, {key: value for key, value in cell.items() if value != BEST}))
        for key in (key for key, value in cell.items() if value == BEST and not isinstance(chosen[key], str)):
            tried = sorted(runs[key].dropna().unique())
            if len(tried) > 2 and (end := {tried[0]: "least", tried[-1]: "largest"}.get(chosen[key])):
                yield f" {study.label({'method': cell.get('method', ''), key: chosen[key]})} is the {end} that was tried."


class Data(NamedTuple):
    """The tables that every claim is evaluated on; see `evaluate`."""

    rows: pd.DataFrame
    accuracy: pd.DataFrame | None
    members: pd.DataFrame
    costs: pd.DataFrame
    looks: tuple[int, ...]

    def scores(self, metric: str) -> pd.DataFrame:
        """Scores per question where there are any, else the runs' own (F1, say): one number per seed."""
        return next((rows for rows in (self.rows, self.accuracy) if rows is not None and metric in rows), self.members)


class Missing(ValueError):
    """What is missing of the runs or the scores that a comparison needs."""

    def __str__(self) -> str:
        return f"missing: {self.args[0]}"


def pair_up(study: Claims, data: Data, cells: list[Cell], metric: str, looks: tuple[int, ...] = ()) -> Paired:
    """The scores of `cells` as one array: diverged runs with the worst score, questions with a gap left out of every
    run. Raises Missing.

    With `looks` the first seeds of the list are taken, in its order and as many as the last look that all of them
    suffice for; without, the seeds that the cells share.
    """
    rows, members = judged_rows(data.scores(metric)), judged_rows(data.members)
    tables, states, ready, gaps = [_scores(rows, cell, metric) for cell in cells], [], [], []
    for cell, table in zip(cells, tables, strict=True):
        runs = select(members, cell)
        gaps += _duplicates(study, cell, runs)
        if "capped" in runs:
            status = runs["status"].mask(runs["capped"].eq(True), "ended by total_steps, not its budget")
            runs = runs.assign(status=status)
        state = dict(zip(runs["seed"].astype(int), runs["status"], strict=True)) if len(runs) else {}
        states.append(state)
        ready.append({s for s in state if state[s] == "diverged" or (state[s] == "completed" and s in table.index)})
    order = list(dict.fromkeys(seed for state in states for seed in state))
    wanted = [seed for seed in order if all(seed in there for there in ready)]
    if looks:
        for cell, state, there in zip(cells, states, ready, strict=True):
            name = study.label(cell)
            gaps += [f"{name}, seed {s}: {_gap(state.get(s))}" for s in order[: looks[0]] if there and s not in there]
            gaps += [] if there else [f"{name}: {_gap(next(iter(state.values()), None))}"]
        whole = next((place for place, seed in enumerate(order) if seed not in wanted), len(order))
        if whole < looks[0]:
            raise Missing("; ".join(gaps) or f"{looks[0] - whole} of the {looks[0]} seeds of the first look")
        wanted = wanted[: max(n for n in looks if n <= whole)]
    if gaps:
        raise Missing("; ".join(gaps))
    if not wanted:
        raise Missing("seeds that " + " and ".join(study.label(cell) for cell in cells) + " share")
    diverged = [[seed for seed in wanted if state[seed] == "diverged"] for state in states]
    scored = [table.loc[[s for s in wanted if s not in lost]] for table, lost in zip(tables, diverged, strict=True)]
    # where every run diverged, one question stands for all
    every = pd.concat([table for table in scored if len(table)] or [pd.DataFrame({0: []})])
    complete = every.columns[every.notna().all()]
    dropped, total = every.shape[1] - len(complete), every.shape[1]
    if dropped > MOST_DROPPED * total:
        raise Missing(f"a {metric} in some run for {dropped} of {total} questions, more than {MOST_DROPPED:.0%}")
    if any(diverged) and metric not in study.diverged:
        raise Missing(f"a {metric} of diverged runs, for which `diverged` in its claims names none")
    worst = study.diverged.get(metric, 0.0)
    filled = [table.reindex(index=wanted, columns=complete).astype(float).fillna(worst) for table in scored]
    return Paired(np.stack(filled), wanted, diverged, dropped)


def average(parts: list[Paired]) -> Paired:
    """Comparisons on questions of their own as one, whose mean is the mean of theirs: what few questions a part has
    weigh more each."""
    seeds = min((part.seeds for part in parts), key=len)
    if any(part.seeds[: len(seeds)] != seeds for part in parts):
        raise Missing("the same seeds in every part of the average")
    total, diverged = sum(part.values.shape[2] for part in parts), []
    scaled = [p.values[:, : len(seeds)] * total / (len(parts) * p.values.shape[2]) for p in parts]
    for side in range(len(parts[0].values)):
        diverged.append([seed for part in parts for seed in part.diverged[side] if seed in seeds])
    return Paired(np.concatenate(scaled, axis=2), seeds, diverged, sum(part.dropped for part in parts), len(parts))


def _scores(rows: pd.DataFrame, cell: Cell, metric: str) -> pd.DataFrame:
    """Seeds x questions (one where a score is about no question); a question's mean over its rows (turns), missing
    where one of them is, or is infinite."""
    mine = select(rows, cell)
    if mine.empty or metric not in mine:
        return pd.DataFrame()
    unit = next((mine[name] for name in UNITS if name in mine), pd.Series(0, mine.index))
    values = _numbers(mine[metric]).groupby([mine["seed"], unit])
    return values.mean().where(values.count() == values.size()).unstack().dropna(axis=0, how="all")


def _numbers(column: pd.Series) -> pd.Series:
    """Missing where there is no number, or an infinite one."""
    return pd.to_numeric(column, errors="coerce").replace([np.inf, -np.inf], np.nan).astype(float)


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
LOOK = ("seeds", "estimate", "low", "high")
WORD = {st.SUPPORTED: "supported", st.REFUTED: "refuted", st.INCONCLUSIVE: "inconclusive"}


def differences(claim: Claim, treatment: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """d (S, Q) of the cells' scores (cells, S, Q). A ratio's is -log of it, (S, 1), so that more is better."""
    if claim.test == "variance_ratio":
        return -st.log_variance_ratio(treatment, baseline)
    if claim.test == "absolute":
        return treatment[0] - float(claim.reported or 0)
    return treatment[0] - claim.factor**SHARE * baseline[0]


def test_of(claim: Claim) -> tuple[str, float]:
    """The test of d and its margin; see stats.decide."""
    if claim.test in RATIOS:
        return ("superiority" if claim.tested < 1 else "non_inferiority"), abs(math.log(claim.tested))
    return claim.test, claim.tested


def measure(claim: Claim, d: np.ndarray, seeds: list[int], names: Names, looks: tuple[int, ...]) -> dict:
    """Estimate, interval, p, verdict and reason of d (S, Q) of these seeds."""
    sequence, (test, margin) = st.look_sequentially(d, looks), test_of(claim)
    decision, last, ratio = st.decide(test, sequence, margin), sequence.taken[-1], claim.test in RATIOS
    low, high = float(sequence.low[-1]), float(sequence.high[-1])
    disagree, half = low > high, float(last.half_width(st.bound_of((last.seeds,))))

    def shown(*values: float) -> tuple[float, ...]:
        """On the claim's own scale, in growing order."""
        return tuple(sorted(math.exp(-x) if ratio else float(x) for x in values))

    (estimate,) = shown(last.mean)
    ends = zip(sequence.taken, sequence.low, sequence.high, strict=True)
    # where no interval is left, the look's own
    steps = [(look, *((a, b) if a <= b else look.interval(st.bound_of(looks)))) for look, a, b in ends]
    interval = shown(*steps[-1][1:])
    digits = 3 if ratio else 2 if max(margin, abs(estimate)) >= 0.3 else 4  # grades of 1 to 10, or shares of 1
    span = " to ".join(f"{end:{'' if ratio else '+'}.{digits}f}" for end in interval)
    what = "processes" if claim.test == "cost_ratio" else "seeds"
    word, rule = WORD[int(decision.code)], f"tested was {claim.threshold_text}: the interval "
    if disagree:
        rule = f"{what} disagree: the intervals of its looks do not meet, and the last one is shown"
    elif word == "inconclusive":
        rule += "holds that threshold, which leaves the claim open"
    else:
        rule += "keeps to it" if word == "supported" else "lies wholly beyond it"
        above = f", but {'below 1' if ratio else 'above 0'}"
        rule += above if word == "refuted" and test == "superiority" and low > 0 else ""
    return {
        "verdict": word,
        "reason": f"{_sentence(claim, names, estimate, digits)} (95 % interval {span}, {last.seeds} {what}); {rule}.",
        "estimate": estimate,
        "interval95": interval,
        "fixed95": shown(last.mean - half, last.mean + half),
        "p": float(decision.p),
        "per_seed": {seed: shown(x)[0] for seed, x in zip(seeds, d.mean(-1), strict=True)},
        "looks": [dict(zip(LOOK, (look.seeds, *shown(look.mean), *shown(a, b)), strict=True)) for look, a, b in steps],
        "sds": last.sds(),
        "next_look": None if disagree else next((n for n in looks if n > last.seeds), None),
        "chance": st.chance_of_word(test, last, margin, looks, looks[-1]),
        "seeds_to_decide": None if disagree else st.seeds_to_decide(test, last, margin, looks),
    }


def _sentence(claim: Claim, names: Names, estimate: float, digits: int) -> str:
    if claim.test == "variance_ratio":
        (key,) = claim.across
        return f"across {key} the variance of {names[0]}'s scores is {estimate:.2f} times that of {names[1]}"
    if claim.test == "cost_ratio":
        return f"{names[0]} takes {estimate:.3f} times the {claim.metric} of {names[1]}"
    side = "above" if estimate >= 0 else "below"
    return f"{names[0]} scored {abs(estimate):.{digits}f} {side} {names[1]}"


def _measure_scores(claim: Claim, pairs: Paired, n: int, names: Names, looks: tuple[int, ...]) -> dict:
    """Of paired scores, the first `n` cells against the rest; raises Missing where a ratio has no value."""
    treatment, baseline = pairs.values[:n], pairs.values[n:]
    d = differences(claim, treatment, baseline)
    if not np.isfinite(d).all():
        raise Missing("scores that vary at all in every seed")
    measured = measure(claim, d, pairs.seeds, names, looks)
    if len(baseline):
        sides = treatment[0], baseline[0]
        if claim.test == "variance_ratio":
            sides = tuple(-x.mean(-1).var(0, ddof=1)[:, None] for x in (treatment, baseline))
        measured["probability_of_improvement"] = st.probability_of_improvement(*sides)
        if not d.any():
            reason = f"identical: every score of {names[0]} is that of {names[1]}, so that nothing was compared"
            measured |= {"verdict": "vacuous", "reason": reason, "p": None}
    if claim.guard is not None and measured["estimate"] < 1:
        means, means_baseline = treatment.mean((1, 2)), baseline.mean((1, 2))
        pairs_of = (("mean", means.mean(), means_baseline.mean()), ("best", means.max(), means_baseline.max()))
        for what, a, b in pairs_of:
            if a < b - claim.guard:
                shown = f"the {what} score of {names[0]} is {a:.2f} against {b:.2f} of {names[1]}"
                why = f"{shown}: scores that vary less because they are worse show nothing"
                return measured | {"verdict": "vacuous", "reason": f"{why}. By its numbers alone: {measured['reason']}"}
    return measured


# ---- a verdict and its forms


class Verdict(SimpleNamespace):
    """What one claim came to, at one scale; its attributes are what claims.json holds. Numbers that do not exist are
    None.

    `interval95`: the repeated interval after the last look, the intersection over `looks`; `fixed95`: the interval of a
    study whose size had been fixed at the seeds it has, for comparison. `p`: the smallest alpha whose interval gives
    either word, `holm_p` adjusted over the study's claims. `tested`: the threshold. `per_seed` maps a seed (of
    times: a process) to its own estimate. `minutes`: that one core trained what it compares. `sds`: standard deviations
    of the paired difference. `next_look`: the seeds of the next look, where another can decide; `chance`: of a word by
    the last look; `seeds_to_decide`: with 80 % chance. `scored_by` names what gave the scores. `n_dropped`: questions
    left out for want of a score. `beside` and `sensitivity` hold comparisons that decide nothing.
    """

    def __init__(self, claim: Claim, scale: str) -> None:
        super().__init__(
            **{key: getattr(claim, key) for key in ("id", "sentence", "test", "metric")},
            **{"scale": scale, "verdict": "not evaluated", "reason": "", "decided": False},
            **{key: getattr(claim, key) for key in ("estimand", "gain", "tested")},
            **dict.fromkeys(("estimate", "interval95", "fixed95", "p", "holm_p", "probability_of_improvement")),
            **{"per_seed": {}, "looks": [], "sds": {}, "n_seeds": 0, "n_questions": 0, "n_dropped": 0},
            **dict.fromkeys(("minutes", "next_look", "chance", "seeds_to_decide", "premise", "sensitivity")),
            **{"note": claim.note, "scored_by": "", "beside": []},
        )


def to_json(verdicts: list[Verdict]) -> list[dict]:
    """Plain data without NaN or infinities (they become null), ready for record.write_json."""
    return finite([vars(verdict) for verdict in verdicts])


def table(verdicts: list[Verdict]) -> pd.DataFrame:
    """One row per claim, for people."""

    def span(bounds: tuple | None) -> str:
        return "" if bounds is None else " to ".join(f"{b:.3g}" if math.isfinite(b) else "no bound" for b in bounds)

    rows = []
    for v in verdicts:
        row = {"claim": v.id, "verdict": v.verdict, "estimate": v.estimate, "95 % interval": span(v.interval95)}
        row |= {"were the size fixed": span(v.fixed95), "p": v.p, "Holm p": v.holm_p, "seeds": v.n_seeds}
        row |= {"core-minutes": v.minutes, "would decide": v.seeds_to_decide}
        row |= {"per seed": ", ".join(f"{x:.3g}" for x in v.per_seed.values() if x is not None)}
        rows.append(row | {"scale": v.scale, "why": v.reason})
    return pd.DataFrame(rows)


def sentence(verdict: Verdict) -> str:
    """`C1 refuted at laptop scale (oracle score): ...`."""
    by = f" ({verdict.scored_by})" if verdict.scored_by else ""
    return f"{verdict.id} {verdict.verdict} at {verdict.scale} scale{by}: {verdict.reason}"


def coverage(study: Claims, members: pd.DataFrame) -> pd.DataFrame:
    """Which runs each claim's cells have: one row per claim and cell, with the seeds of every status."""
    statuses, out = (*FINISHED, "failed", "out_of_memory", "lost", "missing"), []
    sides = [(claim, side, cell) for claim in study.claims for side in SIDES for cell in study.levels(claim, side)]
    for claim, side, cell in sides:
        runs = select_any(members, claim, cell)
        seeds = {s: runs["seed"][runs["status"] == s].astype(int) if len(runs) else [] for s in statuses}
        row = {"claim": claim.id, "side": side, "cell": study.label(cell), "runs": len(runs)}
        row["finished"] = sum(len(seeds[status]) for status in FINISHED)
        out.append(row | {status: ", ".join(map(str, sorted(set(seeds[status])))) for status in statuses})
    return pd.DataFrame(out)


# ---- from claims to verdicts


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
    qualify: Callable[[list["Verdict"]], None] = lambda verdicts: None,
) -> list[Verdict]:
    """A verdict for every claim of `study`, in its order.

    rows: one row per method, cell key, seed and question with `score` and `status`; `accuracy` the same for the second
    metric. members: one row per run with `status` and validation metrics (read off `rows` where not given), in the
    order of the seeds. costs: pairs `seconds`, `seconds_baseline` measured interleaved in each `process`. scored_by:
    what gave the scores, for the record. fix: said of a claim whose scores are missing (how to get them). absent:
    {metric: why it has no values}, the reason of the claims about it. qualify: changes words for reasons of the study's
    own, before it is said what is decided.
    """
    members = read_members(rows, study.keys) if members is None else members
    data = Data(rows, accuracy, members, pd.DataFrame() if costs is None else costs, study.looks_of(scale))
    verdicts, asked = [Verdict(claim, scale) for claim in study.claims], []
    for claim, verdict in zip(study.claims, verdicts, strict=True):
        try:
            verdict.reason = _no_verdict(claim, scale, mode)
            if not verdict.reason:
                asked.append(verdict)
                verdict.reason = (absent or {}).get(claim.metric, "")
            if not verdict.reason:
                _need_searches(study, claim, scale, members)
                (_judge_cost if claim.test == "cost_ratio" else _judge_scores)(study, claim, data, verdict)
        except Missing as missing:
            verdict.reason = f"{missing}. {fix}" if fix and claim.test != "cost_ratio" else str(missing)
        verdict.scored_by = "" if claim.test == "cost_ratio" else scored_by
        verdict.minutes = None if claim.test == "cost_ratio" else spent(study, claim, members)
    for costs_too in (False, True):
        _adjust([v for v in asked if (v.test == "cost_ratio") == costs_too])
    qualify(verdicts)
    for verdict in verdicts:
        verdict.decided = verdict.verdict not in ("inconclusive", "not evaluated")
        if verdict.decided:
            verdict.next_look = verdict.seeds_to_decide = None
            early = verdict.verdict != "vacuous" and verdict.n_seeds < data.looks[-1]
            verdict.reason += " After an early stop an estimate lies, on average, too far out." if early else ""
        elif verdict.verdict == "inconclusive" and verdict.test != "cost_ratio":
            # what Holm's correction alone leaves open is not foreseen
            n = verdict.seeds_to_decide = verdict.seeds_to_decide if (verdict.p or 0) > st.LEVEL else None
            verdict.reason += f" Were the estimate true, {roughly(n)} seeds would decide it (80 % chance)." if n else ""
    return verdicts


def roughly(seeds: int) -> str:
    """A predicted number of seeds, as precise as such predictions are."""
    return f"about {seeds}" if seeds <= FAR else "hundreds of" if seeds < 1000 else "thousands of"


def _adjust(family: list[Verdict]) -> None:
    """Holm over a study's claims, for either word. Those that have no scores count (p = 1): a word that is given before
    they come is not taken back then, nor does it depend on what this machine can measure."""
    for verdict, p in zip(family, st.holm([1.0 if v.p is None else v.p for v in family]), strict=True):
        verdict.holm_p = None if verdict.p is None else float(p)
        if verdict.verdict in ("supported", "refuted") and p >= st.LEVEL:
            verdict.reason += f" But so only before the correction for {len(family)} claims (Holm p {p:.2g})."
            verdict.verdict = "inconclusive"


def _no_verdict(claim: Claim, scale: str, mode: str) -> str:
    """Why the claim is not evaluated, whatever the scores; the empty string where it is."""
    if mode == "trial":
        return "a trial shows that the study runs, not what it finds"
    if claim.not_evaluated:
        return claim.not_evaluated
    if claim.test == "absolute" and scale == "laptop":
        return "a figure of a named model says nothing about the models made at laptop scale"
    return "" if scale in claim.scales else f"this claim is about {' and '.join(claim.scales)} scale"


def _need_searches(study: Claims, claim: Claim, scale: str, members: pd.DataFrame) -> None:
    """Raise Missing where a search that the claim compares has not ended: nothing else stands in for what it finds."""
    cells = [cell for side in SIDES for cell in study.levels(claim, side) if cell.get("cell") == TUNED]
    if late := [study.label(cell) for cell in cells if select(members, cell).empty]:
        run = f"./run_all.sh full --scale {scale} --claims {study.study}/{claim.id}"
        own = "with the --set and --results-dir that this record was made with, if any"
        raise Missing(f"{', '.join(late)}: no search has ended; {run} searches, then trains what is found ({own})")


def spent(study: Claims, claim: Claim, members: pd.DataFrame) -> float | None:
    """Minutes that one core trained the runs of a claim, those included among which `best` was chosen (a search's trials
    are not)."""
    parts = [select_any(members, claim, cell) for side in SIDES for cell in study.levels(claim, side)]
    mine = members.loc[members.index.isin([index for part in parts for index in part.index])]
    return float(mine["seconds"].sum()) / 60 if "seconds" in mine and len(mine) else None


class Comparison(NamedTuple):
    """The cells of a claim with their names. `pairs`: their scores, of which the first `n` are the treatment's."""

    cells: list[Cell]
    n: int
    names: Names
    pairs: Paired


def _compare(study: Claims, claim: Claim, data: Data, looks: tuple[int, ...] = ()) -> Comparison:
    """The claim's two sides; raises Missing."""
    treatment, baseline = study.levels(claim, "treatment"), study.levels(claim, "baseline")
    cells = [choose(study, cell, data.members) for cell in [*treatment, *baseline]]
    if None in cells:
        raise Missing(f"a run with {study.choose_on}")
    n = len(treatment)
    name = study.label(cells[0] if n == 1 else claim.treatment)
    other = claim.baseline_name or study.label(cells[n] if len(baseline) == 1 else claim.baseline or {})
    if claim.across and claim.test != "variance_ratio":
        parts = zip(cells[:n], cells[n:], strict=True)
        pairs, n = average([pair_up(study, data, [*part], claim.metric, looks) for part in parts]), 1
    else:
        pairs = pair_up(study, data, cells, claim.metric, looks)
    return Comparison(cells, n, (name, other if baseline else "the reported figure"), pairs)


def _judge_scores(study: Claims, claim: Claim, data: Data, verdict: Verdict) -> None:
    comparison = _compare(study, claim, data, data.looks)
    _, n, names, pairs = comparison
    vars(verdict).update(_measure_scores(claim, pairs, n, names, data.looks))
    edges = at_edge(study, claim, comparison.cells, data.members) if verdict.p is not None else ()
    verdict.reason += "".join(edges)
    verdict.n_seeds, verdict.n_questions, verdict.n_dropped = len(pairs.seeds), pairs.values.shape[2], pairs.dropped
    parts = pairs.diverged[:n], pairs.diverged[n:]
    lost, lost_baseline = (sorted({seed for seeds in part for seed in seeds}) for part in parts)
    every = [len(seeds) == pairs.parts * len(pairs.seeds) for seeds in pairs.diverged]
    if lost:
        forbidden = claim.no_divergence and verdict.verdict == "supported"
        verdict.reason += f"{' But' if forbidden else ''} {names[0]} diverged (seed {', '.join(map(str, lost))})."
        if forbidden or (verdict.verdict == "supported" and all(every[:n])):
            verdict.verdict = "inconclusive"  # what stands for the scores of a diverged run is ours, not measured
            verdict.next_look = verdict.seeds_to_decide = None  # nor would more seeds change it
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
    """A comparison on the seeds that both sides have, as of a study of that fixed size; with one seed, an estimate
    without an interval."""
    sides = {side: cell for side in SIDES if (cell := getattr(other, side))}
    changes = sides | ({"baseline_name": "", "factor": 1.0} if other.baseline else {})
    asked, out = claim.model_copy(update=changes), {"name": other.name, "decides": False}
    try:
        comparison = _compare(study, asked, data)
        _, n, names, pairs = comparison
        out |= {"treatment": names[0], "baseline": names[1], "n_seeds": len(pairs.seeds)}
        if len(pairs.seeds) > 1 or claim.test in ("variance_ratio", "absolute"):  # of one seed they raise
            measured = _measure_scores(asked, pairs, n, names, (len(pairs.seeds),))
            with contextlib.suppress(Missing):  # the claim's own note says so
                measured |= at_chance(study, data, comparison, measured["reason"])
            return out | _hide_verdict(measured)
    except ValueError as error:  # scores are missing, or it contradicts what is fixed in advance
        return {**out, "reason": str(error)}
    difference = float((pairs.values[0] - pairs.values[1]).mean())
    return {**out, "estimate": difference, "reason": f"{difference:+.2f} in the one seed that both have; no interval"}


def _compare_completed(claim: Claim, comparison: Comparison) -> dict:
    """The same comparison on the seeds in which no run diverged."""
    lost = {seed for seeds in comparison.pairs.diverged for seed in seeds}
    rest = comparison.pairs.of([seed for seed in comparison.pairs.seeds if seed not in lost])
    n = len(rest.seeds)
    out = {"on": "completed runs only", "n_seeds": n}
    if n < 2:
        return {**out, "reason": f"{n} seed(s) without a diverged run: nothing to compare"}
    return out | _hide_verdict(_measure_scores(claim, rest, comparison.n, comparison.names, (n,)))


def _hide_verdict(measured: dict) -> dict:
    """Of a comparison that decides nothing: a word of verdict here would be taken for one."""
    kept = ("reason", "estimate", "interval95", "per_seed", "probability_of_improvement")
    return {k: v for k, v in measured.items() if k in kept} | {"by_the_same_rule": measured["verdict"]}


def _judge_cost(study: Claims, claim: Claim, data: Data, verdict: Verdict) -> None:
    """From pairs `metric`, `metric`_baseline: a fresh process is what repeats, with the median of its log ratios."""
    names = study.label(claim.treatment), claim.baseline_name or study.label(claim.baseline)
    columns = [claim.metric, f"{claim.metric}_baseline"]
    pairs = data.costs if {*columns, "process"} <= set(data.costs) else pd.DataFrame(columns=[*columns, "process"])
    pairs = select(pairs, claim.treatment) if "method" in pairs else pairs
    pairs = pairs.assign(**{name: _numbers(pairs[name]) for name in columns})
    pairs = pairs[(pairs[columns] > 0).all(axis=1)]
    ratios = np.log(pairs[columns[0]] / pairs[columns[1]])
    of_runs = [pairs[name] for name in ("run_id", "process") if name in pairs]  # several runs count alike
    ratios = ratios.groupby(of_runs).median().groupby(level="process").mean()
    looks = data.looks if data.looks[-1] >= MIN_PROCESSES else (MIN_PROCESSES,)
    least = next(n for n in looks if n >= MIN_PROCESSES)
    if len(ratios) < least:
        count = f"{len(ratios)} processes, at least {least} are needed"
        raise Missing(f"{claim.metric} of {names[0]} and {names[1]} measured interleaved ({count})")
    ratios = ratios.iloc[: max(n for n in looks if n <= len(ratios))]
    vars(verdict).update(measure(claim, -ratios.to_numpy()[:, None], [int(i) for i in ratios.index], names, looks))
    verdict.n_seeds = len(ratios)
    span = f"{math.exp(ratios.min()):.3f} to {math.exp(ratios.max()):.3f}"
    verdict.reason += f" Processes differ from {span}."


# ---- whether the runs that a claim compares have learned anything


def at_chance(study: Claims, data: Data, comparison: Comparison, reason: str) -> dict:
    """Verdict and reason where every cell is at chance, whatever its numbers (`reason`) say; nothing where one is not.
    Raises Missing.

    A difference between runs at chance says nothing of methods. What chance is stands in claims.yaml (`chance`), fixed
    before any score is seen. Runs are at chance unless they are shown to be above it or, where they began with
    something to lose, below that: a cell as a whole (t test over seeds, one-sided), or any run alone, over its
    questions (at that level over the number of runs: one lucky seed of many shows nothing, and one that has clearly
    learned is no run at chance, however much the seeds differ). To diverge is a result, and not chance.
    """
    cells, n, names, _ = comparison
    if not (chance := study.chance):
        return {}
    parts = [pair_up(study, data, [cell], chance.metric).of(comparison.pairs.seeds) for cell in cells]
    if min(len(part.seeds) for part in parts) < 2:
        raise Missing("one seed tells nothing about seeds")
    if any(part.diverged[0] for part in parts):
        return {}
    limits = [_chance_limits(study, cell, data.members) for cell in cells]
    runs = sum(len(part.seeds) for part in parts)
    for (values,), (upper, lower) in zip((part.values for part in parts), limits, strict=True):
        for each, level in ((values.mean(-1), CHANCE_LEVEL), (values, CHANCE_LEVEL / runs)):
            p = np.minimum(st.t_tail(each, upper, 1), st.t_tail(each, lower, -1)) if each.shape[-1] > 1 else 1.0
            if np.any(p <= level):
                return {}
    means, upper = np.array([part.values.mean() for part in parts]), max(limit for limit, _ in limits)
    n = len(cells) * n // len(comparison.pairs.values)
    shown = f"{means[:n].max():.3f} of {names[0]} and {means[n:].max():.3f} of {names[1]}"
    text = (
        f"no run is shown to have learned anything: {chance.metric.replace('_', ' ')} is {shown}, not shown to be above "
        f"{upper:.3f} ({chance.what}), and differences between runs at chance show nothing"
    )
    return {"verdict": "vacuous", "reason": f"{text}. By its numbers alone: {reason}"}


def _chance_limits(study: Claims, cell: Cell, members: pd.DataFrame) -> tuple[float, float]:
    """What the metric is above where a run of `cell` has learned, and what below (minus infinity: nothing)."""
    runs, chance = select(judged_rows(members), cell), study.chance

    def value(level: float | str) -> float:
        own = pd.to_numeric(runs[level], errors="coerce").mean() if isinstance(level, str) and level in runs else level
        if isinstance(own, str) or np.isnan(own):
            raise Missing(f"{study.label(cell)}: no {level}")
        return float(own)

    lower = chance.no_worse_than
    return max(map(value, chance.no_better_than)), -np.inf if lower is None else value(lower)
