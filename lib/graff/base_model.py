"""The small base model: a lossless word tokenizer and a tiny Qwen3, pretrained on generated one-step problems."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, get_linear_schedule_with_warmup

from lib import made
from lib.graff import answers, data, order

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
ONE_STEP = 8000  # problems that pretraining draws from
OTHER_VOCABULARY = 2048  # tokens for text that is not generated


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words with the space before them, whole numbers to 199, signs: decoding gives the text back."""
    pieces = Regex(r" ?[A-Za-z]+|\d+|\s|#+|[^\w\s#]")
    split = pre_tokenizers.Split(pieces, "isolated")
    texts = [prompt(r["question"]) + " " + answers.target(r["answer"]) for r in data.generated(2000, 0, 2)]
    found = sorted(
        {piece for text in texts for piece, _ in split.pre_tokenize_str(text)} | {str(i) for i in range(200)}
    )
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL.values(), *found])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def encode(tokenizer, row: dict, longest: int) -> dict:
    """{"ids", "prompt" (its length)}: prompt, answer and the end token, the same prefix as in generation."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt(row["question"]))["input_ids"]
    space = "" if tokenizer.chat_template else " "
    told = tokenizer(space + answers.target(row["answer"]), add_special_tokens=False)["input_ids"]
    return {"ids": (ids + told + [tokenizer.eos_token_id])[:longest], "prompt": len(ids)}


def collate(rows: list[dict], pad: int) -> dict[str, torch.Tensor]:
    """Padded on the right; labels are -100 on prompts and padding."""
    longest = max(len(r["ids"]) for r in rows)
    ids = torch.full((len(rows), longest), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        n = len(row["ids"])
        ids[i, :n], mask[i, :n] = torch.tensor(row["ids"]), 1
        labels[i, row["prompt"] : n] = ids[i, row["prompt"] : n]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tiny_qwen3(hidden: int, layers: int, tokenizer) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def pretraining_batches(lengths: list[int], size: int, rng: np.random.Generator, real: bool) -> Iterator[list[int]]:
    """Rows of each batch, without end. Real problems differ in length: those of like length come into one batch."""
    while not real:
        yield rng.integers(len(lengths), size=size).tolist()
    while True:
        rows = order.bucketed(rng.permutation(len(lengths)).tolist(), lengths, size, rng)
        for start in range(0, max(1, len(rows) - size + 1), size):
            yield rows[start : start + size]


def make(recipe: dict, folder: Path, texts: list[dict] | None, on_step: made.OnStep = lambda *_: None) -> float:
    """Tokenizer and model in `folder`, pretrained on one-step problems (or on `texts`); returns the closing loss."""
    rows = texts or data.generated(ONE_STEP, recipe["seed"], 1)
    if texts is None:
        tokenizer = word_tokenizer()
    else:
        words = [prompt(r["question"]) + " " + answers.target(r["answer"]) for r in rows]
        tokenizer = made.train_bpe_tokenizer(words, OTHER_VOCABULARY, None)
    steps, rng = recipe["pretrain_steps"], np.random.default_rng(recipe["seed"])
    encoded = [encode(tokenizer, row, 512) for row in rows]
    lengths = [len(row["ids"]) for row in encoded]
    batches = pretraining_batches(lengths, recipe["pretrain_batch_size"], rng, texts is not None)
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = tiny_qwen3(recipe["hidden_size"], recipe["layers"], tokenizer).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe["pretrain_learning_rate"], weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 20), steps)

    def loss() -> torch.Tensor:
        return model(**collate([encoded[i] for i in next(batches)], tokenizer.pad_token_id)).loss

    closing = made.pretrain(loss, parameters, optimizer, schedule, steps, on_step)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return closing
