"""What the analysis shows: records as tables, which runs are compared with each other, energy to a level of exact
match, and figures. Claims are decided in lib/claims.py."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns

from lib import config, stats, tables
from lib.claims import Cell, Claims, Paired, choose, pair_up, select
from lib.graff.study import DIVERGED
from lib.graff.trainer import energy_to_level
from lib.plots import BAD, SOFT, Drawing, canvas, housestyle, legend_below, looks, number

KEYS = ["run_id", "method", "learning_rate", "seed"]
MEMBER = ["run_id", "cell", "seed"]

# ---- the records as tables


def with_rate(rows: pd.DataFrame) -> pd.DataFrame:
    """With a column `learning_rate`, under whichever of its names the grid set it."""
    names = ["learning_rate", "adapter_lr_init", "lr_init", "training.optimizer.lr_init"]
    set_by = [rows[name] for name in names if name in rows and rows[name].notna().any()]
    return rows.assign(learning_rate=set_by[0] if set_by else None)


def scores(loaded: tables.Records, kind: str, metric: str) -> pd.DataFrame:
    """One row per member and problem: `example` (test problems' exact_match) or `area` (dev problems' area over
    time)."""
    columns = [*KEYS, "example", metric]
    if loaded.pairs.empty or metric not in loaded.pairs:
        return pd.DataFrame(columns=[*columns, "status"])
    rows = with_rate(loaded.pairs[loaded.pairs["kind"] == kind])
    return rows.reindex(columns=columns).assign(status="completed")


def areas(loaded: tables.Records, energies: pd.DataFrame | None = None) -> pd.DataFrame:
    """Areas per problem; `auc_reactor_22` is the same with REACTOR's raised by 22 %, which makes the relative claim a
    difference. `energies` (of `energy_scores`) are of the same problems."""
    rows = scores(loaded, "area", "auc")
    factor = rows["method"].map(lambda name: 1.22 if name == "reactor" else 1.0)
    rows = rows.assign(auc_reactor_22=rows["auc"].astype(float) * factor.astype(float))
    return rows if energies is None else rows.merge(energies, on=[*KEYS, "example"], how="left")


def all_members(loaded: tables.Records) -> pd.DataFrame:
    """Finished members and, without metrics, the missing ones: coverage names both."""
    return with_rate(pd.concat([loaded.members, pd.DataFrame(loaded.missing)], ignore_index=True))


def _history(loaded: tables.Records, column: str, columns: list[str]) -> pd.DataFrame:
    """The rows of the history that have `column`; none, with `columns`, where nothing has finished."""
    rows = loaded.history
    return (
        with_rate(rows.dropna(subset=[column])) if column in rows else pd.DataFrame(columns=[*KEYS, "cell", *columns])
    )


def steps(loaded: tables.Records) -> pd.DataFrame:
    """The history's rows that are steps (learning rate, multipliers, loss), with the base rate."""
    return _history(loaded, "eta", ["eta", "fraction", "log_m", "a", "gain", "lambda"])


def evaluations(loaded: tables.Records) -> pd.DataFrame:
    """The history's rows that are evaluations (exact match over consumed time)."""
    return _history(loaded, "exact_match_subset", ["used", "joules", "exact_match_subset", "dev_loss"])


def grid(loaded: tables.Records) -> pd.DataFrame:
    """Every run at every base rate: mean over seeds, a diverged one with the study's DIVERGED values; what they have
    none of (dev_loss) is null where one diverged."""
    names = ["exact_match", "dev_exact_match", "flexible_match", "auc", "dev_loss", "test_loss", "steps", "energy"]
    members = with_rate(loaded.members).reindex(columns=["run_id", "learning_rate", "budget", "status", *names])
    members[names] = members[names].apply(pd.to_numeric, errors="coerce")
    lost = members["status"] == "diverged"
    members.loc[lost, names] = [DIVERGED.get(name, np.nan) for name in names]  # pyright: ignore[reportCallIssue]
    members["budget"] = members["budget"].fillna(members.groupby("run_id")["budget"].transform("first"))
    groups = members.assign(diverged=lost).groupby(["budget", "run_id", "learning_rate"], sort=False, dropna=False)
    means = groups[names].agg(lambda x: x.mean())
    means.loc[groups["diverged"].any(), ["dev_loss", "test_loss"]] = np.nan
    return means.assign(seeds=groups.size(), diverged=groups["diverged"].sum()).reset_index()


