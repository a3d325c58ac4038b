"""GRAFF on real problems at laptop scale, and the published configurations: what comes along, what is cut, what is
honoured."""

import json
import re

import numpy as np
import pytest
import torch
import yaml

from lib import config, record
from lib.graff import data, member, prepare, schedulers
from lib.run import check, members
from tests.conftest import ROOT
from tests.test_config import as_published
from tests.test_graff import GSM8K, curve, member_of, shared  # noqa: F401

GRAFF = ROOT / "params" / "graff" / "laptop" / "graff.yaml"


def folder_of(tmp_path, words=60, rows=40):
    """A data set in GSM8K's form with long answers."""
    rng = np.random.default_rng(0)
    for split, count in (("train", rows), ("test", 6)):
        lines = [
            {
                "question": " ".join(f"q{rng.integers(30)}" for _ in range(rng.integers(5, words))),
                "answer": " ".join(f"w{rng.integers(30)}" for _ in range(rng.integers(5, words))) + f"\n#### {i}",
            }
            for i in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def loaded(**overrides):
    return config.load_run(GRAFF, study="graff", scale="laptop", mode="full", overrides=overrides)


# ---- --set dataset.name=FOLDER is all that has to be said


def test_real_problems_bring_along_what_they_need_and_the_users_own_values_win(tmp_path):
    folder = str(folder_of(tmp_path))
    run, as_shipped = loaded(**{"dataset.name": folder}), loaded()
    assert as_shipped.dataset.real
    for key, value in as_shipped.dataset.real.items():
        assert config.get(config.dump(run), key) == value, key
        assert config.get(config.dump(as_shipped), key) != value, key
    assert run.evaluation.max_new_tokens == 320  # an answer of 28 tokens cannot reach its ####
    assert (run.optuna.objective_metric, run.optuna.direction) == (
        "dev_loss",
        "minimize",
    )  # exact match is 0 at every rate
    assert not [f for f in check.findings(run) if f.level == "error"]
    own = loaded(**{"dataset.name": folder, "budget_minutes": "7", "evaluation.max_new_tokens": "50"})
    assert (own.training.budget_minutes, own.evaluation.max_new_tokens, own.dataset.max_tokens) == (7, 50, 512)
    assert set(own.overrides) == {"dataset.name", "budget_minutes", "evaluation.max_new_tokens"}
    assert loaded(**{"dataset.name": "generated"}).training.budget_minutes == as_shipped.training.budget_minutes
    assert config.study_module("graff").implied(as_shipped, {"beta1": 1}) == {}


def test_a_yaml_that_names_real_problems_itself_is_told_that_nothing_comes_along(tmp_path):
    raw = config.load_yaml(GRAFF)
    raw["dataset"]["name"] = str(folder_of(tmp_path))
    (tmp_path / "graff.yaml").write_text(json.dumps(raw))
    run = config.load_run(tmp_path / "graff.yaml", study="graff", scale="laptop", mode="full")
    assert "dataset.real" in {f.key for f in check.findings(run)}
    assert "dataset.real" not in {f.key for f in check.findings(loaded(**{"dataset.name": str(tmp_path)}))}


# ---- preparing


def test_pretraining_on_real_text_pads_little(tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (folder_of(tmp_path, rows=200) / "train.jsonl").read_text().splitlines()]
    recipe = loaded(**{"dataset.name": str(tmp_path)}).model.recipe.model_dump()
    recipe |= {"seed": 0, "pretrain_steps": 7, "pretrain_batch_size": 32, "hidden_size": 16, "layers": 1}
    batches, collate = [], prepare.collate
    monkeypatch.setattr(prepare, "collate", lambda rows, pad: batches.append(rows) or collate(rows, pad))
    prepare.make_base(rows, recipe, tmp_path / "history.jsonl")
    sizes = [[len(row["ids"]) for row in batch] for batch in batches]
    assert [len(batch) for batch in batches] == [32] * 6 + [8]  # an epoch
    assert sum(max(s) * len(s) for s in sizes[:6]) < 1.25 * sum(map(sum, sizes[:6]))


def test_answers_that_are_cut_are_counted_and_rows_without_an_answer_are_left_out(tmp_path):
    run = member_of(changes={"dataset.name": str(folder_of(tmp_path)), "dataset.max_tokens": 64}).run
    (tmp_path / "inputs").mkdir()
    prepare.prepare(run, tmp_path / "inputs")
    given = data.load(tmp_path / "inputs")
    assert prepare.audit(run)["counts"]["train"]["truncated"]["count"] > 5
    assert all(row["prompt"] < len(row["ids"]) <= 64 for row in given.rows["train"])
    assert len(given.rows["train"]) < len(given.problems["train"])
    assert len(given.rows["dev"]) == len(given.problems["dev"])  # these stand beside their problems


def test_gsm8ks_answers_are_not_cut_by_what_the_study_sets():
    if not GSM8K.exists():
        pytest.skip("GSM8K lies beside the checkout in ../shared")
    run = loaded(**{"dataset.name": str(GSM8K)})
    problems, report = prepare.load_problems(run)
    assert (len(problems["train"]), len(problems["dev"]), len(problems["test"])) == (7345, 128, 1319)
    assert (report["source"], report["carved_from_train"]) == (run.dataset.name, {})
    words = [len(data.target(r["answer"]).split()) for r in problems["train"]]
    assert max(words) < run.evaluation.max_new_tokens


def test_larger_numbers_are_in_every_split_of_generated_problems_and_are_words_of_the_made_model():
    def numbers(**sets):
        splits = prepare.load_problems(loaded(**{"dataset.split_seed": "30"}, **sets))[0]
        return {name: {int(n) for row in splits[name] for n in re.findall(r"\d+", row["question"])} for name in splits}

    usual, larger = numbers(), numbers(**{"dataset.numbers_below": "67"})
    for name in ("train", "dev", "test"):
        assert max(usual[name]) == 9
        assert 60 < max(larger[name]) < 67
    words = prepare.word_tokenizer()
    rows = prepare.generate_problems(2000, 0, 2, 67)
    assert not any(words.unk_token_id in words(prepare.text_of(row))["input_ids"] for row in rows)


# ---- loss beside exact match


def test_losses_of_a_problem_do_not_depend_on_its_batch_and_are_the_models_own(shared):  # noqa: F811
    run = member_of().run
    given = data.load(shared)
    model = data.load_model(run, given, 1).eval()
    rows = given.rows["train"][:7]
    together, _ = data.answer_losses(model, given.tokenizer, rows, 7)
    alone = [data.answer_losses(model, given.tokenizer, [row], 1)[0][0] for row in rows]
    assert [n for _, n in together] == [n for _, n in alone] == [len(r["ids"]) - r["prompt"] for r in rows]
    assert [t for t, _ in together] == pytest.approx([t for t, _ in alone], rel=1e-4)
    batch = data.collate(rows[:1], given.tokenizer.pad_token_id)
    with torch.no_grad():
        assert alone[0][0] / alone[0][1] == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_every_test_problem_has_its_loss_beside_its_answer(tmp_path, shared):  # noqa: F811
    found = member.train(member_of(changes={"training.total_steps": 2}), tmp_path, shared)
    rows = [r for r in record.read_jsonl(tmp_path / "predictions.jsonl") if r["kind"] == "example"]
    assert len(rows) == 4
    assert min(r["test_loss"] for r in rows) <= found["test_loss"] <= max(r["test_loss"] for r in rows)


# ---- 2. of what must hold, with the secant and the guard at work


def test_frozen_cold_graff_equals_fixed_bit_for_bit_with_curvature_probes(tmp_path, shared, monkeypatch):  # noqa: F811
    """What the clock reads enters by the warm-up alone: with next to none of it the overhead need not be left
    uncharged."""
    monkeypatch.setattr(schedulers, "WARM_UP", 1e-12)
    for kind, more in (("fixed", {}), ("graff", {"cold": True, "frozen": True})):
        (tmp_path / kind).mkdir()
        member.train(member_of(kind, changes={"training.total_steps": 14}, **more), tmp_path / kind, shared)
    fixed, graff = (
        [(r["step"], r["loss"], r["eta"]) for r in curve(tmp_path / n) if "eta" in r] for n in ("fixed", "graff")
    )
    assert fixed == graff
    assert any(r.get("lambda") for r in curve(tmp_path / "graff"))  # the secant was taken


def test_generation_stops_at_what_the_harness_would_cut(shared, monkeypatch):  # noqa: F811
    given = data.load(shared)
    model = data.load_model(member_of().run, given, 1).eval()
    monkeypatch.setattr(given.tokenizer, "decode", lambda *_, **__: " so #### 4\n\nQuestion: next? #### 5")
    written, _ = data.score(model, given.tokenizer, [{"question": "q", "answer": "#### 4"}], 2, 1)
    assert written[0]["strict"] is True
    assert written[0]["flexible"] is True


@pytest.mark.parametrize(
    ("period", "written", "ends"),
    [(1, 64, True), (5, 64, True), (16, 64, True), (17, 64, False), (3, 56, False), (3, 68, False), (3, 72, True)],
)
def test_a_row_that_only_repeats_itself_is_ended_and_no_other(period, written, ends):
    """Looked at every 8 tokens, from 64 on; the prompt does not count, and a row that says something new goes on."""
    loop = [7 + i % period for i in range(written)]
    fresh = list(range(100, 100 + written))
    rows = torch.tensor([[1, 2, 3, *loop], [1, 2, 3, *fresh], [1, 2, 3, *loop[:-1], 999]])
    assert data.Looping(3)(rows, None).tolist() == [ends, False, False]


def test_what_a_model_writes_in_a_loop_says_the_same_as_all_that_it_may_write(shared, monkeypatch):  # noqa: F811
    given = data.load(shared)
    model = data.load_model(member_of().run, given, 1).eval()
    questions = [p["question"] for p in given.problems["train"][:12]]
    short, units = data.generate_answers(model, given.tokenizer, questions, 150, 12)
    monkeypatch.setattr(data, "LOOP", 10**9)
    long, more = data.generate_answers(model, given.tokenizer, questions, 150, 12)
    assert all(b.startswith(a) for a, b in zip(short, long, strict=True))
    assert [data.strict(t) for t in short] == [data.strict(t) for t in long]
    assert units < more


def test_all_runs_share_one_preparation():
    """What the runs differ in, their schedulers, is no part of it."""
    paths = sorted(GRAFF.parent.glob("*.yaml"))
    loaded = [config.load_run(path, study="graff", scale="laptop", mode="full") for path in paths]
    assert len({members.inputs_folder(run) for run in loaded}) == 1 < len(loaded)


# ---- published configurations: no key goes unheard

RENAMED = {
    "model.dtype": "model.torch_dtype",
    "method": None,
}  # a role and a comment: the scheduler's type is the method


@pytest.mark.parametrize("name", ["proposed-iter1-Qwen3-0.6B-gsm8k", "comparative-1-iter1-Qwen3-0.6B-gsm8k"])
def test_every_published_key_is_honoured_or_named(name, tmp_path):
    published = as_published(ROOT / "params" / "published" / f"{name}.yaml")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(published))
    run = config.load_run(tmp_path / "run.yaml", scale="paper", mode="full")
    said, dump = {f.key for f in check.findings(run)}, config.dump(run)

    def leaves(value, at=""):
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from leaves(inner, f"{at}.{key}" if at else key)
        else:
            yield at, value

    refused = set()
    for key, value in leaves(published):
        mine = RENAMED.get(key, key)
        if mine is None:
            continue
        found = config.get(dump, mine)
        numbers = isinstance(value, str) and isinstance(found, float)  # YAML 1.1 reads 2e-4 as text
        ours = mine.removeprefix("optuna.search_space.").split(".")[0] if "search_space" in mine else mine
        assert found == (float(value) if numbers else value) or {mine, ours} & said, (
            f"{key}: {value!r} became {found!r}"
        )
        refused |= {mine} & said
    assert (run.method, run.role) == (("graff", "proposed") if "proposed" in name else ("reactor", "comparative"))
    assert {"dataset.eval_split", "dataset.shuffle_buffer", "evaluation.interval_steps"} <= refused
    assert "training.scheduler.warm_start_ckpt" in refused or run.method == "reactor"
