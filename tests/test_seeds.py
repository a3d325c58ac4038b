"""A seed is a complete repetition: what is drawn anew by each one, what all of them are judged on, and what is cached."""

import json

import pytest

from lib import config, data, record, tables
from lib.errors import StudyError
from lib.run import decide, keys, members, plan, runs, sweep

STUDIES = {"td_dpo": ("pairs", "test"), "iw_lora": ("texts", "validation"), "graff": ("problems", "test")}


def laptop(study: str, mode="full", **overrides) -> list:
    """The study's runs at laptop scale."""
    folder = config.ROOT / "params" / study / "laptop"
    return [
        config.load_run(path, scale="laptop", mode=mode, overrides=overrides) for path in sorted(folder.glob("*.yaml"))
    ]


def contents(folder) -> dict:
    """{name: bytes} of a preparation, but for the report, which names the folder."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "report.json"}


@pytest.mark.parametrize("study", STUDIES)
def test_seeds_differ_in_all_but_the_judged_rows_and_one_seed_is_the_same_every_time(study, tmp_path):
    run, made = laptop(study, mode="trial")[0], {}
    for name, seed in (("one", 42), ("again", 42), ("other", 43)):
        made[name] = tmp_path / name
        made[name].mkdir()
        config.study_module(study).prepare(config.cell_members(run, config.first_cell(run), [seed])[0].run, made[name])
    assert contents(made["one"]) == contents(made["again"])
    file, judged = STUDIES[study]
    one, other = (json.loads((made[name] / f"{file}.json").read_text()) for name in ("one", "other"))
    assert one.pop(judged) == other.pop(judged)
    assert all(rows != other[split] for split, rows in one.items() if rows)
    changed = ["base/model.safetensors"] + ["warm_start.safetensors"] * (study == "graff")
    assert all((made["one"] / name).read_bytes() != (made["other"] / name).read_bytes() for name in changed)


@pytest.mark.parametrize("study", STUDIES)
def test_the_arms_of_a_seed_share_its_preparation_and_another_seed_has_its_own(study):
    folders = {}
    for run in laptop(study):
        for member in config.members(runs.settle(run, guess=True)):
            folders.setdefault(member.seed, set()).add(members.inputs_folder(member.run))
    assert {len(each) for each in folders.values()} == {1}
    assert len(set.union(*folders.values())) == len(folders) >= 20


def test_pairs_of_sampled_answers_depend_on_how_long_these_may_be():
    """Of generated pairs they do not, and a reference is not computed again for them."""
    asked = {}
    for scale in ("small", "laptop"):
        path = config.ROOT / f"params/td_dpo/{scale}/dpo.yaml"
        runs_of = [
            config.load_run(path, scale=scale, mode="full", overrides={"evaluation.max_new_tokens": n})
            for n in ("48", "96")
        ]
        asked[scale] = {keys.inputs_key(config.members(run)[0].run) for run in runs_of}
    assert [len(asked[scale]) for scale in asked] == [2, 1]


@pytest.mark.parametrize("study", STUDIES)
def test_adding_seeds_changes_no_member_that_stands(study):
    run = next(runs.settle(run, guess=True) for run in laptop(study) if run.role == "proposed")
    few = {m.id: keys.member_key(m)["all"] for m in config.members(config.apply(run, {"seed_list": [42, 43]}))}
    more = {m.id: keys.member_key(m)["all"] for m in config.members(run)}
    assert few.items() < more.items()


def test_a_seed_that_a_yaml_names_is_every_members():
    (run,) = [run for run in laptop("graff", **{"dataset.split_seed": "7"}) if run.run_id == "graff_cold"]
    found = {(m.run.dataset.split_seed, m.run.model.recipe.seed == m.seed) for m in config.members(run)}
    assert found == {(7, True)}
    published = config.load_run(
        config.ROOT / "params/iw_lora/paper/proposed-rte_iw_lora.yaml", scale="paper", mode="full"
    )
    assert {m.run.dataset.split_seed for m in config.members(published)} == {0}
    assert len({members.inputs_folder(m.run) for m in config.members(published)}) == 1


def test_of_given_data_the_judged_part_is_set_apart_first_whatever_the_seed():
    rows = [data.Row("train.jsonl", i, {"text": f"row {i}"}) for i in range(200)]

    def splits(seed: int) -> dict:
        parse, section = lambda row, _: row, {"split_seed": seed, "validation_fraction": 0.2}
        wanted = ("test", "validation", "train")
        return data.make_splits({"train": rows}, wanted, parse, lambda row: row["text"], "rows", section)[0]

    one, other = splits(42), splits(43)
    assert one["test"] == other["test"]
    assert one["validation"] != other["validation"]
    assert sorted(str(row) for split in one.values() for row in split) == sorted(str(row.value) for row in rows)


# ---- pilots: seeds that choose a cell and are never judged


def finish(run, scores: dict) -> None:
    """The records of the run's members that are to be trained, with `scores` {cell: validation score}."""
    for m in config.members(run):
        folder = run.results_dir / run.run_id / "members" / m.id
        if members.stale(m, folder):
            score = scores[m.cell_name] + m.seed / 1e6
            metrics = {
                "status": "completed",
                "validation_implicit_accuracy": score,
                "oracle_score": score,
                "seconds": 1.0,
            }
            spec = {"config": config.dump(m.run), "run_id": run.run_id, "study": run.study, "seed": m.seed}
            record.write_json(folder / "member.json", {**spec, "cell": m.cell, "cell_name": m.cell_name})
            record.write_json(folder / "metrics.json", metrics)
            record.write_jsonl(folder / "predictions.jsonl", [{"kind": "answer", "question": 1, "score": score}])
            done = {"run_id": run.run_id, "status": "completed", "key": keys.member_key(m)}
            record.write_json(folder / "done.json", done)


