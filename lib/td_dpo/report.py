"""The TD-DPO study's records as the tables and figures of its analysis, and the shape of its losses."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import MaxNLocator

from lib import claims, plots, record, stats, tables
from lib.plots import Drawing, Look, canvas, housestyle, number, sort_distinct
from lib.td_dpo.study import METRICS, SECOND_METRIC

LOOKS = {
    "dpo": Look("DPO", plots.PALETTE[0], "o"),
    "discopop": Look("DiscoPOP", plots.PALETTE[1], "s"),
    "td_dpo": Look("TD-DPO", plots.PALETTE[2], "D"),
    "td_dpo_anchored": Look("TD-DPO anchored", plots.PALETTE[3], "^"),
    "discopop_card": Look("DiscoPOP (card)", plots.PALETTE[4], "v"),
}
ABLATIONS = ("td_dpo_anchored", "discopop_card")  # trained where one claim plots.looks, not over beta
TITLES = {
    "oracle_score": "Oracle score (1-10)",
    "mt_bench_score": "MT-Bench score",
    "mt_bench_score_corrected": "MT-Bench score without wrong references",
    "implicit_accuracy": "Implicit accuracy on test pairs",
    "raw_accuracy": "Raw accuracy on test pairs",
}
SECONDARY = ("mt_bench_score_corrected", "implicit_accuracy", "raw_accuracy")  # drawn after the judge's own score
ACCURACIES = ("implicit_accuracy", "raw_accuracy", "validation_implicit_accuracy")
BASELINES = ("length_baseline", "bag_of_words_baseline")  # accuracies that need no model


# ---- the scores that the claims are judged by


class Judged(NamedTuple):
    """What judged the answers: the runs' own `evaluation.judge` and nothing else.

    `metric` of a member; `label` for people; `fix` what is missing of the scores, with the command that gets it;
    `known` False where the scores of several judges would be mixed, so that none can be used.
    """

    metric: str | None
    label: str
    fix: str = ""
    known: bool = True


def judged(planned: list, loaded: tables.Records) -> Judged:
    """What judged the answers of these runs (config.Run objects)."""
    kinds = sorted({run.evaluation.judge for run in planned})
    if len(kinds) > 1:
        fix = f"The runs name different judges ({', '.join(kinds)}): one evaluation.judge for all"
        return Judged(None, "", fix, known=False)
    if kinds == ["oracle"]:
        return Judged("oracle_score", "oracle score")
    if kinds != ["mt_bench"]:
        return Judged(None, "", "No answers are judged: evaluation.judge is none")
    command, done = f"./run_all.sh judge --study {planned[0].study}", loaded.members
    folders = [] if done.empty else [Path(folder) for folder in done.loc[done["status"] == "completed", "folder"]]
    graders = [record.read_json(folder / "judged.json", {}).get("model") for folder in folders]
    models = sorted({model for model in graders if model})
    if len(models) > 1:
        counted = ", ".join(f"{model}: {graders.count(model)} members" for model in models)
        fix = f"Graded by several judges ({counted}): {command} --model {models[0]} has all graded by one"
        return Judged("mt_bench_score", "MT-Bench", fix, known=False)
    unsaved = sum(not (folder / "answers.jsonl").exists() for folder in folders)
    ungraded = graders.count(None) - unsaved
    fixes = []
    if ungraded:
        fixes.append(f"{ungraded} of {len(folders)} members have answers that are not graded: {command}")
    if unsaved:
        again = "train them again with evaluation.mt_bench"
        fixes.append(f"{unsaved} of {len(folders)} members saved no answers: {again}")
    label = f"MT-Bench score, judge {models[0]}" if models else "MT-Bench"
    return Judged("mt_bench_score", label, "; ".join(fixes))


def question_scores(loaded: tables.Records, by: Judged, leave_out: Iterable[int] = ()) -> pd.DataFrame:
    """One row per member and question: the mean score over its turns, as `claims.evaluate` wants it. `leave_out`:
    questions."""
    if loaded.answers.empty or not by.metric or not by.known:
        return pd.DataFrame(columns=["method", "beta", "tau", "seed", "status", "question", "score"])
    keys = ["method", "beta", "tau", "seed", "question"]
    kept = loaded.answers[~loaded.answers["question"].isin(list(leave_out))]
    scores = kept.groupby(keys, dropna=False, as_index=False)["score"].agg(lambda turns: turns.mean(skipna=False))
    return scores.assign(status="completed")


def add_corrected(verdicts: list[claims.Verdict], corrected: list[claims.Verdict]) -> None:
    """Note with each verdict what the same rules say without the questions whose reference is wrong; it decides
    nothing."""
    for verdict, other in zip(verdicts, corrected, strict=True):
        fewer = verdict.n_questions - other.n_questions
        if fewer > 0 and other.estimate is not None:
            note = {
                "name": f"without the {fewer} questions whose reference answer is wrong",
                "decides": False,
                "by_the_same_rule": other.verdict,
            }
            same = ("reason", "estimate", "interval95", "n_questions")
            verdict.beside.append(note | {name: getattr(other, name) for name in same})


def noise(study: claims.Claims, rows: pd.DataFrame, loaded: tables.Records) -> pd.DataFrame:
    """Standard deviations per arm behind each claim about a difference of scores, below those that the power table
    assumes."""
    seed_sds = " or ".join(f"{sd:g}" for sd in study.noise.seed_sds)
    others = {"question": study.noise.interaction_sd, "answer": study.noise.answer_sd}
    table: list[dict] = [{"claim": "assumed", "seed": seed_sds, **others}]
    for claim in study.claims:
        if claim.across or claim.test == "cost_ratio":
            continue
        levels = [level for side in ("treatment", "baseline") for level in study.levels(claim, side)]
        cells = [claims.choose(study, level, loaded.members) for level in levels]
        paired = claims.pair_up(study, rows, loaded.members, cells, claim.metric)
        if isinstance(paired, claims.Paired) and len(paired.seeds) > 1:
            seen = stats.noise_sds(paired.values[0] - paired.values[1])
            table.append({"claim": claim.id, **{name: round(sd / np.sqrt(2), 3) for name, sd in seen.items()}})
    return pd.DataFrame(table)


# ---- tables


def all_members(loaded: tables.Records) -> pd.DataFrame:
    """Finished members and, without metrics, the missing ones: coverage names both."""
    missing = pd.DataFrame([{**member, **member.get("cell", {})} for member in loaded.missing])
    return pd.concat([loaded.members, missing], ignore_index=True)


def present(loaded: tables.Records, metrics: Sequence[str]) -> list[str]:
    """Those of `metrics` that any member has a value of."""
    return [name for name in metrics if name in loaded.members and loaded.members[name].notna().any()]


def primary(loaded: tables.Records, by: Judged) -> str:
    """The judge's metric, or the study's second one where no answer has been judged."""
    return (present(loaded, [by.metric] if by.metric and by.known else []) or [SECOND_METRIC])[0]


def base_score(results: Path) -> float | None:
    """The oracle score of the base model, which every member started from."""
    paths = sorted(Path(results).glob("*/metrics.json"))
    scores = [record.read_json(path, {}).get("base_oracle_score") for path in paths]
    return next((score for score in scores if score is not None), None)


def accuracies(loaded: tables.Records) -> pd.DataFrame:
    """Accuracies of every cell, mean over seeds, and those of the baselines that need no model."""
    if loaded.members.empty:
        return loaded.members
    cells = loaded.members.groupby(["run_id", "cell"], sort=False)
    means = cells[present(loaded, [*ACCURACIES, *BASELINES])].mean()
    return means.join(cells.size().rename("seeds")).reset_index()


def tuned(results: Path) -> pd.DataFrame:
    """Each search's best configuration with its mean over seeds; empty where no search has run."""
    rows = []
    for path in sorted(Path(results).glob("*/sweep/metrics.json")):
        search = record.read_json(path, {})
        if final := search.get("final"):
            scores = {name: final[name] for name in METRICS if final.get(name) is not None}
            counts = {"trials": search["trials"], "seeds": final["seeds"]}
            rows.append({"run": path.parent.parent.name, **(search["best"] or {}), **counts, **scores})
    return pd.DataFrame(rows)


