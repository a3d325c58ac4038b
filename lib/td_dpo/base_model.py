"""The base model 'made': a BPE tokenizer and a small Llama, both made from the data set's own training answers.

Supervised fine-tuning on chosen and rejected answers alike, so that the reference is a plain imitation of the data and
has as much room to become better as to become worse.
"""

from __future__ import annotations

import random
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from lib import witness
from lib.errors import StudyError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# One BOS, and one EOS after a final answer only: in a conversation the next turn's mark ends the earlier answer. So the
# prompt with its generation mark is, character by character and at a special token's edge, how the whole begins.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DEFAULTS = {
    "vocab_size": 2048, "hidden_size": 96, "layers": 3, "heads": 4, "max_length": 512, "sft_steps": 450,
    "sft_batch_size": 32, "sft_max_tokens": 2048, "sft_learning_rate": 6e-3, "seed": 0,
}  # fmt: skip
_WARMUP = 0.05
_BUCKET = 16  # batches whose rows are sorted by length together


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts` (so any text can be encoded), with the chat template above."""
    special = [PAD, BOS, EOS, *ROLES]
    smallest = len(special) + 256
    if vocab_size < smallest:
        raise StudyError(
            "model.recipe.vocab_size", str(vocab_size), f"at least {smallest}: 256 bytes and {len(special)} marks"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=2,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


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
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[dict], max_length: int
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
            "raise model.recipe.max_length or check the data set",
        )
    return kept


def _batches(lengths: Sequence[int], size: int, max_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices: epochs in random order, rows of like length together, at most `max_tokens` padded."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        epoch: list[list[int]] = []
        for start in range(0, len(order), size * _BUCKET):
            batch: list[int] = []
            for index in sorted(order[start : start + size * _BUCKET], key=lambda i: lengths[i]):
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


def make_base(
    pairs_train: Sequence[dict],
    recipe: Mapping,
    folder: Path,
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Makes tokenizer and model from the training pairs and saves both in `folder` (safetensors).

    `recipe` may hold any key of DEFAULTS. `progress(step, total, loss)` is called after every step. The result is the
    same for the same pairs, recipe and number of threads, and the caller's random state is left alone.
    """
    unknown = sorted(set(recipe) - set(DEFAULTS))
    if unknown:
        raise StudyError("model.recipe", f"unknown key {unknown[0]!r}", f"keys among {', '.join(DEFAULTS)}")
    recipe = ChainMap(recipe, DEFAULTS)
    texts = [m["content"] for pair in pairs_train for m in (*pair["prompt"], *pair["chosen"], *pair["rejected"])]
    tokenizer = make_tokenizer(texts, recipe["vocab_size"])
    rows = conversations(tokenizer, pairs_train, recipe["max_length"])
    model = make_model(tokenizer, recipe).train()
    total = recipe["sft_steps"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe["sft_learning_rate"], betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(_WARMUP * total), total)
    batches = _batches(
        [len(ids) for ids, _ in rows], recipe["sft_batch_size"], recipe["sft_max_tokens"], recipe["seed"]
    )
    for step in witness.batches("supervised fine-tuning of the made model", range(1, total + 1)):
        loss = _loss(model, [rows[index] for index in next(batches)], tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step, total, loss.item())
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