PILOTS = [{"product": {"beta": [0.05, 0.5]}, "pilot": True}]


def test_pilots_choose_the_cell_that_is_judged_and_more_seeds_leave_the_choice(tiny):
    run = tiny(pilot_seeds=[8, 9], grid=PILOTS)
    assert [m.id for m in config.members(run)] == ["beta0.05-s8", "beta0.05-s9", "beta0.5-s8", "beta0.5-s9"]
    assert all(m.pilot for m in config.members(run))
    assert runs.settle(run) is run
    step = plan.steps([run])[0]
    assert step.members == 4 + 2, "the pilots, and the chosen cell with each seed"
    assert len(step.inputs) == 4

    finish(run, {"beta0.05": 0.6, "beta0.5": 0.7})
    settled = runs.settle(run)
    judged = [m for m in config.members(settled) if not m.pilot]
    assert [m.id for m in judged] == ["beta0.5-s1", "beta0.5-s2"]
    assert runs.settle(settled) is settled
    (step, *_) = plan.steps([run])
    assert step.members == 2
    before = step.key

    finish(settled, {"beta0.05": 0.9, "beta0.5": 0.1})  # a judged score never changes the choice
    assert runs.settle(run) == settled
    more = runs.settle(config.apply(run, {"seed_list": [1, 2, 3]}))
    late = [m.id for m in config.members(more) if members.stale(m, run.results_dir / "tiny" / "members" / m.id)]
    assert late == ["beta0.5-s3"]
    assert plan.steps([run])[0].key == before


