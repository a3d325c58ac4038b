"""The study's records as the tables that its notebooks show and its claims are judged by."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lib import record
from lib.iw_lora import data
from lib.run import members, runs
from lib.tables import run_metrics


def example_scores(loaded: record.Records) -> pd.DataFrame:
    """One row per member and validation example, `accuracy` 1 or 0, as `claims.evaluate` wants it."""
    columns = ["run_id", "method", "alpha", "learning_rate", "seed", "example", "correct"]
    if loaded.pairs.empty:
        return pd.DataFrame(columns=[*columns[:-1], "accuracy", "status"])
    rows = loaded.pairs.reindex(columns=columns)
    return rows.assign(accuracy=rows.pop("correct").astype(float), status="completed")


def all_members(loaded: record.Records) -> pd.DataFrame:
    """Finished members and, without metrics, the missing ones: coverage names both."""
    found = pd.concat([loaded.members, pd.DataFrame(loaded.missing)], ignore_index=True)
    return found.assign(**{key: None for key in ("alpha", "learning_rate") if key not in found})


def at_chosen(frame: pd.DataFrame, results: Path) -> pd.DataFrame:
    """The rows of each run's cell that was chosen on the tuning split; `label_of_run` names its run."""
    chosen = {run_id: made["chosen_cell"] for run_id, made in run_metrics(results).items()}
    if frame.empty:
        return frame.reindex(columns=[*frame.columns, *{"run_id", "cell", "role", "label_of_run"} - set(frame.columns)])
    mine = frame[[chosen.get(run_id) == cell for run_id, cell in zip(frame["run_id"], frame["cell"], strict=True)]]
    return mine.assign(label_of_run=mine["run_id"])


def learning(loaded: record.Records, results: Path) -> pd.DataFrame:
    """The history of the methods (not of the controls) at their chosen cells, steps with a task loss."""
    rows = at_chosen(loaded.history, results)
    rows = rows.reindex(columns=rows.columns.union(["task_loss", "step", "seed"], sort=False)).dropna(
        subset=["task_loss"]
    )
    return rows[rows["role"].isin(["proposed", "comparative"])]


def exports(loaded: record.Records) -> dict[str, dict]:
    """{member: s, w, coefficients, norms and a rank_pattern for PEFT} of the proposed method's members."""
    rows = loaded.members[loaded.members["role"] == "proposed"] if len(loaded.members) else loaded.members
    found = {
        f"{m['run_id']}/{m['cell']}-s{m['seed']}": record.read_json(Path(m["folder"]) / "adapters.json")
        for m in rows.to_dict("records")
    }
    return {name: made for name, made in found.items() if made}


def calibrations(results: Path) -> pd.DataFrame:
    """What calibration took, counted apart from the steps, per run that measured it."""
    found = {p.parent.name: record.read_json(p) for p in sorted(Path(results).glob("*/calibration.json"))}
    return pd.DataFrame([{"run": name, **made} for name, made in found.items() if made])


def seed_noise(loaded: record.Records, assumed: tuple[float, ...]) -> pd.DataFrame:
    """The standard deviation between seeds that came out, per run at its best-known cell, beside what the power table
    assumes."""
    if loaded.members.empty:
        return loaded.members
    sds = loaded.members.groupby(["run_id", "cell"])["validation_accuracy"].agg(["std", "count"]).reset_index()
    return (
        sds[sds["count"] > 1].assign(assumed=" / ".join(f"{sd:g}" for sd in assumed)).rename(columns={"std": "seed sd"})
    )


def accuracies(loaded: record.Records) -> pd.DataFrame:
    """Every cell's accuracies beside what needs no model, mean over seeds."""
    names = [
        "tuning_accuracy",
        "validation_accuracy",
        "validation_f1",
        "validation_macro_f1",
        "bag_of_words_baseline",
        "majority_baseline",
        "trained_parameters",
    ]
    groups = loaded.members.reindex(columns=["run_id", "cell", "seed", *names]).groupby(["run_id", "cell"], sort=False)
    return groups[names].mean().join(groups["seed"].count().rename("seeds")).reset_index()


def adapters(loaded: record.Records) -> pd.DataFrame:
    """One row per member and adapted matrix: s, w, coefficient, || Delta ||_F at the end, ranks kept by AdaLoRA."""
    rows = []
    for member in loaded.members.to_dict("records"):
        made = record.read_json(Path(member["folder"]) / "adapters.json")
        for k, name in enumerate(made["matrices"] if made else ()):
            rows.append(
                {
                    "run_id": member["run_id"],
                    "method": member["method"],
                    "cell": member["cell"],
                    "seed": member["seed"],
                    "matrix": name.split("encoder.layer.")[-1],
                    "delta_norm": made["delta_norm"][k],
                    **{key: made[key][k] if key in made else None for key in ("s", "w", "coefficient")},
                    "rank": next((r for n, r in made["ranks"].items() if n.endswith(name)), None),
                }
            )
    return pd.DataFrame(
        rows, columns=["run_id", "method", "cell", "seed", "matrix", "delta_norm", "s", "w", "coefficient", "rank"]
    )


def confusion(examples: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """Rows: the label; columns: the prediction; counts over seeds."""
    counts = pd.crosstab(examples["label"], examples["prediction"])
    order = range(len(labels))
    counts = counts.reindex(index=order, columns=order, fill_value=0)
    return counts.set_axis([f"is {name}" for name in labels]).set_axis([f"said {name}" for name in labels], axis=1)


def labels_of(results: Path) -> list[str]:
    """The task's label names, from the records' own reports."""
    for run in runs.planned(results):
        report = record.read_json(members.inputs_folder(run) / "report.json")
        if report:
            return list(report["labels"])
    return list(data.LABELS["generated"])
