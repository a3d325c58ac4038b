"""A seed is a complete repetition: what is drawn anew by each one, what all of them are judged on, and what is cached."""

import json

import pytest

from lib import config, data
from lib.run import keys, members

STUDIES = {"td_dpo": ("pairs", "test"), "iw_lora": ("texts", "validation"), "graff": ("problems", "test")}


def laptop(study: str, mode="full", **overrides) -> list:
    """The study's runs at laptop scale."""
    folder = config.ROOT / "params" / study / "laptop"
    return [
        config.load_run(path, scale="laptop", mode=mode, overrides=overrides or None)
        for path in sorted(folder.glob("*.yaml"))
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
        config.study_module(study).prepare(config.member(run, config.first_cell(run), seed).run, made[name])
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
        for member in config.members(run):
            folders.setdefault(member.seed, set()).add(members.inputs_folder(member.run))
    assert {len(each) for each in folders.values()} == {1}
    assert len(set.union(*folders.values())) == len(folders) >= 20


@pytest.mark.parametrize("study", STUDIES)
def test_adding_seeds_changes_no_member_that_stands(study):
    run = next(run for run in laptop(study) if run.role == "proposed")
    few = {m.id: keys.member_key(m)["all"] for m in config.members(config.apply(run, {"seed_list": [42, 43]}))}
    more = {m.id: keys.member_key(m)["all"] for m in config.members(run)}
    assert few.items() < more.items()


def test_a_seed_that_a_yaml_names_is_every_members():
    (run,) = [run for run in laptop("iw_lora", **{"dataset.split_seed": "7"}) if run.run_id == "lora"]
    found = {(m.run.dataset.split_seed, m.run.model.recipe.seed == m.seed) for m in config.members(run)}
    assert found == {(7, True)}
    published = config.load_run(config.ROOT / "params/iw_lora/paper/rte_lora.yaml", scale="paper", mode="full")
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
