"""The generated preference data: deterministic, disjoint, and noisy by a known amount."""

import random

import pytest

from lib.td_dpo.generated import (
    label_noise,
    make_pairs,
    parse_request,
    questions,
    reward,
    score,
    write_answer,
)


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(640, 400, 400)


def instructions(split: list[dict]) -> set[str]:
    return {message["content"] for pair in split for message in pair["prompt"] if message["role"] == "user"}


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others(pairs):
    assert make_pairs(640, 400, 400, seed=0) == pairs
    assert make_pairs(640, 400, 400, seed=1)["train"] != pairs["train"]
    assert questions(80) == questions(80, seed=0) != questions(80, seed=1)


def test_a_smaller_split_is_the_beginning_of_a_larger_one(pairs):
    small = make_pairs(10, 5, 0)
    assert small == {"train": pairs["train"][:10], "validation": pairs["validation"][:5], "test": []}
    assert questions(5) == questions(80)[:5]


def test_pairs_are_conversations_of_one_and_two_turns(pairs):
    for split, size in (("train", 640), ("validation", 400), ("test", 400)):
        assert [pair["row"] for pair in pairs[split]] == list(range(size))
        for pair in pairs[split]:
            assert set(pair) == {"prompt", "chosen", "rejected", "row"}
            assert [message["role"] for message in pair["prompt"]] in (["user"], ["user", "assistant", "user"])
            (chosen,), (rejected,) = pair["chosen"], pair["rejected"]
            assert chosen["role"] == rejected["role"] == "assistant"
            assert chosen["content"]
            assert rejected["content"]
            assert chosen["content"] != rejected["content"]
        two_turns = sum(len(pair["prompt"]) == 3 for pair in pairs[split]) / size
        assert 0.3 < two_turns < 0.5


@pytest.mark.parametrize("seed", [0, 7])
def test_no_instruction_is_shared_between_splits_or_with_the_questions(seed):
    made = make_pairs(640, 400, 400, seed=seed)
    asked = [instructions(made[split]) for split in ("train", "validation", "test")]
    asked.append({turn for question in questions(80, seed=seed + 1) for turn in question["turns"]})
    for k, left in enumerate(asked):
        for right in asked[k + 1 :]:
            assert not left & right


def test_questions_have_two_turns_that_the_oracle_understands():
    made = questions(80)
    assert [question["id"] for question in made] == list(range(1, 81))
    assert len({tuple(question["turns"]) for question in made}) == 80
    assert len({question["category"] for question in made}) > 8
    for question in made:
        first, second = question["turns"]
        prompt = [{"role": "user", "content": first}]
        assert parse_request(prompt).topic == question["category"]
        prompt += [{"role": "assistant", "content": "apple, pear"}, {"role": "user", "content": second}]
        assert 1 <= score(prompt, "apple, plum") <= 10


def test_about_one_label_in_seven_goes_against_the_reward():
    report = label_noise([pair for split in make_pairs(2000, 2000, 2000).values() for pair in split])
    assert report["flipped"] == pytest.approx(0.145, abs=0.02)
    assert report["ceiling"] == 1 - report["flipped"]
    # 6,000 labels: the observed ceiling lies within three standard errors of its expectation
    assert report["ceiling"] == pytest.approx(report["bayes_accuracy"], abs=3 * (0.15 * 0.85 / 6000) ** 0.5)


def test_bayes_accuracy_depends_on_the_rewards_and_not_on_the_labels(pairs):
    test = pairs["test"]
    turned = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in test]
    assert label_noise(turned)["bayes_accuracy"] == pytest.approx(label_noise(test)["bayes_accuracy"])
    assert label_noise(turned)["flipped"] == pytest.approx(1 - label_noise(test)["flipped"])
    assert 0.83 < label_noise(test)["bayes_accuracy"] < 0.87
    assert all(
        reward(p["prompt"], p["chosen"][0]["content"]) != reward(p["prompt"], p["rejected"][0]["content"]) for p in test
    )


def test_length_tells_little_about_the_label(pairs):
    longer = sum(len(p["chosen"][0]["content"]) > len(p["rejected"][0]["content"]) for p in pairs["test"]) / 400
    assert 0.4 < longer < 0.6


def test_a_careful_writer_is_faultless(pairs):
    rng = random.Random(0)
    for pair in pairs["train"][:200]:
        assert score(pair["prompt"], write_answer(rng, parse_request(pair["prompt"]), care=1.0)) == 10
