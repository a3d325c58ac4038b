"""The audit of a run's data: every count against data made to hold it, where it is shown; splits that end empty; and
each cure that a message suggests, executed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lib import config, data, hub, record
from lib.errors import MissingError, StudyError
from lib.run import check, cli, members, model_card, pages
from tests.conftest import TINY
from tests.test_data import assistant, user, write_jsonl

YAMLS = {"td_dpo": "td_dpo", "graff": "graff_cold", "iw_lora": "iw_lora"}


def run_of(study: str, name: Path | str, mode: str = "full", **overrides):
    """The first member's run of the study on this data."""
    sets = {"dataset.name": json.dumps(str(name)), **({"dataset.subset": "rte"} if study == "iw_lora" else {})}
    if study == "graff":
        sets["dataset.dev_size"] = "4"
    path = config.ROOT / "params" / study / "laptop" / f"{YAMLS[study]}.yaml"
    sets |= {key.replace("__", "."): str(value) for key, value in overrides.items()}
    run = config.load_run(path, scale="laptop", mode=mode, overrides=sets)
    return config.seeded(run, run.seed_list[0])


def audit(study: str, name: Path | str, **overrides) -> dict:
    return config.study_module(study).audit(run_of(study, name, **overrides))


def pair(i: int, chosen: str = "", rejected: str = "", **more) -> dict:
    return {
        "prompt": f"Request number {i}",
        "chosen": chosen or f"good {i}",
        "rejected": rejected or f"bad {i}",
        **more,
    }


def problem(i: int, number: int | str = "") -> dict:
    return {"question": f"What is {i}?", "answer": f"It is so.\n#### {number or i}"}


def example(i: int, label: int | str = "") -> dict:
    return {"sentence1": f"Fact {i}.", "sentence2": "It holds.", "label": i % 2 if label == "" else label}


MAKERS = {"td_dpo": pair, "graff": problem, "iw_lora": example}


def counts(found: dict) -> dict[str, dict[str, int]]:
    """{split: {kind: count}} of what is above zero."""
    every = {split: {kind: each["count"] for kind, each in kinds.items()} for split, kinds in found["counts"].items()}
    return {split: own for split, kinds in every.items() if (own := {kind: n for kind, n in kinds.items() if n})}


# ---- what it counts


@pytest.mark.parametrize("study", MAKERS)
def test_splits_with_the_same_rows_are_a_warning_with_the_count(tmp_path, study):
    """Train, validation and test hold the same rows but for case and spaces; IW-LoRA has no test split."""
    rows = [MAKERS[study](i) for i in range(30)]
    for split in ("train", "validation", "test"):
        loud = [{key: text.upper() + " " if key in ("prompt", "question", "sentence1") else text for key, text in row.items()}
                for row in rows]  # fmt: skip
        write_jsonl(tmp_path / f"{split}.jsonl", rows if split == "train" else loud)
    found = audit(study, tmp_path, dataset__on_bad_row="drop")
    judged = {"td_dpo": "test", "graff": "test", "iw_lora": "validation"}[study]
    others = sum(
        found["counts"][judged][f"in_{other}"]["count"] for other in ("train", "tuning") if other in found["rows"]
    )
    assert others == 30
    assert any(f"{judged}: " in text and "are also in train (rows 0, " in text for text in found["warnings"])
    assert found["carved_from_train"] == {}


def test_every_count_of_pairs_is_of_what_was_put_in(tmp_path):
    rows = [pair(i) for i in range(40)]
    rows[7] = pair(3)  # repeats row 3
    rows[9] = pair(4, rejected="GOOD 4", chosen="bad  4")  # row 4 turned round
    rows[12] = pair(12, chosen="use <|eos|> here")
    rows[20]["chosen"] = rows[20]["rejected"]
    rows[31]["chosen"] = " "
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "validation.jsonl", [pair(i) for i in range(100, 104)] + [pair(5)])
    write_jsonl(tmp_path / "test.jsonl", [pair(i, chosen="long " * 900) for i in range(200, 203)] + [pair(210)])
    found = audit("td_dpo", tmp_path, dataset__on_bad_row="drop")
    assert found["rows"] == {"train": 38, "validation": 5, "test": 4}
    assert found["dropped"]["count"] == 2
    assert {fault["reason"]: fault["rows"] for fault in found["dropped"]["reasons"]} == {
        "identical chosen and rejected": [20], "empty chosen": [31]}  # fmt: skip
    assert counts(found) == {
        "train": {"duplicates": 1, "contradictory": 1, "special_tokens": 1},
        "validation": {"in_train": 1},
        "test": {"truncated": 3, "eos_dropped": 3},
    }
    assert found["counts"]["train"]["duplicates"]["first"] == [7]
    assert found["counts"]["validation"]["in_train"]["first"] == [4]
    assert found["turns"] == {"user": 47, "assistant": 47}
    assert found["tokens"]["test"]["chosen"]["longest"] > found["tokens"]["train"]["chosen"]["longest"] > 0
    assert len(found["warnings"]) == 2 + 6
    assert found["columns"] == {"used": ["chosen", "prompt", "rejected"], "left_over": []}


