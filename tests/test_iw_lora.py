"""IW-LoRA: sensitivities, penalty, AdaLoRA's schedule and the trainer, on a tiny random DeBERTa-v2."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding, DebertaV2Config, DebertaV2ForSequenceClassification

from lib import config, models, record
from lib.data import BadRow
from lib.errors import StudyError
from lib.iw_lora import data, penalty, trainer
from lib.iw_lora.study import Adapter
from lib.made import word_tokenizer
from lib.training import SeededOrder, StudyTrainer
from tests.conftest import ROOT

ADALORA = {"type": "adalora", "lora_alpha": 24, "init_r": 12, "target_r": 8, "tinit": 2, "tfinal": 3, "delta_t": 1}


def deberta(adapter=None, steps=10, seed=0):
    torch.manual_seed(seed)
    config = DebertaV2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        type_vocab_size=0,
        max_position_embeddings=64,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        pad_token_id=0,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pooler_hidden_size=32,
        pooler_dropout=0.0,
        initializer_range=0.1,
    )
    return trainer.add_adapters(DebertaV2ForSequenceClassification(config), Adapter(**(adapter or {})), steps)


def rows(count=32):
    rng = np.random.default_rng(0)
    return [
        {"input_ids": rng.integers(5, 40, size=int(rng.integers(6, 10))).tolist(), "label": i % 2} for i in range(count)
    ]


GROUPED = {"train_sampling_strategy": "group_by_length"}
TOKENIZER = word_tokenizer(map(str, range(40)), data.SPECIAL)
COLLATE = DataCollatorWithPadding(TOKENIZER)
BATCH = COLLATE(rows(8))


def moved(model):
    """B away from 0, where LoRA begins."""
    with torch.no_grad():
        for _, b, _ in penalty.lora_pairs(model):
            b.normal_(generator=torch.Generator().manual_seed(1))
    return model


def trainables(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def trainer_of(tmp_path, model, term=None, every=None, steps=6, **training):
    run = config.load_run(ROOT / "params/iw_lora/laptop/iw_lora.yaml", study="iw_lora", scale="laptop", mode="full")
    when = {"evaluation_strategy": "steps", "eval_steps": every} if every else {"evaluation_strategy": "no"}
    section = {"max_steps": steps, "batch_size": 8, "learning_rate": 1e-3, **when, **training}
    run = config.apply(run, {"grid": None, "loss.alpha": 0.0, "training": section})
    given = SimpleNamespace(rows={"train": rows(), "tuning": rows(8)}, tokenizer=TOKENIZER, report={"task": "rte"})
    return trainer.ImportanceTrainer(run, given, model, 3, tmp_path, term)


def fit(tmp_path, model, *arguments, **options):
    """(outcome, the steps that the history holds)."""
    outcome = trainer_of(tmp_path, model, *arguments, **options).fit()
    return outcome, [row for row in record.read_jsonl(tmp_path / "history.jsonl") if "loss" in row]


def test_lora_a_has_no_gradient_at_initialization_and_the_base_weight_has():
    model = deberta()
    trainer.task_loss(model, BATCH).backward()
    assert all((a.grad == 0).all() for a, _, _ in penalty.lora_pairs(model))
    norms, skipped = penalty.gradient_norms(model, [BATCH], trainer.task_loss)
    assert (norms > 0).all()
    assert skipped == 0


def test_sensitivities_equal_autograd_with_shared_projections():
    model = deberta()
    weights = [layer.base_layer.weight.requires_grad_(True) for layer in penalty.lora_layers(model).values()]
    expected = torch.stack([g.norm() for g in torch.autograd.grad(trainer.task_loss(model.eval(), BATCH), weights)])
    for weight in weights:
        weight.requires_grad_(False)
    norms, _ = penalty.gradient_norms(model, [BATCH], trainer.task_loss)
    torch.testing.assert_close(norms[0], expected)


@pytest.mark.parametrize("rows_of_batch", [1, 8])  # few tokens: Gram matrices; many: the product itself
def test_gradient_norms_from_inputs_and_outputs_are_those_of_the_weights(rows_of_batch):
    model, batch = deberta().eval(), COLLATE(rows(rows_of_batch))
    direct = penalty.gradient_norms(model, [batch], trainer.task_loss)[0][0]
    layers = list(penalty.lora_layers(model).values())
    value, norms = penalty.quantized_norms(layers, lambda: trainer.task_loss(model, batch))
    assert value.item() == trainer.task_loss(model, batch).item()
    torch.testing.assert_close(norms, direct, rtol=1e-4, atol=1e-6)


def test_sensitivities_of_a_4bit_base_are_those_of_its_values(tmp_path):
    import bitsandbytes as bnb

    deberta({"type": "none"}).save_pretrained(tmp_path)
    nf4 = models.nf4(torch.float32)
    nf4.llm_int8_skip_modules = ["pooler", "classifier"]  # which are trained
    model = DebertaV2ForSequenceClassification.from_pretrained(tmp_path, quantization_config=nf4, dtype=torch.float32)
    model = trainer.add_adapters(model, Adapter(), 10)
    twin = deberta().eval()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        state = getattr(mine, "quant_state", None)
        theirs.data = mine.data if state is None else bnb.functional.dequantize_4bit(mine.data, state)
    (norms, _), (expected, _) = (penalty.gradient_norms(m, [BATCH], trainer.task_loss) for m in (model, twin))
    assert all(layer.base_layer.weight.dtype == torch.uint8 for layer in penalty.lora_layers(model).values())
    torch.testing.assert_close(norms, expected, rtol=1e-3, atol=1e-6)


def test_calibration_changes_nothing():
    model = deberta().train()
    trainer.task_loss(model, BATCH).backward()
    before = {n: (p.detach().clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    penalty.gradient_norms(model, [BATCH, BATCH], trainer.task_loss)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    for name, p in model.named_parameters():
        old, flag, gradient = before[name]
        assert torch.equal(p, old)
        assert p.requires_grad == flag
        assert p.grad is gradient


def test_weights_sum_to_one_and_degenerate_sensitivities_are_refused():
    s = torch.tensor([1.0, 2.0, 5.0, 0.5])
    made = penalty.COEFFICIENTS["importance"](s, 1.0)
    torch.testing.assert_close(made.mean(), torch.tensor(1 - 1 / 4))
    assert penalty.COEFFICIENTS["importance"](torch.tensor([3.0]), 1.0).item() == 0
    assert sorted(penalty.COEFFICIENTS["shuffled"](s, 1.0, 1).tolist()) == sorted(made.tolist())
    torch.testing.assert_close(penalty.COEFFICIENTS["uniform"](s, 1.0), torch.full((4,), 0.75))
    assert penalty.COEFFICIENTS["max"](s, 1.0).min() == 0
    torch.testing.assert_close(penalty.COEFFICIENTS["inv_mean"](s, 1.0).mean(), torch.tensor(1.0))
    for bad in (torch.zeros(2, 3), torch.full((2, 3), float("nan")), torch.zeros(0, 3)):
        with pytest.raises(StudyError):
            penalty.sensitivities(bad)
    assert penalty.sensitivities(torch.tensor([[1.0], [3.0], [5.0]]), buffer=2).item() == 4


def test_penalty_equals_the_materialised_norm_and_vanishes_with_its_gradient_where_b_is_zero():
    model = deberta()
    c = torch.rand(4)
    at_start = penalty.penalty(model, c)
    at_start.backward()
    assert at_start.item() == 0
    assert all((p.grad == 0).all() for a, b, _ in penalty.lora_pairs(model) for p in (a, b))
    moved(model)
    expected = sum(
        w * ((scaling * b @ a) ** 2).sum() for w, (a, b, scaling) in zip(c, penalty.lora_pairs(model), strict=True)
    )
    torch.testing.assert_close(penalty.penalty(model, c), expected)


def test_penalty_gradient_against_differences():
    a = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: penalty.squared_norm(a, b, 2.0), (a, b))


def test_alpha_zero_is_lora_bit_for_bit_and_a_penalty_is_not(tmp_path):
    found = []
    for name, alpha in (("none", None), ("zero", 0.0), ("some", 0.1)):
        model = deberta()
        term = None
        if alpha is not None:
            s = penalty.sensitivities(penalty.gradient_norms(model, [BATCH], trainer.task_loss)[0])
            term = trainer.Term(alpha, penalty.COEFFICIENTS["importance"](s, 1.0))
        fit(tmp_path / name, model, term)
        found.append({n: p.clone() for n, p in trainables(model).items()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert any(not torch.equal(found[0][n], found[2][n]) for n in found[0])


def test_one_batch_of_32_equals_8_accumulated_4_times(tmp_path):
    term = trainer.Term(0.1, torch.ones(4))
    norms = [
        fit(
            tmp_path / str(size),
            moved(deberta()),
            term,
            steps=1,
            batch_size=size,
            gradient_accumulation_steps=32 // size,
        )[1][0]["grad_norm"]
        for size in (32, 8)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_adalora_keeps_8_k_triplets_and_bad_schedules_are_refused(tmp_path):
    model = deberta(ADALORA, steps=12)
    assert fit(tmp_path, model, steps=12)[0].status == "completed"
    assert sum(trainer.ranks_used(model).values()) == 8 * 4
    with pytest.raises(StudyError, match="tfinal"):
        deberta(ADALORA, steps=5)


@pytest.mark.parametrize("adapter", [{}, ADALORA, {"type": "none"}], ids=["lora", "adalora", "full"])
def test_a_resumed_training_is_bit_identical_and_the_head_is_trained(tmp_path, monkeypatch, adapter):
    straight, broken = deberta(adapter, 12), deberta(adapter, 12)
    order = GROUPED if adapter == ADALORA else {}  # either order is resumed
    start = {n: p.clone() for n, p in trainables(straight).items()}
    fit(tmp_path / "a", straight, steps=12, every=4, **order)

    class Killed(Exception):
        pass

    def dies(self, row):
        if row.get("step") == 7:
            raise Killed
        write(self, row)

    write = StudyTrainer.write
    monkeypatch.setattr(StudyTrainer, "write", dies)
    with pytest.raises(Killed):
        fit(tmp_path / "b", broken, steps=12, every=4, **order)
    monkeypatch.setattr(StudyTrainer, "write", write)
    again = deberta(adapter, 12)
    fit(tmp_path / "b", again, steps=12, every=4, **order)
    assert (tmp_path / "a/history.jsonl").read_text() == (tmp_path / "b/history.jsonl").read_text()
    mine, theirs = trainables(straight), trainables(again)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    for part in ("pooler", "classifier"):
        assert any(part in n and not torch.equal(p, start[n]) for n, p in mine.items())
    loaded = deberta(adapter, 12, seed=9)
    assert fit(tmp_path / "a", loaded, steps=12, every=4, **order)[0].step == 12  # finished: its last state is loaded
    assert all(torch.equal(p, mine[n]) for n, p in trainables(loaded).items())


def test_rows_of_like_length_are_trained_together_and_scored_in_their_own_order(tmp_path):
    model = moved(deberta())
    mine = trainer_of(tmp_path, model, batch_size=12, **GROUPED)
    lengths = [len(row["input_ids"]) for row in mine.train_dataset]
    padded = lambda order: sum(12 * max(lengths[i] for i in order[s : s + 12]) for s in range(0, 32, 12))  # noqa: E731
    order, random = list(mine._get_train_sampler()), list(SeededOrder(32, 3))
    assert sorted(order) == list(range(32))
    assert padded(order) < padded(random) == padded(list(trainer_of(tmp_path, model)._get_train_sampler()))
    # calibration sees what is trained on: 12, 12 and 8 rows an epoch
    loader, trained = mine.get_train_dataloader(), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        trained += [batch["input_ids"] for batch in loader]
    calibrated = trainer.calibration_batches(mine.run, mine.given, 3)
    assert len(calibrated) == 16
    assert all(torch.equal(a, b["input_ids"]) for a, b in zip(trained, calibrated[:6], strict=True))
    alone = [COLLATE([row]) for row in mine.train_dataset]
    alone = [int(model.eval()(b["input_ids"], attention_mask=b["attention_mask"]).logits.argmax()) for b in alone]
    assert set(alone) == {0, 1}
    assert mine.score("train")[0] == alone


def test_a_trial_calibrates_on_two_batches_at_most():
    path = ROOT / "params/iw_lora/laptop/iw_lora.yaml"
    run = config.members(config.load_run(path, study="iw_lora", scale="laptop", mode="trial"))[0].run
    given = SimpleNamespace(rows={"train": rows()}, tokenizer=TOKENIZER)
    assert len(trainer.calibration_batches(run, given, 1)) == 2


def test_labels_and_columns_are_checked_and_f1_is_on_entailment():
    good = {"sentence1": "a", "sentence2": "b", "label": 0}
    assert data.to_example(good, "rte") == {"text_a": "a", "text_b": "b", "label": 0}
    assert data.to_example({**good, "label": "not_entailment"}, "rte")["label"] == 1
    assert data.to_example({"sentence1": "a", "sentence2": "b", "gold_label": "neutral"}, "mnli")["label"] == 1
    for row, fault in (({**good, "label": -1}, "unknown label"), ({**good, "sentence2": " "}, "empty sentence2")):
        with pytest.raises(BadRow, match=fault):
            data.to_example(row, "rte")
    with pytest.raises(BadRow, match="missing premise"):
        data.to_example({"text": "a", "label": 0}, "mnli")
    scored = trainer.scores([0, 0, 0, 1], [0, 1, 1, 1], "rte")
    assert scored["f1"] == pytest.approx(0.5)
    assert scored["accuracy"] == 0.5
    assert trainer.scores([0, 1, 2], [0, 1, 2], "mnli")["f1"] is None


def test_words_do_not_tell_the_generated_label():
    made = data.generate(2000, 5)
    assert data.bag_of_words({"train": made[:1600], "validation": made[1600:]}) == pytest.approx(0.5, abs=0.08)
    content = set(data.NOUNS) | {"by", "is"}
    assert all(set(r["text_b"].split()) & content - {"by", "is"} <= set(r["text_a"].split()) for r in made)
    assert data.generate(50, 5) == copy.deepcopy(data.generate(50, 5))


def test_neither_do_they_tell_of_which_kind_a_thing_is():
    """The hypothesis names the thing's kind where it is entailed, and another one where it is not."""
    made = data.generate(2000, 5, "kinds")
    assert data.bag_of_words({"train": made[:1600], "validation": made[1600:]}) == pytest.approx(0.5, abs=0.08)
    kind_of = {thing: kind for kind, things in data.KINDS.items() for thing in things.split()}
    assert len(kind_of) == sum(len(things.split()) for things in data.KINDS.values()), "no thing is of two kinds"
    for row in made:
        thing, kind = row["text_a"].split()[-1], row["text_b"].split()[-1]
        assert row["text_a"].split()[:3] == row["text_b"].split()[:3]
        assert (kind_of[thing] == kind) == (row["label"] == data.ENTAILMENT)
    assert sum(row["label"] for row in made) == 1000
    assert data.generate(50, 5, "kinds") == data.generate(50, 5, "kinds")
