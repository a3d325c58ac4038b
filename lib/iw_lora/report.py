"""The study's records as tables, and its figures: sensitivities over layers and projections, what is made of them, and
what training did."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns

from lib import record, tables
from lib.plots import SOFT, Drawing, canvas, housestyle, legend_below, looks, number
from lib.tables import run_metrics

MATRIX = r"(?P<layer>\d+)\.(?:.*\.)?(?P<projection>\w+)$"
ACCURACIES = ["tuning_accuracy", "validation_accuracy", "validation_f1", "validation_macro_f1"]
BESIDE = ["bag_of_words_baseline", "majority_baseline", "trained_parameters"]  # columns that need no model

# ---- tables


def example_scores(loaded: tables.Records) -> pd.DataFrame:
    """One row per member and validation example, `accuracy` 1 or 0, as `claims.evaluate` wants it."""
    columns = ["run_id", "method", "alpha", "learning_rate", "seed", "example", "correct"]
    if loaded.pairs.empty:
        return pd.DataFrame(columns=[*columns[:-1], "accuracy", "status"])
    rows = loaded.pairs.reindex(columns=columns)
    return rows.assign(accuracy=rows.pop("correct").astype(float), status="completed")


def all_members(loaded: tables.Records) -> pd.DataFrame:
    """Finished members and, without metrics, the missing ones: coverage names both."""
    rows = pd.concat([loaded.members, pd.DataFrame(loaded.missing)], ignore_index=True)
    return rows.assign(**{key: None for key in ("alpha", "learning_rate") if key not in rows})


def at_chosen(frame: pd.DataFrame, results: Path) -> pd.DataFrame:
    """The rows of each run's cell that was chosen on the tuning split; `label_of_run` names its run."""
    chosen = {run_id: metrics["chosen_cell"] for run_id, metrics in run_metrics(results).items()}
    if frame.empty:
        return frame.reindex(columns=[*frame.columns, *{"run_id", "cell", "role", "label_of_run"} - set(frame.columns)])
    mine = frame[[chosen.get(run_id) == cell for run_id, cell in zip(frame["run_id"], frame["cell"], strict=True)]]
    return mine.assign(label_of_run=mine["run_id"])


def learning(loaded: tables.Records, results: Path) -> pd.DataFrame:
    """The history of the methods (not of the controls) at their chosen cells, steps with a task loss."""
    rows = at_chosen(loaded.history, results)
    rows = rows.reindex(columns=rows.columns.union(["task_loss", "step", "seed"], sort=False))
    return rows.dropna(subset=["task_loss"])[lambda r: r["role"].isin(["proposed", "comparative"])]


def exports(loaded: tables.Records) -> dict[str, dict]:
    """{member: s, w, coefficients, norms and a rank_pattern for PEFT} of the proposed method's members."""
    rows = loaded.members[loaded.members["role"] == "proposed"] if len(loaded.members) else loaded.members
    found = {
        f"{m['run_id']}/{m['cell']}-s{m['seed']}": record.read_json(Path(m["folder"]) / "adapters.json")
        for m in rows.to_dict("records")
    }
    return {name: values for name, values in found.items() if values}


def calibrations(results: Path) -> pd.DataFrame:
    """What calibration took, counted apart from the steps, per run that measured it."""
    found = {p.parent.name: record.read_json(p) for p in sorted(Path(results).glob("*/calibration.json"))}
    return pd.DataFrame([{"run": name, **values} for name, values in found.items() if values])


def seed_noise(loaded: tables.Records, assumed: tuple[float, ...]) -> pd.DataFrame:
    """Standard deviation between seeds per run and cell, beside what the power table assumes."""
    if loaded.members.empty:
        return loaded.members
    sds = loaded.members.groupby(["run_id", "cell"])["validation_accuracy"].agg(["std", "count"]).reset_index()
    sds = sds[sds["count"] > 1].assign(assumed=" / ".join(f"{sd:g}" for sd in assumed))
    return sds.rename(columns={"std": "seed sd"})


def accuracies(loaded: tables.Records) -> pd.DataFrame:
    """Every cell's accuracies beside what needs no model, mean over seeds."""
    names = [*ACCURACIES, *BESIDE]
    groups = loaded.members.reindex(columns=["run_id", "cell", "seed", *names]).groupby(["run_id", "cell"], sort=False)
    return groups[names].mean().join(groups["seed"].count().rename("seeds")).reset_index()


def adapters(loaded: tables.Records) -> pd.DataFrame:
    """One row per member and adapted matrix: s, w, coefficient, || Delta ||_F at the end, ranks kept by AdaLoRA."""
    rows, identity = [], ["run_id", "method", "cell", "seed"]
    for member in loaded.members.to_dict("records"):
        values = record.read_json(Path(member["folder"]) / "adapters.json")
        for k, name in enumerate(values["matrices"] if values else ()):
            row = {key: member[key] for key in identity}
            row |= {"matrix": name.split("encoder.layer.")[-1], "delta_norm": values["delta_norm"][k]}
            row |= {key: values[key][k] if key in values else None for key in ("s", "w", "coefficient")}
            row["rank"] = next((rank for matrix, rank in values["ranks"].items() if matrix.endswith(name)), None)
            rows.append(row)
    return pd.DataFrame(rows, columns=[*identity, "matrix", "delta_norm", "s", "w", "coefficient", "rank"])