def test_contradictions_and_labels_of_the_other_studies(tmp_path):
    write_jsonl(tmp_path / "p" / "train.jsonl", [*(problem(i) for i in range(30)), problem(3, "1,003"), problem(4)])
    found = audit("graff", tmp_path / "p", dataset__dev_size=1)
    both = [
        sum(counts(found).get(split, {}).get(kind, 0) for split in found["rows"])
        for kind in ("contradictory", "duplicates")
    ]
    crossed = [kind for kinds in counts(found).values() for kind in kinds if kind.startswith("in_")]
    assert sum(both) + len(crossed) >= 2, "each in one split, or in two"
    write_jsonl(tmp_path / "e" / "train.jsonl", [example(i, 0) for i in range(40)])
    found = audit("iw_lora", tmp_path / "e")
    assert found["labels"]["train"]["not_entailment"] == 0
    assert "train: no row has the label not_entailment" in found["warnings"]


def test_a_validation_split_is_dev_and_nothing_of_train_is_set_apart(tmp_path):
    for split, rows in (("train", range(30)), ("dev", range(30, 41)), ("test", range(50, 55))):
        write_jsonl(tmp_path / f"{split}.jsonl", [problem(i) for i in rows])
    found = audit("graff", tmp_path)
    assert (found["rows"], found["carved_from_train"]) == ({"train": 30, "dev": 11, "test": 5}, {})
    (tmp_path / "dev.jsonl").unlink()
    assert audit("graff", tmp_path)["rows"] == {"train": 26, "dev": 4, "test": 5}


# ---- where it is shown


def test_it_is_in_check_the_record_the_card_and_the_index(tmp_path, monkeypatch, capsys):
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [*(pair(i) for i in range(40)), pair(1, id="x"), pair(2, rejected="good 2")]
    )
    section = {"name": str(rows), "on_bad_row": "drop"}
    write_yaml(tmp_path / "params" / "td_dpo" / "laptop" / "tiny.yaml", {**TINY, "dataset": section})
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path / "outputs")
    options = cli.parser().parse_args(["check", "--static", "--params", str(tmp_path / "params")])
    options.mode, options.scale = "full", "laptop"
    findings = list(check.audit_findings(check.runs_of(cli.select_runs(options))))
    said = capsys.readouterr().err
    assert "rows of " in said
    assert "left over: id" in said
    (dropped, repeated) = sorted(findings, key=lambda finding: "repeat" in finding.what)
    assert (dropped.level, repeated.level) == ("warning", "warning")
    assert "identical chosen and rejected (row 41" in dropped.what

    (run,) = check.runs_of(cli.select_runs(options))
    folder = tmp_path / "outputs" / "laptop-full" / "td_dpo" / "tiny"
    found = members.audit(run, folder)
    assert record.read_json(folder / "audit.json") == found
    assert found["warnings"] == [finding.what for finding in findings]
    record.write_json(folder / "status.json", {"status": "succeeded"})
    index = pages.index_html(tmp_path / "outputs").read_text()
    assert "⚠ 2 about its data" in index
    member = folder / "members" / "default-s1"
    checkpoint = member / "checkpoints" / "checkpoint-1"
    spec = {"run_id": "tiny", "member": "default-s1", "seed": 1, "study": "td_dpo", "scale": "laptop", "mode": "full"}
    record.write_json(checkpoint / "adapter_config.json", {"peft_type": "LORA"})
    card = model_card.card(
        checkpoint, 1, member, {**spec, "config": config.dump(run)}, {"steps": 1, "status": "completed"}
    )
    assert all(f"- {text}" in card for text in found["warnings"])


