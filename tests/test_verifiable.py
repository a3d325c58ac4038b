"""Verifiable preferences: what code checks, the pairs of a model's own answers, and adapters on the last layers."""

import pytest
import torch

from lib import made, models, record
from lib.config import restore
from lib.errors import StudyError
from lib.run import members
from lib.td_dpo import data, engine, generated, member
from tests.conftest import TINY

WORD, SHORT = 'Describe bread. Use the word "small".', "Explain winter. Use at most 15 words."
AVOID, SIGN = 'Tell me about sleep. Do not use the word "the".', 'Describe trees. Use the sign "?".'
WITHOUT = 'What should I know about music? Do not use the sign ",".'


@pytest.mark.parametrize(
    ("request_", "answer", "share"),
    [
        (WORD, "A SMALL loaf.", 1),
        (WORD, "A smaller loaf.", 0),
        (SHORT, "Winter is cold.", 1),
        (SHORT, "word " * 30, 0.5),
        (SHORT, "...", 0),
        (AVOID, "Sleep well, then.", 1),
        (AVOID, "The night and the day.", 1 / 3),
        (SIGN, "Trees? Tall.", 1),
        (SIGN, "Trees.", 0),
        (WITHOUT, "It is loud.", 1),
        (WITHOUT, "Loud, long, low.", 1 / 3),
    ],
)
def test_code_says_how_far_an_answer_does_what_was_asked(request_, answer, share):
    assert generated.fulfilled(request_, answer) == pytest.approx(share)
    assert generated.verifier_score([{"role": "user", "content": request_}], answer) == pytest.approx(1 + 9 * share)


def test_every_request_has_a_constraint_and_belongs_to_one_split():
    splits = {split: generated.requests(split, 3) for split in (*data.SPLITS, "questions")}
    every = [request for requests in splits.values() for request in requests]
    assert len(set(every)) == len(every)
    assert {generated.constraint(request)[0] for request in every} == set(generated.KINDS)
    assert splits["train"] != generated.requests("train", 4)
    assert sorted(splits["train"]) == sorted(generated.requests("train", 4))
    questions = generated.verifiable_questions(160)
    assert len(questions) == 160
    assert {question["turns"][0] for question in questions} <= set(splits["questions"])


def run_of(seed=1, mode="full", **sizes):
    wanted = {"train_pairs": 60, "validation_pairs": 8, "test_pairs": 8, "split_seed": seed, **sizes}
    evaluation = {"questions": 4, "max_new_tokens": 8, "judge": "verifier"}
    raw = {
        **TINY,
        "dataset": {"name": "verifiable", **wanted},
        "model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    }
    return restore({**raw, "evaluation": evaluation}, study="td_dpo", scale="small", mode=mode)


@pytest.fixture
def model_that_listens_to_every_second_draw(monkeypatch):
    def sample(_model, _tokenizer, prompts, **_):
        texts = []
        for number, [message] in enumerate(prompts):
            kind, asked = generated.constraint(message["content"])
            done = f"So {asked} it is." if kind in ("word", "sign") else "Yes."
            texts.append(done if number % 2 else "No the and is of" * 20 if kind != "without" else asked)
        return [{"text": text} for text in texts]

    monkeypatch.setattr(data, "sample", sample)


@pytest.mark.usefixtures("model_that_listens_to_every_second_draw")
def test_a_pair_is_an_answer_that_does_what_was_asked_and_one_that_does_not():
    splits, report = data.sample_pairs(run_of(), None, None)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 60, "validation": 8, "test": 8}
    assert report["base_rates"] == dict.fromkeys(sorted(generated.KINDS), 0.5)
    for pair in (pair for pairs in splits.values() for pair in pairs):
        texts = [pair[side][0]["content"] for side in ("chosen", "rejected")]
        assert [generated.fulfilled(pair["prompt"][0]["content"], text) == 1 for text in texts] == [True, False]
    other = data.sample_pairs(run_of(seed=2), None, None)[0]
    assert other["test"] == splits["test"]
    assert other["train"] != splits["train"]


