"""The base model 'made': a BPE tokenizer and a small Llama, both made from the data set's own training answers.

Supervised fine-tuning on chosen and rejected answers alike, so that the reference is a plain imitation of the data and
has as much room to become better as to become worse.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from lib import made
from lib.errors import StudyError

SPECIAL = {
    "pad_token": "<|pad|>",
    "bos_token": "<|bos|>",
    "eos_token": "<|eos|>",
    "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"],
}
# One BOS, and one EOS after a final answer only: in a conversation the next turn's mark ends the earlier answer. So the
# prompt with its generation mark is, character by character and at a special token's edge, how the whole begins.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LONGEST = 512  # tokens of a conversation that are learned from
MAX_TOKENS = 2048  # of a padded batch
WARM_UP = 0.05
BUCKET = 16  # batches whose rows are sorted by length together


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts` (so any text can be encoded), with the chat template above."""
    return made.train_bpe_tokenizer(texts, vocab_size, CHAT_TEMPLATE, SPECIAL, min_frequency=2)


def make_model(tokenizer: PreTrainedTokenizerFast, recipe: Mapping) -> LlamaForCausalLM:
    """An untrained float32 Llama; its weights depend on recipe['seed'] and not on the caller's generator."""
    hidden = recipe["hidden_size"]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=recipe["layers"],
        num_attention_heads=recipe["heads"],
        num_key_value_heads=recipe["heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        return LlamaForCausalLM(config)


def conversations(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[dict], max_length: int = LONGEST
) -> list[tuple[list[int], int]]:
    """(token ids, length of the prompt) of every chosen and rejected answer, cut to `max_length` tokens.

    A conversation whose prompt alone fills `max_length` has no answer left to learn from and is left out.
    """
    prompts, wholes = [], []
    for pair in pairs:
        prompt = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
        for side in ("chosen", "rejected"):
            prompts.append(prompt)
            wholes.append(tokenizer.apply_chat_template([*pair["prompt"], *pair[side]], tokenize=False))
    encode = {"add_special_tokens": False, "return_attention_mask": False}
    prompt_ids = tokenizer(prompts, **encode)["input_ids"] if prompts else []
    whole_ids = tokenizer(wholes, **encode)["input_ids"] if wholes else []
    kept = []
    for prompt, whole in zip(prompt_ids, whole_ids, strict=True):
        if whole[: len(prompt)] == prompt and len(prompt) < min(len(whole), max_length):
            kept.append((whole[:max_length], len(prompt)))
    if not kept:
        raise StudyError(
            "base model",
            f"no answer within {max_length} tokens in {len(pairs)} training pairs",
            "training pairs with answers",
            "check the data set",
        )
    return kept


def _batches(lengths: Sequence[int], size: int, max_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices: epochs in random order, rows of like length together, at most `max_tokens` padded."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        epoch: list[list[int]] = []
        for start in range(0, len(order), size * BUCKET):
            batch: list[int] = []
            for index in sorted(order[start : start + size * BUCKET], key=lambda i: lengths[i]):
                if batch and (len(batch) == size or (len(batch) + 1) * lengths[index] > max_tokens):
                    epoch.append(batch)
                    batch = []
                batch.append(index)
            epoch.append(batch)
        rng.shuffle(epoch)
        yield from epoch


def _loss(model: LlamaForCausalLM, rows: Sequence[tuple[list[int], int]], pad: int) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of the answers' tokens, the end mark included."""
    longest = max(len(ids) for ids, _ in rows)
    inputs = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    where = torch.tensor([[start <= k < len(ids) for k in range(1, longest)] for ids, start in rows])
    # no attention mask: padding is on the right, so under causal attention no answer's token sees it
    hidden = model.model(input_ids=inputs[:, :-1]).last_hidden_state
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[where]), inputs[:, 1:][where])


def make_base(pairs: Sequence[dict], recipe: Mapping, folder: Path, on_step: made.OnStep = lambda *_: None) -> float:
    """Make tokenizer and model from the training pairs and save both in `folder`; returns the closing loss. The result
    is the same for the same pairs, recipe and number of threads, and the caller's random state is left alone."""
    texts = [m["content"] for pair in pairs for m in (*pair["prompt"], *pair["chosen"], *pair["rejected"])]
    tokenizer = make_tokenizer(texts, recipe["vocab_size"])
    rows = conversations(tokenizer, pairs)
    model = make_model(tokenizer, recipe).train()
    steps, parameters = recipe["sft_steps"], list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe["sft_learning_rate"], betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    batches = _batches([len(ids) for ids, _ in rows], recipe["sft_batch_size"], MAX_TOKENS, recipe["seed"])

    def loss() -> torch.Tensor:
        return _loss(model, [rows[index] for index in next(batches)], tokenizer.pad_token_id)

    closing = made.pretrain(loss, parameters, optimizer, schedule, steps, on_step)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return closing
