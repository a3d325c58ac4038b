"""Small models made on this machine: stand-ins for models of the hub, and the pretraining of a study's own tiny model.

A stand-in has the architecture and chat format of its model, random weights and a tokenizer trained on the run's own
texts: it exercises a YAML end to end where the hub cannot be reached (trial); what it produces means nothing.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, processors
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lib import hub, models as base_models, record
from lib.errors import MissingError, StudyError

Base = tuple[PreTrainedModel, PreTrainedTokenizerFast, float]  # made here; the closing loss of its pretraining
Make = Callable[[dict, Path], Base]  # of a recipe; the file that its steps go to

# Formats of the models that are stood in for; each puts the beginning token itself, where the model has one.
LLAMA2 = (
    "{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = LLAMA2.replace("{{ bos_token + '[INST] '", "{{ (bos_token if loop.first else '') + '[INST] '")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
BERT_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = {"max_position_embeddings": 4096, "tie_word_embeddings": False}
# its relative attention, which decides which projections exist
DEBERTA_V3 = {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True}
DEBERTA_V3 |= {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
QWEN3 = {"num_key_value_heads": 2, "head_dim": 16, **CAUSAL}
MISTRAL_7B = {"num_key_value_heads": 2, "sliding_window": None, **CAUSAL}
FAMILIES = {  # beginning of the hub id -> (model class, its settings besides TINY, chat format, special tokens)
    "meta-llama/": (transformers.LlamaForCausalLM, {"num_key_value_heads": 4, **CAUSAL}, LLAMA2, LLAMA_TOKENS),
    "Qwen/Qwen3": (transformers.Qwen3ForCausalLM, QWEN3, CHATML, QWEN_TOKENS),
    "mistralai/": (transformers.MistralForCausalLM, MISTRAL_7B, MISTRAL, LLAMA_TOKENS),
    "HuggingFaceTB/SmolLM2": (transformers.LlamaForCausalLM, {"num_key_value_heads": 2, **CAUSAL}, CHATML, QWEN_TOKENS),
    "sentence-transformers/all-MiniLM": (transformers.BertForSequenceClassification, {}, None, BERT_TOKENS),
    "microsoft/deberta-v3": (transformers.DebertaV2ForSequenceClassification, DEBERTA_V3, None, BERT_TOKENS),
}


def train_bpe_tokenizer(
    texts: Iterable[str], vocab_size: int, template: str | None = CHATML, special: dict = QWEN_TOKENS
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts` (any text can be encoded: all bytes are in its alphabet).
    `special` maps names such as eos_token to strings."""
    names = [name for value in special.values() for name in ([value] if isinstance(value, str) else value)]
    if vocab_size < 256 + len(names):
        least = f"at least {256 + len(names)}: 256 bytes and {len(names)} special tokens"
        raise StudyError("model.recipe.vocab_size", str(vocab_size), least)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, min_frequency=2, show_progress=False, special_tokens=names)
    return _wrap(Tokenizer.from_str(tokenizer.to_str()), special, template)


