"""What the notebooks read off the study's records besides tables.load's."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from lib import record
from lib.stats import ratio_scores

KEYS = ["run_id", "method", "subset", "cell", "alpha", "beta", "learning_rate"]
ENTAILMENT = 0  # its label
STACK = r"^.*?layers?\."  # what precedes a layer's number in the name of a matrix
PLACE = r"(?P<layer>\d+)\.(?:.*\.)?(?P<projection>\w+?)(?:_proj)?$"  # of a matrix: 0.attention.self.query_proj


def adapters(members: pd.DataFrame) -> pd.DataFrame:
    """One row per member and adapted matrix, with its layer and projection: s, w, coefficient, || Delta ||_F at the end,
    rank kept by AdaLoRA."""
    rows, own = [], ["run_id", "cell", "seed"]
    columns = [*own, "matrix", "layer", "projection", "s", "w", "coefficient", "delta_norm", "rank"]
    for member in members.to_dict("records"):
        values = record.read_json(Path(member["folder"]) / "adapters.json", {"matrices": []})
        for k, name in enumerate(values["matrices"]):
            row = {key: values[key][k] for key in ("s", "w", "coefficient", "delta_norm") if key in values}
            row["rank"] = values["ranks"].get(f"base_model.model.{name}")
            rows.append({key: member[key] for key in own} | {"matrix": re.sub(STACK, "", name)} | row)
    table = pd.DataFrame(rows, columns=columns)
    table[["layer", "projection"]] = table["matrix"].astype(str).str.extract(PLACE)
    return table.astype({"layer": "Int64"})


def scores(pairs: pd.DataFrame) -> pd.DataFrame:
    """One row per member and example. `accuracy`: 1 or 0. `f1`, of RTE: a score whose mean over a member's examples is
    its F1 on entailment. `score`: what was published of the task, F1 of RTE and else accuracy."""
    rows = pairs.reindex(columns=[*KEYS, "seed", "example", "label", "prediction", "correct"])
    rows = rows.assign(status="completed", accuracy=rows["correct"].astype(float), f1=np.nan)
    for _, mine in rows[rows["subset"] == "rte"].groupby(["run_id", "cell", "seed"]):
        true, found = (mine[name] == ENTAILMENT for name in ("label", "prediction"))
        rows.loc[mine.index, "f1"] = ratio_scores(2.0 * (true & found).to_numpy(), (true * 1.0 + found).to_numpy())
    return rows.assign(score=rows["f1"].fillna(rows["accuracy"]))


def with_calibration(costs: pd.DataFrame, results: Path) -> pd.DataFrame:
    """The measured step times with what a training of the run takes by them, `training_seconds` with its calibration and
    `training_seconds_baseline` without, a pair per process."""
    parts = []
    for (run_id, process), rows in costs.groupby(["run_id", "process"], sort=False) if len(costs) else ():
        counts = record.read_json(results / run_id / "step_cost" / str(process) / "calibration.json", {})
        trained = counts.get("training_passes", np.nan) * rows["seconds"].median()
        whole = trained + counts.get("seconds", np.nan)
        parts.append(rows.assign(training_seconds=whole, training_seconds_baseline=trained))
    return pd.concat(parts) if parts else costs
