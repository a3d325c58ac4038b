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
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lib import data, made, models, record
from lib.data import BadRow, describe, require
from lib.errors import StudyError
from lib.td_dpo import generated
from lib.td_dpo.engine import Row, conversation_ids, sequence_logprobs, token_budget_batches

SPLITS = ("train", "validation", "test")

# ---- one row to one pair ----

ROLES = ("system", "user", "assistant")
LAYOUTS = (
    "chosen and rejected (with or without prompt), or prompt|instruction with completion_a, completion_b and choice; "
    "a prompt that ends with a user turn and two different answers"
)
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


def conversation(value: Any, column: str, role: str, transcript: str) -> list[dict]:
    """A column as checked messages, [{"role", "content"}, ...] without their further keys: of a message list, of a
    text that matches `transcript`, or one message of `role`."""
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


def split_conversations(sides: dict[str, list[dict]], prompt: list[dict]) -> tuple[list[dict], str, str]:
    """(prompt, chosen, rejected) of two conversations; `prompt` from its own column, where there is one: else it is
    all but their last messages."""
    for name, turns in sides.items():
        if not turns:
            raise BadRow(f"empty {name}", "no messages")
        if turns[-1]["role"] != "assistant":
            raise BadRow(f"{name} does not end with an assistant turn", f"ends with {turns[-1]['role']}")
        if not turns[-1]["content"].strip():
            raise BadRow(f"empty {name}")
    (*lead, chosen), (*other, rejected) = sides.values()
    if lead != other:
        raise BadRow("chosen and rejected have different prompts", describe((lead or other)[-1]["content"]))
    if prompt and lead and lead != prompt:
        # Many sets give the full conversations and repeat the user's request, as a string, in `prompt`.
        contents = [message["content"].strip() for message in lead]
        if not all(message["content"].strip() in contents for message in prompt):
            raise BadRow("the prompt column disagrees with the conversation in chosen", describe(prompt[-1]["content"]))
    if not (lead or prompt):
        raise BadRow("no prompt (expected a prompt column, or a common beginning of chosen and rejected)")
    return lead or prompt, chosen["content"], rejected["content"]


def choice_key(row: dict) -> str:
    """'a', 'b', '0', '1' or '2' for the ways to write a choice; anything else for what is none."""
    return str(row.get("choice")).strip().lower().removeprefix("completion_").removesuffix(".0")


def to_pair(row: dict, place: int, choices: Mapping[str, int]) -> dict:
    """The checked pair of a source's row at `place`; raises BadRow. `choices`: see choices_of."""
    asked = next((name for name in ("prompt", "instruction") if row.get(name) is not None), None)
    chose = "completion_a" in row or "completion_b" in row
    needed = ["completion_a", "completion_b", "choice", asked or "prompt"] if chose else ["chosen", "rejected"]
    chosen, rejected, *_ = (decode(require(row, name), name) for name in needed)
    if chose:
        if (second := choices.get(choice_key(row))) is None:
            kind = "choice that names neither completion (expected a or b, completion_a or completion_b, 0/1, or 1/2)"
            raise BadRow(kind, describe(row["choice"]))
        chosen, rejected = (rejected, chosen) if second else (chosen, rejected)
    if type(chosen) is not type(rejected):
        kind = "wrong type in chosen or rejected (expected both text, or both message lists)"
        raise BadRow(kind, f"{describe(chosen)}; {describe(rejected)}")
    prompt = conversation(decode(row[asked], asked), asked, "user", PROMPT) if asked else []
    if prompt and prompt[-1] == {"role": "assistant", "content": ""}:  # where a transcript's answer would begin
        prompt.pop()
    more = row.get("input")
    if (
        prompt and asked == "instruction" and isinstance(more, str) and more.strip()
    ):  # Alpaca's second half of a request
        prompt[-1]["content"] += "\n\n" + more
    sides = (("chosen", chosen), ("rejected", rejected))
    mark = ANSWER if asked else WHOLE
    conversations = {name: conversation(side, name, "assistant", mark) for name, side in sides}
    prompt, chosen, rejected = split_conversations(conversations, prompt)
    if chosen.strip() == rejected.strip():
        raise BadRow("identical chosen and rejected", describe(chosen))
    if prompt[-1]["role"] != "user":
        raise BadRow("prompt that does not end with a user turn", f"ends with {prompt[-1]['role']}")
    if not prompt[-1]["content"].strip():
        raise BadRow("empty prompt")
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "row": place}


def choices_of(sources: dict[str, list[data.Row]], where: str) -> dict[str, int]:
    """{way to write a choice: 0 where it means completion_a, 1 where completion_b}. In all files, numbers are 0/1 or
    1/2; ambiguity is an error."""
    rows = [row.value for rows in sources.values() for row in rows if isinstance(row.value, dict)]
    numbers = {choice_key(row) for row in rows} & {"0", "1", "2"}
    if {"0", "2"} <= numbers or numbers == {"1"}:
        found = f"the rows' numbers in column choice are {', '.join(sorted(numbers))}: 1 could be either completion"
        raise StudyError(where, found, "0 and 1, or 1 and 2, or a and b", "write a and b in column choice")
    return {"a": 0, "b": 1} | ({"1": 0, "2": 1} if "2" in numbers else {"0": 0, "1": 1})


