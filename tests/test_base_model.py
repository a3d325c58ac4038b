"""The made base model and its sampling: template, tokens, determinism, batches against single rows."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lib import record
from lib.errors import StudyError
from lib.made import save, train_bpe_tokenizer
from lib.td_dpo import data
from lib.td_dpo.data import conversations, make_base
from lib.td_dpo.engine import answer_questions, sample
from lib.td_dpo.generated import make_pairs, questions

RECIPE = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "sft_steps": 40,
    "sft_batch_size": 16,
    "sft_learning_rate": 1e-2,
    "seed": 0,
}
REAL = Path(__file__).parents[2] / "shared/data/alpaca_eval_preferences/data/test-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(120, 0, 0)["train"]


@pytest.fixture(scope="module")
def made(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer, _ = make_base(pairs, RECIPE, folder / "history.jsonl")
    save(model, tokenizer, folder)
    return folder, record.read_jsonl(folder / "history.jsonl")


@pytest.fixture(scope="module")
def loaded(made):
    folder, _ = made
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_training_reports_every_step_and_learns(made):
    folder, losses = made
    assert [(row["step"], row["steps"]) for row in losses] == [(k, 40) for k in range(1, 41)]
    assert losses[-1]["loss"] < 0.75 * losses[0]["loss"]
    assert (folder / "model.safetensors").exists()
    assert (folder / "tokenizer.json").exists()


def test_the_made_vocabulary_begins_with_its_marks_and_no_others_whatever_roles_the_reader_knows(loaded):
    marks = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert sorted(loaded[1].all_special_tokens) == sorted(marks)
    assert loaded[1].convert_tokens_to_ids(marks) == list(range(6))


def test_the_same_recipe_gives_the_same_weights_and_leaves_the_callers_generator_alone(pairs, made, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    save(*make_base(pairs, RECIPE, tmp_path / "h")[:2], tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / "model.safetensors").read_bytes() == (made[0] / "model.safetensors").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == (made[0] / "tokenizer.json").read_bytes()
    save(*make_base(pairs, {**RECIPE, "seed": 1, "sft_steps": 1}, tmp_path / "h")[:2], tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() != (made[0] / "model.safetensors").read_bytes()


def test_one_begin_one_end_and_the_prompt_is_a_prefix(pairs, loaded):
    model, tokenizer = loaded
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "right"
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert model.config.vocab_size == len(tokenizer) <= 2048
    for pair in pairs:
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
        assert prompt.count(tokenizer.bos_token_id) == 1
        assert prompt[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in prompt
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template([*pair["prompt"], *pair[side]], return_dict=False)
            assert whole[: len(prompt)] == prompt
            assert whole.count(tokenizer.bos_token_id) == 1
            assert whole.count(tokenizer.eos_token_id) == 1
            assert whole[-1] == tokenizer.eos_token_id
            answer = tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True)
            assert answer == pair[side][0]["content"]


def test_any_text_survives_the_tokenizer(loaded):
    _, tokenizer = loaded
    for text in ("naïve 日本 \U0001f600", " two  spaces ", "tabs\tand\r\nlines\n", "x 's n't . ,", "don 't"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_too_small_a_vocabulary_and_no_answers_are_refused(pairs, loaded, monkeypatch):
    with pytest.raises(StudyError, match="vocab_size"):
        train_bpe_tokenizer(["a"], 100)
    monkeypatch.setattr(data, "LONGEST", 4)
    with pytest.raises(StudyError, match="no answer within 4 tokens"):
        conversations(loaded[1], pairs)


def test_real_conversations_are_cut_and_learned_from(monkeypatch, tmp_path):
    if not REAL.exists():
        pytest.skip(f"{REAL} is not on this machine")
    import pandas as pd

    rows = pd.read_parquet(REAL).head(60)
    real = [
        {"prompt": list(chosen[:-1]), "chosen": [chosen[-1]], "rejected": [rejected[-1]], "row": k}
        for k, (chosen, rejected) in enumerate(zip(rows["chosen"], rows["rejected"], strict=True))
    ]
    tokenizer = make_base(real, {**RECIPE, "sft_steps": 4, "vocab_size": 600}, tmp_path / "h")[1]
    assert len(tokenizer) == 600
    monkeypatch.setattr(data, "LONGEST", 128)
    kept = conversations(tokenizer, real)
    assert 0 < len(kept) <= 120
    assert all(0 < row["prompt"] < len(row["ids"]) <= 128 for row in kept)


def sampled(loaded, pairs, **changes):
    model, tokenizer = loaded
    options = {"max_new_tokens": 12, "temperature": 0.7, "seed": 3, "batch_size": 8} | changes
    return sample(model, tokenizer, [pair["prompt"] for pair in pairs[:12]], **options)


def test_greedy_answers_are_the_same_in_left_padded_batches_and_one_by_one(loaded, pairs):
    single = sampled(loaded, pairs, temperature=0, batch_size=1)
    assert len({len(answer["prompt_ids"]) for answer in single}) > 3  # so that batches are really padded
    assert sampled(loaded, pairs, temperature=0, batch_size=12) == single
    assert sampled(loaded, pairs, temperature=0, seed=99) == single
    model, tokenizer = loaded
    for answer in single[:4]:  # and equal to what the model says without a cache
        ids = list(answer["prompt_ids"])
        for token in answer["ids"]:
            assert model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)


def test_sampling_depends_on_its_seed_alone(loaded, pairs):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sampled(loaded, pairs)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sampled(loaded, pairs) == first
    assert sampled(loaded, pairs, batch_size=1) == first
    assert sampled(loaded, pairs, seed=4) != first


def test_answers_to_one_prompt_share_its_forward_pass(loaded, pairs):
    model, tokenizer = loaded
    prompts, options = [pair["prompt"] for pair in pairs[:3] for _ in range(4)], {"temperature": 0.7, "seed": 3}
    single = sample(model, tokenizer, prompts, max_new_tokens=4, batch_size=1, **options)
    shapes = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    assert sample(model, tokenizer, prompts, max_new_tokens=4, batch_size=12, **options) == single
    hook.remove()
    longest = max(len(answer["prompt_ids"]) for answer in single)
    assert shapes == [(3, longest - 1), *[(12, 1)] * 4]


def test_sampling_follows_the_distribution_at_its_temperature(loaded, pairs):
    model, tokenizer = loaded
    prompt = pairs[0]["prompt"]
    answers = sample(model, tokenizer, [prompt] * 3000, max_new_tokens=1, temperature=0.7, seed=0, batch_size=3000)
    counts = torch.bincount(torch.tensor([answer["ids"][0] for answer in answers]), minlength=len(tokenizer))
    logits = model(torch.tensor([answers[0]["prompt_ids"]])).logits[0, -1]
    expected = torch.softmax(logits / 0.7, dim=-1)
    likely = expected > 0.02
    errors = (expected * (1 - expected) / 3000).sqrt()
    assert likely.sum() > 3
    assert ((counts / 3000 - expected).abs()[likely] < 4 * errors[likely]).all()


def test_the_models_own_generation_defaults_play_no_part_and_come_back(loaded, pairs):
    model, _ = loaded
    plain = sampled(loaded, pairs, temperature=0)
    own = model.generation_config
    model.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=2, min_new_tokens=12)
    model.train()
    try:
        assert sampled(loaded, pairs, temperature=0) == plain
        assert model.training
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = own
        model.eval()


def test_answers_say_whether_they_ended(loaded, pairs):
    _, tokenizer = loaded
    for answer in sampled(loaded, pairs, max_new_tokens=40):
        assert answer["finished"] == (answer["ids"][-1] == tokenizer.eos_token_id)
        assert answer["ids"].count(tokenizer.eos_token_id) == answer["finished"]
        assert answer["finished"] or len(answer["ids"]) == 40
        assert answer["text"] == tokenizer.decode(answer["ids"], skip_special_tokens=True)
    assert not any(answer["finished"] for answer in sampled(loaded, pairs, max_new_tokens=1, temperature=0))


def test_second_turns_follow_the_models_own_first_answers(loaded):
    model, tokenizer = loaded
    asked = questions(6)
    options = {"seed": 0, "max_new_tokens": 12, "temperature": 0.7, "batch_size": 4}
    answers = answer_questions(model, tokenizer, asked, **options)
    assert answers == answer_questions(model, tokenizer, asked, **options)
    assert [(answer["question"], answer["turn"]) for answer in answers] == [(k, t) for k in range(1, 7) for t in (1, 2)]
    for first, second, question in zip(answers[::2], answers[1::2], asked, strict=True):
        assert first["prompt"] == [{"role": "user", "content": question["turns"][0]}]
        assert second["prompt"][:2] == [*first["prompt"], {"role": "assistant", "content": first["text"]}]
        assert second["prompt"][2:] == [{"role": "user", "content": question["turns"][1]}]
        assert first["length"] == len(first["ids"])
        assert second["category"] == question["category"]


def test_a_model_that_is_not_finite_still_answers(loaded, pairs):
    model, tokenizer = loaded
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    for temperature in (0.0, 0.7):
        answers = sampled((broken, tokenizer), pairs, temperature=temperature)
        assert len(answers) == 12
        assert all(isinstance(answer["text"], str) for answer in answers)
    assert sample(model, tokenizer, [], max_new_tokens=4, temperature=0.7, seed=0, batch_size=2) == []