def one_member(history: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """A member's columns as rows (step, seed, term, value), for a figure with one line per term."""
    kept = history.dropna(subset=list(columns), how="all")[["step", "seed", *columns]].rename(columns=columns)
    return kept.melt(["step", "seed"], var_name="term", value_name="value").dropna()


# ---- figures


def claim_arms(table: pd.DataFrame, fixed_tau: Mapping[float, float]) -> pd.DataFrame:
    """The rows of the methods that are compared over beta, added ones included: one cell per method and beta, with the
    tau fixed in advance for each beta (params/td_dpo/claims.yaml) where the method has one. Runs of one method (of
    several models, say) stand under their own names."""
    if table.empty:
        return table
    if "run_id" in table:
        several = table.groupby("method")["run_id"].transform("nunique") > 1
        table = table.assign(method=table["method"].where(~several, table["run_id"]))
    taus = {float(beta): tau for beta, tau in fixed_tau.items()}
    tau, fixed = table["tau"].astype(float), table["beta"].map(taus.get).astype(float)
    return table[~table["method"].isin(ABLATIONS) & (tau.isna() | np.isclose(tau, fixed))]


@housestyle
def heat_map(members: pd.DataFrame, metric: str, *, title: str, center: float | None = None) -> Drawing:
    """`metric` over beta and tau: a row per method and tau. A cell shows the mean over seeds, its standard deviation
    and what diverged. `center` (say the base model's score) is white: blue is better, red is worse."""
    table = plots.outcomes(members, metric)
    look = plots.looks(table["method"], LOOKS)
    taus = {method: sort_distinct(table.loc[table["method"] == method, "tau"])[::-1] or [np.nan] for method in look}
    rows = pd.MultiIndex.from_tuples([(m, tau) for m in look for tau in taus[m]] or [("none", np.nan)])
    names = [(look[m].label if m in look else m) + ("" if np.isnan(tau) else f" τ = {number(tau)}") for m, tau in rows]
    betas, cells = sort_distinct(table["beta"]) or [0.0], []
    for (method, tau), beta in itertools.product(rows, betas):
        same_tau = table["tau"].isna() if np.isnan(tau) else table["tau"] == tau
        cell = table[(table["method"] == method) & (table["beta"] == beta) & same_tau]
        counts = {"seeds": len(cell), "diverged": int(cell["diverged"].sum())}
        means = {"mean": cell["value"].mean(), "sd": cell["value"].std(ddof=1)}
        cells.append({"method": method, "beta": beta, "tau": tau, **means, **counts})
    data = pd.DataFrame(cells)
    texts = [_cell_text(cell) for cell in cells]
    means = data["mean"].to_numpy(float).reshape(len(rows), len(betas))
    drawn, axes = canvas(height=1.6 + 0.62 * len(rows), title=title)
    place = axes[0, 0]
    sns.heatmap(
        pd.DataFrame(means, names, [f"β = {number(beta)}" for beta in betas]),
        annot=np.reshape(texts, means.shape),
        fmt="",
        cmap="cividis" if center is None else "RdBu",
        center=center,
        linewidths=2,
        annot_kws={"fontsize": 9.5},
        cbar_kws={"label": title if center is None else f"{title} (white: {number(center)})"},
        ax=place,
    )
    place.grid(False)
    place.tick_params(length=0, rotation=0)
    for (row, column), mean in np.ndenumerate(means):
        if np.isnan(mean):  # seaborn leaves these cells empty
            text = texts[row * len(betas) + column]
            color = plots.BAD if "diverged" in text else plots.SOFT
            place.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9.5, color=color)
    words = [
        f"{name} β = {number(beta)}: {text}."
        for (name, beta), text in zip(itertools.product(names, betas), texts, strict=True)
    ]
    alt = f"{title}: mean over seeds. {' '.join(words)}".replace("\n", " ")
    return Drawing(drawn, title, alt, data)


