"""The preference engine on tiny models: tokens, log-probabilities, reference cache, training, resume, cost."""

import copy
import json
import math
import multiprocessing
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lib import models as base_models, record, training as runs
from lib.errors import StudyError
from lib.td_dpo import data, engine, losses, trainer
from lib.td_dpo.engine import pair_scores, reference_columns, with_reference
from lib.td_dpo.study import Loss, Training
from lib.td_dpo.trainer import PreferenceTrainer

WORDS = [
    a + b for a in ["b", "d", "f", "g", "l", "m", "n", "p", "r", "s", "t"] for b in ["an", "et", "il", "os", "um", "ar"]
]
TURNS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] + eos_token }}"
    "{% else %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATE = "{{ bos_token }}" + TURNS
BOS, EOS, PAD = 0, 1, 2
TRAINING = {
    "max_steps": 10,
    "global_batch_size": 8,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-3,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "max_grad_norm": 1.0,
    "eval_steps": 4,
    "save_steps": 3,
}
DPO = {"name": "dpo", "beta": 0.1}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # children are forked below: no OpenMP pool may exist in the parent
    yield
    torch.set_num_threads(before)


def make_tokenizer(template=TEMPLATE):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
    inner.train_from_iterator(
        [" ".join(random.Random(0).choices(WORDS, k=2000))],
        trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )


def make_pairs(count, seed=0):
    draw = random.Random(seed)

    def turn(role, low, high):
        return [{"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(low, high)))}]

    return [
        {
            "prompt": turn("user", 2, 12),
            "chosen": turn("assistant", 1, 14),
            "rejected": turn("assistant", 1, 14),
            "row": i,
        }
        for i in range(count)
    ]


def make_model(seed=0, hidden=32, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=360,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).eval()


def with_adapter(model, dropout=0.0):
    torch.manual_seed(5)
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    )


TOKENIZER = make_tokenizer()
ROWS, _ = data.encode_pairs(TOKENIZER, make_pairs(40))
VALIDATION, _ = data.encode_pairs(TOKENIZER, make_pairs(16, seed=9))


def references(model):
    return {
        "train": engine.sequence_logprobs(model, ROWS),
        "validation": engine.sequence_logprobs(model, VALIDATION),
    }


REFERENCE = references(make_model())


def train(folder, *, model=None, loss=DPO, seed=3, on_write=None, rows=ROWS, table=REFERENCE, kl=None, **training):
    """One training of the tiny model, with what `kl` returns as its sampled KL; returns the outcome and the records that it
    wrote itself."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    records = []

    class Trainer(PreferenceTrainer):
        def write(self, row):
            super().write(row)
            records.append(record.finite(row))
            if on_write:
                on_write(row)

        def sampled_kl(self):
            return kl(self.model) if kl else {}

    run = SimpleNamespace(loss=Loss(**loss), training=Training(**TRAINING | training))
    given = SimpleNamespace(rows={"train": rows, "validation": VALIDATION}, reference=table)
    return Trainer(run, seed, folder, given, model or make_model()).fit(), records


# --- tokens --------------------------------------------------------------------------------------------------------


def test_golden_tokens_one_bos_one_eos_and_the_prompt_a_prefix():
    pairs = make_pairs(6)
    rows, counts = data.encode_pairs(TOKENIZER, pairs)
    assert {name: count for name, count in counts.items() if count} == {"pairs": 6, "kept": 6}
    for pair, row in zip(pairs, rows, strict=True):
        for side in ("chosen", "rejected"):
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            text = f"<s><|user|>{pair['prompt'][0]['content']}<|assistant|>{pair[side][0]['content']}</s>"
            assert ids == TOKENIZER(text, add_special_tokens=False)["input_ids"]
            assert ids.count(BOS) == 1
            assert ids[0] == BOS
            assert ids.count(EOS) == 1
            assert ids[-1] == EOS
        assert TOKENIZER.decode(row["prompt_ids"]).endswith("<|assistant|>")


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ bos_token }}" + TEMPLATE, id="two BOS"),
        pytest.param(TEMPLATE.replace("+ eos_token", ""), id="no EOS"),
        pytest.param(TEMPLATE.replace("+ eos_token", "+ eos_token + '\n'"), id="text after EOS"),
        pytest.param(TEMPLATE.replace("+ eos_token", "+ eos_token + eos_token"), id="two EOS"),
    ],
)
def test_templates_that_err_still_give_one_bos_and_one_eos(template):
    assert (
        data.encode_pairs(make_tokenizer(template), make_pairs(6))[0] == data.encode_pairs(TOKENIZER, make_pairs(6))[0]
    )


def test_a_prompt_that_is_no_prefix_is_split_where_it_diverges_and_counted():
    template = TEMPLATE.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|>' + 'zz' }}")
    rows, counts = data.encode_pairs(make_tokenizer(template), make_pairs(6))
    assert counts["prompt_not_prefix"] == 6
    assert counts["kept"] == 6
    assert rows == data.encode_pairs(TOKENIZER, make_pairs(6))[0]


def test_truncation_is_counted_and_nothing_left_is_dropped():
    full, _ = data.encode_pairs(TOKENIZER, make_pairs(40))
    limit = 14
    rows, counts = data.encode_pairs(TOKENIZER, make_pairs(40), limit)
    lengths = [[len(r["prompt_ids"]) + len(r[side]) for side in ("chosen_ids", "rejected_ids")] for r in full]
    fits = [r for r, length in zip(full, lengths, strict=True) if len(r["prompt_ids"]) < limit]
    assert counts["truncated"] == sum(max(pair) > limit for pair in lengths)
    assert counts["eos_dropped"] == sum(x > limit for pair in lengths for x in pair)
    assert counts["dropped"] == 40 - len(rows) > 0
    assert len(rows) <= len(fits)
    assert counts["dropped"] == 40 - len(fits) + counts["identical_after_truncation"]
    assert all(len(r["prompt_ids"]) + len(r["chosen_ids"]) <= limit for r in rows)
    assert [r["pair"] for r in rows] == sorted(r["pair"] for r in rows)


def test_a_prompt_limit_keeps_bos_and_the_end():
    rows, counts = data.encode_pairs(TOKENIZER, make_pairs(20), None, 10)
    full, _ = data.encode_pairs(TOKENIZER, make_pairs(20))
    assert counts["prompt_truncated"] == sum(len(r["prompt_ids"]) > 10 for r in full) > 0
    for row, whole in zip(rows, full, strict=True):
        assert row["prompt_ids"][0] == BOS
        assert row["prompt_ids"][1:] == whole["prompt_ids"][1:][-9:]


def test_trl_tokenises_the_same_rows(tmp_path):
    stock, dataset = stock_trainer(tmp_path, make_model(), make_pairs(10), "sigmoid", 0.1)
    ours, _ = data.encode_pairs(TOKENIZER, make_pairs(10))
    for theirs, row in zip(dataset, ours, strict=True):
        assert all(theirs[k] == row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert stock.beta == 0.1


# --- log-probabilities, against TRL ----------------------------------------------------------------------------------


def stock_trainer(folder, model, pairs, loss_type, beta):
    """trl.DPOTrainer as shipped on the same pairs (float32, its own tokenization and precomputed reference)."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(folder),
        loss_type=loss_type,
        beta=beta,
        precompute_ref_log_probs=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        use_cpu=True,
        per_device_train_batch_size=len(pairs),
    )
    columns = [{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in pairs]
    stock = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(columns), processing_class=TOKENIZER)
    return stock, stock.train_dataset


