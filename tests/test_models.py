"""Loading tokenizers and models, 4-bit, adapters, stand-ins: on the CPU, with tiny models, without a network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from benchmarks.random_llama import random_llama
from lib import hub, models
from lib.errors import MissingError, StudyError
from lib.made import FAMILIES, stand_in, train_bpe_tokenizer, write_stand_in


def fingerprint(model: nn.Module) -> str:
    """sha256 of the names, types, shapes and values of a loaded model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + raw.numpy().tobytes())
    return digest.hexdigest()


TEXTS = [f"Question {i}: name {i} rivers, please. Answer: the Rhine, the Nile and the Amazon." for i in range(60)]
LORA = {"lora_r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Rhine."},
    {"role": "user", "content": "Another."},
    {"role": "assistant", "content": "The Nile."},
]
CAUSAL = ["meta-llama/Llama-2-7b-chat-hf", "Qwen/Qwen3-0.6B", "mistralai/Mistral-7B-Instruct-v0.2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved stand-in of every family."""
    made = {name: tmp_path_factory.mktemp("model") for name in [*CAUSAL, "microsoft/deberta-v3-base"]}
    for name, folder in made.items():
        write_stand_in(name, folder, TEXTS, vocab_size=384, **({"num_labels": 3} if "deberta" in name else {}))
    return made


@pytest.fixture(scope="module")
def llama(folders):
    return str(folders[CAUSAL[0]])


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """HF_HUB_OFFLINE as a fresh process would see it, with an empty cache."""
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def loss_of(model: nn.Module, folder: str) -> torch.Tensor:
    ids = models.load_tokenizer(folder)(TEXTS[0], return_tensors="pt")["input_ids"]
    return model(input_ids=ids, labels=ids).loss


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- 4-bit and adapters ----


@pytest.mark.parametrize(("compute", "storage"), [("bfloat16", None), ("bfloat16", "bfloat16"), ("float32", None)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nf4_with_lora_runs_forward_and_backward_with_float32_trainables(llama, compute, storage, checkpointing):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = models.load_causal_lm(
        llama,
        torch_dtype=compute,
        quantization="nf4",
        quant_storage=storage,
        device="cpu",
    )
    if checkpointing:
        base.activation_checkpointing_enable()
    projection = base.model.layers[0].self_attn.q_proj
    assert isinstance(projection, bitsandbytes.nn.Linear4bit)
    assert projection.weight.quant_type == "nf4"
    assert projection.weight.dtype == (torch.bfloat16 if storage else torch.uint8)
    assert projection.weight.quant_state.nested  # double quantization
    assert projection.compute_dtype == getattr(torch, compute)
    model = models.add_lora(base, LORA, seed=42).train()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 7 * 2  # A and B of the seven linear maps of two layers; the head is not among them
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in trainable.items())
    assert any(tuple(parameter.shape) == (4, 64) for parameter in trainable.values())
    loss_of(model, llama).backward()
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
        for parameter in trainable.values()
    )
    assert any(parameter.grad.abs().sum() > 0 for name, parameter in trainable.items() if "lora_B" in name)
    before = adapters(model)
    torch.optim.AdamW(trainable.values(), lr=5e-7).step()
    assert any(not torch.equal(before[name], parameter) for name, parameter in trainable.items() if "lora_B" in name)


def test_fresh_adapters_leave_the_model_as_it_is(llama):
    plain = loss_of(models.load_causal_lm(llama, device="cpu"), llama)
    adapted = loss_of(models.add_lora(models.load_causal_lm(llama, device="cpu"), LORA, seed=1), llama)
    assert torch.equal(plain, adapted)


def test_adapter_initialization_follows_the_seed_alone(llama):
    first, same, other = (
        models.add_lora(models.load_causal_lm(llama, device="cpu"), LORA, seed=seed) for seed in (42, 42, 43)
    )
    torch.manual_seed(7)
    state = torch.get_rng_state()
    moved = models.add_lora(models.load_causal_lm(llama, device="cpu"), LORA, seed=42)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random state is untouched
    one, two, three, four = map(adapters, (first, same, other, moved))
    assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], four[name]) for name in one)
    assert all(not torch.equal(one[name], three[name]) for name in one if "lora_A" in name)
    assert all(not one[name].any() for name in one if "lora_B" in name)