def anytime(evaluations: pd.DataFrame, budgets: dict[str, float], share: float = 0.5) -> pd.DataFrame:
    """What each run had reached at `share` of its OWN budget ({run_id: seconds}): the last evaluation that had ended by
    then, mean over seeds. Not a run of that shorter budget, whose cosine and budget feature end there: hence the
    label."""
    rows, names = [], ["exact_match_subset", "dev_loss"]
    for (run_id, cell), mine in evaluations.groupby(["run_id", "cell"], sort=False):
        last = mine[mine["used"] <= share * budgets[run_id]].sort_values("used").groupby("seed").tail(1)
        label = f"anytime: {share * budgets[run_id] / 60:g} of {budgets[run_id] / 60:g} minutes"
        rows.append([run_id, cell, label, *(float(last[name].mean()) for name in names), len(last)])
    return pd.DataFrame(rows, columns=["run_id", "cell", "label", *names, "seeds"])


def gsm1k(loaded: tables.Records, draws: int = 2000) -> pd.DataFrame:
    """EM(test) - EM(GSM1k) per run and cell, paired by model (seed): bootstrap over models and over each set's
    problems."""
    rows, pairs = [], loaded.pairs if "kind" in loaded.pairs else pd.DataFrame(columns=["kind", "run_id", "cell"])
    for (run_id, cell), extra in pairs[pairs["kind"] == "gsm1k"].groupby(["run_id", "cell"], sort=False):
        mine = pairs[(pairs["kind"] == "example") & (pairs["run_id"] == run_id) & (pairs["cell"] == cell)]
        sets = [f.pivot(index="seed", columns="example", values="exact_match").astype(float) for f in (mine, extra)]
        seeds = sorted(set(sets[0].index) & set(sets[1].index))
        test, other = (s.loc[seeds].to_numpy() for s in sets)
        rng, gaps = np.random.default_rng(0), []
        for _ in range(draws):
            models = rng.integers(len(seeds), size=len(seeds))
            a, b = (x[np.ix_(models, rng.integers(x.shape[1], size=x.shape[1]))].mean() for x in (test, other))
            gaps.append(a - b)
        low, high = np.quantile(gaps, [0.025, 0.975])
        rows.append([run_id, cell, test.mean() - other.mean(), low, high, len(seeds), other.shape[1]])
    return pd.DataFrame(rows, columns=["run_id", "cell", "gap", "low", "high", "models", "problems"])


# ---- which runs are compared


def headline(planned: Iterable, published: Claims) -> list[str]:
    """Methods of the figures over all methods: those that some run proposes or compares with, and the controls that a
    claim compares with; ablations and reconstructions beside the claims have tables of their own."""
    runs, claimed = list(planned), set()
    for claim in published.claims:
        sides = [claim.treatment, claim.baseline, *(cell for b in claim.beside for cell in (b.treatment, b.baseline))]
        claimed |= {cell["method"] for cell in sides if cell and not claim.not_evaluated}
    ablations = {run.method for run in runs if run.role == "ablation"}
    chosen = [run.method for run in runs if run.role in ("proposed", "comparative") or run.method in claimed]
    return [method for method in dict.fromkeys(chosen) if method not in ablations]


def rivals(planned: Iterable) -> list[tuple]:
    """(proposed run, other run of its model and budget): every pair that may be compared."""
    runs = list(planned)
    place = {run.run_id: (run.model.name, run.training.budget_minutes) for run in runs}
    proposed = [run for run in runs if run.role == "proposed"]
    return [(a, b) for a in proposed for b in runs if a is not b and place[a.run_id] == place[b.run_id]]


def cell_of(run, rate: float | str | None = "best") -> Cell:
    """The claims' name of a run, at `rate` where it has a grid of base rates (at its own, where it has one)."""
    cell: Cell = {"method": run.method}
    if run.run_id != run.method:
        cell["run_id"] = run.run_id
    if rate is not None and any("training.optimizer.lr_init" in member.cell for member in config.members(run)):
        cell["learning_rate"] = rate
    return cell


