"""What the notebooks read off the study's records besides tables.load's."""

import re
from pathlib import Path

import pandas as pd

from lib import record

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