def plain_logprobs(model, rows):
    """The definition: log softmax of the model's own logits, one sequence at a time."""
    out = []
    for row in rows:
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            out.append(scores[len(row["prompt_ids"]) - 1 :].sum())
    return torch.stack(out).view(-1, 2)


@pytest.fixture
def double_norm(monkeypatch):
    """transformers normalizes in float32 whatever the model's type: for float64 comparisons it must not."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.mark.parametrize("layout", [engine.paired_batch, engine.packed_batch])
@pytest.mark.parametrize(
    ("attention", "tolerance"), [("sdpa", 1e-10), ("eager", 1e-6)]
)  # eager: its softmax is float32
def test_log_probabilities_are_the_definitions_in_float64(layout, attention, tolerance, monkeypatch, double_norm):
    if layout is engine.packed_batch and attention == "eager":
        pytest.skip("packed rows need scaled_dot_product_attention")
    monkeypatch.setattr(engine, "layout", lambda model: layout)
    model = make_model().double()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        expected = plain_logprobs(model, ROWS)
    for elements in (2**24, 360 * 7):  # in one go, and in chunks of seven tokens
        monkeypatch.setattr(engine, "CHUNK", {"cpu": elements})
        monkeypatch.setattr(engine, "MIN_CHUNK", 1)
        monkeypatch.setattr(engine, "SCORING_TOKENS", 300)
        got = engine.sequence_logprobs(model, ROWS)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)


def on_the_last(model, last):
    """Adapters on the last layers alone, moved away from zero."""
    peft = {"lora_r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "last_layers": last}
    model = base_models.add_lora(model, peft, seed=5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return model


def test_rows_that_enter_behind_the_frozen_layers_have_the_scores_and_gradients_of_whole_passes():
    rows = [dict(row) for row in ROWS]
    depth = engine.trunk_depth(make_model(layers=4), 1, rows)
    reference = engine.sequence_logprobs(make_model(layers=4), rows, depth=depth)
    assert depth == 3
    assert all(row["trunk"][1].shape == (engine.packed_tokens(row), 32) for row in rows)
    assert torch.equal(reference, engine.sequence_logprobs(make_model(layers=4), ROWS))
    model, found = on_the_last(make_model(layers=4), 1), []
    assert not torch.allclose(engine.sequence_logprobs(model, ROWS), reference)
    for given in (ROWS, rows):
        with engine.completion_head(model):
            chosen, rejected = engine.batch_logprobs(model, engine.layout(model)(given[:8]))
        (chosen.square() - rejected).sum().backward()
        found.append([chosen, rejected, *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad(set_to_none=True)
    for whole, entered in zip(*found, strict=True):
        torch.testing.assert_close(entered, whole, rtol=1e-5, atol=1e-5)
    model.model.model.embed_tokens.weight.data.zero_()  # what is below the trunk is not looked at
    torch.testing.assert_close(
        engine.sequence_logprobs(model, rows)[:, 0][:8], found[0][0].detach(), rtol=1e-5, atol=1e-5
    )
    assert len(model.get_base_model().model.layers) == 4


def test_no_trunk_is_kept_of_a_model_whose_first_layers_are_trained_or_take_no_inputs_or_of_too_many_rows(monkeypatch):
    model, other, eager = (make_model(layers=4) for _ in range(3))
    other.config.model_type = "gemma"  # scales what it is given by sqrt(H)
    eager.config._attn_implementation = "eager"
    assert [engine.trunk_depth(model, last, ROWS) for last in (None, 1, 4, 9)] == [0, 3, 0, 0]
    assert engine.trunk_depth(other, 1, ROWS) == engine.trunk_depth(eager, 1, ROWS) == 0
    monkeypatch.setattr(engine, "TRUNK_BYTES", 1000)
    assert engine.trunk_depth(model, 1, ROWS) == 0


@pytest.mark.parametrize("layout", [engine.paired_batch, engine.packed_batch])
def test_gradients_are_those_of_the_definition_in_float64(layout, monkeypatch, double_norm):
    model, rows = make_model().double(), ROWS[:6]
    (plain_logprobs(model, rows) * torch.tensor([1.0, -0.5])).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    for elements in (2**24, 360 * 7):
        monkeypatch.setattr(engine, "CHUNK", {"cpu": elements})
        monkeypatch.setattr(engine, "MIN_CHUNK", 1)
        model.zero_grad()
        with engine.completion_head(model):
            chosen, rejected = engine.batch_logprobs(model, layout(rows))
        (chosen.sum() - 0.5 * rejected.sum()).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("kept", [10**6, 0])
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, False)])
def test_the_heads_gradients_are_those_of_cross_entropy_in_float64(monkeypatch, weight, bias, kept, chunk):
    """Trained or frozen, with a bias or without, in chunks or whole, probabilities kept or computed again."""
    monkeypatch.setattr(engine, "CHUNK", {"cpu": chunk * 50})
    monkeypatch.setattr(engine, "MIN_CHUNK", 1)
    monkeypatch.setattr(engine, "MAX_KEPT", kept)
    draw = torch.Generator().manual_seed(0)
    hidden, matrix, offset = (
        torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((17, 8), (50, 8), (50,))
    )
    hidden *= 30  # log-probabilities below -100, where a float32 probability would be zero
    targets, slope = torch.randint(50, (17,), generator=draw), torch.randn(17, generator=draw, dtype=torch.float64)
    seen = []
    for scored in (
        engine.token_scores,
        lambda h, w, b, t: -torch.nn.functional.cross_entropy(torch.nn.functional.linear(h, w, b), t, reduction="none"),
    ):
        leaves = [
            hidden.clone().requires_grad_(),
            matrix.clone().requires_grad_(weight),
            offset.clone().requires_grad_(bias),
        ]
        scores = scored(leaves[0], leaves[1], leaves[2] if bias else None, targets)
        seen.append(
            [scores.detach(), *torch.autograd.grad(scores, [leaf for leaf in leaves if leaf.requires_grad], slope)]
        )
    assert seen[0][0].min() < -100
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_faint_probabilities_keep_their_logarithm_in_float32():
    """From certain to far below what float32 holds as a probability (1e-45), in one chunk."""
    margins = torch.tensor([0.0, 1.0, 20.0, 60.0, 69.0, 69.2, 80.0, 100.0, 104.0, 300.0, 1e4])  # ln 1e-30 = -69.1
    logits = torch.stack([torch.zeros_like(margins), margins, torch.full_like(margins, -5.0)], dim=1)  # (n, 3)
    targets = torch.zeros(len(margins), dtype=torch.long)
    found = engine.token_scores(logits, torch.eye(3), None, targets)
    torch.testing.assert_close(found.double(), logits.double().log_softmax(dim=-1)[:, 0], rtol=3e-7, atol=1e-7)


@pytest.fixture
def double_head(monkeypatch):
    """TRL's head accumulates in float32 whatever the model's type: for float64 comparisons it is given a plain one."""

    def apply(hidden, weight, bias, targets, *_):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        scores = logits.log_softmax(-1)
        blank = torch.zeros_like(targets, dtype=scores.dtype)
        return scores.gather(1, targets[:, None])[:, 0], blank, blank, blank, blank.bool()

    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", SimpleNamespace(apply=apply))


def trl_and_ours(folder, dtype, loss_type, ours, layout):
    """Reference, log-probabilities, loss and gradient of one batch, by stock TRL and by the engine."""
    base, moved, beta, pairs = make_model().to(dtype), make_model(seed=1).to(dtype), 0.05, make_pairs(12)
    stock, dataset = stock_trainer(folder, base, pairs, loss_type, beta)
    stored = torch.tensor([[d["ref_chosen_logps"], d["ref_rejected_logps"]] for d in dataset], dtype=dtype)
    rows, _ = data.encode_pairs(TOKENIZER, pairs)
    table = engine.sequence_logprobs(make_model().to(dtype), rows)
    with torch.no_grad():  # a policy some way from its reference
        for p, q in zip(base.parameters(), moved.parameters(), strict=True):
            p.add_(0.3 * q)
    inputs = stock.data_collator(list(dataset))
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = stored.unbind(dim=1)
    loss = stock.compute_loss(stock.model, inputs)
    with torch.no_grad():
        scores = torch.stack(stock.compute_ref_log_probs(stock.model, inputs), dim=1)
    theirs = [stored, scores, loss.detach(), *torch.autograd.grad(loss, list(base.parameters()))]

    policy = make_model().to(dtype)
    policy.load_state_dict(base.state_dict())
    rows = with_reference(rows, stored)
    with engine.completion_head(policy):
        scores = engine.batch_logprobs(policy, layout(rows))
    values, _ = losses.objective({"name": ours, "beta": beta}, *scores, reference_columns(rows, dtype))
    gradient = torch.autograd.grad(values.mean(), list(policy.parameters()))
    return [table, torch.stack(scores, dim=1).detach(), values.mean().detach(), *gradient], theirs


def relative_error(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("ours", "theirs"), [("dpo", "sigmoid"), ("discopop", "discopop")])
@pytest.mark.parametrize("layout", [engine.paired_batch, engine.packed_batch])
def test_one_batch_equals_stock_trl_in_float64(tmp_path, ours, theirs, layout, monkeypatch, double_norm, double_head):
    monkeypatch.setattr(engine, "layout", lambda model: layout)
    for a, b in zip(*trl_and_ours(tmp_path, torch.float64, theirs, ours, layout), strict=True):
        assert relative_error(a, b) < 1e-10


@pytest.mark.parametrize(("ours", "theirs"), [("dpo", "sigmoid"), ("discopop", "discopop")])
@pytest.mark.parametrize("layout", [engine.paired_batch, engine.packed_batch])
def test_one_batch_equals_stock_trl_in_float32(tmp_path, ours, theirs, layout, monkeypatch):
    monkeypatch.setattr(engine, "layout", lambda model: layout)
    (table, scores, loss, *gradient), want = trl_and_ours(tmp_path, torch.float32, theirs, ours, layout)
    for a, b in zip((table, scores, loss), want, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    # a gradient element is a sum with cancellation: measured against its tensor's largest, not against itself
    for a, b in zip(gradient, want[3:], strict=True):
        assert relative_error(a, b) < 1e-5


def test_the_model_is_its_own_again_after_scoring():
    """A head left on a model would make its deep copies run the original's weights."""
    model = make_model()
    before, ids = dict(model.__dict__), torch.tensor([ROWS[0]["prompt_ids"]])
    engine.sequence_logprobs(model, ROWS[:2])
    assert dict(model.__dict__) == before
    assert model.config._attn_implementation == "sdpa"
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
        assert not twin(ids).logits.any()
        assert model(ids).logits.any()