def word_tokenizer(words: Iterable[str], special: dict, **parts: Any) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the special ones and `words`, in their order. `parts`: its pre_tokenizer, which
    takes a text apart, its normalizer, its decoder."""
    vocabulary = {word: i for i, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return _wrap(tokenizer, special)


def _wrap(tokenizer: Tokenizer, special: dict, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """As transformers has it; where there is a [CLS] and a [SEP], they are put round every encoded text."""
    if "cls_token" in special:
        marks = [(special[name], tokenizer.token_to_id(special[name])) for name in ("sep_token", "cls_token")]
        tokenizer.post_processor = processors.BertProcessing(*marks)
    options = {"padding_side": "right", "clean_up_tokenization_spaces": False, "chat_template": chat_template}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options, **special)
    if wrapped.pad_token is None:
        wrapped.pad_token = wrapped.unk_token or wrapped.eos_token
    return wrapped


def family(name: str) -> tuple:
    """The entry of FAMILIES for a hub id, or an error that lists them."""
    for beginning, entry in FAMILIES.items():
        if name.startswith(beginning):
            return entry
    expected, fix = f"a model under {', '.join(FAMILIES)}", "add its family to lib/made.py, or run where the hub is"
    raise StudyError(f"model.name = {name}", "no stand-in for this architecture", expected, fix)


def stand_in(name: str, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, **settings) -> PreTrainedModel:
    """A tiny, randomly initialized model of the architecture of `name`; `settings` of its config, such as
    num_labels=3."""
    architecture, own, *_ = family(name)
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    ids = {key: value for key, value in ids.items() if value is not None}
    config = architecture.config_class(**{**TINY, **own, "vocab_size": len(tokenizer), **ids, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return architecture(config).eval()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> Path:
    """Both in `folder`, which loads like any local model."""
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def write_stand_in(name: str, folder: str | Path, texts: Iterable[str], vocab_size: int = 1024, **settings) -> Path:
    """The stand-in saved in `folder` (it loads in 4-bit too), with a tokenizer trained on `texts`."""
    *_, template, special = family(name)
    tokenizer = train_bpe_tokenizer(texts, vocab_size, template, special)
    return save(stand_in(name, tokenizer, **settings), tokenizer, folder)


def pretrain(loss: Callable[[], Tensor], optimizer: Optimizer, rate: LRScheduler, steps: int, history: Path) -> float:
    """Take `steps` steps on `loss()`, the loss of the next batch, with gradients clipped to norm 1, a line of `history`
    for each; returns the mean loss of the last tenth of the steps."""
    history.unlink(missing_ok=True)
    losses = []
    for step in record.batches("pretraining of the made model", range(1, steps + 1)):
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(value.item())
        record.append_jsonl(history, {"step": step, "steps": steps, "loss": losses[-1]})
    return float(np.mean(losses[-max(1, steps // 10) :]))


def base_model(run, folder: Path, texts: Iterable[str], make: Make, **options: Any) -> tuple[Any, dict]:
    """(tokenizer, {base: name or folder, stand_in, pretraining_loss}) of the run's base model. Where its name is
    'made', `make` makes it and its steps go to history.jsonl; in a trial without the hub a stand-in is made of `texts`.
    `options` are the tokenizer's."""
    base, closing = run.model.name, None
    if base == "made":
        model, tokenizer, closing = make(run.model.recipe.model_dump(), folder / "history.jsonl")
        base = str(save(model, tokenizer, folder / "base"))
    elif run.mode == "trial" and hub.out_of_reach(base):
        base = str(write_stand_in(base, folder / "base", texts))
    facts = {"base": base, "stand_in": base != run.model.name != "made", "pretraining_loss": closing}
    options["trust_remote_code"] = run.model.trust_remote_code
    return base_models.load_tokenizer(base, run.model.revision, **options), facts


def tokenizer_of(run, texts: Iterable[str], make: Callable[[], Any], **options: Any) -> Any:
    """The tokenizer that `base_model` would give, without its model; None where it is not on this machine."""
    if run.model.name == "made":
        return make()
    if run.mode == "trial" and hub.out_of_reach(run.model.name):
        *_, template, special = family(run.model.name)
        return train_bpe_tokenizer(texts, 1024, template, special)
    options["trust_remote_code"] = run.model.trust_remote_code
    try:
        return base_models.load_tokenizer(run.model.name, run.model.revision, **options)
    except MissingError:
        return None


def write_inputs(folder: Path, tokenizer, report: dict, **files: Any) -> None:
    """Write what all members of a run share, for models.load_inputs: each of `files` as JSON under its name."""
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, content in files.items():
        record.write_text(folder / f"{name}.json", json.dumps(content, ensure_ascii=False))
    record.write_json(folder / "report.json", report)