def labels_of(inputs: Iterable[Path]) -> list[str]:
    """The task's label names, from the first report in these folders."""
    reports = (record.read_json(folder / "report.json") for folder in inputs)
    return next((list(report["labels"]) for report in reports if report), ["entailment", "not_entailment"])


# ---- figures


def by_place(matrices: pd.DataFrame) -> pd.DataFrame:
    """The rows of `adapters` with `layer` (number) and `projection` (short name) read off the matrix's name."""
    parts = matrices["matrix"].str.extract(MATRIX)
    short = parts["projection"].str.removesuffix("_proj")
    return matrices.assign(layer=pd.to_numeric(parts["layer"]), projection=short.fillna(matrices["matrix"]))


def _short(matrix: object) -> str:
    return str(matrix).replace("attention.self.", "")


@housestyle
def sensitivity_map(matrices: pd.DataFrame, *, title: str = "Sensitivity of the frozen matrices") -> Drawing:
    """K w_k, mean over members, with layers across and projections down; it is 1 where all matrices are alike."""
    rows = by_place(matrices.dropna(subset=["w"]))
    means = rows.groupby(["projection", "layer"])["w"].mean() * rows["matrix"].nunique()
    table = means.unstack()
    drawn, axes = canvas(height=1.6 + 0.5 * max(1, len(table)), title=title)
    if len(table):
        size = {"fontsize": 9 if table.shape[1] < 9 else 7}
        bar = {"label": "K × w (1: alike)", "pad": 0.02}
        sns.heatmap(table, annot=True, fmt=".3g", cmap="cividis", annot_kws=size, cbar_kws=bar, ax=axes[0, 0])
    words = [f"{name} of layer {layer:g} {number(value)}" for (name, layer), value in means.items()]
    alt = f"{title}: K times the weight of each matrix, mean over members. {'; '.join(words) or 'no sensitivities'}."
    return Drawing(drawn, title, alt, table.reset_index() if len(table) else rows)