def test_token_budget_batches_cover_every_row_once_within_the_budget():
    lengths = [random.Random(0).randint(1, 50) for _ in range(200)] + [500]
    batches = list(engine.token_budget_batches(lengths, 120))
    assert sorted(i for b in batches for i in b) == list(range(201))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 120 for b in batches)
    fewer = list(engine.token_budget_batches(lengths, 120, rows=2))
    assert sorted(i for b in fewer for i in b) == list(range(201))
    assert max(map(len, fewer)) == 2 < max(map(len, batches))


# --- reference -------------------------------------------------------------------------------------------------------


def test_sampled_log_ratios_with_a_model_or_with_adapters_off():
    samples = [{"prompt_ids": r["prompt_ids"], "ids": r["chosen_ids"]} for r in ROWS]
    moved = make_model(seed=1)
    expected = engine.sequence_logprobs(moved, ROWS)[:, 0] - REFERENCE["train"][:, 0]
    got = engine.log_ratio_of_samples(moved, make_model(), samples)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    unmoved = engine.log_ratio_of_samples(with_adapter(make_model()), None, samples)
    assert unmoved.shape == (40,)
    upper = on_the_last(make_model(), 1)  # whose reference enters behind the frozen layer
    expected = engine.sequence_logprobs(upper, ROWS)[:, 0] - REFERENCE["train"][:, 0]
    got = engine.log_ratio_of_samples(upper, None, samples)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert got.abs().max() > 0.1
    assert unmoved.abs().max() < 1e-4


