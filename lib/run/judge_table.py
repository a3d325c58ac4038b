"""The command `judge-table`: the studies' rule on a table of scores of other people's making.

    ./run_all.sh judge-table scores.csv --claims claims.yaml [--json verdicts.json] [--figure claims.png]

scores.csv has a row per method, seed and (where there are any) question, with its `score`; every other column is a
factor (beta, say), which a claim's cells may name. claims.yaml is what the studies' own are (lib/claims.py):

    claims: [{id: C1, treatment: A, baseline: B, gain: 1.0}]

A table of n seeds is judged as a study whose size was fixed at n; with `looks: [5, 8, 12, 20]` as one that could have
stopped at any of them.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from lib import claims, config, record
from lib.claims import SIDES, UNITS, Claims
from lib.errors import StudyError

SCALE = "table"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run_all.sh judge-table", description=__doc__.split("\n\n")[0])
    parser.add_argument("table", metavar="FILE.csv", type=Path, help="columns: method, seed, score; question; factors")
    parser.add_argument("--claims", metavar="FILE.yaml", type=Path, required=True)
    parser.add_argument("--json", metavar="FILE.json", type=Path, help="write the verdicts there")
    parser.add_argument("--figure", metavar="FILE.png", type=Path, help="draw the claims there")
    options = parser.parse_args(argv)
    study = claims.load(options.claims)
    rows, study = read(options.table, study, options.claims)
    verdicts = claims.evaluate(study, rows, scale=SCALE, mode="full")
    for verdict in verdicts:
        print(claims.sentence(verdict))
    if options.json:
        record.write_json(options.json, claims.to_json(verdicts))
    if options.figure:
        from lib import plots

        drawing = plots.claims(claims.to_json(verdicts), title=f"The claims ({options.table.name})")
        record.write_bytes(options.figure, drawing.render("png", Software=None, Description=drawing.alt))
    return 0


def read(path: Path, study: Claims, claims_path: Path) -> tuple[pd.DataFrame, Claims]:
    """The table's rows, and the claims ready to be judged on them. Raises StudyError for the first fault."""

    def fault(found: str, expected: str, fix: str = "", line: int | None = None) -> StudyError:
        return StudyError(f"{path}" + ("" if line is None else f": line {line}"), found, expected, fix)

    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (OSError, ValueError) as error:  # pandas' own are ValueErrors
        raise fault(str(error).splitlines()[0], "a CSV file with a header line") from None
    metrics = sorted({claim.metric for claim in study.claims})
    if lacking := [name for name in ("method", "seed", *metrics) if name not in rows]:
        raise fault(f"no column {', '.join(lacking)}", f"method, seed, {', '.join(metrics)}; it has {', '.join(rows)}")
    if ours := [name for name in ("status", "pilot", "cell", "capped") if name in rows]:
        raise fault(f"a column {ours[0]}", "other names for your factors: this one means something to the rule")
    factors = [name for name in rows if name not in ("method", "seed", *metrics, *UNITS)]
    for name in ("seed", *metrics):
        numbers = pd.to_numeric(rows[name], errors="coerce")
        if len(bad := np.flatnonzero(~np.isfinite(numbers) | ((numbers % 1 != 0) & (name == "seed")))):
            expected = "a whole number" if name == "seed" else "a finite number (a diverged run: its worst score)"
            raise fault(f"{name} {rows[name].iat[bad[0]]!r}", expected, line=int(bad[0]) + 2)
        rows[name] = numbers
    for name in factors:
        rows[name] = [config.plain(value) for value in rows[name]]
    unit = [name for name in UNITS if name in rows]
    key = ["method", *factors, "seed", *unit]
    if (twice := rows.duplicated(key)).any():
        line = int(np.flatnonzero(twice)[0])
        words = ", ".join(f"{name} {value}" for name, value in rows.iloc[line][key].items())
        raise fault(f"a second score of {words}", "one", line=line + 2)
    rows = rows.sort_values("seed", kind="stable", ignore_index=True).assign(status="completed")  # looks take the first
    sides = [(c, cell) for c in study.claims for side in SIDES for cell in study.levels(c, side)]
    seeds = {seed for _, cell in sides for seed in claims.select(rows, cell)["seed"]}
    for claim, cell in sides:
        mine, name, where = claims.select(rows, cell), study.label(cell), f"{claims_path}: {claim.id}"
        if mine.empty:
            methods = sorted(set(rows["method"]))
            near = config.did_you_mean(str(cell.get("method", "")), methods)
            raise StudyError(where, f"no rows of {name}", ", ".join(methods), near)
        if len(open_ := [f for f in factors if f not in cell and mine[f].nunique() > 1]):
            raise StudyError(where, f"{name} has several {open_[0]}", f"a cell with one {open_[0]}")
        if missing := sorted(seeds - set(mine["seed"])):
            raise fault(f"{name} lacks seed {missing[0]:g}", "every seed for every cell of a claim")
        if unit and (counts := mine.groupby("seed")[unit[0]].nunique()).nunique() > 1:
            found = f"{name}, seed {counts.idxmin():g}: fewer {unit[0]}s than other seeds"
            raise fault(found, f"every {unit[0]} in every seed")
    looks = study.looks_of(SCALE) if "looks" in study.model_fields_set else (len(seeds),)
    if len(seeds) < min(looks) or len(seeds) < 2:
        raise fault(f"{len(seeds)} seeds", f"at least {max(2, min(looks))}")
    asked = tuple(claim.model_copy(update={"scales": (SCALE,)}) for claim in study.claims)
    return rows, study.model_copy(update={"claims": asked, "looks": looks, "keys": tuple(factors)})
