"""The paper's scale from `full` to verdicts, with searches on: what a search finds is what claims, aggregated metrics, the
table of tuned runs, W&B and the model cards speak of. Models and data are tiny stand-ins."""

import json

import numpy as np
import pytest
import yaml

from lib import config, record, tables
from lib.graff import prepare
from lib.iw_lora import data
from lib.made import write_stand_in
from lib.run import members, runs
from tests.conftest import PATIENCE, ROOT
from tests.test_judging_path import run
from tests.test_tracking import PROJECT, server  # noqa: F401 (a fixture)
from tests.wandb_server import ENTITY

TRIALS, SEEDS = 4, [42, 43, 44]
SMALL = {
    "model.revision": None, "dataset.revision": None, "compute.gpus": 0, "compute.threads": 1, "optuna.n_trials": TRIALS,
    "seed_list": SEEDS, "wandb": {"entity": ENTITY, "project": PROJECT, "mode": "online"},
}  # fmt: skip


def write_runs(place, study, names, changes):
    """The shipped YAMLs of these runs with `changes` {dotted key: value}; returns their folder."""
    for name in names:
        raw = config.load_yaml(ROOT / "params" / study / "paper" / f"{name}.yaml")
        for key, value in {**SMALL, **changes, **names[name]}.items():
            config.put(raw, key, value) if "." in key else raw.update({key: value})
        raw["compute"].pop("min_gpu_memory_gb", None)
        record.write_text(place / "params" / study / "paper" / f"{name}.yaml", yaml.safe_dump(raw))
    return place / "params"


def full(place, study, names, changes, claims):
    """Execute it, twice; returns the study's results and what the first said."""
    params = write_runs(place, study, names, changes)
    chosen = ("full", "--scale", "paper", "--params", str(params), "--claims", claims, "--jobs", "2")
    said = run(place, *chosen)
    assert "nothing to do" in run(place, *chosen), "all is cached"
    (results,) = (place / "outputs").glob(f"paper-full*/{study}")
    return results, said


def assert_agree(results, wandb, metric_of):
    """All that speaks of a run speaks of its tuned members, in the same numbers. metric_of: {claim metric: member's}."""
    planned = runs.planned(results)
    verdicts = {claim["id"]: claim for claim in record.read_json(results / "comparison" / "claims.json")}
    total = record.read_json(results / "comparison" / "aggregated_metrics.json")
    table = tables.tuned_runs(planned).set_index("run")
    published = {c["id"]: c for c in config.load_yaml(ROOT / "params" / results.name / "claims.yaml")["claims"]}
    notebook = (results / "comparison" / "analysis.ipynb").read_text()
    assert list(table.index) == [each.run_id for each in planned if each.optuna.n_trials]
    for each in planned:
        if not each.optuna.n_trials:
            continue
        folder, name = results / each.run_id, each.run_id
        members = {s: record.read_json(folder / "members" / f"tuned-s{s}" / "metrics.json") for s in SEEDS}
        search, own = record.read_json(folder / "sweep" / "metrics.json"), record.read_json(folder / "metrics.json")
        assert (search["trials"], own["chosen_cell"], total["members"][name]["cell"]) == (TRIALS, "tuned", "tuned")
        trained = record.read_json(folder / "members" / "tuned-s42" / "member.json")
        best = {key: config.get(trained["config"], key) for key in search["cell"]}
        assert best == search["cell"], "frozen before its judged seeds"
        assert not {f"tuned-s{seed}" for seed in each.pilot_seeds} & set(own["members"])
        ids = [key for key, sent in wandb.runs.items() if sent["displayName"] == name]
        (final,) = (json.loads(wandb.runs[key]["summary"]) for key in ids)
        for metric in (name for name in metric_of.values() if own["metrics"].get(name) is not None):
            mean = np.mean([values[metric] for values in members.values()])
            assert own["metrics"][metric] == pytest.approx(mean)
            assert total["metrics"][metric][name] == final[metric] == own["metrics"][metric]
            if metric in table:
                assert table.loc[name, metric] == own["metrics"][metric]
                assert f"{own['metrics'][metric]:.6f}".rstrip("0") in notebook, (name, metric)
            for seed, values in members.items():
                (card,) = (folder / "members" / f"tuned-s{seed}" / "checkpoints").glob("checkpoint-*/README.md")
                assert f"| {metric} | {values[metric]:.6g} |" in card.read_text()
                assert all(f"{name} **{v['verdict']}**" in card.read_text() for name, v in verdicts.items())
    for name, verdict in verdicts.items():
        sides = [published[name][side] for side in ("treatment", "baseline") if published[name].get(side)]
        if verdict["estimate"] is None or "across" in published[name] or any("tuned" not in s.values() for s in sides):
            continue
        values = [total["metrics"][metric_of[verdict["metric"]]][side["run_id"]] for side in sides]
        other = values[1] if len(values) > 1 else published[name]["reported"]
        factor = published[name].get("factor", 1.0) ** (2 / 3)
        assert verdict["estimate"] == pytest.approx(values[0] - factor * other), name
        assert verdict["n_seeds"] == len(SEEDS)
    return verdicts