def test_a_reference_of_another_model_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(StudyError, match="log-ratio"):
        train(tmp_path, model=make_model(seed=1))


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_a_timed_step_computes_in_the_precision_of_a_training(bf16):
    layer, seen = torch.nn.Linear(4, 4), []
    section = SimpleNamespace(learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0, bf16=bf16)

    def loss(batch):
        seen.append((out := layer(batch)).dtype)
        return out.float().sum()

    assert runs.make_stepper(layer, section, loss)(torch.ones(2, 4)) > 0
    assert seen == [torch.bfloat16 if bf16 else torch.float32]


@pytest.mark.parametrize(("tokens", "rows"), [(48, 80), (1024, 16), (20_000, 1)])
def test_long_answers_are_sampled_fewer_at_a_time(tokens, rows):
    evaluation = SimpleNamespace(max_new_tokens=tokens, temperature=0.7)
    assert trainer.sampling(SimpleNamespace(evaluation=evaluation))["batch_size"] == rows


HISTORY = [
    "step",
    "epoch",
    "loss",
    "preference_loss",
    "anchor_loss",
    "chosen_log_ratio",
    "rejected_log_ratio",
    "raw_margin",
    "chosen_length",
    "rejected_length",
    "margin",
    "implicit_accuracy",
    "raw_accuracy",
    "grad_norm",
    "learning_rate",
]