@housestyle
def coefficient_spread(matrices: pd.DataFrame) -> Drawing:
    """Every matrix's coefficient over the mean of its member's, one row per run: far from 1, they discriminate."""
    title = "How much the penalty's coefficients discriminate"
    rows = matrices.dropna(subset=["coefficient"])
    means = rows.groupby(["run_id", "cell", "seed"])["coefficient"].transform("mean")
    rows = rows.assign(relative=rows["coefficient"] / means)
    names, words = list(dict.fromkeys(rows["run_id"])), []
    drawn, axes = canvas(height=1.4 + 0.42 * max(1, len(names)), title=title)
    place = axes[0, 0]
    place.axvline(1, color=SOFT, linewidth=1)
    if names:
        palette = {name: look.color for name, look in looks(names).items()}
        sns.stripplot(rows, x="relative", y="run_id", hue="run_id", palette=palette, jitter=False, alpha=0.6, ax=place)
    for level, name in enumerate(names):
        values = rows.loc[rows["run_id"] == name, "relative"]
        least, most = float(values.min()), float(values.max())
        ratio = number(most / least) if least > 0 else "unbounded"
        place.annotate(f"max/min {ratio}", (1.01, level), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        words.append(f"{name} {number(least)} to {number(most)}, max/min {ratio}")
    place.set(xlabel="coefficient over its member's mean", ylabel="")
    alt = f"{title}: coefficients of every matrix and member over their mean. {'; '.join(words) or 'no penalty'}."
    return Drawing(drawn, title, alt, rows[["run_id", "cell", "seed", "matrix", "coefficient", "relative"]])


@housestyle
def update_norms(matrices: pd.DataFrame, *, title: str = "Size of the update with the penalty and without") -> Drawing:
    """|| Delta_k ||_F at the end of training per matrix, mean over seeds with their range, one series per run."""
    rows = by_place(matrices.dropna(subset=["delta_norm"])).sort_values(["layer", "projection"], kind="stable")
    look = looks(list(dict.fromkeys(rows["label_of_run"])))
    drawn, axes = canvas(height=4.0, title=title)
    place, words = axes[0, 0], []
    if len(rows):
        styles = {"palette": [own.color for own in look.values()], "markers": [own.marker for own in look.values()]}
        sns.pointplot(
            rows.assign(matrix=rows["matrix"].map(_short)),
            x="matrix", y="delta_norm", hue="label_of_run", hue_order=list(look), **styles,
            errorbar=("pi", 100), linestyle="none", dodge=0.6, markersize=5, err_kws={"linewidth": 1}, ax=place,
        )  # fmt: skip
        place.get_legend().remove()
    for name in look:
        mean = rows[rows["label_of_run"] == name].groupby("matrix")["delta_norm"].mean()
        words.append(f"{name} {number(mean.min())} to {number(mean.max())}, mean {number(mean.mean())}")
    place.tick_params(axis="x", rotation=90 if rows["matrix"].nunique() > 8 else 0, labelsize=8.5)
    place.set(xlabel="", ylabel="‖Δ‖ (Frobenius)", ylim=(0, None))
    legend_below(drawn)
    alt = f"{title}: Frobenius norm of every matrix's update at the end. {'; '.join(words) or 'no adapters'}."
    return Drawing(drawn, title, alt, rows[["run_id", "cell", "seed", "matrix", "delta_norm"]])


@housestyle
def rank_against_sensitivity(matrices: pd.DataFrame) -> Drawing:
    """Where AdaLoRA put its rank (mean over seeds, per matrix) against the same matrix's K w (mean over who measured
    it)."""
    title = "AdaLoRA's kept ranks against the sensitivity"
    weight = matrices.dropna(subset=["w"]).groupby("matrix")["w"].mean()
    rank = matrices.dropna(subset=["rank"]).groupby("matrix")["rank"].mean()
    table = pd.DataFrame({"weight": weight * max(1, len(weight)), "rank": rank}).dropna()
    drawn, axes = canvas(height=3.8, title=title)
    place, words = axes[0, 0], []
    sns.scatterplot(table, x="weight", y="rank", ax=place)
    for name, row in table.iterrows():
        spot = (row["weight"], row["rank"])
        place.annotate(_short(name), spot, xytext=(5, 4), textcoords="offset points", fontsize=8.5)
        words.append(f"{name}: {number(row['weight'])}, rank {number(row['rank'])}")
    place.set(xlabel="K × w of the frozen matrix, before training", ylabel="triplets that AdaLoRA kept")
    place.margins(x=0.25, y=0.2)
    correlation = table["weight"].corr(table["rank"], method="spearman") if len(table) > 2 else float("nan")
    summary = f"rank correlation {number(correlation)} over {len(table)} matrices"
    return Drawing(drawn, title, f"{title}, {summary}. {'; '.join(words) or 'no AdaLoRA record'}.", table.reset_index())


@housestyle
def confusions(examples: pd.DataFrame, labels: list[str], *, title: str = "Confusion matrices") -> Drawing:
    """One matrix per run, over its seeds: the share of each true label that was predicted to be each label."""
    names = list(dict.fromkeys(examples["label_of_run"])) if len(examples) else []
    columns = min(5, max(1, len(names)))
    lines, short = -(-max(1, len(names)) // columns), [label[:7] for label in labels]
    drawn, axes = canvas(lines, columns, height=0.8 + 2.0 * lines, title=title)
    words, data = [], [pd.DataFrame(columns=["label", "prediction", "count", "run"])]
    for place in axes.flat[len(names) :]:
        place.set_axis_off()
    for place, name in zip(axes.flat, names, strict=False):
        rows, every = examples[examples["label_of_run"] == name], range(len(labels))
        counts = pd.crosstab(rows["label"], rows["prediction"]).reindex(index=every, columns=every, fill_value=0)
        share = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
        sns.heatmap(
            share, annot=True, fmt=".2f", cmap="Blues", vmin=0, vmax=1, cbar=False, annot_kws={"fontsize": 8},
            xticklabels=short, yticklabels=short, ax=place,
        )  # fmt: skip
        place.set_title(name, fontsize=9)
        place.set(xlabel="", ylabel="")
        place.tick_params(labelsize=7)
        right = (f"{label} right {number(float(share.iloc[i, i]))}" for i, label in enumerate(labels))
        words.append(f"{name}: {', '.join(right)}")
        data.append(counts.stack().rename("count").reset_index().assign(run=name))
    alt = f"{title}: true labels down, predicted ones across, shares of a row. {'; '.join(words) or 'none'}."
    return Drawing(drawn, title, alt, pd.concat(data[1:] or data))


@housestyle
def times(costs: pd.DataFrame, *, title: str = "Seconds of a step, measured in turns") -> Drawing:
    """Step times of IW-LoRA over LoRA's and over AdaLoRA's, of every interleaved round, with the median."""
    series = {"over LoRA": ("seconds", "seconds_baseline"), "over AdaLoRA": ("step_seconds", "step_seconds_baseline")}
    measured = {name: costs[own] / costs[other] for name, (own, other) in series.items() if own in costs}
    table = pd.DataFrame(measured).melt(var_name="against", value_name="ratio").dropna()[["ratio", "against"]]
    drawn, axes = canvas(height=2.2, title=title)
    place, words = axes[0, 0], []
    place.axvline(1, color=SOFT, linewidth=1)
    if len(table):
        sns.boxplot(table, x="ratio", y="against", fill=False, width=0.5, fliersize=3, ax=place)
    for name, ratios in table.groupby("against", sort=False)["ratio"]:
        words.append(f"{name} median {number(float(np.median(ratios)))} of {len(ratios)} rounds")
    place.set(xlabel="IW-LoRA's step, as a multiple", ylabel="")
    return Drawing(drawn, title, f"{title}. {'; '.join(words) or 'not measured'}.", table)
