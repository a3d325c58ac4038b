"""The analysis notebooks on made records, in this process: their cells are plain Python."""

import json

from lib import config, record
from tests.conftest import ROOT


def write_member(results, member, metrics, *, rows=(), history=(), **files):
    """The record of a finished member, with `files` ({name: value}) of its own, and its run's metrics.json."""
    run, folder = member.run, results / member.run.run_id / "members" / member.id
    who = {"study": run.study, "run_id": run.run_id, "cell": member.cell, "cell_name": member.cell_name}
    spec = {**who, "seed": member.seed, "config": config.dump(run)}
    for name, value in {"member": spec, "metrics": metrics, **files}.items():
        record.write_json(folder / f"{name}.json", value)
    record.write_jsonl(folder / "predictions.jsonl", rows)
    record.write_jsonl(folder / "history.jsonl", history)
    record.write_json(folder / "done.json", {"run_id": run.run_id, "status": "completed"})
    summary = {"run_id": run.run_id, "method": run.method, "role": run.role, "chosen_cell": member.cell_name}
    summary |= {"metrics": metrics, "members": {}, "key_metric": {"name": "", "value": None}, "chosen_on": ""}
    record.write_json(results / run.run_id / "metrics.json", summary)


def analyze(results, planned):
    """({figure: its alternative text}, the notebook's names) of an analysis of `planned` runs from the records in
    `results`, as a trial: no simulated power and no verdicts, but every table and figure."""
    study = planned[0].study
    listed = [{**config.dump(run), "study": study, "scale": run.scale, "mode": run.mode} for run in planned]
    record.write_json(results / "comparison" / "runs.json", listed)
    names = {"__name__": "notebook"}
    for cell in json.loads((ROOT / "notebooks" / study / "analysis.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                names |= {"scale": planned[0].scale, "mode": "trial", "results_dir": str(results)}
    texts = (results / "comparison" / "figures").glob("*.alt.txt")
    return {path.name.removesuffix(".alt.txt").removeprefix("comparison_"): path.read_text() for path in texts}, names