def test_training_learns_and_records_every_step(tmp_path):
    model = make_model()
    outcome, records = train(
        tmp_path,
        model=model,
        loss={"name": "td_dpo_anchored", "beta": 0.01, "tau": 1.0},
        max_steps=30,
        kl=lambda model: {"sampled_kl": 1.0},
    )
    timings = record.read_jsonl(tmp_path / "timing.jsonl")
    assert record.read_jsonl(tmp_path / "history.jsonl") == records
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "loss" not in r]
    assert outcome.status == "completed"
    assert outcome.step == 30
    assert [r["step"] for r in steps] == list(range(1, 31)) == [t["step"] for t in timings]
    assert list(steps[0]) == HISTORY
    assert set(timings[0]) == {"step", "seconds", "pairs_per_second", "tokens_per_second"}
    assert [r["step"] for r in evaluations] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert set(evaluations[0]) == {"step", "sampled_kl"} | {
        f"validation_{k}"
        for k in ("implicit_accuracy", "raw_accuracy", "loss", "margin", "chosen_log_ratio", "rejected_log_ratio")
    }
    assert abs(steps[0]["margin"]) < 1e-3
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert steps[-1]["implicit_accuracy"] == 1
    assert steps[-1]["margin"] > 3
    assert steps[-1]["anchor_loss"] > 0
    assert steps[-1]["loss"] == pytest.approx(steps[-1]["preference_loss"] + steps[-1]["anchor_loss"], rel=1e-5)
    scores = pair_scores(model, VALIDATION, REFERENCE["validation"])
    assert sum(s["rho"] for s in scores) / 16 == pytest.approx(evaluations[-1]["validation_margin"], rel=1e-4)
    assert sum(s["delta"] > 0 for s in scores) / 16 == evaluations[-1]["validation_raw_accuracy"]


def test_the_best_checkpoint_is_kept_and_gives_its_metric_back(tmp_path):
    outcome, records = train(tmp_path, max_steps=14)
    evaluations = {r["step"]: r["validation_implicit_accuracy"] for r in records if "validation_loss" in r}
    best = max(evaluations, key=evaluations.get)
    assert outcome.best_step == best
    kept = {int(p.name[11:]) for p in runs.checkpoint_folders(tmp_path / "checkpoints")}
    assert kept == {best, 14}
    model = runs.load_checkpoint(make_model(seed=4), tmp_path / "checkpoints" / f"checkpoint-{best}")
    scores = pair_scores(model, VALIDATION, REFERENCE["validation"])
    assert sum(s["rho"] > 0 for s in scores) / 16 == evaluations[best]


