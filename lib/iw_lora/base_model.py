"""The small base model: a word tokenizer and a tiny DeBERTa-v2, pretrained without labels by replaced-token detection.

A share of the tokens is replaced by others of the same text (in place of ELECTRA's generator network) and the encoder
learns, token by token, which ones were: binary cross-entropy over all but the special tokens.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model, PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from lib import made

SPECIAL = {key: made.DEBERTA_TOKENS[key] for key in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")}
REPLACED = 0.15
LONGEST = 64


def word_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Whole lower-case words and punctuation marks, the `vocab_size` most frequent ones."""
    split = pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text.lower()))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - len(SPECIAL)]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *ranked])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **SPECIAL)


def tiny_deberta(recipe: dict, tokens: int, pad: int) -> DebertaV2Model:
    """DeBERTa-v3's relative attention with shared query and key projections, small; no dropout."""
    hidden = recipe["hidden_size"]
    own = {
        "vocab_size": tokens,
        "pad_token_id": pad,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": recipe["layers"],
        "num_attention_heads": recipe["heads"],
        "max_position_embeddings": 256,
        "position_buckets": 32,
        "initializer_range": 0.1,
        "pooler_hidden_size": hidden,
    }
    no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout"), 0.0)
    return DebertaV2Model(DebertaV2Config(**{**made.DEBERTA_V3, **own, **no_dropout}))


def replace_tokens(ids: Tensor, special: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(corrupted ids, 1.0 where a token now differs), both (B, L). A replacement is a token from elsewhere in the same
    row, which only its place betrays; special tokens (`special`, bool) are neither replaced nor drawn."""
    chosen = (torch.rand(ids.shape, generator=generator) < REPLACED) & ~special
    drawn = (~special).float()
    drawn[drawn.sum(1) == 0] = 1.0  # a row of special tokens alone (all its words unknown): nothing is replaced there
    places = torch.multinomial(drawn, ids.shape[1], replacement=True, generator=generator)
    corrupted = torch.where(chosen, ids.gather(1, places), ids)
    return corrupted, (corrupted != ids).float()


def make_base(
    pairs: list[tuple[str, str]], recipe: dict, folder: Path, on_step: made.OnStep = lambda *_: None
) -> float:
    """Tokenizer and pretrained encoder saved in `folder`; returns the closing loss in nats per token."""
    tokenizer = word_tokenizer([text for pair in pairs for text in pair], recipe["vocab_size"])
    first, second = (list(side) for side in zip(*pairs, strict=True))
    ids = tokenizer(first, second if any(second) else None, truncation=True, max_length=LONGEST)["input_ids"]
    marks, steps, size = (
        torch.tensor(tokenizer.all_special_ids),
        recipe["pretrain_steps"],
        recipe["pretrain_batch_size"],
    )
    generator, order = torch.Generator().manual_seed(recipe["seed"]), np.random.default_rng(recipe["seed"])
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = tiny_deberta(recipe, len(tokenizer), tokenizer.pad_token_id).train()
        head = nn.Linear(model.config.hidden_size, 1)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe["pretrain_learning_rate"], weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)

    def loss() -> Tensor:
        rows = [ids[i] for i in order.integers(len(ids), size=size)]
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        special = torch.isin(padded["input_ids"], marks)
        corrupted, replaced = replace_tokens(padded["input_ids"], special, generator)
        hidden = model(input_ids=corrupted, attention_mask=padded["attention_mask"]).last_hidden_state
        logits = head(hidden).squeeze(-1)
        return nn.functional.binary_cross_entropy_with_logits(logits[~special], replaced[~special])

    closing = made.pretrain(loss, parameters, optimizer, schedule, steps, on_step)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return closing