def with_methods(planned: Iterable, main: Iterable[str]) -> list[tuple[Cell, Cell]]:
    """Each proposed run against every other method of the figures, each at its best base rate."""
    return [(cell_of(run), cell_of(other)) for run, other in rivals(planned) if other.method in main]


def with_ablations(planned: Iterable, main: Iterable[str], rate: float | None) -> list[tuple[Cell, Cell]]:
    """Every ablation and reconstruction beside the claims, at the tuned rate, against the proposed run there."""
    return [(cell_of(other, rate), cell_of(run, rate)) for run, other in rivals(planned) if other.method not in main]


def base_rates(planned: Iterable) -> list[float]:
    """The base rates of the runs that have several, those that most of them share, in order; of the laptop scale 0.1x,
    1x and 10x of the tuned one. Ablations have the tuned one alone, and may be more."""
    key = "training.optimizer.lr_init"
    rates = [sorted({m.cell[key] for m in config.members(run) if m.cell.get(key) is not None}) for run in planned]
    return max(rates, key=lambda own: (len(own) > 1, rates.count(own), len(own)), default=[])


def tuned_rate(planned: Iterable) -> float | None:
    """The middle one of the shared base rates; None where there is no grid of them."""
    rates = base_rates(planned)
    return rates[len(rates) // 2] if rates else None


def groups(planned: Iterable) -> list[tuple[str, str, list[str]]]:
    """(name of the base model and budget, suffix of a file's name, its run_ids): runs of different budgets or models
    are never in one figure."""
    runs: dict[tuple[str, float], list[str]] = {}
    for run in planned:
        runs.setdefault((run.model.name, run.training.budget_minutes), []).append(run.run_id)
    several, out = len({model for model, _ in runs}) > 1, []
    for (path, minutes), ids in sorted(runs.items(), key=lambda item: item[0]):
        model = path.rpartition("/")[2]
        name = f"{model}, {minutes:g} minutes" if several else f"{minutes:g} minutes"
        suffix = ("_" + model if several else "") + (f"_{minutes:g}" if len(runs) > 1 else "")
        out.append((name, suffix, ids))
    return out


COLUMNS = ["method", "less", "difference", "low", "high", "t low", "t high", "seeds", "problems", "per seed", "why not"]


def differences(
    study: Claims, rows: pd.DataFrame, members: pd.DataFrame, pairs: Iterable[tuple[Cell, Cell]], metric: str
) -> pd.DataFrame:
    """A row per (cell, other cell): mean difference of `metric` over problems and seeds with the crossed bootstrap's
    interval and the t interval over seeds. It decides nothing. Where a run diverged, what it has none of (loss) has no
    figure."""
    out = []
    for pair in pairs:
        chosen = [choose(study, cell, members) for cell in pair]
        names = [study.label(cell if at is None else at) for cell, at in zip(pair, chosen, strict=True)]
        out.append(row := {"method": names[0], "less": names[1]})
        if None in chosen:
            row["why not"] = f"missing: a run with {study.choose_on}"
            continue
        paired = pair_up(study, rows, members, chosen, metric)
        if not isinstance(paired, Paired):
            row["why not"] = "missing: " + "; ".join(paired)
            continue
        row["seeds"] = len(paired.seeds)
        if len(paired.seeds) < 2:
            row["why not"] = "one seed shows nothing about seeds"
        elif any(paired.diverged) and metric not in study.diverged:
            row["why not"] = "diverged"
        else:
            difference = paired.values[0] - paired.values[1]
            mean = stats.crossed_mean(difference)
            over_seeds = difference.mean(-1)
            row["difference"], row["problems"] = float(mean.value), difference.shape[1]
            row["low"], row["high"] = map(float, stats.interval(mean))
            row["t low"], row["t high"] = map(float, stats.interval(stats.seed_mean(over_seeds)))
            row["per seed"] = ", ".join(f"{value:+.3f}" for value in over_seeds)
    return pd.DataFrame(out, columns=COLUMNS)


def by_loss(study: Claims, members: pd.DataFrame) -> tuple[Claims, pd.DataFrame]:
    """(claims, members) that choose base rates by the lowest dev loss, for comparisons of loss; a diverged run is the
    worst."""
    loss = pd.to_numeric(members["dev_loss"], errors="coerce") if "dev_loss" in members else float("nan")
    study = study.model_copy(update={"choose_on": "dev_fit", "diverged": {"accuracy": -1e9}})
    return study, members.assign(dev_fit=-loss)


# ---- energy to a level of exact match, as scores that a claim is judged by

FACTOR = 0.83  # of REACTOR's energy, as was claimed
METRIC = "energy_reactor_83"


class Level(NamedTuple):
    """The exact match that energy is counted to, or None, and why."""

    value: float | None
    why: str


def choose_level(evaluations: pd.DataFrame, stated: float | None) -> Level:
    """The stated level; where none is, half-way from the base model's exact match to what the tuned fixed rate ends at
    (mean over seeds; `evaluations` are of the runs at their chosen rates), which neither side of the claim has a say
    in. A level that the base model has already is refused: no energy is spent on reaching it."""
    curves = evaluations.sort_values("used").groupby([*MEMBER, "method"])["exact_match_subset"]
    base = float(curves.first().max()) if len(evaluations) else math.nan
    if stated is not None:
        if base >= stated:
            return Level(None, f"the base model's exact match is {base:.3f} already, the level {stated:g}")
        return Level(stated, f"{stated:g}, as evaluation.energy_level states")
    if not len(evaluations) or "fixed" not in set(evaluations["method"]):
        return Level(None, "no level is stated (evaluation.energy_level), and no fixed rate's record to choose one by")
    end = float(curves.last().xs("fixed", level="method").mean())
    if end - base < 1e-9:  # means are not exact
        why = f"the fixed rate ends at {end:.3f}, not above the base model's {base:.3f}: no level lies between"
        return Level(None, why)
    half = (base + end) / 2
    return Level(half, f"{half:.3f}, half-way from the base model's {base:.3f} to the tuned fixed rate's {end:.3f}")


def energy_scores(evaluations: pd.DataFrame, level: float, reference: str = "reactor") -> pd.DataFrame:
    """One row per member and dev problem: METRIC is -log of the energy to the level, of `reference` of FACTOR times it,
    in units of `reference`'s mean whole run: larger is better, and 0 is the claimed ratio in a difference. And
    `reached`: a run that never got there counts with its whole energy, the least that it can have taken.

    A run has one such figure, log E. The crossed bootstrap wants one value per seed and problem whose mean it is: what
    leaving one problem of the dev subset out does to log E (the jackknife's influence values), so that the interval
    holds the chance of the problems as well as the seeds'."""
    out, whole = [], evaluations.groupby(MEMBER)["joules"].transform("max").astype(float)
    theirs = evaluations["method"] == reference
    unit = float(whole[theirs].mean() if theirs.any() else whole.mean())
    for _, mine in evaluations.groupby(MEMBER, sort=False):
        mine = mine.sort_values("used")
        joules, hits = mine["joules"].astype(float).tolist(), np.array(mine["hits"].tolist(), dtype=float)
        problems = hits.shape[1]
        without = (hits.sum(1, keepdims=True) - hits) / (problems - 1)
        reached = energy_to_level(joules, hits.mean(1).tolist(), level)
        log_e = math.log((joules[-1] if reached is None else reached) / unit)
        left = np.log([(energy_to_level(joules, column.tolist(), level) or joules[-1]) / unit for column in without.T])
        influence = (problems - 1) * (left.mean() - left)
        factor = math.log(FACTOR) if mine["method"].iloc[0] == reference else 0.0
        head = {**mine.iloc[0][KEYS].to_dict(), "reached": reached is not None}
        out += [{**head, "example": f"dev-{i}", METRIC: -(log_e + x) - factor} for i, x in enumerate(influence)]
    return pd.DataFrame(out, columns=[*KEYS, "example", METRIC, "reached"])


def unread_energy(members: pd.DataFrame) -> str:
    """Why no energy can be compared, '' where every member's was read from one source."""
    done = members[members["status"] == "completed"]
    if done.empty:
        return "no run has finished"
    sources = done["energy_source"].map(lambda source: source if isinstance(source, str) else None)
    if sources.isna().any():
        reasons = sorted({str(r) for r in done.loc[sources.isna(), "energy_reason"].dropna()}) or ["no reason recorded"]
        return f"energy could not be read ({'; '.join(reasons)})"
    if not (pd.to_numeric(done["energy"], errors="coerce") > 0).all():
        return "the energy that was read is 0 in some run: the counter did not move"
    if sources.nunique() > 1:
        return f"energy comes from different sources ({', '.join(sorted(set(sources)))})"
    return ""


def energies(
    members: pd.DataFrame, evaluations: pd.DataFrame, stated: float | None
) -> tuple[pd.DataFrame | None, dict[str, str], Level]:
    """(scores for the claims about energy or None, {METRIC: why it has no values}, the level). `evaluations` are of the
    runs that the claims compare; the level is chosen on those at their chosen rates, `at_chosen` a column of it."""
    why, level = unread_energy(members), choose_level(evaluations[evaluations["at_chosen"]], stated)
    if why or level.value is None:
        return None, {METRIC: why or f"no level to count energy to: {level.why}"}, level
    return energy_scores(evaluations, level.value), {}, level


def qualify(verdicts: list, study: Claims, members: pd.DataFrame, energies: pd.DataFrame | None) -> None:
    """A run that never reached the level counts with the least energy it can have taken: a verdict that rests on that
    becomes inconclusive, and vacuous where neither side got there in any seed. Changes the verdicts on METRIC."""
    claims = {claim.id: claim for claim in study.claims if claim.metric == METRIC}
    for verdict in verdicts:
        if verdict.id not in claims or verdict.estimate is None or energies is None:
            continue
        cells = [choose(study, side, members) for side in (claims[verdict.id].treatment, claims[verdict.id].baseline)]
        sides = [select(energies, cell) for cell in cells]
        lost = [sorted(map(int, side.loc[~side["reached"].astype(bool), "seed"].unique())) for side in sides]
        sentences = [
            f"{study.label(cell)} did not reach the level with seed {', '.join(map(str, seeds))}"
            for cell, seeds in zip(cells, lost, strict=True)
            if seeds
        ]
        if not sentences:
            continue
        if not any(side["reached"].any() for side in sides):
            verdict.verdict = "vacuous"
        elif (verdict.verdict == "supported" and lost[0]) or (verdict.verdict == "refuted" and lost[1]):
            verdict.verdict = "inconclusive"
        verdict.reason += f" {'; '.join(sentences)}: counted with all its energy, the least it can be."


# ---- figures

PLACES = np.linspace(0, 1, 51)


def mean_curves(rows: pd.DataFrame, x: pd.Series, column: str, places: np.ndarray = PLACES) -> pd.DataFrame:
    """A column a run: the mean over its members of `column` at `places` of x, by linear interpolation."""
    rows, out = rows.assign(x=x.astype(float)), {}
    for name in dict.fromkeys(rows["run_id"]):
        mine = rows[rows["run_id"] == name].dropna(subset=[column]).sort_values("x").groupby(["cell", "seed"])
        members = [np.interp(places, g["x"], g[column].astype(float)) for _, g in mine]
        out[name] = np.mean(members, axis=0) if members else places * np.nan
    return pd.DataFrame(out, index=pd.Index(places, name="fraction"))


@housestyle
def lines(table: pd.DataFrame, title: str, ylabel: str, scale: str = "linear") -> Drawing:
    """One line per run over the budget's fraction."""
    drawn, axes = canvas(title=title, height=4.6)
    place = axes[0, 0]
    for name, look in looks(table).items():
        place.plot(table.index, table[name], color=look.color, label=name)
    place.set(yscale=scale, xlabel="share of the budget used", ylabel=ylabel)
    legend_below(drawn)
    words = "; ".join(f"{name} from {number(v.iloc[0])} to {number(v.iloc[-1])}" for name, v in table.items())
    return Drawing(drawn, title, f"{title}: {words}.", table.reset_index())


def rates(steps: pd.DataFrame, *, title: str = "Learning rate over the budget") -> Drawing:
    """One line per run: the mean over seeds of the applied rate, log scale."""
    table = mean_curves(steps, steps["fraction"], "eta", np.linspace(0.02, 0.98, 49))
    return lines(table, title, "applied learning rate", "log")


def loss(rows: pd.DataFrame, budget: float, *, title: str = "Dev loss over time") -> Drawing:
    """One line per run: the mean over seeds of the loss on the dev subset, from the base model's on."""
    return lines(mean_curves(rows, rows["used"] / budget, "dev_loss"), title, "loss on the dev subset, nats per token")


@housestyle
def exact_match(rows: pd.DataFrame, budget: float, *, title: str = "Exact match over time") -> Drawing:
    """A panel a run, the area under its line shaded, which is AUC/B; the fixed rate's line in gray behind the others.
    The first point is the base model's."""
    table = mean_curves(rows, rows["used"] / budget, "exact_match_subset")
    area = {name: np.trapezoid(curve, PLACES) for name, curve in table.items()}
    columns, gray = min(4, len(area)), "fixed" if "fixed" in area else next(iter(area))
    down = -(-len(area) // columns)
    drawn, axes = canvas(down, columns, title=title, height=max(4, 0.6 + 2.2 * down), sharex=True, sharey=True)
    for place, (name, look) in zip(axes.flat, looks(area).items(), strict=False):
        if name != gray:
            place.plot(PLACES, table[gray], color=SOFT, linewidth=1)
        place.plot(PLACES, table[name], color=look.color)
        place.fill_between(PLACES, table[name], color=look.color, alpha=0.25, linewidth=0)
        place.set_title(f"{name}: {number(area[name])}", fontsize=10)
    axes.flat[0].set_ylim(bottom=0)  # shared by all
    for place in axes.flat[len(area) :]:
        place.set_axis_off()
    drawn.supxlabel("share of the budget used" + (f" (gray: {gray})" if len(area) > 1 else ""), fontsize=10)
    drawn.supylabel("exact match, dev subset", fontsize=10)
    words = "; ".join(f"{n} ends at {number(table[n].iloc[-1])} with area {number(a)}" for n, a in area.items())
    return Drawing(drawn, title, f"{title}: {words}.", table.reset_index())


@housestyle
def energy(rows: pd.DataFrame, level: float, *, title: str = "Exact match over energy") -> Drawing:
    """One line per run over the joules used (mean over seeds at the same share of them), and the level counted to."""
    rows = rows.dropna(subset=["joules"]).astype({"joules": float})
    whole = rows.groupby(MEMBER)["joules"].transform("max").clip(lower=1e-9)
    table = mean_curves(rows, rows["joules"] / whole, "exact_match_subset")
    joules = rows.groupby(MEMBER)["joules"].max().groupby("run_id").mean()
    drawn, axes = canvas(title=title, height=4.6)
    place = axes[0, 0]
    for name, look in looks(table).items():
        place.plot(PLACES * joules[name] / 1e3, table[name], color=look.color, label=name)
    place.axhline(level, color=BAD, linestyle="--", linewidth=1)
    place.set(xlabel="energy used, kJ", ylabel="exact match, dev subset")
    legend_below(drawn)
    words = "; ".join(f"{name} ends at {number(curve.iloc[-1])}" for name, curve in table.items())
    return Drawing(drawn, title, f"{title}: {words}.", table.rename_axis("share of the energy").reset_index())


@housestyle
def multipliers(steps: pd.DataFrame, *, title: str = "Block multipliers over the budget") -> Drawing:
    """Heat map of mean log2 m_i: blocks (depth) down, time across."""
    cells = np.minimum((steps["fraction"] * 20).astype(int), 19) / 20
    log_m = pd.DataFrame(steps["log_m"].tolist(), index=steps.index) / math.log(2)
    table = log_m.groupby(cells).mean().T
    table.index = [f"layer {i // 2} {'mlp' if i % 2 else 'attention'}" for i in table.index]
    drawn, axes = canvas(title=title, height=3.6)
    top = max(0.01, float(table.abs().max().max()))
    bar = {"label": "log2 of the multiplier"}
    sns.heatmap(table, ax=axes[0, 0], cmap="PuOr", vmin=-top, vmax=top, cbar_kws=bar, xticklabels=4)
    axes[0, 0].set_xlabel("share of the budget used")
    axes[0, 0].grid(False)
    last = "; ".join(f"{name} {number(value)}" for name, value in table.iloc[:, -1].items())
    return Drawing(drawn, title, f"{title}; log2 at the end: {last}.", table.reset_index())
