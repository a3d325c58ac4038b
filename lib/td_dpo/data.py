"""What all members of a grid share, made once by `prepare`: pairs from anywhere, the base model, tokenized rows,
reference log-probabilities and baselines that need no training.

Pairs are read (lib/data.py) or generated. Layouts of a row: chosen/rejected as message lists, strings or transcripts,
with or without `prompt`; prompt|instruction with completion_a, completion_b and choice. A pair: {"prompt": [messages,
the last from the user], "chosen": [one assistant message], "rejected": [one assistant message], "row": int}.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from lib import data, made, models, record
from lib.data import BadRow, describe, require
from lib.errors import StudyError
from lib.td_dpo import generated
from lib.td_dpo.engine import IGNORE, Row, conversation_ids, sample, sequence_logprobs, token_budget_batches
from lib.training import collate

SPLITS = ("train", "validation", "test")

# ---- one row to one pair ----

ROLES = ("system", "user", "assistant")
LAYOUTS = "chosen and rejected, with or without prompt; or prompt|instruction, completion_a, completion_b and choice"
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # the markup of HH-RLHF
# Which texts are transcripts: a prompt that asks for an answer, an answer that begins with the request; without a
# prompt column, any with an answer in it.
PROMPT, ANSWER, WHOLE = r"(\A\s*|\n\n)Assistant:\s*\Z", r"\A\s*Human:", r"\A\s*Human:|\n\nAssistant:"
STRUCTURE = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")  # messages that were written as text


def decode(value: Any, column: str) -> Any:
    """The message list that a text holds, as JSON or as Python prints it; any other value as it is."""
    if not (isinstance(value, str) and STRUCTURE.match(value)):
        return value
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError):
            return parse(value)
    raise BadRow(f"text in {column} that is neither an answer nor readable messages", describe(value))


def parse_turns(transcript: str) -> list[dict]:
    """Messages of a transcript ('Human: ...\n\nAssistant: ...'); text before the first turn is the system's."""
    head, *rest = TURN.split(transcript)
    turns = [{"role": "system", "content": head.strip()}] if head.strip() else []
    for speaker, content in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": "user" if speaker == "Human" else "assistant", "content": content.strip()})
    return turns


def conversation(row: dict, column: str, role: str, transcript: str) -> list[dict]:
    """A column as checked messages, [{"role", "content"}, ...] without their further keys: of a message list, of a
    text that matches `transcript`, or one message of `role`."""
    value = decode(require(row, column), column)
    if isinstance(value, str):
        return parse_turns(value) if re.search(transcript, value) else [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise BadRow(f"wrong type in {column} (expected text or messages)", describe(value))
    for message in value:
        keys = message if isinstance(message, dict) else {}
        if keys.get("role") not in ROLES or not isinstance(keys.get("content"), str):
            kind = f"wrong message in {column} (expected text as content and a role: {', '.join(ROLES)})"
            raise BadRow(kind, describe(message))
    return [{"role": message["role"], "content": message["content"]} for message in value]


def name_choice(row: dict) -> dict:
    """A row with completions and a choice as one with chosen and rejected. Numbers are refused: 1 could be either."""
    completions = [require(row, name) for name in ("completion_a", "completion_b")]
    choice = str(require(row, "choice")).strip().lower().removeprefix("completion_")
    if choice not in ("a", "b"):
        raise BadRow("choice that names neither completion (expected a or b)", describe(row["choice"]))
    chosen, rejected = completions if choice == "a" else reversed(completions)
    return {**row, "chosen": chosen, "rejected": rejected}


def to_pair(row: dict, place: int) -> dict:
    """The checked pair of a source's row at `place`; raises BadRow."""
    if "completion_a" in row or "completion_b" in row:
        row = name_choice(row)
    asked = next((name for name in ("prompt", "instruction") if row.get(name) is not None), None)
    prompt, more = conversation(row, asked, "user", PROMPT) if asked else [], row.get("input")
    if prompt and prompt[-1] == {"role": "assistant", "content": ""}:  # where a transcript's answer would begin
        prompt.pop()
    # Alpaca's second half of a request
    if prompt and asked == "instruction" and isinstance(more, str) and more.strip():
        prompt[-1]["content"] += "\n\n" + more
    sides = {side: conversation(row, side, "assistant", ANSWER if asked else WHOLE) for side in ("chosen", "rejected")}
    for side, (*_, last) in sides.items():
        if last["role"] != "assistant":
            raise BadRow(f"{side} does not end with an assistant turn", f"ends with {last['role']}")
        if not last["content"].strip():
            raise BadRow(f"empty {side}")
    (*lead, chosen), (*other, rejected) = sides.values()
    if lead != other:
        raise BadRow("chosen and rejected have different prompts", describe((lead or other)[-1]["content"]))
    # Many sets give the full conversations and repeat the user's request, as a string, in `prompt`.
    if lead and not {message["content"].strip() for message in prompt} <= {turn["content"].strip() for turn in lead}:
        raise BadRow("the prompt column disagrees with the conversation in chosen", describe(prompt[-1]["content"]))
    if not (prompt := lead or prompt):
        raise BadRow("no prompt (expected a prompt column, or a common beginning of chosen and rejected)")
    if chosen["content"].strip() == rejected["content"].strip():
        raise BadRow("identical chosen and rejected", describe(chosen["content"]))
    if prompt[-1]["role"] != "user":
        raise BadRow("prompt that does not end with a user turn", f"ends with {prompt[-1]['role']}")
    if not prompt[-1]["content"].strip():
        raise BadRow("empty prompt")
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected], "row": place}


