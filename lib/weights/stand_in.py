"""Stand-ins for the models of the paper's scale where the hub is out of reach: same architecture and chat format, tiny,
random.

They exercise a YAML end to end (trial); what they produce means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lib.errors import StudyError

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
DEBERTA_TOKENS = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}


def train_bpe_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    chat_template: str | None = CHATML,
    special_tokens: dict | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokeniser trained on `texts` (any text can be encoded: all bytes are in its alphabet).

    `special_tokens` maps names such as eos_token to strings; a [CLS]/[SEP] pair is put round every encoded text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = dict(special_tokens or QWEN_TOKENS)
    names = [name for value in special.values() for name in ([value] if isinstance(value, str) else value)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if "cls_token" in special:
        marks = [(special[name], tokenizer.token_to_id(special[name])) for name in ("cls_token", "sep_token")]
        first, last = marks[0][0], marks[1][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}", pair=f"{first} $A {last} $B:1 {last}:1", special_tokens=marks
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="right", clean_up_tokenization_spaces=False, **special
    )
    wrapped.chat_template = chat_template
    if wrapped.pad_token is None:
        wrapped.pad_token = wrapped.unk_token or wrapped.eos_token
    return wrapped


def _tiny(config: type[PretrainedConfig], model: type[PreTrainedModel], **more):
    def build(sizes: dict) -> PreTrainedModel:
        return model(config(**{**TINY, **more, **sizes}))

    return build


TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = {"max_position_embeddings": 4096, "tie_word_embeddings": False}
DEBERTA_V3 = {  # its relative attention, which decides which projections exist
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": -1,
    "position_biased_input": False,
    "layer_norm_eps": 1e-7,
}
FAMILIES = {  # beginning of the hub id -> (builder, chat format, special tokens)
    "meta-llama/": (_tiny(LlamaConfig, LlamaForCausalLM, num_key_value_heads=4, **CAUSAL), LLAMA2, LLAMA_TOKENS),
    "Qwen/Qwen3": (
        _tiny(Qwen3Config, Qwen3ForCausalLM, num_key_value_heads=2, head_dim=16, **CAUSAL),
        CHATML,
        QWEN_TOKENS,
    ),
    "mistralai/": (
        _tiny(MistralConfig, MistralForCausalLM, num_key_value_heads=2, sliding_window=None, **CAUSAL),
        MISTRAL,
        LLAMA_TOKENS,
    ),
    "microsoft/deberta-v3": (
        _tiny(DebertaV2Config, DebertaV2ForSequenceClassification, **DEBERTA_V3),
        None,
        DEBERTA_TOKENS,
    ),
}


def family(name: str) -> tuple:
    """The entry of FAMILIES for a hub id, or an error that lists them."""
    for beginning, entry in FAMILIES.items():
        if name.startswith(beginning):
            return entry
    raise StudyError(
        f"model.name = {name}",
        "no stand-in for this architecture",
        f"a model under {', '.join(FAMILIES)}",
        "add its family to lib/weights/stand_in.py, or run where the hub is in reach",
    )


def stand_in(name: str, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, **settings) -> PreTrainedModel:
    """A tiny, randomly initialised model of the architecture of `name`; `settings` of its config, such as
    num_labels=3."""
    build = family(name)[0]
    ids = {
        key: getattr(tokenizer, key)
        for key in ("pad_token_id", "bos_token_id", "eos_token_id")
        if getattr(tokenizer, key) is not None
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build({"vocab_size": len(tokenizer), **ids, **settings}).eval()


def write_stand_in(
    name: str, folder: str | Path, texts: Iterable[str], *, vocab_size: int = 1024, seed: int = 0, **settings
) -> Path:
    """Model and tokeniser of the stand-in saved in `folder`, which loads like any local model (4-bit too); returns
    it."""
    _, chat_template, special = family(name)
    tokenizer = train_bpe_tokenizer(texts, vocab_size, chat_template, special)
    stand_in(name, tokenizer, seed=seed, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