# ---- splits ----


def prompt_key(pair: dict) -> str:
    """The prompt's content as one string: pairs with the same key belong in the same split."""
    return json.dumps(pair["prompt"], sort_keys=True, ensure_ascii=False)


def load_splits(section: dict) -> tuple[dict[str, list[dict]], dict]:
    """({"train", "validation", "test"}: pairs, report) of a `dataset` section. A split the source does not have is
    carved from train by prompt, so that no prompt is in both.

    report: source, files, rows per split, carved splits, dropped rows with reasons, overlap of test with train,
    fingerprint.
    """
    name, seed = section["name"], section.get("split_seed") or 0
    files, dropped, carved = {}, {"count": 0, "reasons": []}, {}
    if name == "generated":
        splits = generated.make_pairs(*(section[f"{split}_pairs"] for split in SPLITS), seed=seed)
    else:
        where, fraction = f"dataset.name = {name}", section.get("validation_fraction") or 0.1
        sources = data.read(name, section.get("revision"))
        sources = {split: rows for split, rows in sources.items() if split in SPLITS or len(sources) == 1}
        files = {split: list(dict.fromkeys(row.file for row in rows)) for split, rows in sources.items()}
        choices, drop = choices_of(sources, where), section.get("on_bad_row") == "drop"
        splits, dropped = data.convert(sources, partial(to_pair, choices=choices), LAYOUTS, drop)
        splits, carved = data.complete(splits, ("test", "validation", "train"), prompt_key, where, seed, fraction)
    splits = {split: splits[split][: section.get("limit")] for split in SPLITS}
    seen = {prompt_key(pair) for pair in splits["train"]}
    report = {
        "source": name,
        "revision": section.get("revision"),
        "files": files,
        "rows": {split: len(splits[split]) for split in SPLITS},
        "carved_from_train": carved,
        "split_seed": seed if carved else None,
        "dropped": dropped,
        "test_pairs_with_a_train_prompt": sum(prompt_key(pair) in seen for pair in splits["test"]),
        "fingerprint": record.digest(splits),  # of what was read, wherever it was
    }
    return splits, report


# ---- tokens ----

COUNTS = ("pairs", "kept", "dropped", "truncated", "eos_dropped", "prompt_not_prefix", "prompt_truncated")
COUNTS += ("identical_after_truncation",)


