"""The one reader of all studies: forms of files, folders and splits; and what each study makes of rows: preference
pairs (layouts, faults by file and row, splits, baselines), GSM8K's problems, GLUE's examples."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import data, hub
from lib.errors import MissingError, StudyError
from lib.graff import data as graff_data, prepare
from lib.iw_lora import data as iw_data
from lib.td_dpo import generated
from lib.td_dpo.data import bag_of_words_baseline, compared, length_baseline, load_splits, prompt_key

REAL = Path(__file__).resolve().parents[2] / "shared/data/alpaca_eval_preferences"


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def mix_row(i: int, **changes) -> dict:
    """A row in the layout of argilla/dpo-mix-7k."""
    row = {
        "dataset": "x",
        "chosen": [user(f"question {i}"), assistant(f"a good answer {i}")],
        "rejected": [user(f"question {i}"), assistant(f"a bad one {i}")],
        "chosen_rating": 5.0,
    }
    return {**row, **changes}


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, **options) -> tuple[dict, dict]:
    return load_splits({"name": str(path), "on_bad_row": "refuse", **options})


def everything(splits: dict) -> list[dict]:
    return sorted((pair for pairs in splits.values() for pair in pairs), key=lambda pair: pair["row"])


def refused(path: Path, **options) -> str:
    with pytest.raises(StudyError) as caught:
        load(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


# ---- layouts ----

EXPECTED = {
    "prompt": [user("question 3")],
    "chosen": [assistant("a good answer 3")],
    "rejected": [assistant("a bad one 3")],
    "row": 3,
}
HH = "\n\nHuman: question {i}\n\nAssistant: {answer}"
LAYOUTS = {
    "message lists": lambda i: mix_row(i),
    "message lists and a prompt string": lambda i: mix_row(i, prompt=f"question {i}"),
    "answers as messages, prompt as messages": lambda i: {
        "prompt": [user(f"question {i}")],
        "chosen": [assistant(f"a good answer {i}")],
        "rejected": [assistant(f"a bad one {i}")],
    },
    "strings with a prompt": lambda i: {
        "prompt": f"question {i}",
        "chosen": f"a good answer {i}",
        "rejected": f"a bad one {i}",
    },
    "HH-RLHF transcripts": lambda i: {
        "chosen": HH.format(i=i, answer=f"a good answer {i}"),
        "rejected": HH.format(i=i, answer=f"a bad one {i}"),
    },
    "transcripts without blank lines, the prompt in a column and again in the answers": lambda i: {
        "prompt": f"Human: question {i}\n\nAssistant:",
        "chosen": f"Human: question {i}\n\nAssistant: a good answer {i}",
        "rejected": f"Human: question {i}\n\nAssistant: a bad one {i}",
    },
    "messages as Python prints them": lambda i: {k: str(v) for k, v in mix_row(i).items()},
    "messages as indented JSON": lambda i: {k: json.dumps(v, indent=2) for k, v in mix_row(i).items()},
    "letters": lambda i: {
        "prompt": f"question {i}",
        "completion_a": f"a good answer {i}",
        "completion_b": f"a bad one {i}",
        "choice": "a",
    },
    "names": lambda i: {
        "instruction": f"question {i}",
        "completion_b": f"a good answer {i}",
        "completion_a": f"a bad one {i}",
        "choice": "completion_b",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_layout_in_every_format_gives_the_same_pairs(tmp_path, layout, suffix):
    rows = [LAYOUTS[layout](i) for i in range(20)]
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, rows[0])
            writer.writeheader()
            writer.writerows(
                {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
                for row in rows
            )
    splits, report = load(path)
    pairs = everything(splits)
    assert len(pairs) == 20
    assert pairs[3] == EXPECTED
    assert [pair["row"] for pair in pairs] == list(range(20))
    assert (
        report["rows"]
        == {split: len(splits[split]) for split in ("train", "validation", "test")}
        == {"train": 16, "validation": 2, "test": 2}
    )


def saved_as(form: str, rows: list[dict], folder: Path) -> Path:
    """`rows` of texts in a form that `datasets`, pandas or a person writes."""
    import datasets
    import pandas as pd

    path, frame, table = folder / f"pairs{form}", pd.DataFrame(rows), datasets.Dataset.from_list(rows)
    if form == ".jsonl.zst":  # pandas would want one more package
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(frame.to_json(orient="records", lines=True, force_ascii=False).encode())
    elif form.startswith(".jsonl"):
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    elif form.startswith(".csv"):
        frame.to_csv(path, index=False, sep=";" if form == ".csv" else ",")
    elif form == ".tsv":
        frame.to_csv(path, index=False, sep="\t")
    elif form == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.data.table.schema) as stream:
            stream.write_table(table.data.table)
    elif form == "of a Dataset":
        table.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": table}).save_to_disk(path)
    return path


FORMS = [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".csv", ".csv.gz", ".tsv", ".arrow"]
FORMS += ["of a Dataset", "of a DatasetDict"]  # folders that save_to_disk writes


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_texts_that_were_written(tmp_path, form):
    odd = ['say "no"', "a\nb, c; d", "line\u2028 and \u0085", "None", "NA", "2020-01-01", "'t", "ä\U0001f600"]
    rows = [{"prompt": text, "chosen": f"{text} yes", "rejected": "no"} for text in odd]
    read = data.read(str(saved_as(form, rows, tmp_path)))
    assert [row.value for row in read["train"]] == rows
    assert [row.number for row in read["train"]] == list(range(len(odd)))


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        (["train.jsonl", "dev.jsonl", "test.jsonl"], None, {"train", "validation", "test"}),
        (["train.jsonl.gz", "eval.jsonl", "README.md"], None, {"train", "validation"}),
        ([f"data/{part}-00000-of-00001.jsonl" for part in ("train_prefs", "test_prefs", "train_sft")], None,
         {"train", "test", "train_sft"}),
        (["main/train-00000-of-00002.jsonl", "main/train-00001-of-00002.jsonl", "socratic/train-00000-of-00001.jsonl"],
         "main", {"train"}),
        (["MNLI/train.jsonl", "MNLI/dev_matched.jsonl", "MNLI/dev_mismatched.jsonl", "SST-2/train.jsonl"],
         "mnli", {"train", "validation_matched", "validation_mismatched"}),
        (["SST-2/train.jsonl", "SST-2/dev.jsonl"], "sst2", {"train", "validation"}),
        (["anything.jsonl"], None, {"train"}),
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "dataset_infos.json"], None, {"train", "test"}),
        (["train/0000.jsonl", "test/0000.jsonl"], None, {"train", "test"}),
        (["train.ndjson"], None, {"train"}),
    ],
)  # fmt: skip
def test_a_folders_files_are_its_splits(tmp_path, files, config, expected):
    import gzip

    for name in files:
        path = write_jsonl(tmp_path / name, [{"file": name}])
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    read = data.read(str(tmp_path), config=config)
    assert set(read) == expected
    rows = len(files) if config == "main" else 1  # its two shards
    assert [row.value["file"] for row in read["train"]] == files[:rows][:2]


@pytest.mark.parametrize("sentences", [['"A" he said', 'ends with "b"', '"'], ['"hello', 'bye"', 'an empty "" one']])
def test_glues_own_files_may_hold_quotation_marks(tmp_path, sentences):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"{sentence}\t1\n" for sentence in sentences))
    assert [row.value["sentence"] for row in data.read(str(path))["train"]] == sentences


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_field_that_is_quoted_as_a_whole_loses_its_marks(tmp_path, quote):
    """Header and all, as R writes them, or where a field needs it."""
    path = tmp_path / "train.tsv"
    path.write_text(f"{quote}sentence{quote}\tlabel\n" + '"A dog, ""Rex"", runs."\t1\n' * 2)
    assert data.read(str(path))["train"][0].value == {"sentence": 'A dog, "Rex", runs.', "label": "1"}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("form", ["pandas", "wrapped"])
def test_a_json_file_that_is_one_object_is_read_as_its_rows(tmp_path, form, indent):
    rows = [mix_row(i) for i in range(12)]
    columns = {name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]}
    (tmp_path / "a.json").write_text(json.dumps(columns if form == "pandas" else {"data": rows}, indent=indent))
    assert [row.value for row in data.read(str(tmp_path / "a.json"))["train"]] == rows


def test_both_of_arrows_formats_are_read(tmp_path):
    table = pa.Table.from_pylist([{"x": 1, "y": ["a"]}])
    for name, form in (("a.arrow", pa.ipc.new_file), ("b.arrow", pa.ipc.new_stream)):
        with form(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
        assert [row.value for row in data.read(str(tmp_path / name))["train"]] == table.to_pylist()


def test_what_is_not_whole_is_not_read_as_the_whole(tmp_path):
    """Shards of a download that broke off, a pointer of git-lfs, a folder of `save_to_disk` without its parts."""
    shard = write_jsonl(tmp_path / "a" / "train-00000-of-00002.jsonl", [mix_row(0)])
    assert "1 shards of train, which say that they are 2" in refused(shard.parent)
    pointer = tmp_path / "train.csv"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "fix: git lfs pull" in refused(pointer)
    datasets.Dataset.from_list([mix_row(0)]).save_to_disk(saved := tmp_path / "saved")
    (saved / "state.json").write_text("{}")
    assert "expected: a folder that save_to_disk wrote whole" in refused(saved)
    both = datasets.DatasetDict(dict.fromkeys(("train", "train_prefs"), datasets.Dataset.from_list([mix_row(0)])))
    both.save_to_disk(tmp_path / "both")
    assert "splits train, train_prefs" in refused(tmp_path / "both")


def test_a_mapped_column_may_be_missing_in_a_row_and_not_in_all(tmp_path):
    rows = [{**mix_row(i), **({"sp": "Be brief."} if i else {})} for i in range(12)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    pairs = everything(load(path, columns={"system": "sp"})[0])
    assert sum(pair["prompt"][0]["role"] == "system" for pair in pairs) == 11
    assert "missing persona" in refused(path, columns={"system": "persona"})
    assert "history, which this study does not read" in refused(path, columns={"history": "sp"})


def test_a_second_reading_sees_a_changed_file_and_leaves_nothing_behind(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"x": 1}])
    assert data.read(str(path))["train"][0].value == {"x": 1}
    write_jsonl(path, [{"x": 2}])
    assert data.read(str(path))["train"][0].value == {"x": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_longer_conversations_keep_system_and_earlier_turns(tmp_path):
    lead = [{"role": "system", "content": "Be brief."}, user("one"), assistant("two"), user("three")]
    path = write_jsonl(
        tmp_path / "p.jsonl",
        [
            {"chosen": [*lead, assistant(f"yes {i}")], "rejected": [*lead, assistant("no")]} if i else mix_row(i)
            for i in range(2)
        ]
        + [mix_row(i) for i in range(2, 9)],
    )
    assert next(pair for pair in everything(load(path)[0]) if pair["row"] == 1)["prompt"] == lead
    transcript = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    rows = [{"chosen": f"{transcript} yes {i}", "rejected": f"{transcript} yes, no {i}"} for i in range(3)]
    rows += [{"chosen": HH.format(i=i, answer="a"), "rejected": HH.format(i=i, answer="b")} for i in range(5)]
    first = everything(load(write_jsonl(tmp_path / "hh.jsonl", rows))[0])[0]
    assert first["prompt"] == lead[1:]
    assert first["chosen"] == [assistant("yes 0")]
    assert first["rejected"] == [assistant("yes, no 0")]


def test_alpaca_input_column_is_part_of_the_request(tmp_path):
    rows = [
        {
            "instruction": f"Translate {i}.",
            "input": "the cat" if i else "",
            "completion_a": "x",
            "completion_b": "y",
            "choice": "b",
        }
        for i in range(9)
    ]
    pairs = everything(load(write_jsonl(tmp_path / "p.jsonl", rows))[0])
    assert pairs[0]["prompt"] == [user("Translate 0.")]
    assert pairs[1]["prompt"] == [user("Translate 1.\n\nthe cat")]


def test_json_of_one_object_per_line_and_a_byte_order_mark(tmp_path):
    lines = "\ufeff" + "\r\n".join(json.dumps(mix_row(i)) for i in range(12)) + "\r\n\r\n"
    for name in ("p.json", "p.jsonl"):
        (tmp_path / name).write_bytes(lines.encode())
        assert len(everything(load(tmp_path / name)[0])) == 12


def test_directory_in_the_hub_layout_with_shards(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(2):
        pq.write_table(
            pa.Table.from_pylist([mix_row(i) for i in range(10 * shard, 10 * shard + 10)]),
            folder / f"train-0000{shard}-of-00002.parquet",
        )
    pq.write_table(pa.Table.from_pylist([mix_row(i) for i in range(100, 104)]), folder / "test-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("a card")
    splits, report = load(tmp_path)
    assert report["rows"] == {"train": 18, "validation": 2, "test": 4}
    assert sorted(pair["row"] for split in ("train", "validation") for pair in splits[split]) == list(range(20))
    assert [Path(file).name for file in report["files"]["train"]] == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]


def test_directory_of_named_files_keeps_its_own_splits(tmp_path):
    for split, start in (("train", 0), ("test", 10), ("val", 20)):
        write_jsonl(tmp_path / f"{split}.jsonl", [mix_row(i) for i in range(start, start + 5)])
    splits, report = load(tmp_path)
    assert report["rows"] == {"train": 5, "validation": 5, "test": 5}
    assert report["carved_from_train"] == {}
    assert splits["validation"][0]["prompt"] == [user("question 20")]


def test_directory_faults(tmp_path):
    assert "no data files for a split; it holds nothing" in refused(tmp_path)
    write_jsonl(tmp_path / "test.jsonl", [mix_row(0)])
    write_jsonl(tmp_path / "val.jsonl", [mix_row(1)])
    with pytest.raises(StudyError, match="a train split"):
        load(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", [mix_row(2)])
    (tmp_path / "train.csv").write_text("a,b\n")
    assert "several files for train: train.csv, train.jsonl" in refused(tmp_path)


def test_real_data_loads_whole():
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not on this machine")
    splits, report = load(REAL)
    assert report["rows"]["train"] + report["rows"]["validation"] == 7223
    assert report["rows"]["test"] == 736
    assert report["dropped"]["count"] == 0
    found = data.audit(splits, report, compared, None, None)
    overlaps = [kinds[kind]["count"] for kinds in found["counts"].values() for kind in kinds if kind.startswith("in_")]
    assert overlaps == [0, 0, 0]
    assert found["counts"]["train"]["duplicates"]["count"] >= len(splits["train"]) - len(
        {json.dumps([pair["prompt"], pair["chosen"], pair["rejected"]]) for pair in splits["train"]}
    )
    assert report["rows"]["validation"] == pytest.approx(722, abs=15)
    assert not {prompt_key(pair) for pair in splits["train"]} & {prompt_key(pair) for pair in splits["validation"]}
    assert length_baseline(splits["test"]) == pytest.approx(0.81, abs=0.005)


# ---- faults: one clear error, with file and row numbers ----

PROMPTED = {"prompt": "q", "chosen": "x", "rejected": "y"}
BAD_ROWS = {
    "empty chosen": (mix_row(0, chosen=[user("question 0"), assistant("  ")]), "empty chosen"),
    "empty rejected": (mix_row(0, rejected=[user("question 0"), assistant("")]), "empty rejected"),
    "empty list": (mix_row(0, chosen=[]), "empty chosen"),
    "empty strings": ({"chosen": "", "rejected": ""}, "empty chosen"),
    "empty prompt": ({**PROMPTED, "prompt": " "}, "empty prompt"),
    "identical": (mix_row(0, chosen=mix_row(0)["rejected"]), "identical chosen and rejected"),
    "null": (mix_row(0, rejected=None), "missing rejected"),
    "column absent in one row": ({"chosen": mix_row(0)["chosen"]}, "missing rejected"),
    "a number": (mix_row(0, chosen=7), "wrong type in chosen .*int 7"),
    "one text, one list": (mix_row(0, chosen="text"), "chosen and rejected have different prompts"),
    "messages without a role": (
        mix_row(0, chosen=[{"speaker": "human", "value": "x"}]),
        "wrong message in chosen .*'speaker'",
    ),
    "content that is not text": (
        mix_row(0, chosen=[user("question 0"), assistant(None)]),
        "wrong message in chosen .*'content': None",
    ),
    "unknown role": (
        mix_row(0, chosen=[{"role": "robot", "content": "x"}, assistant("y")]),
        "wrong message in chosen .*'robot'",
    ),
    "a prompt that ends with the assistant": (
        {**PROMPTED, "prompt": [user("q"), assistant("a")]},
        "does not end with a user turn",
    ),
    "a conversation that answers itself": (
        mix_row(
            0, chosen=[user("q"), assistant("a"), assistant("b")], rejected=[user("q"), assistant("a"), assistant("c")]
        ),
        "does not end with a user turn .*ends with assistant",
    ),
    "an answer by the user": (mix_row(0, chosen=[user("question 0")]), "chosen does not end with an assistant turn"),
    "no prompt": (mix_row(0, chosen=[assistant("x")], rejected=[assistant("y")]), "no prompt"),
    "different prompts": (mix_row(0, rejected=[user("another"), assistant("x")]), "different prompts .*question 0"),
    "a prompt column that disagrees": (mix_row(0, prompt="something else"), "prompt column disagrees"),
    "strings without a shared prompt": ({"chosen": "x", "rejected": "y"}, "no prompt .*expected a prompt column"),
    "transcripts that part early": (
        {"chosen": HH.format(i=0, answer="a\n\nHuman: b\n\nAssistant: c"), "rejected": HH.format(i=0, answer="d")},
        "different prompts",
    ),
    "a lone surrogate": (mix_row(0, chosen=[user("question 0"), assistant("\ud800")]), "not valid Unicode"),
    "not an object": (["x"], "not an object"),
    "messages that were cut": (mix_row(0, chosen=str(mix_row(0)["chosen"])[:-9]), "neither an answer nor readable"),
    "an instruction that only asks for an answer": (
        {"instruction": "Assistant:", "input": "x", "chosen": "a", "rejected": "b"},
        "no prompt",
    ),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_is_refused_by_number_and_can_be_dropped_and_counted(tmp_path, fault):
    row, message = BAD_ROWS[fault]
    rows = [mix_row(i) for i in range(20)]
    rows[4] = rows[11] = row
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    said = refused(path)
    assert re.search(message, said), said
    assert "2 rows" in said
    assert "rows 4, 11" in said
    assert "dataset.on_bad_row=drop" in said
    assert "expected:" in said
    assert len(said) < 1500
    splits, report = load(path, on_bad_row="drop")
    assert report["dropped"]["count"] == 2
    assert report["dropped"]["reasons"][0]["rows"] == [4, 11]
    assert report["dropped"]["reasons"][0]["file"] == str(path)
    assert [pair["row"] for pair in everything(splits)] == [i for i in range(20) if i not in (4, 11)]


def test_all_faults_of_a_file_come_in_one_error(tmp_path):
    rows = [mix_row(i) for i in range(40)]
    for i in range(10, 20):
        rows[i]["chosen"][-1]["content"] = ""
    rows[30]["rejected"] = rows[30]["chosen"]
    said = refused(write_jsonl(tmp_path / "p.jsonl", rows))
    assert "10 rows: empty chosen (rows 10, 11, 12, 13, 14, ...)" in said
    assert "1 row: identical chosen and rejected (row 30: " in said


def test_faults_in_several_files_name_each(tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [mix_row(0), mix_row(1, chosen=[])])
    with pytest.raises(
        StudyError,
        match=r"test.jsonl, .*train.jsonl: .*empty chosen \(row 1\) in test.jsonl; .*empty chosen \(row 1\) in train.jsonl",
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    "rows",
    [
        [{"chosen": "x", "reject": "y"}] * 3,
        [{"question": "x"}],
        [{"completion_a": "x", "completion_b": "y", "prompt": "p"}],
    ],
)
def test_missing_column_names_what_is_there(tmp_path, rows):
    said = refused(write_jsonl(tmp_path / "p.jsonl", rows))
    assert "missing" in said
    assert "row 0" in said
    assert all(column in said for column in rows[0])


@pytest.mark.parametrize(
    ("choice", "found"),
    [("c", "'c'"), (0, "int 0"), (None, "missing choice"), (True, "bool True"), ("tie", "'tie'"), (1, "int 1")],
)
def test_choice_that_names_neither(tmp_path, choice, found):
    rows = [{"prompt": f"q{i}", "completion_a": "x", "completion_b": "y", "choice": "a"} for i in range(9)]
    rows[5]["choice"] = choice
    said = refused(write_jsonl(tmp_path / "p.jsonl", rows))
    assert found in said
    assert "(row 5" in said


@pytest.mark.parametrize(
    ("content", "said_line"),
    [
        (b"{broken", "line 3: "),
        (b'{"chosen": "\xff"}', "line 3: 'utf-8' codec can't decode byte 0xff in position 12"),
        (b"[" * 100_000, "line 3"),
    ],
)
def test_a_line_that_cannot_be_read_names_line_and_row(tmp_path, content, said_line):
    lines = [json.dumps(mix_row(i)).encode() for i in range(20)]
    lines[2] = content
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join(lines))
    said = refused(path)
    assert said_line in said
    assert "row 2" in said
    assert load(path, on_bad_row="drop")[1]["dropped"]["count"] == 1


@pytest.mark.parametrize("rows", [[], [""]])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_zero_rows(tmp_path, suffix, rows):
    path = tmp_path / f"p{suffix}"
    path.write_text({".jsonl": "\n" * len(rows), ".csv": "prompt,chosen,rejected\n" * len(rows), ".json": "[]"}[suffix])
    assert "0 rows" in refused(path)


def test_zero_rows_left_after_dropping(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [mix_row(0, chosen=[])] * 3)
    assert "no usable row for split train (dropped: 3; held out: test, validation)" in refused(path, on_bad_row="drop")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "prompt,chosen,rejected\nq,caf\xe9,no\n".encode("latin-1"), "not CSV in UTF-8: .*0xe9"),
        ("p.csv", b'prompt,chosen,rejected\nq,"never closed,no\n', "not CSV"),
        ("p.csv", b"prompt,chosen,chosen,rejected\nq,x,y,z\n", "names that repeat"),
        ("p.csv", b"prompt,chosen,rejected\nq,x,y,z\n", "more fields than the header has .*row 0: list .'z'"),
        ("p.csv", b"prompt,chosen,rejected\nq,x\n", "missing rejected .*row 0"),
        ("p.json", b'{"a": ', "not JSON"),
        ("p.json", b'"text"', "not an object with named columns .*str 'text'"),
        ("p.json", b"[1, ", "not JSON in UTF-8"),
        ("p.json", b"\xff\xfe", "not JSON .*0xff"),
        ("p.parquet", b"PAR1 not really", "not PARQUET"),
        ("p.txt", b"hello", "a file of type '.txt'"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StudyError, match=f"(?s){message}"):
        load(tmp_path / name)


def test_parquet_with_text_that_is_not_utf8(tmp_path):
    table = pa.table({"prompt": pa.array([b"q"]), "chosen": pa.array([b"\xff"]), "rejected": pa.array([b"n"])})
    text = pa.table(
        {name: pa.Array.from_buffers(pa.string(), 1, table[name].chunk(0).buffers()) for name in table.column_names}
    )
    pq.write_table(text, tmp_path / "p.parquet")
    assert "UTF-8" in refused(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    "name",
    ["/nowhere/at/all", "./missing", "missing.jsonl", "data/pairs.parquet", "~/no/such", "a/b/c", "what is this"],
)
def test_a_missing_path_is_not_taken_for_a_hub_id(name):
    with pytest.raises(StudyError, match="no such file or directory") as caught:
        load_splits({"name": name})
    assert name in str(caught.value)
    assert caught.value.exit_code == 2


# ---- the hub ----


def test_hub_id_goes_to_datasets_with_its_revision(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(name, config=None, revision=None):
        asked.update(name=name, revision=revision)
        return datasets.DatasetDict(
            {
                "train": datasets.Dataset.from_list([mix_row(i) for i in range(20)]),
                "test": datasets.Dataset.from_list([mix_row(i) for i in range(30, 33)]),
            }
        )

    monkeypatch.setattr(hub, "prepare", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits, report = load_splits({"name": "argilla/dpo-mix-7k", "revision": "f8869fc"})
    assert asked == {"name": "argilla/dpo-mix-7k", "revision": "f8869fc"}
    assert report["rows"] == {"train": 18, "validation": 2, "test": 3}
    assert report["files"]["test"] == ["argilla/dpo-mix-7k[test]"]
    assert everything({"x": splits["train"] + splits["validation"]})[3] == EXPECTED


def test_hub_out_of_reach_is_missing_with_the_mend(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingError) as caught:
        load_splits({"name": "argilla/no-such-set-7k", "revision": "abc"})
    said = str(caught.value)
    assert caught.value.exit_code == 3
    assert "argilla/no-such-set-7k at revision abc" in said
    assert "HF_HUB_OFFLINE" in said
    assert "hf download argilla/no-such-set-7k --repo-type dataset --revision abc" in said
    assert "--set dataset.name=DIR" in said


def test_files_that_were_downloaded_beforehand_are_read_where_the_hub_is_out_of_reach(monkeypatch, tmp_path):
    """What the preflight counts as there: a snapshot in the hub's cache, which datasets by itself does not look at."""
    import pandas as pd

    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "prepared")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    revision = "f8869fc91bde5c71a104667292addcbbfd15985d"
    snapshot = tmp_path / "datasets--argilla--dpo-mix-7k" / "snapshots" / revision / "data"
    snapshot.mkdir(parents=True)
    for split, rows in (("train", range(20)), ("test", range(30, 33))):
        pd.DataFrame([mix_row(i) for i in rows]).to_parquet(snapshot / f"{split}-00000-of-00001.parquet")
    splits, report = load_splits({"name": "argilla/dpo-mix-7k", "revision": revision})
    assert report["rows"] == {"train": 18, "validation": 2, "test": 3}
    assert everything({"x": splits["train"] + splits["validation"]})[3] == EXPECTED
    with pytest.raises(MissingError):
        load_splits({"name": "argilla/dpo-mix-7k", "revision": "0" * 40})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GatedRepoError", "accept the license at https://huggingface.co/datasets/a/b"),
        ("RevisionNotFoundError", "or revision"),
        ("DatasetNotFoundError", "no such dataset"),
        ("ConnectError", "hf download a/b"),
        ("Other", "could not be loaded: Other"),
    ],
)
def test_hub_errors_in_words(monkeypatch, name, message):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    outer = OSError("wrapped")
    outer.__cause__ = type(name, (Exception,), {})("x")
    if name == "Other":
        outer = outer.__cause__
    error = hub.explain(outer, "a/b", kind="dataset")
    assert isinstance(error, MissingError)
    assert message in str(error)