@pytest.mark.usefixtures("model_that_listens_to_every_second_draw")
def test_the_stated_share_of_training_labels_is_turned_round():
    splits, plain = (data.sample_pairs(run_of(flipped=share), None, None)[0] for share in (0.25, 0.0))
    turned = [pair["chosen"] == other["rejected"] for pair, other in zip(splits["train"], plain["train"], strict=True)]
    assert 0.1 < sum(turned) / len(turned) < 0.4
    assert splits["test"] == plain["test"]
    assert splits["validation"] == plain["validation"]


@pytest.mark.usefixtures("model_that_listens_to_every_second_draw")
def test_sampled_pairs_are_audited_as_they_were_prepared(tmp_path, monkeypatch):
    run = run_of(mode="trial")
    splits, report = data.load_run(run, data.sample_pairs(run, None, None))
    record.write_json(tmp_path / "pairs.json", splits)
    record.write_json(tmp_path / "report.json", report)
    asked = []
    monkeypatch.setattr(members, "prepare_all", asked.append)
    monkeypatch.setattr(members, "prepare_inputs", lambda _: tmp_path)
    monkeypatch.setattr(members, "CACHE", tmp_path)
    found = members.audit(run, tmp_path)
    assert asked == [run], "sampling takes minutes of one core: not of one seed after the other"
    assert found == record.read_json(tmp_path / "audit.json")
    assert found["rows"] == {"train": 60, "validation": 8, "test": 8}
    assert found["turns"] == {"user": 76, "assistant": 76}
    assert found["summary"][0].endswith("rows of verifiable")
    assert all(parts["prompt"]["median"] > 0 for parts in found["tokens"].values())


def test_a_model_that_never_listens_gives_no_pairs_but_a_trial(monkeypatch):
    monkeypatch.setattr(data, "sample", lambda _m, _t, prompts, **_: [{"text": "the and is of " * 20} for _ in prompts])
    with pytest.raises(StudyError, match=r"dataset.train_pairs: 0 pairs from the answers to \d+ requests"):
        data.sample_pairs(run_of(), None, None)
    assert len(data.sample_pairs(run_of(mode="trial"), None, None)[0]["train"]) == 60


def test_adapters_are_on_the_last_layers_alone():
    tokenizer = made.train_bpe_tokenizer(["a b c"], 300)
    model = made.stand_in("HuggingFaceTB/SmolLM2-135M-Instruct", tokenizer, num_hidden_layers=5)
    adapted = models.add_lora(model, {"lora_r": 2, "target_modules": ["q_proj", "up_proj"], "last_layers": 2}, seed=0)
    layers = {name.split(".layers.")[1].split(".")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert layers == {"3", "4"}
    with pytest.raises(StudyError, match="PEFT takes layers of no other"):
        restore({**TINY, "model": {"name": "made", "peft": {"lora_r": 2, "last_layers": 2}}}, study="td_dpo", scale="laptop",
                mode="full")  # fmt: skip


def test_members_with_adapters_on_those_layers_enter_behind_the_others(tmp_path):
    def run_with(last):
        peft = {"lora_r": 2, "target_modules": ["q_proj"], "last_layers": last}
        recipe = TINY["model"]["recipe"] | {"layers": 3}
        return restore({**TINY, "model": {"name": "made", "recipe": recipe, "peft": peft}}, study="td_dpo",
                       scale="laptop", mode="full")  # fmt: skip

    data.prepare(run_with(2), tmp_path)
    for last, depth in ((1, 1), (2, 1), (None, None), (3, None)):
        given = member.load(run_with(last), tmp_path)
        assert [row.get("trunk", [None])[0] for row in given.rows["test"]] == [depth] * len(given.rows["test"])
    model = models.load_causal_lm(given.base)
    for split, rows in member.load(run_with(2), tmp_path).rows.items():
        assert torch.equal(engine.sequence_logprobs(model, rows), given.reference[split])