def _cell_text(cell: Mapping) -> str:
    if not cell["seeds"]:
        return "not run"
    if np.isnan(cell["mean"]):
        return f"all {cell['diverged']} diverged" if cell["diverged"] else "no value"
    spread = "1 seed" if np.isnan(cell["sd"]) else f"± {number(cell['sd'], 2)}"
    lost = f", {cell['diverged']}/{cell['seeds']} diverged" if cell["diverged"] else ""
    return f"{number(cell['mean'])}\n{spread}{lost}"


@housestyle
def likelihood_displacement(
    history: pd.DataFrame, *, title: str = "Likelihood displacement", smooth: int = 5
) -> Drawing:
    """log(pi_theta/pi_0) of chosen and of rejected answers over the steps, mean over seeds: a column per beta, a row
    per method, one scale per column. Both falling is likelihood displacement. Give it one cell per method and beta."""
    answers = {
        "chosen_log_ratio": ("chosen", plots.PALETTE[0], "-"),
        "rejected_log_ratio": ("rejected", plots.PALETTE[2], "--"),
    }
    rows = history.reindex(columns=[*plots.IDENTITY, "step", *answers]).dropna(subset=list(answers))
    if rows.duplicated(["method", "beta", "step", "seed"]).any():
        raise ValueError(f"{title}: several members per method, beta and seed; choose one cell first")
    betas, look = sort_distinct(rows["beta"]), plots.looks(rows["method"], LOOKS)
    height = 1.2 + 1.75 * max(1, len(look))
    drawn, axes = canvas(len(look) or 1, len(betas) or 1, height=height, title=title, sharex=True, sharey="col")
    words = []
    for (i, (method, own)), (j, beta) in itertools.product(enumerate(look.items()), enumerate(betas)):
        place, ends = axes[i, j], []
        place.axhline(0, color=plots.SOFT, linewidth=0.8)
        for column, (answer, color, dash) in answers.items():
            cell = rows[(rows["method"] == method) & (rows["beta"] == beta)]
            seeds = cell.pivot(index="step", columns="seed", values=column).rolling(smooth, min_periods=1).mean()
            mean = seeds.dropna().mean(axis=1)
            place.plot(seeds, color=color, alpha=0.3, linewidth=0.8)
            place.plot(mean, color=color, label=answer, linestyle=dash)
            ends.append(f"{answer} ends at {number(mean.iloc[-1] if len(mean) else None)}")
        place.yaxis.set_major_locator(MaxNLocator(4))
        place.tick_params(labelsize=9)
        axes[0, j].set_title(f"β = {number(beta)}")
        axes[-1, j].set_xlabel("step")
        axes[i, 0].set_ylabel(f"{own.label}\n(nats)")
        words.append(f"{own.label} β = {number(beta)}: {', '.join(ends)}.")
    plots.legend_below(drawn)
    alt = (
        f"{title}: mean log-ratio to the reference, in nats, of chosen and rejected answers (smoothed over {smooth} "
        f"points). {' '.join(words)}"
    )
    return Drawing(drawn, title, alt, rows[["method", "beta", "tau", "seed", "step", *answers]])