def test_lora_settings_reach_peft(llama):
    model = models.add_lora(
        models.load_causal_lm(llama, device="cpu"),
        {"lora_r": 2, "lora_alpha": 6, "lora_dropout": 0.5, "target_modules": ["q_proj"]},
        seed=0,
    )
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (2, 6, 0.5, {"q_proj"})
    with pytest.raises(ValueError, match="Target modules .* not found"):
        models.add_lora(
            models.load_causal_lm(llama, device="cpu"), {"lora_r": 2, "target_modules": ["nothing_here"]}, seed=0
        )


def test_trainable_parameters_become_float32_and_there_is_one():
    layer = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(torch.bfloat16)
    layer[0].requires_grad_(False)
    models.float32_trainables(layer)
    assert layer[0].weight.dtype == torch.bfloat16
    assert layer[1].weight.dtype == torch.float32
    with pytest.raises(AssertionError, match="no trainable"):
        models.float32_trainables(layer.requires_grad_(False))


# ---- loading ----


def test_a_model_loads_in_bfloat16_for_evaluation(llama):
    model = models.load_causal_lm(llama, torch_dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not model.config.use_cache
    assert next(model.parameters()).device == torch.device("cpu")


def test_device_is_a_torch_device():
    assert models.current_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_tokenizer_pads_on_the_right_and_has_one_bos_and_eos_per_answer(folders):
    for name in CAUSAL:
        tokenizer = models.load_tokenizer(str(folders[name]), needs_chat_template=True)
        assert tokenizer.padding_side == "right"
        assert tokenizer.pad_token_id is not None
        ids = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
        head = tokenizer.apply_chat_template(CHAT[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
        assert ids[: len(head)] == head, name  # the prompt's tokens begin the conversation's
        completion = ids[len(head) :]
        assert completion.count(tokenizer.eos_token_id) == 1
        assert "The Nile." in tokenizer.decode(completion)
        if name.startswith("meta-llama"):
            assert ids.count(tokenizer.bos_token_id) == 2
            assert "<<SYS>>" in tokenizer.decode(ids)


def test_tokenizer_without_a_template_or_files(tmp_path, folders):
    with pytest.raises(StudyError, match="without a chat template"):
        models.load_tokenizer(str(folders["microsoft/deberta-v3-base"]), needs_chat_template=True)
    with pytest.raises(MissingError, match="no tokenizer_config.json in"):
        models.load_tokenizer(str(tmp_path))


def test_missing_models_say_what_to_do(tmp_path, llama):
    with pytest.raises(MissingError, match=r"no such directory[\s\S]*--set model.name"):
        models.load_causal_lm("/nowhere/at all")
    with pytest.raises(MissingError, match="no config.json"):
        models.load_causal_lm(str(tmp_path))
    shutil.copy(f"{llama}/config.json", tmp_path)
    with pytest.raises(MissingError, match="no file named model.safetensors"):
        models.load_causal_lm(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(MissingError, match="could not be loaded"):
        models.load_causal_lm(str(tmp_path))


def test_hub_id_while_offline_is_missing_at_once(offline):
    for load in (models.load_causal_lm, models.load_tokenizer):
        with pytest.raises(MissingError, match=r"HF_HUB_OFFLINE is set[\s\S]*hf download nobody/no-model") as caught:
            load("nobody/no-model")
        assert caught.value.exit_code == 3


def test_gated_model(monkeypatch):
    def refuse(*_, **__):
        error = OSError("You are trying to access a gated repo.")
        error.__cause__ = type("GatedRepoError", (Exception,), {})()
        raise error

    monkeypatch.setattr(hub, "prepare", lambda: None)
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(
        MissingError,
        match="accept the license at https://huggingface.co/meta-llama/Llama-2-7b-chat-hf, then: .venv/bin/hf",
    ):
        models.load_causal_lm("meta-llama/Llama-2-7b-chat-hf")


def test_offline_reaches_libraries_that_are_already_imported(monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "_answers", lambda *_: False)
    assert not hub.is_offline()
    hub.prepare()
    assert hub.is_offline()
    assert constants.HF_HUB_OFFLINE
    assert not hub.reachable()


def test_reachable_asks_the_endpoint(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert hub.reachable(1.0) is False


# ---- stand-ins ----


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_stand_ins_have_their_architecture(folders, name):
    model = models.load_causal_lm(str(folders[name]), device="cpu")
    assert (
        type(model).__name__ == {"m": "LlamaForCausalLM", "Q": "Qwen3ForCausalLM"}[name[0]]
        if "mistral" not in name
        else "MistralForCausalLM"
    )
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    assert loss_of(model, str(folders[name])).isfinite()


def test_deberta_stand_in_classifies(folders):
    folder = str(folders["microsoft/deberta-v3-base"])
    model = models.load_causal_lm(folder, device="cpu", auto_class=AutoModelForSequenceClassification)
    tokenizer = models.load_tokenizer(folder)
    batch = tokenizer(["a man sleeps", "x"], ["someone rests", "y"], padding=True, return_tensors="pt")
    assert model(**batch).logits.shape == (2, 3)
    assert batch["input_ids"][0, 0] == tokenizer.cls_token_id
    assert (batch["input_ids"][0] == tokenizer.sep_token_id).sum() == 2
    adapted = models.add_lora(model, LORA, seed=0, task_type="SEQ_CLS")
    assert any("classifier" in name for name in adapters(adapted))  # the new head is trained with the adapters
    config = json.loads((folders["microsoft/deberta-v3-base"] / "config.json").read_text())
    assert config["relative_attention"]
    assert config["share_att_key"]
    assert config["position_buckets"] == 256


def test_stand_ins_follow_their_seed():
    tokenizer = train_bpe_tokenizer(TEXTS, 384)
    prints = [fingerprint(stand_in(CAUSAL[0], tokenizer, seed=seed)) for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_unknown_family_lists_the_known():
    with pytest.raises(StudyError) as caught:
        stand_in("google/gemma-7b", None)
    assert all(family in str(caught.value) for family in FAMILIES)


def test_bpe_tokenizer_is_deterministic_and_encodes_any_text():
    one, two = (train_bpe_tokenizer(TEXTS, 320) for _ in range(2))
    assert one.get_vocab() == two.get_vocab()
    assert len(one) == 320
    odd = "Zoë 漢字 \u200b\n\ttail "
    assert one.decode(one(odd)["input_ids"]) == odd


# ---- fingerprints ----


def test_fingerprint_is_of_content(llama):
    model = models.load_causal_lm(llama, device="cpu")
    before = fingerprint(model)
    assert fingerprint(models.load_causal_lm(llama, device="cpu")) == before
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert fingerprint(model) != before


def test_fingerprint_of_a_quantized_model_differs_from_the_plain_one(llama):
    pytest.importorskip("bitsandbytes")
    plain, four_bit = (
        fingerprint(models.load_causal_lm(llama, quantization=kind, device="cpu")) for kind in ("none", "nf4")
    )
    assert plain != four_bit


# ---- a real shape with random weights ----

SMALL = {"vocab_size": 384, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip


def test_a_random_model_is_quantized_as_a_loaded_one(tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = random_llama(SMALL, quantization="none", device="cpu", gradient_checkpointing=False)
    wide.save_pretrained(tmp_path)
    loaded = models.load_causal_lm(str(tmp_path), torch_dtype="bfloat16", quantization="nf4", device="cpu")
    made = random_llama(SMALL, device="cpu", gradient_checkpointing=False)
    for name, module in loaded.named_modules():
        other = made.get_submodule(name)
        assert type(module) is type(other)
        if hasattr(getattr(module, "weight", None), "quant_state"):
            mine, theirs = other.weight, module.weight
            assert torch.equal(mine, theirs)
            assert mine.quant_state.nested
            assert mine.quant_state.dtype == theirs.quant_state.dtype
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.slow
def test_the_gpu_checks_run_at_a_tiny_shape(tmp_path):
    out = tmp_path / "checks.json"
    command = [sys.executable, "benchmarks/gpu_checks.py", "--small", "--steps", "3", "--out", str(out)]
    subprocess.run(command, cwd=hub.ROOT, check=True, env={**os.environ, "PYTHONPATH": str(hub.ROOT)})
    rows = json.loads(out.read_text())["rows"]
    assert [row["check"] for row in rows] == ["NF4 base, 1 process", "bf16 base, 1 process", "NF4 base, 2 processes"]
    assert all(row["pairs_per_second"] > 0 for row in rows)
    assert rows[2]["largest_difference_of_loss"] < 0.05 * max(rows[0]["losses"])