def test_pilots_are_marked_and_nothing_of_them_is_judged(tiny):
    run = tiny(pilot_seeds=[8, 9], grid=[*PILOTS, {"cells": [{"beta": 0.05}], "seeds": [1]}])
    finish(run, {"beta0.05": 0.8, "beta0.5": 0.4})
    settled = runs.settle(run)
    finish(settled, {"beta0.05": 0.2})
    every = config.members(settled)
    loaded = tables.load(run.results_dir, every)
    assert dict(zip(loaded.members["seed"], loaded.members["pilot"], strict=True)) == {
        8: True,
        9: True,
        1: False,
        2: False,
    }
    assert set(loaded.answers["seed"]) == {1, 2}
    folders = {m.id: run.results_dir / "tiny" / "members" / m.id for m in every}
    records = members.collect(members.Job(run, every, folders, {}))
    found = runs.summary(settled, records)
    assert found["chosen_cell"] == "beta0.05"
    assert found["metrics"]["oracle_score"] == pytest.approx((0.8 + 0.2) / 2, abs=1e-4), (
        "the mean over judged seeds alone"
    )
    pilots = [(row["cell"], row["pilot"], row["seeds"]) for row in runs.by_cell(records, [])]
    assert pilots == [("beta0.05", True, 2), ("beta0.05", False, 2), ("beta0.5", True, 2)]


def test_each_block_of_pilots_chooses_one_cell_for_its_own_seeds(tiny):
    blocks = [{"product": {"beta": [beta], "tau": [0.5, 1.0]}, "pilot": True} for beta in (0.05, 0.5)]
    run = tiny(pilot_seeds=[8, 9], grid=[blocks[0], {**blocks[1], "seeds": [2]}])
    finish(run, {"beta0.05-tau0.5": 0.2, "beta0.05-tau1": 0.3, "beta0.5-tau0.5": 0.9, "beta0.5-tau1": 0.1})
    judged = [m.id for m in config.members(runs.settle(run)) if not m.pilot]
    assert judged == ["beta0.05-tau1-s1", "beta0.05-tau1-s2", "beta0.5-tau0.5-s2"]


def test_more_seeds_are_asked_for_what_pilots_choose_whichever_cell_that_is(tiny):
    run = tiny(pilot_seeds=[8, 9], grid=[*PILOTS, {"cells": [{"beta": 1}]}])
    assert decide.recorded(run) == {}
    asked = config.with_seeds(run, {config.BEST: [1], "beta1": [1, 2]})
    finish(asked, {"beta0.05": 0.6, "beta0.5": 0.7, "beta1": 0.1})
    judged = [m.id for m in config.members(runs.settle(asked)) if not m.pilot]
    assert sorted(judged) == ["beta0.5-s1", "beta1-s1", "beta1-s2"]
    record.write_json(run.results_dir / "tiny" / "config.yaml", config.dump(asked))  # as a notebook begins
    assert decide.recorded(run) == {"beta1": [1, 2], config.BEST: [1]}
    assert not any(m.pilot for m in config.members(config.with_seeds(run, {"beta1": [1]}))), "nothing is to be chosen"


def test_a_trial_has_no_pilots_and_a_search_asks_a_pilot_seed(tiny):
    search = {"n_trials": 3, "search_space": {"beta": {"type": "loguniform", "low": 0.01, "high": 1}}}
    run = tiny(pilot_seeds=[8, 9], grid=PILOTS, optuna=search)
    assert [m.id for m in config.members(config.trial(run))] == ["beta0.05-s1"]
    assert sweep.trial_member(run, {"beta": 0.5})[1] == "members"
    assert [sweep.trial_member(run, {"beta": beta})[0].seed for beta in (0.5, 0.2)] == [8, 8]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": PILOTS}, "pilot_seeds: missing"),
        ({"grid": PILOTS, "pilot_seeds": [2, 9]}, r"pilot_seeds: \[2\]"),
        ({"grid": [*PILOTS, {"cells": [{"beta": 1}], "seeds": [8]}], "pilot_seeds": [8]}, r"pilot_seeds: \[8\]"),
    ],
)
def test_pilot_seeds_are_given_and_no_judged_ones(tiny, changes, said):
    with pytest.raises(StudyError, match=said):
        tiny(**changes)