# ---- splits ----


def prompt_key(pair: dict) -> str:
    """The prompt's content as one string: pairs with the same key belong in the same split."""
    return json.dumps(pair["prompt"], sort_keys=True, ensure_ascii=False)


def load_splits(section: dict, sampled: tuple | None = None) -> tuple[dict[str, list[dict]], dict]:
    """({"train", "validation", "test"}: pairs, report) of a `dataset` section. A split the source does not have is
    carved from train by prompt, so that no prompt is in both. `sampled`: splits and report of `sample_pairs`.

    report: source, rows per split, overlap of test with train, fingerprint, and for a source that is read
    data.make_splits' own.
    """
    name, report = section["name"], {}
    if name == "generated":
        sizes = (section[f"{split}_pairs"] for split in SPLITS)
        splits = generated.make_pairs(*sizes, seed=section.get("split_seed") or 0)
    elif sampled:
        splits, report = sampled
    else:
        sources, wanted = data.read(name, section.get("revision")), ("test", "validation", "train")
        splits, report = data.make_splits(sources, wanted, to_pair, prompt_key, LAYOUTS, section)
    splits = {split: splits[split][: section.get("limit")] for split in SPLITS}
    seen = {prompt_key(pair) for pair in splits["train"]}
    return splits, report | {
        "source": name,
        "rows": {split: len(pairs) for split, pairs in splits.items()},
        "test_pairs_with_a_train_prompt": sum(prompt_key(pair) in seen for pair in splits["test"]),
        "fingerprint": record.digest(splits),  # of what was read, wherever it was
    }


# ---- verifiable pairs, of the model's own answers ----

DRAWS, TEMPERATURE, CHUNK = 4, 1.0, 40  # answers to a request, how they are sampled, requests at a time