def test_a_whole_run_equals_stock_trl_when_every_batch_is_the_data_set(tmp_path):
    pairs = make_pairs(8)
    stock, _ = stock_trainer(tmp_path / "trl", make_model(), pairs, "sigmoid", 0.1)
    args = stock.args
    args.max_steps, args.learning_rate, args.logging_steps, args.weight_decay = 6, 1e-3, 1, 0.01
    args.save_strategy, args.lr_scheduler_type, args.warmup_steps = "no", "cosine", 0
    stock.train()
    theirs = [(h["loss"], h["grad_norm"]) for h in stock.state.log_history if "loss" in h]
    rows, _ = data.encode_pairs(TOKENIZER, pairs)
    _, records = train(
        tmp_path / "ours",
        rows=rows,
        max_steps=6,
        learning_rate=1e-3,
        warmup_ratio=0.0,
        table=REFERENCE | {"train": engine.sequence_logprobs(make_model(), rows)},
    )
    ours = [(r["loss"], r["grad_norm"]) for r in records if "loss" in r]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)


def test_accumulated_gradients_equal_those_of_one_batch(tmp_path):
    """1 x 8 accumulated = 8 x 1, in a full step and in an epoch's last, uneven one."""
    seen = {}
    for device_batch in (8, 3, 1):
        rows = ROWS[:20]
        records = train(
            tmp_path / str(device_batch),
            rows=rows,
            global_batch_size=8 if device_batch != 3 else 9,
            table=REFERENCE | {"train": REFERENCE["train"][:20]},
            per_device_train_batch_size=device_batch,
            max_steps=6,
        )[1]
        seen[device_batch] = [(r["loss"], r["grad_norm"], r["chosen_length"]) for r in records if "loss" in r]
    torch.testing.assert_close(torch.tensor(seen[1]), torch.tensor(seen[8]), rtol=1e-4, atol=1e-6)
    nine = train(
        tmp_path / "nine",
        rows=ROWS[:20],
        global_batch_size=9,
        per_device_train_batch_size=9,
        max_steps=6,
        table=REFERENCE | {"train": REFERENCE["train"][:20]},
    )[1]
    torch.testing.assert_close(
        torch.tensor(seen[3]),
        torch.tensor([(r["loss"], r["grad_norm"], r["chosen_length"]) for r in nine if "loss" in r]),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("layout", [engine.paired_batch, engine.packed_batch])
def test_a_token_budget_changes_the_passes_and_not_the_numbers(tmp_path, monkeypatch, layout):
    """The same pairs make each optimizer step, cut by length so that no pass exceeds the budget or the device's
    batch."""
    passes = []
    monkeypatch.setattr(engine, "layout", lambda model: layout)
    whole = train(
        tmp_path / "whole",
        rows=ROWS[:20],
        table=REFERENCE | {"train": REFERENCE["train"][:20]},
        max_steps=6,
    )[1]
    one_pass = PreferenceTrainer._pass
    monkeypatch.setattr(PreferenceTrainer, "_pass", lambda self, rows: passes.append(rows) or one_pass(self, rows))
    records = train(
        tmp_path / "cut",
        rows=ROWS[:20],
        table=REFERENCE | {"train": REFERENCE["train"][:20]},
        max_steps=6,
        token_budget=150,
        per_device_train_batch_size=4,
    )[1]
    seen = [[(r["loss"], r["grad_norm"], r["chosen_length"]) for r in rows if "loss" in r] for rows in (records, whole)]
    torch.testing.assert_close(*map(torch.tensor, seen), rtol=1e-4, atol=1e-6)
    widths = [[engine.row_tokens(row) for row in rows] for rows in passes]
    assert len(widths) > 12, "6 steps of 8 or 4 pairs, at most 4 in a pass"
    assert all(len(rows) == 1 or len(rows) <= 4 and len(rows) * max(rows) <= 150 for rows in widths)
    assert any(len(rows) == 1 for rows in widths)
    assert max(map(len, widths)) > 1


def test_steps_follow_from_the_global_batch():
    published = Training(global_batch_size=128, per_device_train_batch_size=4, epochs=3, learning_rate=1e-5)
    assert published.steps(6075) == 144


def test_batches_are_the_same_in_every_arm_and_differ_between_seeds(tmp_path):
    def lengths(name, seed):
        tau = {"tau": 1.0} if name == "td_dpo" else {}
        _, records = train(tmp_path / f"{name}{seed}", loss={"name": name, "beta": 0.05, **tau}, seed=seed)
        return [(r["chosen_length"], r["rejected_length"]) for r in records if "loss" in r]

    first = lengths("dpo", 42)
    assert first == lengths("td_dpo", 42) == lengths("ipo", 42) != lengths("dpo", 43)
    assert first[:5] != first[5:]  # 40 pairs in batches of 8: a new order in the second epoch
    order = runs.SeededOrder(40, 42)
    assert sorted(order) == list(range(40))
    assert list(order) == list(order)


@pytest.mark.parametrize("loss", [{"name": "discopop_card", "beta": 60.0}, {"name": "dpo", "beta": 0.1}])
def test_a_run_that_diverges_is_an_outcome_with_its_step(tmp_path, loss):
    rate = 1.0 if loss["name"] == "discopop_card" else 1e30
    model = make_model()
    outcome, records = train(tmp_path, model=model, loss=loss, learning_rate=rate, max_grad_norm=1e38, max_steps=30)
    steps = [r for r in records if "loss" in r]
    assert outcome.status == "diverged"
    assert outcome.step == steps[-1]["step"] < 30
    assert steps[-1]["loss"] is None or steps[-1]["grad_norm"] is None
    assert all(r["loss"] is not None and r["grad_norm"] is not None for r in steps[:-1])
    assert records[-1] is steps[-1]  # neither evaluated nor saved afterwards
    assert all(
        s["rho"] is None or math.isfinite(s["rho"]) for s in pair_scores(model, VALIDATION, REFERENCE["validation"])
    )


def test_averaged_log_probabilities_are_a_flagged_ablation(tmp_path):
    loss = {"name": "td_dpo", "beta": 0.0, "tau": 0.5, "average_log_probs": True}
    _, records = train(tmp_path, loss=loss, max_steps=1)
    rows = [ROWS[i] for i in list(runs.SeededOrder(40, 3))[:8]]
    table = engine.sequence_logprobs(make_model(), rows)
    delta = table[:, 0] / torch.tensor([len(r["chosen_ids"]) for r in rows]) - table[:, 1] / torch.tensor(
        [len(r["rejected_ids"]) for r in rows]
    )
    simpo = -torch.nn.functional.logsigmoid(delta / 0.5)  # SimPO with beta = 1/tau and gamma = 0
    assert records[0]["loss"] == pytest.approx(float(simpo.mean()), rel=1e-5)
    assert records[0]["raw_margin"] == pytest.approx(float((table[:, 0] - table[:, 1]).mean()), rel=1e-4)


def test_what_runs_at_an_evaluation_leaves_the_training_alone(tmp_path):
    """LoRA with dropout draws random numbers in training; sampling at evaluations must not shift them."""

    def noisy(model):
        torch.rand(7), random.random()
        model.eval()
        prompt = {
            "input_ids": torch.tensor([[PAD, BOS, 7], [BOS, 5, 6]]),
            "attention_mask": torch.tensor([[0, 1, 1], [1] * 3]),
        }
        said = [model.generate(**prompt, max_new_tokens=5, do_sample=False) for _ in range(2)]
        assert torch.equal(*said)
        assert said[0].shape[1] > 3
        model.train()
        return {}

    histories = []
    for index, hook in enumerate((None, noisy)):
        model = with_adapter(make_model(), dropout=0.3)
        _, records = train(tmp_path / str(index), model=model, kl=hook)
        histories.append(records)
    assert histories[0] == histories[1]


@pytest.mark.parametrize("build", [make_model, lambda: with_adapter(make_model())], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(tmp_path, build):
    histories = [train(tmp_path / str(on), model=build(), gradient_checkpointing=on)[1] for on in (False, True)]
    for a, b in zip(*histories, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


def test_generation_is_the_same_with_the_head_on():
    model = make_model()
    prompt = {
        "input_ids": torch.tensor([[PAD, BOS, 7], [BOS, 5, 6]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1] * 3]),
    }
    plain = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    with engine.completion_head(model):
        assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), plain)