@housestyle
def kl_against_score(
    members: pd.DataFrame,
    score: str,
    *,
    score_label: str,
    reference: float | None = None,
    title: str = "Score against distance from the reference",
) -> Drawing:
    """Sampled KL(pi_theta || pi_0) against the score: seeds faint, the mean of each cell bold, larger at larger beta.
    A diverged member has no KL and so no point; the words count them."""
    table = plots.outcomes(members, score)
    table["kl"] = plots.outcomes(members, "sampled_kl")["value"]
    shown = table.dropna(subset=["kl", "value"])
    look = plots.looks(shown["method"], LOOKS)
    shown = shown.assign(label=[look[method].label for method in shown["method"]])
    means = shown.groupby(["label", "beta", "tau"], dropna=False, sort=False)[["kl", "value"]].mean().reset_index()
    drawn, axes = canvas(height=4.6, title=title)
    place, betas = axes[0, 0], sort_distinct(shown["beta"])
    if len(shown):
        style = {"x": "kl", "y": "value", "hue": "label", "style": "label", "ax": place}
        style |= {"palette": {own.label: own.color for own in look.values()}}
        style |= {"markers": {own.label: own.marker for own in look.values()}}
        sns.scatterplot(shown, s=18, alpha=0.35, legend=False, **style)
        sizes = dict(zip(betas, np.linspace(40, 200, len(betas)), strict=True))
        sns.scatterplot(means.rename(columns={"beta": "β"}), size="β", sizes=sizes, **style)
        sns.move_legend(place, "center left", bbox_to_anchor=(1, 0.5), title="")
        if shown["kl"].max() > 20:  # from near 0 to hundreds of nats: linear up to 1, then logarithmic
            place.set_xscale("symlog", linthresh=1.0)
    words = [
        f"{cell['label']} β = {number(cell['beta'])}"
        + ("" if pd.isna(cell["tau"]) else f" τ = {number(cell['tau'])}")
        + f": KL {number(cell['kl'])}, score {number(cell['value'])}."
        for cell in means.to_dict("records")
    ]
    if reference is not None:
        plots.reference_line(place, reference)
        words.append(f"The reference model scores {number(reference)} (dashed).")
    if lost := int(table["diverged"].sum()):
        words.append(f"{lost} diverged members have no point.")
    place.set(xlabel="sampled KL to the reference (nats per answer)", ylabel=score_label)
    alt = f"{title}: {score_label} against sampled KL in nats, mean of each cell. {' '.join(words)}"
    return Drawing(drawn, title, alt, shown[["method", "beta", "tau", "seed", "kl", "value"]])


