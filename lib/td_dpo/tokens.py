"""Preference pairs as token ids: the whole conversation is rendered and tokenised once, and the prompt's length in it
says which tokens are scored. Nothing is tokenised a second time."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from transformers import PreTrainedTokenizerBase

from lib.errors import StudyError

Row = dict[str, Any]  # {"pair": position in the input list, "prompt_ids", "chosen_ids", "rejected_ids": list[int]}
COUNTS = (
    "pairs",
    "kept",
    "dropped",
    "truncated",
    "eos_dropped",
    "prompt_not_prefix",
    "prompt_truncated",
    "identical_after_truncation",
)


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], *, add_generation_prompt: bool = False
) -> list[list[int]]:
    """Token ids of each conversation through the chat template, with at most one BOS.

    The template writes the special tokens as text, so the tokenizer adds none; one that it would have added and that
    the template forgot is put in front. Used for training, evaluation and generation alike, so that all see the same
    prompt.
    """
    if not conversations:
        return []
    texts = [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=add_generation_prompt)
        for c in conversations
    ]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is None:
        return encoded
    adds_bos = tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos]
    return [_one_bos(ids, bos, adds_bos) for ids in encoded]


def _one_bos(ids: list[int], bos: int, adds_bos: bool) -> list[int]:
    leading = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return ([bos] if leading or adds_bos else []) + ids[leading:]


def _one_eos(ids: list[int], eos: int) -> list[int]:
    """Cut after the answer's end token (ChatML templates write a line break after it); add it if the template does
    not."""
    if eos not in ids:
        return [*ids, eos]
    return ids[: ids.index(eos) + 1]


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens the two have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[dict],
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> tuple[list[Row], dict[str, int]]:
    """Rows of token ids and the counts that go into the record (see COUNTS; `truncated` counts pairs, `eos_dropped`
    answers).

    The prompt rendered alone must be a prefix of both whole conversations. Where it is not (a template that renders it
    differently, tokens that merge over the boundary) the completion begins where they diverge, as in TRL, and the pair
    is counted. Longer sequences lose their end; a pair with nothing left to compare is dropped and counted.
    """
    if tokenizer.eos_token_id is None:
        raise StudyError("tokenizer", "no end-of-sequence token", "a tokenizer with eos_token set")
    prompts = conversation_ids(tokenizer, [p["prompt"] for p in pairs], add_generation_prompt=True)
    answers = [conversation_ids(tokenizer, [p["prompt"] + p[side] for p in pairs]) for side in ("chosen", "rejected")]
    rows, counts = [], Counter(dict.fromkeys(COUNTS, 0), pairs=len(pairs))
    for index, (prompt, chosen, rejected) in enumerate(zip(prompts, *answers, strict=True)):
        shared = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
        counts["prompt_not_prefix"] += shared < len(prompt)
        if shared == 0:
            raise StudyError(
                f"row {pairs[index].get('row', index)}",
                "prompt and answer share no leading token",
                "a chat template that renders the prompt the same with and without the answer",
            )
        row = _row(tokenizer.eos_token_id, index, chosen, rejected, shared, max_length, max_prompt_length, counts)
        if row is not None:
            rows.append(row)
    counts["kept"], counts["dropped"] = len(rows), len(pairs) - len(rows)
    return rows, dict(counts)


def _row(
    eos: int,
    index: int,
    chosen: list[int],
    rejected: list[int],
    split: int,
    max_length: int | None,
    max_prompt_length: int | None,
    counts: Counter,
) -> Row | None:
    prompt = chosen[:split]
    if max_prompt_length is not None and len(prompt) > max_prompt_length:
        prompt = prompt[:1] + prompt[len(prompt) - max_prompt_length + 1 :]  # its BOS and its end, nearest the answer
        counts["prompt_truncated"] += 1
    whole = [_one_eos(ids[split:], eos) for ids in (chosen, rejected)]
    kept = whole if max_length is None else [ids[: max(max_length - len(prompt), 0)] for ids in whole]
    cut = sum(len(k) < len(w) for k, w in zip(kept, whole, strict=True))
    counts["truncated"] += cut > 0
    counts["eos_dropped"] += cut
    if not kept[0] or not kept[1]:
        return None
    if kept[0] == kept[1]:
        counts["identical_after_truncation"] += 1
        return None
    return {"pair": index, "prompt_ids": prompt, "chosen_ids": kept[0], "rejected_ids": kept[1]}


def rows_digest(rows: list[Row]) -> str:
    """A content hash of tokenised rows: what the reference log-probabilities depend on besides the model."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])).encode())
    return digest.hexdigest()


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with; its value never reaches a score, so EOS serves where no pad token is set."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