def _one_eos(ids: list[int], eos: int) -> list[int]:
    """Cut after the answer's end token, the last one: text may spell others, and ChatML templates write a line break
    after it. Add it if the template does not."""
    ids = ids[: len(ids) - ids[::-1].index(eos)] if eos in ids else [*ids, eos]
    while ids[-2:] == [eos, eos]:
        ids = ids[:-1]
    return ids


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens the two have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _token_ids(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[dict]) -> Iterator[tuple]:
    """(prompt, conversation with the chosen answer, with the rejected one) of every pair, in token ids."""
    prompts = conversation_ids(tokenizer, [pair["prompt"] for pair in pairs], add_generation_prompt=True)
    both = [conversation_ids(tokenizer, [p["prompt"] + p[side] for p in pairs]) for side in ("chosen", "rejected")]
    return zip(prompts, *both, strict=True)


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast,
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
    rows, counts = [], Counter(dict.fromkeys(COUNTS, 0), pairs=len(pairs))
    for index, (prompt, *both) in enumerate(_token_ids(tokenizer, pairs)):
        shared = min(common_prefix(prompt, ids) for ids in both)
        counts["prompt_not_prefix"] += shared < len(prompt)
        if shared == 0:
            where, found = f"row {pairs[index].get('row', index)}", "prompt and answer share no leading token"
            raise StudyError(where, found, "a chat template that renders the prompt alike with and without the answer")
        prompt = both[0][:shared]
        if max_prompt_length is not None and len(prompt) > max_prompt_length:
            # its BOS, and what is nearest the answer
            prompt = prompt[:1] + prompt[len(prompt) - max_prompt_length + 1 :]
            counts["prompt_truncated"] += 1
        whole = [_one_eos(ids[shared:], tokenizer.eos_token_id) for ids in both]
        kept = whole if max_length is None else [ids[: max(max_length - len(prompt), 0)] for ids in whole]
        cut = sum(len(k) < len(w) for k, w in zip(kept, whole, strict=True))
        counts["truncated"] += cut > 0
        counts["eos_dropped"] += cut
        chosen, rejected = kept
        if chosen and rejected and chosen != rejected:
            rows.append({"pair": index, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        else:
            counts["dropped"] += 1
            counts["identical_after_truncation"] += bool(chosen) and chosen == rejected
    return rows, dict(counts) | {"kept": len(rows)}


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


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts` (so any text can be encoded), with the chat template above."""
    return made.train_bpe_tokenizer(texts, vocab_size, CHAT_TEMPLATE, SPECIAL, min_frequency=2)


def make_model(tokenizer: PreTrainedTokenizerFast, recipe: Mapping) -> PreTrainedModel:
    """An untrained float32 Llama; its weights depend on recipe['seed'] and not on the caller's generator."""
    hidden, heads = recipe["hidden_size"], recipe["heads"]
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": recipe["layers"]}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 2048}
    more = {"tie_word_embeddings": True, "initializer_range": 0.04, "dtype": "float32"}
    return made.stand_in("meta-llama/", tokenizer, seed=recipe["seed"], **sizes, **more)


def conversations(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[dict], max_length: int = LONGEST
) -> list[tuple[list[int], int]]:
    """(token ids, length of the prompt) of every chosen and rejected answer, cut to `max_length` tokens.

    A conversation whose prompt alone fills `max_length` has no answer left to learn from and is left out.
    """
    kept = [
        (ids[:max_length], len(prompt))
        for prompt, *both in _token_ids(tokenizer, pairs)
        for ids in both
        if ids[: len(prompt)] == prompt and len(prompt) < min(len(ids), max_length)
    ]
    if not kept:
        found = f"no answer within {max_length} tokens in {len(pairs)} training pairs"
        raise StudyError("base model", found, "training pairs with answers", "check the data set")
    return kept


def _batches(lengths: Sequence[int], size: int, max_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices: epochs in random order, rows of like length together, at most `max_tokens` padded."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        epoch: list[list[int]] = []
        for start in range(0, len(order), size * BUCKET):
            bucket = order[start : start + size * BUCKET]
            batches = token_budget_batches([lengths[index] for index in bucket], max_tokens, size)
            epoch += [[bucket[place] for place in batch] for batch in batches]
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
    tokenizer = make_tokenizer(texts_of(pairs), recipe["vocab_size"])
    rows = conversations(tokenizer, pairs)
    model, steps = make_model(tokenizer, recipe), recipe["sft_steps"]
    batches = _batches([len(ids) for ids, _ in rows], recipe["sft_batch_size"], MAX_TOKENS, recipe["seed"])

    def loss() -> torch.Tensor:
        return _loss(model, [rows[index] for index in next(batches)], tokenizer.pad_token_id)

    schedule = {"steps": steps, "learning_rate": recipe["sft_learning_rate"], "warm_up": round(WARM_UP * steps)}
    options = {"schedule": "cosine", "betas": (0.9, 0.95), "fused": True}
    return made.pretrain(model, tokenizer, loss, folder, on_step, **schedule, **options)


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
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression

    chosen, rejected = answers(train)
    options = {"min_df": min(3, 2 * len(train)), "token_pattern": r"(?u)\b\w+\b|[^\w\s]"}
    counts = data.word_counts(chosen + rejected, chosen, rejected, *answers(test), **options)
    won, lost, test_won, test_lost = (count.log1p() for count in counts)
    # A classifier needs both labels: a seeded half of the pairs is turned round.
    signs = np.where(np.random.default_rng(seed).random(len(train)) < 0.5, 1.0, -1.0)
    if len(train) > 1 and abs(signs.sum()) == len(train):
        signs[0] = -signs[0]
    model = LogisticRegression(C=0.01, fit_intercept=False, solver="liblinear", random_state=seed, max_iter=200)
    model.fit(sparse.diags(signs) @ (won - lost).tocsr(), signs)
    scores = model.decision_function((test_won - test_lost).tocsr())
    return float(np.mean((np.sign(scores) + 1) / 2))


# ---- what members share ----


def prepare(run, folder: Path) -> None:
    """Make the inputs of all members in `folder`. A base model's training steps go to history.jsonl, for the live
    line."""
    splits, report = pairs_of(run)
    texts, make = texts_of(splits["train"]), partial(make_base, splits["train"])
    tokenizer, facts = made.base_model(run, folder, texts, make, needs_chat_template=True)
    limits = run.dataset.preprocessing
    rows, counts = {}, {}
    for split in SPLITS:
        rows[split], counts[split] = encode_pairs(tokenizer, splits[split], limits.max_length, limits.max_prompt_length)
    model = models.load_base(run, facts["base"])
    reference = {split: sequence_logprobs(model, rows[split]) for split in SPLITS}
    enough = len(splits["train"]) >= 20  # to fit anything (not in trial mode)
    report |= {
        **facts,
        "tokens": counts,
        "length_baseline": length_baseline(splits["test"]),
        "bag_of_words_baseline": bag_of_words_baseline(splits["train"], splits["test"]) if enough else None,
    }
    if run.dataset.name == "generated":
        report["label_noise"] = generated.label_noise(splits["test"])
    save_file(reference, folder / "reference.safetensors")
    made.write_inputs(folder, tokenizer, report, rows=rows, pairs=splits)


def pairs_of(run) -> tuple[dict, dict]:
    """The run's pairs and the loader's report; in a trial without the hub, generated ones in the data set's place."""
    section, (name, source) = run.dataset.model_dump(), data.source_of(run)
    if name != source:
        section |= {"name": name} | {f"{split}_pairs": run.dataset.limit or 8 for split in SPLITS}
    splits, report = load_splits(section)
    return splits, {**report, "source": source}