def write_yaml(path: Path, content: dict) -> None:
    import yaml

    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(content))


def test_bad_data_keeps_a_run_from_starting(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [pair(0), pair(1, context="told before")])
    write_yaml(tmp_path / "params" / "td_dpo" / "laptop" / "tiny.yaml",
               {**TINY, "dataset": {"name": str(tmp_path / "rows.jsonl")}})  # fmt: skip
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path / "outputs")
    assert cli.main(["full", "--scale", "laptop", "--params", str(tmp_path / "params")]) == 2
    said = capsys.readouterr().err
    assert "rows.jsonl: 1 row: context, which this study does not read (row 1" in said
    assert "nothing was started" in said
    assert not list(tmp_path.glob("outputs/*/*/*"))


# ---- every cure of a message, executed

PLACE = re.compile(r"<[^>]*>|FILE|DIR")


def cures(message: str) -> list[tuple[str, str]]:
    """[(key, value)] of each --set that the message suggests."""
    return [(key, value.rstrip(",;.")) for key, value in re.findall(r"--set ([\w.]+)=(<[^>]+>|[^\s]+)", message)]


def rows_of(study: str, **more) -> list[dict]:
    return [{**MAKERS[study](i), **more} for i in range(20)]


def renamed(study: str, old: str, new: str) -> list[dict]:
    return [{(new if key == old else key): value for key, value in row.items()} for row in rows_of(study)]


def one_bad(study: str, column: str) -> list[dict]:
    rows = rows_of(study)
    rows[3][column] = None
    return rows


LONG = "word " * 700
CURES = {  # study, rows, further settings, what stands for a placeholder in the cure
    "a bad row, pairs": ("td_dpo", one_bad("td_dpo", "chosen"), {}, ""),
    "a bad row, problems": ("graff", one_bad("graff", "answer"), {}, ""),
    "a bad row, examples": ("iw_lora", one_bad("iw_lora", "label"), {}, ""),
    "a column with a meaning, pairs": ("td_dpo", rows_of("td_dpo", context="x y"), {}, ""),
    "a column with a meaning, problems": ("graff", rows_of("graff", system="x y"), {}, ""),
    "a column with a meaning, examples": ("iw_lora", rows_of("iw_lora", images=["x"]), {}, ""),
    "another name, answers": ("td_dpo", renamed("td_dpo", "chosen", "better"), {}, "better"),
    "another name, prompts": ("td_dpo", renamed("td_dpo", "prompt", "query"), {}, ""),
    "another name, problems": ("graff", renamed("graff", "question", "problem"), {}, "problem"),
    "another name, examples": ("iw_lora", renamed("iw_lora", "sentence1", "text"), {}, "text"),
    "a mapped column that is not there": ("td_dpo", rows_of("td_dpo"), {"dataset__columns__prompt": "ask"}, "prompt"),
    "prompts that leave no room": ("td_dpo", [pair(i, prompt=f"{i} {LONG}") for i in range(20)], {}, ""),
    "questions that leave no room": ("graff", rows_of("graff"), {"dataset__max_tokens": 8}, ""),
    "a split that is not there": ("iw_lora", None, {"dataset__splits__validation": "dev2"}, "validation"),
    "a missing file": ("td_dpo", "gone.jsonl", {}, "rows.jsonl"),
    "a folder of folders": ("td_dpo", "folders", {}, ""),
    "a task that the name does not tell": ("iw_lora", rows_of("iw_lora"), {"dataset__subset": "null"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CURES)
def test_what_a_message_suggests_is_what_cures_it(tmp_path, monkeypatch, case):
    study, rows, sets, place = CURES[case]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows if isinstance(rows, list) else rows_of(study))
    if rows is None:
        path = tmp_path / "splits"
        for split in ("train", "validation", "test"):
            write_jsonl(path / f"{split}.jsonl", rows_of(study))
    elif rows == "folders":
        path = tmp_path / "folders"
        for name in ("helpful-base", "harmless base"):
            write_jsonl(path / name / "train.jsonl", rows_of(study))
    elif isinstance(rows, str):
        path = tmp_path / rows
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError) as caught:
        audit(study, path, **sets)
    assert not isinstance(caught.value, MissingError)
    found = cures(str(caught.value))
    assert found, str(caught.value)
    for key, value in found:
        value = PLACE.sub(place or "?", value)
        if value == "?" or (case == "a folder of folders" and value.endswith("harmless")):  # a name with a space
            continue
        audit(study, path, **(sets | {key.replace(".", "__"): value}))