def sample_pairs(run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[dict, dict]:
    """(splits, report): of each request's answers one that does what it asks for and one that does not. Test pairs are the
    same for every seed. report: base_rates, {kind of request: share of the answers that do}.

    Raises StudyError where the requests do not give as many pairs as the run wants. A trial makes up what is missing."""
    splits, rates = {}, defaultdict(list)
    chunk = 4 if run.mode == "trial" else CHUNK
    settings = {"max_new_tokens": run.evaluation.max_new_tokens, "temperature": TEMPERATURE, "batch_size": 2 * CHUNK}
    for place, split in enumerate(SPLITS):
        size, seed = getattr(run.dataset, f"{split}_pairs"), 0 if split == "test" else run.dataset.split_seed
        asked, pairs, rng = generated.requests(split, seed), [], random.Random(f"flipped {split} {seed}")
        for start in range(0, len(asked), chunk):
            if len(pairs) >= size:
                break
            prompts = [
                [{"role": "user", "content": text}] for text in asked[start : start + chunk] for _ in range(DRAWS)
            ]
            answers = sample(model, tokenizer, prompts, seed=10_000 * (3 * seed + place) + start, **settings)
            for i in range(0, len(prompts), DRAWS):
                request, own = prompts[i][0]["content"], [answer["text"] for answer in answers[i : i + DRAWS]]
                does = [text for text in own if generated.fulfilled(request, text) == 1]
                fails = [text for text in own if text.strip() and text not in does]
                rates[generated.constraint(request)[0]].append(len(does) / DRAWS)
                if run.mode == "trial" and not (does and fails):
                    does, fails = [f"{request} Yes."], ["No."]
                if does and fails:
                    is_flipped = split == "train" and rng.random() < run.dataset.flipped
                    texts = (fails[0], does[0]) if is_flipped else (does[0], fails[0])
                    chosen, rejected = ([{"role": "assistant", "content": text}] for text in texts)
                    pairs.append({"prompt": prompts[i], "chosen": chosen, "rejected": rejected, "row": len(pairs)})
        if len(pairs) < size:
            found = f"{len(pairs)} pairs from the answers to {len(asked)} requests"
            raise StudyError(
                f"dataset.{split}_pairs", found, f"{size}", "fewer, or a model that does what it is asked for"
            )
        splits[split] = pairs[:size]
    return splits, {"base_rates": {kind: float(np.mean(shares)) for kind, shares in sorted(rates.items())}}


# ---- tokens ----


def _one_eos(ids: list[int], eos: int) -> list[int]:
    """Cut after the answer's end token, the last one: text may spell others, and ChatML templates write a line break
    after it. Add it if the template does not."""
    ids = ids[: len(ids) - ids[::-1].index(eos)] if eos in ids else [*ids, eos]
    while ids[-2:] == [eos, eos]:
        ids = ids[:-1]
    return ids


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast, pairs: list[dict], max_length: int | None = None, max_prompt: int | None = None
) -> tuple[list[Row], dict[str, int]]:
    """Rows of token ids and counts for the record: pairs kept, dropped, truncated (`eos_dropped`: their answers), with a
    prompt that was truncated or is no prefix.

    The prompt rendered alone must be a prefix of both whole conversations. Where it is not (a template that renders it
    differently, tokens that merge over the boundary) the completion begins where they diverge, as in TRL, and the pair
    is counted. Longer sequences lose their end; a pair with nothing left to compare is dropped and counted.
    """
    if tokenizer.eos_token_id is None:
        raise StudyError("tokenizer", "no end-of-sequence token", "a tokenizer with eos_token set")
    rows, counts = [], Counter(pairs=len(pairs))
    prompts = conversation_ids(tokenizer, [pair["prompt"] for pair in pairs], add_generation_prompt=True)
    wholes = [conversation_ids(tokenizer, [p["prompt"] + p[side] for p in pairs]) for side in ("chosen", "rejected")]
    for index, (alone, *both) in enumerate(zip(prompts, *wholes, strict=True)):
        prompt = os.path.commonprefix([alone, *both])  # of any sequences
        if not prompt:
            where, found = f"row {pairs[index].get('row', index)}", "prompt and answer share no leading token"
            raise StudyError(where, found, "a chat template that renders the prompt alike with and without the answer")
        whole = [_one_eos(ids[len(prompt) :], tokenizer.eos_token_id) for ids in both]
        counts["prompt_not_prefix"] += len(prompt) < len(alone)
        if max_prompt is not None and len(prompt) > max_prompt:  # its BOS stays, and what is nearest the answer
            prompt = prompt[:1] + prompt[len(prompt) - max_prompt + 1 :]
            counts["prompt_truncated"] += 1
        room = None if max_length is None else max(max_length - len(prompt), 0)
        chosen, rejected = (ids[:room] for ids in whole)
        cut, same = sum(len(ids[:room]) < len(ids) for ids in whole), bool(chosen) and chosen == rejected
        counts.update(truncated=cut > 0, eos_dropped=cut, identical_after_truncation=same)
        if chosen and rejected and not same:
            rows.append({"pair": index, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows, dict(counts) | {"kept": len(rows), "dropped": len(pairs) - len(rows)}


# ---- the base model 'made' ----

SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
SPECIAL |= {"additional_special_tokens": [f"<|{role}|>" for role in ROLES]}
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


def texts_of(pairs: Sequence[dict]) -> list[str]:
    """Every text of the pairs: what a tokenizer is trained on."""
    return [m["content"] for pair in pairs for m in (*pair["prompt"], *pair["chosen"], *pair["rejected"])]


def make_model(tokenizer: PreTrainedTokenizerFast, recipe: Mapping) -> PreTrainedModel:
    """An untrained float32 Llama; its weights depend on recipe['seed'] and not on the caller's generator."""
    hidden, heads = recipe["hidden_size"], recipe["heads"]
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": recipe["layers"]}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 2048}
    more = {"tie_word_embeddings": True, "initializer_range": 0.04, "dtype": "float32"}
    return made.stand_in("meta-llama/", tokenizer, seed=recipe["seed"], **sizes, **more)


def conversations(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[dict], max_length: int = LONGEST) -> list[dict]:
    """{"ids", "prompt" (its length)} of every chosen and rejected answer, cut to `max_length` tokens."""
    rows, _ = encode_pairs(tokenizer, pairs, max_length)
    if not rows:
        found = f"no answer within {max_length} tokens in {len(pairs)} training pairs"
        raise StudyError("base model", found, "training pairs with answers", "check the data set")
    sides = ("chosen_ids", "rejected_ids")
    return [{"ids": row["prompt_ids"] + row[side], "prompt": len(row["prompt_ids"])} for row in rows for side in sides]


def _batches(lengths: Sequence[int], size: int, max_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices: epochs in random order, rows of like length together, at most `max_tokens` padded."""
    rng = random.Random(seed)
    while True:
        order, epoch = rng.sample(range(len(lengths)), len(lengths)), []
        for start in range(0, len(order), size * BUCKET):
            bucket = order[start : start + size * BUCKET]
            batches = token_budget_batches([lengths[index] for index in bucket], max_tokens, size)
            epoch += [[bucket[place] for place in batch] for batch in batches]
        rng.shuffle(epoch)
        yield from epoch


def make_base(pairs: Sequence[dict], recipe: Mapping, on_step: made.OnStep = lambda *_: None) -> made.Base:
    """Tokenizer and model of the training pairs. The result is the same for the same pairs, recipe and number of
    threads, and the caller's random state is left alone."""
    tokenizer = made.train_bpe_tokenizer(texts_of(pairs), recipe["vocab_size"], CHAT_TEMPLATE, SPECIAL)
    rows = conversations(tokenizer, pairs)
    model, steps, rate = make_model(tokenizer, recipe).train(), recipe["sft_steps"], recipe["sft_learning_rate"]
    batches = _batches([len(row["ids"]) for row in rows], recipe["sft_batch_size"], MAX_TOKENS, recipe["seed"])

    def loss() -> torch.Tensor:
        """Mean negative log-likelihood (nats) of the answers' tokens, the end mark included."""
        batch = collate([rows[index] for index in next(batches)], tokenizer.pad_token_id)
        labels = batch["labels"][:, 1:]
        # no attention mask: padding is on the right, so under causal attention no answer's token sees it
        hidden = model.model(input_ids=batch["input_ids"][:, :-1]).last_hidden_state[labels != IGNORE]
        return torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[labels != IGNORE])

    optimizer = AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    return model, tokenizer, made.pretrain(loss, optimizer, schedule, steps, on_step)


# ---- baselines ----


def answers(pairs: Sequence[dict]) -> tuple[list[str], list[str]]:
    """(chosen texts, rejected texts)."""
    return [pair["chosen"][-1]["content"] for pair in pairs], [pair["rejected"][-1]["content"] for pair in pairs]


def length_baseline(pairs: Sequence[dict]) -> float:
    """Pairwise accuracy of 'the longer answer is preferred'; length in characters, ties count one half."""
    longer = [len(chosen) - len(rejected) for chosen, rejected in zip(*answers(pairs), strict=True)]
    return float(np.mean((np.sign(longer) + 1) / 2))


def bag_of_words_baseline(train: Sequence[dict], test: Sequence[dict], seed: int = 0) -> float:
    """Pairwise accuracy on `test` of a logistic regression on the difference of log(1 + count) of words; ties count one
    half.

    No intercept, so that swapping the answers of a pair turns the sign. One fixed, strong penalty (C = 0.01: words are
    many, pairs few) and no search. Words in fewer than 3 answers are left out.
    """
    from sklearn.linear_model import LogisticRegression

    chosen, rejected = answers(train)
    options = {"min_df": min(3, 2 * len(train)), "token_pattern": r"(?u)\b\w+\b|[^\w\s]"}
    counts = data.word_counts(chosen + rejected, chosen, rejected, *answers(test), **options)
    won, lost, test_won, test_lost = (count.log1p() for count in counts)
    signs = np.resize([1.0, -1.0], len(train))  # a classifier needs both labels: every other pair is turned round
    model = LogisticRegression(C=0.01, fit_intercept=False, solver="liblinear", random_state=seed, max_iter=200)
    model.fit((won - lost).multiply(signs[:, None]).tocsr(), signs)
    scores = model.decision_function((test_won - test_lost).tocsr())
    return float(np.mean((np.sign(scores) + 1) / 2))


# ---- what members share ----


def prepare(run, folder: Path) -> None:
    """Make the inputs of all members in `folder`. A base model's training steps go to history.jsonl, for the live
    line."""
    section, (name, source) = run.dataset.model_dump(), data.source_of(run)
    if name != source:  # generated pairs stand in
        section |= {"name": name} | {f"{split}_pairs": run.dataset.limit or 8 for split in SPLITS}
    if name == "verifiable":  # the model comes first: the pairs are of its own answers
        splits, report, texts, make = None, {}, generated.requests("train", 0), None
    else:
        splits, report = load_splits(section)
        texts, make = texts_of(splits["train"]), partial(make_base, splits["train"])
    tokenizer, facts = made.base_model(run, folder, texts, make, needs_chat_template=True)
    model = models.load_base(run, facts["base"])
    if splits is None:
        splits, report = load_splits(section, sample_pairs(run, model, tokenizer))
    limits = run.dataset.preprocessing
    rows, counts = {}, {}
    for split in SPLITS:
        rows[split], counts[split] = encode_pairs(tokenizer, splits[split], limits.max_length, limits.max_prompt_length)
    reference = {split: sequence_logprobs(model, rows[split]) for split in SPLITS}
    enough = len(splits["train"]) >= 20  # to fit anything (not in trial mode)
    report |= {
        **facts,
        "source": source,
        "tokens": counts,
        "length_baseline": length_baseline(splits["test"]),
        "bag_of_words_baseline": bag_of_words_baseline(splits["train"], splits["test"]) if enough else None,
    }
    if run.dataset.name == "generated":
        report["label_noise"] = generated.label_noise(splits["test"])
    save_file(reference, folder / "reference.safetensors")
    made.write_inputs(folder, tokenizer, report, rows=rows, pairs=splits)