# ---- generated, splits, limit ----


def test_generated_pairs_come_from_the_generator(monkeypatch):
    asked = []

    def make_pairs(train, validation, test, seed):
        asked.append((train, validation, test, seed))
        pair = {key: EXPECTED[key] for key in EXPECTED}
        return {"train": [pair] * train, "validation": [pair] * validation, "test": [pair] * test}

    section = {
        "name": "generated",
        "train_pairs": 6,
        "validation_pairs": 5,
        "test_pairs": 4,
        "split_seed": 7,
        "limit": 5,
    }
    monkeypatch.setattr(generated, "make_pairs", make_pairs)
    splits, report = load_splits(section)
    assert asked == [(6, 5, 4, 7)]
    assert report["rows"] == {"train": 5, "validation": 5, "test": 4}


def test_carved_splits_share_no_prompt_and_follow_the_seed(tmp_path):
    rows = [mix_row(i // 5, chosen=[user(f"question {i // 5}"), assistant(f"yes {i}")]) for i in range(300)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    splits, report = load(path, split_seed=1, validation_fraction=0.2)
    assert report["carved_from_train"] == {"test": 0.2, "validation": 0.2}
    prompts = {split: {prompt_key(pair) for pair in pairs} for split, pairs in splits.items()}
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["test"] & prompts["validation"]
    assert len(splits["test"]) == 60
    assert len(splits["validation"]) == 50
    assert load(path, split_seed=1, validation_fraction=0.2)[0] == splits
    assert load(path, split_seed=2, validation_fraction=0.2)[0] != splits
    assert all([pair["row"] for pair in pairs] == sorted(pair["row"] for pair in pairs) for pairs in splits.values())


def test_a_row_more_does_not_reshuffle_the_rest():
    pairs = [{"prompt": [user(f"q{i}")], "row": i} for i in range(100)]
    held = {pair["row"] for pair in data.carve(pairs, prompt_key, 0.1, 0, "validation")[1]}
    more = {
        pair["row"]
        for pair in data.carve([*pairs, {"prompt": [user("new")], "row": 100}], prompt_key, 0.1, 0, "validation")[1]
    }
    assert len(held) == 10
    assert len(held - more) <= 1


def test_too_few_prompts_to_carve(tmp_path):
    assert "no usable row for split test (dropped: 0; held out: test" in refused(
        write_jsonl(tmp_path / "p.jsonl", [mix_row(0)] * 9)
    )


def test_limit_takes_the_first_of_each_split(tmp_path):
    for split, start in (("train", 0), ("test", 10), ("validation", 20)):
        write_jsonl(tmp_path / f"{split}.jsonl", [mix_row(i) for i in range(start, start + 5)])
    splits, report = load(tmp_path, limit=2)
    assert report["rows"] == {"train": 2, "validation": 2, "test": 2}
    assert [pair["row"] for pair in splits["test"]] == [0, 1]


def test_prompts_in_both_shipped_splits_are_reported(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [mix_row(i) for i in range(10)])
    write_jsonl(tmp_path / "validation.jsonl", [mix_row(i) for i in range(20, 25)])
    write_jsonl(tmp_path / "test.jsonl", [mix_row(i) for i in range(8, 14)])
    counts = data.audit(*load(tmp_path), compared, None, None)["counts"]
    assert counts["test"]["in_train"] == {"count": 2, "first": [0, 1]}
    assert counts["test"]["in_validation"] == counts["validation"]["in_train"] == {"count": 0, "first": []}


def test_the_same_rows_are_the_same_pairs_in_whichever_format(tmp_path):
    rows = [mix_row(i) for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert load(write_jsonl(tmp_path / "a.jsonl", rows))[0] == load(tmp_path / "b.parquet")[0]


def test_relative_paths_work_from_any_directory(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "here" / "p.jsonl", [mix_row(i) for i in range(20)])
    monkeypatch.setattr(hub, "ROOT", tmp_path)
    assert sum(load(Path("here/p.jsonl"))[1]["rows"].values()) == 20


# ---- the other studies ----


def test_one_file_of_problems_is_carved_and_shares_no_question(tmp_path):
    rows = [{"question": f"q{i // 2}", "answer": f"so\n#### {i}"} for i in range(60)]
    splits, report = prepare.read_problems(str(write_jsonl(tmp_path / "one.jsonl", rows)), ("test", "train"), {})
    assert {name: len(part) for name, part in splits.items()} == {"test": 6, "train": 54}
    assert report["carved_from_train"] == {"test": 0.1}
    assert not {row["question"] for row in splits["test"]} & {row["question"] for row in splits["train"]}


@pytest.mark.parametrize(
    ("answer", "number"),
    [("We take #### 3 boxes\n#### 12", "12"), ("#### $1,000", "1000"), ("#### 5 apples.", "5"), ("#### -7.50", "-7.50"),
     ("#### 1,234,567", "1234567"), ("####12%", "12"), ("#### 1/2", None), ("#### 3:30", None), ("#### 1e3", None),
     ("#### ", None), ("5", None), ("#### 1,00", None), ("#### 2 of 3", None), ("#### +5", "5"), ("#### - 5", "-5"),
     ("#### $ 5", "5"), ("#### 12 boxes, no wait, that is wrong", None)],
)  # fmt: skip
def test_the_reference_is_the_one_number_after_the_last_mark(answer, number):
    """And what is trained on is what the strict filter reads that number in."""
    assert graff_data.reference(answer) == number
    if number and answer.count("####") == 1:
        trained = prepare.to_problem({"question": "q", "answer": answer})["answer"]
        assert graff_data.strict(graff_data.target(trained)) == number


def test_fewer_problems_than_dev_takes_are_named_with_a_number_that_fits(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(54)]
    with pytest.raises(StudyError, match=r"dev_size: 128 of 54 .*\n.*\n  fix: --set dataset.dev_size=5"):
        prepare.split_dev(rows, 128, 0)
    assert list(map(len, prepare.split_dev(rows, 5, 0))) == [49, 5]


def test_faults_of_problems_come_in_one_error_and_numbers_alone_are_answers(tmp_path):
    good = {"question": "q", "answer": 4}
    rows = [good, {"question": "q"}, {"question": None, "answer": "#### 1"}, {"question": "q", "answer": "#### 1/2"}]
    with pytest.raises(StudyError) as caught:
        prepare.read_problems(str(write_jsonl(tmp_path / "a.jsonl", rows)), ("test", "train"), {})
    for fault in ("missing answer .row 1: columns: question", "missing question .row 2", "no '#### number' .*row 3"):
        assert re.search(fault, str(caught.value)), str(caught.value)
    assert "--set dataset.on_bad_row=drop" in str(caught.value)
    splits, report = prepare.read_problems(
        str(write_jsonl(tmp_path / "c.jsonl", [*rows, {"question": "r", "answer": "#### 2"}])),
        ("test", "train"),
        section={"on_bad_row": "drop"},
    )
    assert (sum(map(len, splits.values())), report["dropped"]["count"]) == (2, 3)
    gsm1k = prepare.read_problems(str(write_jsonl(tmp_path / "b.jsonl", [good])), ("test",), {})[0]["test"]
    assert gsm1k == [{"question": "q", "answer": "#### 4"}]


def glue(path: Path, **options) -> SimpleNamespace:
    plain = {"revision": None, "subset": "rte", "splits": [("train", "train"), ("validation", "validation")]}
    return SimpleNamespace(name=str(path), **(plain | options))


def test_examples_are_carved_from_one_file_and_never_over_a_validation_file(tmp_path):
    labels = "entailment", 1, "1", 1.0, "0.0"  # of a column with gaps
    rows = [{"sentence1": f"a{i}", "sentence2": "b", "label": labels[i % 5]} for i in range(40)]
    splits, report = iw_data.read_task(glue(write_jsonl(tmp_path / "train.jsonl", rows)), "rte")
    assert (len(splits["train"]), len(splits["validation"]), report["carved_from_train"]) == (
        36,
        4,
        {"validation": 0.1},
    )
    assert not {row["text_a"] for row in splits["train"]} & {row["text_a"] for row in splits["validation"]}
    same, report = iw_data.read_task(glue(tmp_path, splits=[("train", "train"), ("validation", "train")]), "rte")
    assert (same, report["carved_from_train"]) == (splits, {"validation": 0.1}), "rows named for both splits are carved"
    write_jsonl(tmp_path / "dev.jsonl", rows[:3])
    splits, report = iw_data.read_task(glue(tmp_path), "rte")
    assert (len(splits["train"]), len(splits["validation"]), report["carved_from_train"]) == (40, 3, {})
    with pytest.raises(StudyError, match="no split validation_mismatched"):
        iw_data.read_task(glue(tmp_path, splits=[("train", "train"), ("validation", "validation_mismatched")]), "rte")


def test_a_label_of_another_name_is_not_called_unlabelled(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "target": 1}])
    with pytest.raises(StudyError, match=r"(?s)missing label .*sentence2, target.*--set dataset.columns.label="):
        iw_data.read_task(glue(path), "rte")


# ---- baselines ----


def pair_of(chosen: str, rejected: str) -> dict:
    return {"prompt": [user("q")], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], "row": 0}


def test_length_baseline_counts_characters_and_halves_ties():
    assert (
        length_baseline([pair_of("abc", "ab"), pair_of("a", "ab"), pair_of("ab", "cd"), pair_of("a b c", "abcd")])
        == 2.5 / 4
    )


def test_bag_of_words_finds_a_word_and_not_noise():
    words = ["river", "stone", "cloud", "paper", "green", "seven", "quick", "north", "table", "music"]
    noise = [(f"{words[i % 10]} {words[i // 10 % 10]}", f"{words[i * 7 % 10]} {words[i * 3 % 10]}") for i in range(400)]
    planted = [pair_of(f"{a} please", f"{b} never") for a, b in noise]
    assert bag_of_words_baseline(planted[:300], planted[300:], seed=0) == 1.0
    assert bag_of_words_baseline(planted[:300], [pair_of("zzz", "yyy")] * 4, seed=0) == 0.5
    assert bag_of_words_baseline(planted[:300], planted[300:], 1) == bag_of_words_baseline(
        planted[:300], planted[300:], 1
    )