@pytest.mark.parametrize("study", ["td_dpo", "graff"])
def test_a_split_that_ends_empty_is_an_error_before_training_and_so_is_its_preparation(tmp_path, study):
    longer = {"td_dpo": pair(50, prompt=LONG), "graff": {"question": LONG * 4, "answer": "#### 1"}}[study]
    for split, rows in (("train", rows_of(study)), ("validation", [longer]), ("test", rows_of(study))):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    split = {"td_dpo": "validation", "graff": "dev"}[study]
    run = run_of(study, tmp_path, mode="trial")
    for work in (lambda: audit(study, tmp_path), lambda: config.study_module(study).prepare(run, tmp_path / "inputs")):
        (tmp_path / "inputs").mkdir(exist_ok=True)
        with pytest.raises(StudyError, match=f"split {split}: no"):
            work()


def test_the_made_model_keeps_to_the_prompt_limit_that_its_message_names(tmp_path):
    from lib.td_dpo.data import conversations, make_tokenizer

    pairs = [
        {"prompt": [user(f"{i} {LONG}")], "chosen": [assistant("a b")], "rejected": [assistant("c")]} for i in range(8)
    ]
    tokenizer = make_tokenizer(pairs, {"vocab_size": 300})
    with pytest.raises(StudyError) as caught:
        conversations(tokenizer, pairs)
    ((key, value),) = cures(str(caught.value))
    assert key == "dataset.preprocessing.max_prompt_length"
    assert len(conversations(tokenizer, pairs, max_prompt=int(value))) == 16


def test_what_the_printed_download_leaves_can_be_read(tmp_path):
    """The folders of `hf download ... --local-dir DIR`, with what else lies in them."""
    message = str(hub.explain(ConnectionError("out"), "a/b", kind="dataset"))
    assert re.search(r"hf download a/b --repo-type dataset --local-dir DIR; then --set dataset.name=DIR", message)
    layouts = {
        "td_dpo": [
            "data/train_prefs-00000-of-00001",
            "data/test_prefs-00000-of-00001",
            "data/train_sft-00000-of-00001",
        ],
        "graff": ["main/train-00000-of-00001", "main/test-00000-of-00001", "socratic/train-00000-of-00001"],
        "iw_lora": ["rte/train-00000-of-00001", "rte/validation-00000-of-00001", "mnli/train-00000-of-00001"],
    }
    for study, names in layouts.items():
        for i, name in enumerate(names):
            rows = [MAKERS[study](100 * i + n) for n in range(20)]
            write_jsonl(tmp_path / study / f"{name}.jsonl", rows)
        for extra in (
            "README.md",
            ".gitattributes",
            ".cache/huggingface/.gitignore",
            ".cache/huggingface/download/x.json",
        ):
            path = tmp_path / study / extra
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("*")
        found = audit(study, tmp_path / study)
        assert sum(found["rows"].values()) == 40
        assert set(counts(found)) == set(), found["warnings"]


@pytest.mark.parametrize(
    "name", ["a: b #c.jsonl", "données 'x'.jsonl", "[1]{2}*?.jsonl", "x,y=z;%20.jsonl.gz", "no_suffix_dir"]
)
def test_a_name_may_hold_any_character_that_a_path_may(tmp_path, monkeypatch, name):
    import gzip

    path = tmp_path / name
    if name.endswith("dir"):
        write_jsonl(path / "train.jsonl", rows_of("td_dpo"))
    else:
        write_jsonl(path, rows_of("td_dpo"))
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.chdir(tmp_path)
    run = run_of("td_dpo", name)  # relative, without a slash
    assert run.dataset.name == str(path)
    assert {split: len(rows) for split, rows in data.read(run.dataset.name).items()} == {"train": 20}