def test_adapters_train_in_float32_over_a_frozen_base(tmp_path):
    model = with_adapter(make_model())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
    outcome, records = train(tmp_path, model=model)
    assert outcome.status == "completed"
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    twin = runs.load_checkpoint(with_adapter(make_model()), runs.last_complete_checkpoint(tmp_path / "checkpoints"))
    torch.testing.assert_close(
        engine.sequence_logprobs(twin, VALIDATION), engine.sequence_logprobs(model, VALIDATION), rtol=0, atol=0
    )


def nf4_model(folder):
    make_model(hidden=64).save_pretrained(folder)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return with_adapter(LlamaForCausalLM.from_pretrained(folder, quantization_config=four_bit, dtype=torch.bfloat16))


def test_nf4_adapters_are_trained_in_float32(tmp_path):
    model = nf4_model(tmp_path / "base")
    with model.disable_adapter():
        table = references(model)
    outcome, records = train(tmp_path / "run", model=model, table=table, max_steps=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.dtype == torch.float32 for p in trained)
    assert outcome.status == "completed"
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=0.05)


def test_scoring_an_nf4_model_leaves_its_gradients_whole(tmp_path):
    """bitsandbytes repacks 4-bit weights in eval mode for a CPU kernel without a backward."""
    gradients = []
    for scored in (False, True):
        model = nf4_model(tmp_path)
        if scored:
            engine.sequence_logprobs(model, ROWS[:8])
        model.train()
        with engine.completion_head(model):
            chosen, rejected = engine.batch_logprobs(model, engine.layout(model)(ROWS[:8]))
        (chosen - rejected).sum().backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "lora_B" in n])
    assert all(g.abs().max() > 0 for g in gradients[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# --- checkpoints and resume ------------------------------------------------------------------------------------------


def in_child(run):
    """Run in a forked child; returns its exit code (-9: killed)."""
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def adapter_model():
    return with_adapter(make_model(), dropout=0.2)


@pytest.fixture(scope="module", params=[make_model, adapter_model], ids=["full", "lora-dropout"])
def undisturbed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder, model=request.param())
    return request.param, folder


def assert_same_run(folder, undisturbed):
    assert (folder / "history.jsonl").read_text() == (undisturbed / "history.jsonl").read_text()
    last = [runs.last_complete_checkpoint(f / "checkpoints") for f in (folder, undisturbed)]
    assert last[0].name == last[1].name == "checkpoint-10"
    weights = next(p.name for p in last[0].glob("*.safetensors"))
    assert (last[0] / weights).read_bytes() == (last[1] / weights).read_bytes()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        a, b = (torch.load(f / name, weights_only=False) for f in last)
        assert str(a) == str(b), name
    assert runs.read_marker(last[0]) == runs.read_marker(last[1])


@pytest.mark.parametrize("step", [1, 3, 5, 8, 10])
def test_resume_after_a_kill_is_bit_identical(tmp_path, undisturbed, step):
    build, folder = undisturbed

    def killed():
        train(tmp_path, model=build(), on_write=lambda r: r["step"] == step and die())

    assert in_child(killed) == -signal.SIGKILL
    outcome, records = train(tmp_path, model=build())
    assert outcome.status == "completed"
    assert outcome.step == 10
    assert records[0]["step"] == (step - 1) // 3 * 3 + 1 or records[0]["step"] > 1
    assert_same_run(tmp_path, folder)


@pytest.mark.parametrize("inside", ["_save_optimizer_and_scheduler", "_save_rng_state", "mark_complete"])
def test_a_half_written_checkpoint_does_not_count(tmp_path, undisturbed, inside):
    build, folder = undisturbed

    def killed():
        owner = runs if inside == "mark_complete" else trainer.PreferenceTrainer
        real, calls = getattr(owner, inside), []

        def dies_the_second_time(*args, **kwargs):
            calls.append(1)
            return die() if len(calls) == 2 else real(*args, **kwargs)

        setattr(owner, inside, dies_the_second_time)
        train(tmp_path, model=build())

    assert in_child(killed) == -signal.SIGKILL
    folders = runs.checkpoint_folders(tmp_path / "checkpoints")
    assert len(folders) == 2
    assert runs.last_complete_checkpoint(tmp_path / "checkpoints") == folders[0]
    _, records = train(tmp_path, model=build())
    assert records[0]["step"] == 4
    assert_same_run(tmp_path, folder)


def test_a_finished_run_is_loaded_not_trained(tmp_path):
    models = make_model(), make_model()
    first, _ = train(tmp_path, model=models[0])
    again, records = train(tmp_path, model=models[1])
    assert again.step == 10
    assert again.best_step == first.best_step
    assert not records
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


def test_other_intervals_of_saves_and_log_lines_go_on_from_the_same_checkpoints(tmp_path):
    first, _ = train(tmp_path)
    again, records = train(tmp_path, save_steps=5, logging_steps=2)
    assert (again.step, again.best_step, records) == (10, first.best_step, [])


def test_checkpoints_of_another_configuration_are_not_resumed(tmp_path):
    train(tmp_path)
    outcome, records = train(tmp_path, loss={"name": "dpo", "beta": 0.2})
    assert records[0]["step"] == 1
    assert outcome.step == 10
    kept = [json.loads(line)["step"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert kept == [r["step"] for r in records]


def test_history_is_cut_to_a_step_and_loses_a_half_written_line(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "validation_loss": 1}\n{"step": 3}\n{"step": 1, "lo')
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    runs.mark_complete(tmp_path / "checkpoints" / "checkpoint-2", {"step": 2, "fingerprint": "f"})
    checkpoint, marker = runs.resume_point(tmp_path, "f")
    assert (checkpoint.name, marker["step"]) == ("checkpoint-2", 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "validation_loss": 1}\n'


# --- cost ------------------------------------------------------------------------------------------------------------


def test_steps_are_timed_on_the_same_batches_and_who_goes_first_rotates():
    taken = []

    def stepper(name):
        return lambda batch: taken.append((name, batch)) or 1.0

    rows = runs.time_interleaved([stepper("a"), stepper("b")], iter(range(9)), rounds=3, warm_up=1)
    assert rows == [[1.0, 1.0]] * 3
    assert taken == [(n, i) for i, names in enumerate(("ab", "ba", "ab", "ba")) for n in names]