def write_glue(folder):
    """GLUE's three tasks in its files, of generated entailment; MNLI's third label is a doubt."""
    rows, texts = data.generate(240, 0), []
    texts = [row[side] for row in rows for side in ("text_a", "text_b")]
    for task, columns in data.COLUMNS.items():
        splits = {"train": rows[:160], "validation": rows[160:]}
        if task == "mnli":
            splits = {"train": rows[:160], "validation_matched": rows[160:200], "validation_mismatched": rows[200:]}
        for split, own in splits.items():
            made = [{columns[0]: row["text_a"], columns[-1]: row["text_b"], "label": row["label"]} for row in own]
            if task == "mnli":
                made = [{**row, "label": 1 if i % 5 == 0 else 2 * row["label"]} for i, row in enumerate(made)]
            record.write_jsonl(folder / task / f"{split}.jsonl", made)
    return texts


@pytest.mark.slow
@pytest.mark.timeout(6 * PATIENCE)
def test_iw_lora_is_judged_by_what_its_searches_find(tmp_path, server):  # noqa: F811
    texts = write_glue(tmp_path / "glue")
    write_stand_in("microsoft/deberta-v3-base", tmp_path / "deberta", texts, vocab_size=384)
    changes = {
        "model.name": str(tmp_path / "deberta"), "dataset.name": str(tmp_path / "glue"), "dataset.max_seq_length": 64,
        "dataset.tuning_fraction": 0.2, "training.max_steps": 8, "training.bf16": False, "training.logging_steps": 4,
        "optuna.objective_metric": "tuning_loss", "optuna.direction": "minimize",
    }  # fmt: skip
    lora, iw_lora = "comparative-1-{}_lora", "proposed-{}_iw_lora"
    names = {name.format(task): {} for task in data.COLUMNS for name in (lora, iw_lora)}
    for name, own in names.items():
        own |= {"loss.sensitivity_warmup_steps": 2} if name.endswith("iw_lora") else {}
    asked = ",".join(f"iw_lora/{claim}" for claim in ("C4", "C8", "C12", "C13", "C19", "C21", "C26"))
    results, said = full(tmp_path, "iw_lora", names, changes, asked)
    order = [said.index(f"iw_lora/comparative-1-rte_lora{more}  ") for more in (" sweep", "")]
    assert order == sorted(order), "the search before what it finds"
    measured = {"accuracy": "validation_accuracy", "f1": "validation_f1", "loss": "validation_loss"}
    verdicts = assert_agree(results, server, measured)
    total = record.read_json(results / "comparison" / "aggregated_metrics.json")["metrics"]
    gains = []
    for task, metric in (("mnli", "accuracy"), ("sst2", "accuracy"), ("rte", "f1")):
        of = total[measured[metric]]
        gains.append(of[iw_lora.format(task)] - of[lora.format(task)])
    assert verdicts["C12"]["estimate"] == pytest.approx(np.mean(gains))
    assert verdicts["C8"]["estimate"] == pytest.approx(gains[2])
    assert verdicts["C19"]["estimate"] == pytest.approx(total["validation_f1"]["comparative-1-rte_lora"] - 0.72)
    assert verdicts["C26"]["n_seeds"] == 8, "processes"
    assert 1 < verdicts["C26"]["estimate"] < 3
    assert verdicts["C5"]["verdict"] == "not evaluated"
    assert "--claims iw_lora/C5 searches" in verdicts["C5"]["reason"]


@pytest.mark.slow
@pytest.mark.timeout(6 * PATIENCE)
def test_graff_is_judged_by_what_its_searches_find(tmp_path, server, monkeypatch):  # noqa: F811
    problems = prepare.generate_problems(40, 0, 2, 10)
    texts = [row[part] for row in problems for part in ("question", "answer")]
    write_stand_in("Qwen/Qwen3-0.6B", tmp_path / "qwen", texts, vocab_size=384)
    changes = {
        "model.name": str(tmp_path / "qwen"), "dataset.name": "generated", "dataset.train_examples": 200,
        "dataset.test_examples": 12, "dataset.dev_size": 12, "dataset.gsm1k": None, "dataset.max_tokens": 256,
        "training.budget_minutes": 1, "training.clock": "virtual", "training.global_batch_size": 8,
        "training.micro_batch_size": 8, "training.gradient_checkpointing": False, "evaluation.dev_subset": 6,
        "evaluation.max_new_tokens": 6, "evaluation.energy_level": None,
        "optuna.objective_metric": "dev_loss", "optuna.direction": "minimize",
    }  # fmt: skip
    names = {"comparative-2-fixed_30": {}, "comparative-1-reactor_30": {}, "proposed-graff_30": {}}
    # what members share, but with a warm start of two batches: the published one trains 71 M parameters
    monkeypatch.setattr(members, "CACHE", tmp_path / "cache")
    path = write_runs(tmp_path, "graff", names, changes) / "graff" / "paper" / "comparative-2-fixed_30.yaml"
    one = config.load_run(path, scale="paper", mode="full")
    shared = members.inputs_folder(one)
    shared.mkdir(parents=True)
    loaded = prepare.prepare(one, shared)
    prepare.warm_start(shared / "warm_start.safetensors", "paper", trial=True, loaded=loaded)
    record.write_json(shared / "complete.json", {"seconds": 1.0, "scale": "paper", "mode": "full"})
    results, said = full(tmp_path, "graff", names, changes, "C6,C8,C12,C13")
    assert said.index("graff/proposed-graff_30 sweep") < said.index("graff/proposed-graff_30  ")
    verdicts = assert_agree(results, server, {"exact_match": "exact_match", "auc": "auc", "loss": "dev_loss"})
    assert {verdicts[name]["n_seeds"] for name in ("C6", "C8", "C12", "C13")} == {3}
    assert verdicts["C18"]["verdict"] == "not evaluated", "of the published rate, which nothing here asked for"
