"""The oracle: known answers, monotone in every quality, and a score for any text."""

import random

import pytest

from lib.errors import StudyError
from lib.td_dpo.generated import BEST_REWARD, STYLES, TONES, TOPICS, WEIGHTS, parse_request, qualities, reward, score


def ask(*turns: str) -> list[dict]:
    return [{"role": "assistant" if k % 2 else "user", "content": text} for k, text in enumerate(turns)]


ONE = ask("List three fruits in a calm tone as bullet points.")
FAULTLESS = "Gently now:\n- apple\n- pear\n- plum\nBreathe easy."


def test_no_word_belongs_to_two_topics_and_no_phrase_to_two_tones():
    items = [item.lower() for topic in TOPICS.values() for item in topic]
    phrases = [phrase for ends in TONES.values() for end in ends for phrase in end]
    assert len(items) == len(set(items))
    assert len(phrases) == len(set(phrases))


def test_faultless_answers_score_ten_in_every_style_and_tone():
    for tone, (openers, closers) in TONES.items():
        for style, body in (
            ("line", "apple, pear, plum"),
            ("bullets", "- apple\n- pear\n- plum"),
            ("numbers", "1. apple\n2. pear\n3. plum"),
        ):
            prompt = ask(f"List three fruits in a {tone} tone {STYLES[style]}.")
            answer = f"{openers[0]}\n{body}\n{closers[1]}"
            assert reward(prompt, answer) == BEST_REWARD
            assert score(prompt, answer) == 10


@pytest.mark.parametrize(
    ("quality", "answers"),  # from best to worst in that quality
    [
        (
            "topicality",
            [FAULTLESS, FAULTLESS.replace("pear", "saw"), "Gently now:\n- saw\n- axe\n- rake\nBreathe easy."],
        ),
        ("count", [FAULTLESS, FAULTLESS.replace("- pear\n", ""), "Gently now:\n- apple\nBreathe easy."]),
        ("tone", [FAULTLESS, FAULTLESS.replace("Gently now:\n", ""), "- apple\n- pear\n- plum\nGood night."]),
        ("style", [FAULTLESS, FAULTLESS.replace("- plum", "plum"), FAULTLESS.replace("- ", "1. ")]),
        (
            "duplicates",
            [FAULTLESS, FAULTLESS.replace("pear", "plum"), "Gently now:\n- plum\n- plum\n- plum\nBreathe easy."],
        ),
        ("junk", [FAULTLESS, FAULTLESS.replace("- pear", "- blah\n- pear"), FAULTLESS + " blah um qux zap !!!!!!!!"]),
    ],
)
def test_reward_and_score_fall_as_one_quality_alone_becomes_worse(quality, answers):
    found = [qualities(ONE, answer) for answer in answers]
    worse = 1 if WEIGHTS[quality] < 0 else -1
    for better, worst in zip(found, found[1:], strict=False):
        assert (worst[quality] - better[quality]) * worse > 0
        assert {name: share for name, share in better.items() if name != quality} == pytest.approx(
            {name: share for name, share in worst.items() if name != quality}
        )
    rewards = [reward(ONE, answer) for answer in answers]
    scores = [score(ONE, answer) for answer in answers]
    assert rewards == sorted(rewards, reverse=True)
    assert len(set(rewards)) == 3
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3


def test_score_is_monotone_in_reward_and_within_one_and_ten_on_any_text():
    rng = random.Random(0)
    pieces = [
        "apple",
        "Gently now:",
        "\n",
        "- ",
        "blah",
        "1. ",
        "saw",
        ",",
        "日本",
        "\x00",
        "é",
        "  ",
        "!!",
        "_",
        "٣",
        "<|eos|>",
    ]
    texts = ["", " ", "\n\n", "-", "1.", "a" * 20_000, "apple " * 3_000, FAULTLESS]
    texts += ["".join(rng.choices(pieces, k=rng.randrange(30))) for _ in range(500)]
    graded = sorted((reward(ONE, text), score(ONE, text)) for text in texts)
    assert all(-3 <= latent <= BEST_REWARD and 1 <= given <= 10 for latent, given in graded)
    assert [given for _, given in graded] == sorted(given for _, given in graded)
    assert score(ONE, "") == score(ONE, "\n") == score(ONE, "blah blah") == 1


def test_flattery_by_repetition_does_not_pay():
    assert score(ONE, FAULTLESS * 5) < 7
    assert score(ONE, "Gently now: " * 10) < 4


def test_second_turns_take_over_what_they_do_not_name():
    first = "List two tools in a formal tone as a numbered list."
    answer = "1. saw\n2. axe"
    more = parse_request(ask(first, answer, "Add three more in a calm tone on one line."))
    assert (more.topic, more.count, more.tone, more.style, more.listed) == ("tools", 3, "calm", "line", {"saw", "axe"})
    other = parse_request(ask(first, answer, "Now four birds in a pirate tone."))
    assert (other.topic, other.count, other.tone, other.style, other.listed) == ("birds", 4, "pirate", "numbers", set())
    again = parse_request(ask(first, answer, "Say that again in a sleepy tone as bullet points."))
    assert (again.topic, again.count, again.tone, again.style, again.listed) == ("tools", 2, "sleepy", "bullets", set())


def test_more_must_not_repeat_the_earlier_answer():
    prompt = ask("List two tools in a calm tone.", "saw, axe", "Add two more in a calm tone on one line.")
    assert qualities(prompt, "hammer, rake")["duplicates"] == 0
    assert qualities(prompt, "saw, rake")["duplicates"] == 0.5


@pytest.mark.parametrize(
    "prompt", [[], ask("What is the capital of France?"), ask("List two tools in a calm tone.", "saw, axe")]
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(StudyError, match="not a generated list request"):
        score(prompt, "apple")
