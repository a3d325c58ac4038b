"""The records of a study as tables, tables for people, and the metrics of runs against their baselines."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib import claims, config, record
from lib.errors import StudyError
from lib.plots import number, outcomes

# ---- the records of a study


class Records(NamedTuple):
    """One study's members as tables. `members` has one row per member with its metrics; `history`, `answers` and
    `pairs` one row per step, graded answer and scored pair, each with the member's identity in front; `costs` the
    interleaved step times of a method and its baseline. `everyone`: the members and, without metrics, those
    with no finished record, in the order in which they were planned: a look at claims takes the first seeds of it."""

    members: pd.DataFrame
    history: pd.DataFrame
    answers: pd.DataFrame
    pairs: pd.DataFrame
    costs: pd.DataFrame
    everyone: pd.DataFrame


def load(results_dir: Path, expected: list | None = None, *, subfolder: str = "members") -> Records:
    """Read the members below `results_dir`/<run_id>/<subfolder>.

    `expected`: config.Member objects; of those with no finished record `everyone` has what is known of them.
    Raises StudyError where finished members were made by different states of a function (code.json).
    """
    rows = {"history": [], "answers": [], "pairs": [], "costs": []}
    planned = {(m.run.run_id, m.id): m for m in expected or []}
    found = dict.fromkeys(planned)  # in this order
    code: dict[tuple[str, str], tuple[str, str]] = {}
    for done in sorted(Path(results_dir).glob(f"*/{subfolder}/*/done.json")):
        folder, sentinel = done.parent, record.read_json(done, {})
        place = (sentinel.get("run_id"), folder.name)
        if sentinel.get("status") not in record.FINISHED or (expected is not None and place not in planned):
            continue
        member, who = planned.pop(place, None), record.identity(record.read_json(folder / "member.json", {}))
        who["pilot"] = member.pilot if member else who["pilot"]  # as it is planned now
        name = f"{who['run_id']}/{folder.name}"
        for module, definitions in record.read_json(folder / "code.json", {}).items():
            for definition, digest in definitions.items():
                digest_before, name_before = code.setdefault((module, definition), (digest, name))
                if digest_before != digest:
                    seen = f"members made by different code ({module} {definition}): {name_before} and {name}"
                    fix = "rerun the command that made them: it trains again what is stale"
                    raise StudyError(str(results_dir), seen, "records of one state of the code", fix)
        metrics = record.read_json(folder / "metrics.json", {})
        found[place] = {**who, "status": sentinel["status"], "folder": str(folder), **metrics}
        rows["history"] += [{**who, **row} for row in record.read_jsonl(folder / "history.jsonl")]
        for row in () if who["pilot"] else record.read_jsonl(folder / "predictions.jsonl"):  # pilots are not judged
            rows["answers" if row["kind"] == "answer" else "pairs"].append({**who, **row})
    for path in sorted(Path(results_dir).glob("*/step_cost.jsonl")):
        who = {"run_id": path.parent.name, "method": record.read_json(path.parent / "metrics.json", {}).get("method")}
        rows["costs"] += [{**who, **row} for row in record.read_jsonl(path)]
    rows["members"] = [row for row in found.values() if row]
    for place, m in planned.items():
        spec = {"run_id": m.run.run_id, "study": m.run.study, "config": config.dump(m.run), "seed": m.seed}
        who = record.identity({**spec, "cell": m.cell, "cell_name": m.cell_name})
        found[place] = {**who, "member": m.id, **_state(Path(results_dir) / m.run.run_id / subfolder / m.id)}
    rows["everyone"] = list(found.values())
    return Records(**{name: pd.DataFrame(part) for name, part in rows.items()})


def _state(folder: Path) -> dict:
    """What is known of a member with no finished record."""
    if error := record.read_json(folder / "error.json"):
        return {"status": error.get("status", "failed"), "why": error.get("exception", "")}
    if (folder / "member.json").exists():
        return {"status": "lost", "why": "its process went away"}
    return {"status": "missing", "why": "never started"}


# ---- tables for people


class Table(NamedTuple):
    """A table that shows itself in a notebook. The first column names the rows."""

    frame: pd.DataFrame
    caption: str

    def _repr_html_(self) -> str:
        named = self.frame.set_index(self.frame.columns[0]).rename_axis(index=None, columns=self.frame.columns[0])
        with pd.option_context("display.max_colwidth", None, "display.max_rows", None, "display.max_columns", None):
            page = named.map(_text).to_html(border=0)  # every value escaped
        return page.replace("<thead>", f"<caption>{html.escape(self.caption)}</caption>\n<thead>", 1)


def _text(value: object) -> str:
    if value is None or isinstance(value, float):
        return number(value, 4).replace("none", "–")
    return str(value)


def metrics_table(members: pd.DataFrame, planned: list, total: Mapping, group: str) -> Table:
    """A row per run of a group of `total` (aggregate_metrics), of its cell chosen on validation: mean ± standard deviation
    over seeds of each metric of the study, and its improvement over each baseline in percent of it (positive is better,
    also for metrics to minimize). A diverged member counts as the study says."""
    study, own_runs = config.study_module(planned[0].study), total["groups"][group]["runs"]
    chosen = {run_id: total["members"][run_id]["cell"] for run_id in own_runs}
    baselines = [run.run_id for run in planned if run.role == "comparative" and run.run_id in own_runs]
    metrics = {name: aim for name, aim in study.METRICS.items() if name in total["metrics"]}
    judged = claims.judged_rows(members)
    own = {i: judged[(judged["run_id"] == i) & (judged["cell"] == cell)] for i, cell in chosen.items()}
    lost = [(rows["status"] == "diverged").sum() for rows in own.values()]
    table = pd.DataFrame({"run": list(chosen), "cell": list(chosen.values())})
    table["seeds"] = [f"{len(r)}, {n} diverged" if n else f"{len(r)}" for r, n in zip(own.values(), lost, strict=True)]
    for metric, aim in metrics.items():
        name, worst = metric.replace("_", " "), study.DIVERGED.get(metric)
        seeds = {i: outcomes(rows, metric, worst)["value"] for i, rows in own.items()}
        means = pd.Series({i: values.mean() for i, values in seeds.items()}, dtype=float)
        spreads = [f" ± {number(values.std(), 2)}" if values.count() > 1 else "" for values in seeds.values()]
        table[name] = [_text(mean) + spread for mean, spread in zip(means, spreads, strict=True)]
        for baseline in baselines:
            base = means.get(baseline, np.nan)
            gains = (100 if aim == "maximize" else -100) * (means - base) / abs(base)
            texts = [f"{gain:+.1f} %".replace("-", "−") if np.isfinite(gain) else "–" for gain in gains]
            table[f"{name} vs {baseline}"] = np.where(table["run"] == baseline, "–", texts)
    about = "every run at its chosen cell: mean ± sd over seeds, and how much better than each baseline"
    return Table(table, f"{group}, {about}")


def run_metrics(results_dir: Path) -> dict[str, dict]:
    """{run_id: its metrics.json} of every run with a finished record."""
    metrics = {path.parent.name: record.read_json(path) for path in sorted(Path(results_dir).glob("*/metrics.json"))}
    return {run_id: own for run_id, own in metrics.items() if own and "chosen_cell" in own}


def tuned_runs(planned: list) -> pd.DataFrame:
    """A row per run (config.Run) whose search has ended: the configuration that it found, after how many trials, and the
    mean of each metric over the seeds of its final runs. Where these are the run's cell `tuned`, which its claims
    compare, they are the numbers of its metrics.json."""
    rows = []
    for run in planned:
        folder = Path(run.results_dir) / run.run_id
        search, own = (record.read_json(path, {}) for path in (folder / "sweep/metrics.json", folder / "metrics.json"))
        final = search.get("final")
        if own.get("chosen_cell") == config.TUNED:
            final = {"seeds": sum(name.startswith(f"{config.TUNED}-s") for name in own["members"]), **own["metrics"]}
        if final:
            row = {"run": run.run_id, **search["best"], "trials": search["trials"], "seeds": final["seeds"]}
            metrics = config.study_module(run.study).METRICS
            rows.append(row | {name: final[name] for name in metrics if final.get(name) is not None})
    return pd.DataFrame(rows)


def aggregate_metrics(planned: list) -> dict:
    """Of a study's runs (config.Run), in the published form: primary_metric by its published name; metrics {name:
    {run_id: value}}, value being the mean over seeds of the run's cell chosen on validation; best_proposed and
    best_baseline {run_id, value}; gap in percent of the best baseline, positive where the proposed method is better.
    These three are of the leading one of `groups`, each a model and data set (and budget). While answers of a group are
    not graded, its three are null and `graded_by` is the command. Also members {run_id: {role, cell, members ...}}.
    """
    study, runs = config.study_module(planned[0].study), run_metrics(planned[0].results_dir)
    runs = {run.run_id: runs[run.run_id] for run in planned if run.run_id in runs}
    groups: dict[str, list] = {}
    for run in planned:
        groups.setdefault(_group(run, study.GROUP), []).append(run)
    compared = {name: _compare(study, group, runs) for name, group in groups.items()}
    lead = min(groups, key=lambda name: study.LEADS not in name)
    first = compared[lead]
    names = dict.fromkeys([first["primary_key"], *(name for own in runs.values() for name in own["metrics"])])
    metrics = {name: {i: own["metrics"].get(name) for i, own in runs.items()} for name in names}
    metrics = {first["primary_metric"]: metrics[first["primary_key"]]} | metrics
    kept = ("role", "chosen_on", "members")
    members = {i: {"cell": own["chosen_cell"]} | {k: own[k] for k in kept} for i, own in runs.items()}
    return {**first, "group": lead, "metrics": metrics, "groups": compared, "members": members}


def _group(run, keys: Sequence[str]) -> str:
    """Qwen3-0.6B, gsm8k, 30 budget minutes."""
    values = [(key.rpartition(".")[2].replace("_", " "), config.get(config.dump(run), key)) for key in keys]
    return ", ".join(Path(v).name if isinstance(v, str) else f"{v:g} {k}" for k, v in values if v is not None)


def _compare(study, group: list, runs: Mapping[str, dict]) -> dict:
    """A group's part of aggregate_metrics."""
    rows, key = [runs[run.run_id] for run in group if run.run_id in runs], study.primary_metric(group[0])
    sides = [[row for row in rows if row["role"] == role] for role in ("proposed", "comparative")]
    graded_by = {row["key_metric"].get("graded_by") for row in (*sides[0], *sides[1])} - {None}
    best, sign = [], -1 if study.METRICS[key] == "minimize" else 1
    for side in sides:
        own = [{"run_id": row["run_id"], "value": row["metrics"].get(key)} for row in side if not graded_by]
        best.append(max((r for r in own if r["value"] is not None), key=lambda r: sign * r["value"], default=None))
    (proposed, baseline), gap = best, None
    if proposed and baseline and baseline["value"]:
        gap = sign * (proposed["value"] - baseline["value"]) / abs(baseline["value"]) * 100
    named = {"primary_metric": study.published_name(group[0]), "primary_key": key}
    named |= {"best_proposed": proposed, "best_baseline": baseline, "gap": gap}
    return named | {"graded_by": next(iter(graded_by), None), "runs": [row["run_id"] for row in rows]}
