"""Any encoder: what is adapted, measured and penalized follows the architecture."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import transformers

from lib import config, made
from lib.config import ROOT
from lib.errors import StudyError
from lib.iw_lora import data, penalty, report, trainer
from lib.iw_lora.study import Adapter
from tests.test_iw_lora import ADALORA, BATCH, fit, trainables

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
BERT, ROBERTA = transformers.BertForSequenceClassification, transformers.RobertaForSequenceClassification
MODERN, DEBERTA = transformers.ModernBertForSequenceClassification, transformers.DebertaV2ForSequenceClassification
ENCODERS = {  # class, settings, what is adapted, what is new or belongs to the head and is trained whole
    "bert": (BERT, {}, {"query", "value"}, {"pooler", "classifier"}),
    "roberta": (ROBERTA, {}, {"query", "value"}, {"classifier"}),
    "modernbert": (MODERN, SPECIAL, {"Wqkv"}, {"head", "classifier"}),
    "deberta": (DEBERTA, made.DEBERTA_V3, {"query", "value"}, {"pooler", "classifier"}),
}


def encoder(name, **adapter):
    architecture, settings, *_ = ENCODERS[name]
    torch.manual_seed(0)
    return trainer.add_adapters(
        architecture(architecture.config_class(**{**SMALL, **settings, "initializer_range": 0.1})),
        Adapter(**adapter),
        10,
    )


def test_what_is_trained_is_float32_whatever_the_base_is_computed_in(tmp_path):
    ENCODERS["bert"][0](transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    run = config.load_run(ROOT / "params/iw_lora/laptop/lora.yaml", study="iw_lora", scale="laptop", mode="full")
    run = config.apply(run, {"model.torch_dtype": "bfloat16", "model.adapter.target_modules": ["query", "value"]})
    given = SimpleNamespace(base=str(tmp_path), report={"labels": ["0", "1"]})
    model = trainer.build(run, given, 1, 10)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("name", ENCODERS)
def test_the_penalty_and_the_record_follow_what_is_adapted(tmp_path, name):
    model = encoder(name)
    names = [matrix.removeprefix("base_model.model.") for matrix in penalty.lora_layers(model)]
    norms, skipped = penalty.gradient_norms(model, [BATCH], trainer.task_loss)
    assert skipped == 0
    assert (norms > 0).all()
    assert norms.shape == (1, len(names))
    term = trainer.Term(1e-2, penalty.importance(penalty.sensitivities(norms), 1.0))
    before = {p: tensor.clone() for p, tensor in trainables(model).items()}
    outcome, steps = fit(tmp_path, model, term)
    assert outcome.status == "completed"
    assert [row["penalty"] > 0 for row in steps] == [False, *[True] * (len(steps) - 1)]  # B is 0 at first
    after = trainables(model)
    moved = [
        parts for p in after if not torch.equal(before[p], after[p]) and len(parts := p.split(".modules_to_save")) > 1
    ]
    assert {home.rpartition(".")[2] for home, _ in moved} == ENCODERS[name][3]
    trainer.record_adapters(tmp_path, model, penalty.sensitivities(norms), term)
    table = report.adapters(pd.DataFrame([{"run_id": name, "cell": "default", "seed": 1, "folder": tmp_path}]))
    assert len(table) == len(names)
    assert set(table["layer"]) == {0, 1}
    assert set(table["projection"]) == ENCODERS[name][2]


@pytest.mark.parametrize("name", ENCODERS)
def test_adalora_adapts_the_same_matrices_and_prunes_them(tmp_path, name):
    model = encoder(name, **ADALORA)
    assert list(penalty.lora_layers(model)) == list(penalty.lora_layers(encoder(name)))
    assert fit(tmp_path, model, steps=10)[0].status == "completed"
    used = trainer.ranks_used(model)
    assert sum(used.values()) == 8 * len(used)


def test_an_architecture_that_nobody_lists_is_asked_for_its_layers():
    config = transformers.FNetConfig(**{k: v for k, v in SMALL.items() if k != "num_attention_heads"})
    with pytest.raises(StudyError, match=r"model.adapter.target_modules: null\n.*fnet has no default"):
        trainer.add_adapters(transformers.FNetForSequenceClassification(config), Adapter(), 10)


def test_bert_is_given_which_text_is_which():
    section = SimpleNamespace(preprocessing=SimpleNamespace(truncation=True), max_seq_length=16)
    tokenizer = made.word_tokenizer(["one", "two", "three"], data.SPECIAL, pre_tokenizer=data.WORDS)
    rows = [{"text_a": "one two", "text_b": "three", "label": 0}]
    assert set(data.encode(tokenizer, rows, section)[0]) == {"input_ids", "label"}
    tokenizer.model_input_names = ["input_ids", "token_type_ids"]  # as BERT's own has them
    assert data.encode(tokenizer, rows, section)[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