# ---- the shape of the losses, taken from the functions that train


def loss_curve(name: str, margin: np.ndarray, *, beta: float, tau: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(loss, slope) of a loss of lib.td_dpo.losses over margins (n,) in nats (rho; Delta for td_dpo), without the
    anchor, which is not a function of the margin. A positive slope pushes the margin down."""
    import torch

    from lib.td_dpo.losses import preference_loss

    x = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(x)
    loss = preference_loss(name, x / 2, -x / 2, zero, zero, beta=beta, tau=tau)[1]
    (slope,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach().numpy(), slope.numpy()


def hessian_eigenvalues(name: str, margin: np.ndarray, *, beta: float, tau: float = 1.0) -> np.ndarray:
    """(n, 2) eigenvalues of a loss's Hessian in (log p+, log p-) at log p+ = -log p- = margin/2: those of the common
    mode (1, 1)/sqrt 2 and of the margin mode (1, -1)/sqrt 2, the eigenvectors of a loss that treats both answers
    alike but for the sign of the margin."""
    import torch

    from lib.td_dpo.losses import preference_loss

    x = torch.tensor(margin, dtype=torch.float64)
    p, zero = torch.stack([x / 2, -x / 2], dim=1).requires_grad_(), torch.zeros_like(x)
    loss, *_ = preference_loss(name, p[:, 0], p[:, 1], zero, zero, beta=beta, tau=tau)
    (gradient,) = torch.autograd.grad(loss.sum(), p, create_graph=True)
    (row,) = torch.autograd.grad(gradient[:, 0].sum(), p)
    return torch.stack([row[:, 0] + row[:, 1], row[:, 0] - row[:, 1]], dim=1).numpy()


def stationary_points(margin: np.ndarray, slope: np.ndarray) -> list[tuple[float, str]]:
    """Where a curve turns: [(margin, "minimum" or "barrier")], interpolated between the points where its slope changes
    sign."""
    turns = np.flatnonzero(slope[:-1] * slope[1:] < 0)
    at = margin[turns] - slope[turns] * (margin[turns + 1] - margin[turns]) / (slope[turns + 1] - slope[turns])
    return [(float(x), "minimum" if slope[i] < 0 else "barrier") for i, x in zip(turns, at, strict=True)]


def _label(name: str, tau: float | None) -> str:
    return LOOKS[name].label + (f" τ = {number(tau)}" if tau else "")


def _dash(tau: float | None, taus: Sequence[float]) -> str:
    return ("-", "--", ":", "-.")[taus.index(tau) % 4] if tau else "-"


@housestyle
def loss_landscape(
    beta: float, taus: Sequence[float], *, reach: float = 12.0, title: str = "The losses and their slopes"
) -> Drawing:
    """Loss (above) and slope (below). Left: DPO and DiscoPOP over z = beta rho near 0, with DiscoPOP's minimum and
    barrier marked. Right: all losses over the margin in nats (rho; Delta for td_dpo) at `beta`."""
    drawn, axes = canvas(2, 2, height=6.6, title=title, sharex="col")
    plain: list[tuple[str, float | None]] = [("dpo", None), ("discopop", None), ("discopop_card", None)]
    sides = (
        ("z = β·ρ", np.linspace(-0.6, 0.6, 1201), 1.0, plain[:2]),
        (f"margin in nats, at β = {number(beta)}", np.linspace(-reach, reach, 1601), beta, plain),
    )
    words, data = [], []
    for column, (axis, x, scale, losses) in enumerate(sides):
        for name, tau in [*losses, *(("td_dpo", tau) for tau in taus if column)]:
            loss, slope = loss_curve(name, x, beta=scale, tau=tau or 1.0)
            style = {"color": LOOKS[name].color, "linestyle": _dash(tau, taus)}
            style |= {"linestyle": (0, (2, 2.5))} if name == "discopop_card" else {}  # the same as DiscoPOP at .05
            axes[0, column].plot(x, loss, label=_label(name, tau) if column else None, **style)
            axes[1, column].plot(x, slope, **style)
            data.append(pd.DataFrame({"axis": axis, "curve": _label(name, tau), "x": x, "loss": loss, "slope": slope}))
            middle = len(x) // 2
            words.append(
                f"{_label(name, tau)} over {axis}: loss {number(loss[middle])}, slope {number(slope[middle])} at 0"
            )
            points = stationary_points(x, slope)
            words += [f"{_label(name, tau)} has a {kind} at {at:+.{3 - column}f}" for at, kind in points]
            for at, kind in points if not column else ():
                height, low = float(np.interp(at, x, loss)), kind == "minimum"
                axes[0, 0].plot([at], [height], "o" if low else "^", color=style["color"], markersize=7)
                axes[0, 0].annotate(
                    f"{kind}\n{at:+.3f}".replace("-", "−"), (at, height), (-6, -30) if low else (6, 8),
                    textcoords="offset points", ha="right" if low else "left", fontsize=9, color=style["color"],
                )  # fmt: skip
            if not column and len(points) == 2:
                (start, _), (end, _) = points
                axes[1, 0].axvspan(start, end, color=style["color"], alpha=0.12, linewidth=0)
                pushed = f"pushed the wrong way:\nρ from {start / beta:+.1f} to {end / beta:+.1f}\nnats at β = {beta:g}"
                axes[1, 0].annotate(pushed, (end, 0.8), (5, -2), textcoords="offset points", va="top", fontsize=8.5)
        axes[1, column].axhline(0, color=plots.SOFT, linewidth=0.9)
        axes[1, column].set_xlabel(axis)
    axes[0, 1].set_ylim(-0.5, 6)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("slope of the loss")
    plots.legend_below(drawn)
    return Drawing(drawn, title, f"{title}. {'; '.join(words)}.".replace("-", "−"), pd.concat(data))


@housestyle
def curvature(
    beta: float, taus: Sequence[float], *, reach: float = 10.0, title: str = "Curvature of the losses"
) -> Drawing:
    """Hessian eigenvalues over the margin: what holds the level of both answers (left), what bends the margin
    (right)."""
    margin = np.linspace(-reach, reach, 801)
    drawn, axes = canvas(1, 2, height=4.2, title=title, sharex=True)
    words, data = [], []
    losses: list[tuple[str, float | None]] = [("dpo", None), ("discopop", None), *(("td_dpo", tau) for tau in taus)]
    for name, tau in losses:
        common, bend = hessian_eigenvalues(name, margin, beta=beta, tau=tau or 1.0).T
        for place, mode in zip(axes[0], (common, bend), strict=True):
            place.plot(margin, mode, color=LOOKS[name].color, linestyle=_dash(tau, taus), label=_label(name, tau))
        words.append(
            f"{_label(name, tau)}: at margin 0 common mode {number(common[400])}, margin mode {number(bend[400])}; at "
            f"{number(reach)} nats margin mode {number(bend[-1])}"
        )
        columns = {"loss": _label(name, tau), "margin": margin, "common_mode": common, "margin_mode": bend}
        data.append(pd.DataFrame(columns))
    left, right = axes[0]
    left.set(title="common mode", xlabel="margin (nats)", ylabel=f"Hessian eigenvalue at β = {number(beta)}")
    right.set(title="margin mode", xlabel="margin (nats)")
    plots.legend_below(drawn)
    alt = f"{title} at beta {number(beta)}: eigenvalues of the Hessian. {'; '.join(words)}."
    return Drawing(drawn, title, alt, pd.concat(data))
