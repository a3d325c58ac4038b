"""What all members of a grid share, made once by `prepare`: pairs from anywhere, the base model, tokenized rows,
reference log-probabilities and baselines that need no training.

Pairs are read (lib/data.py) or generated. Layouts of a row: chosen/rejected as message lists, strings or transcripts,
with or without `prompt`; prompt|instruction with completion_a, completion_b and choice. A pair: {"prompt": [messages,
the last from the user], "chosen": [one assistant message], "rejected": [one assistant message], "row": int}.
"""

import contextlib
import itertools
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from lib import data, hub, made, models, record
from lib.data import BadRow, decode, describe, require
from lib.errors import StudyError
from lib.td_dpo import engine, generated
from lib.td_dpo.engine import IGNORE, Row, conversation_ids, sample, sequence_logprobs, token_budget_batches
from lib.training import WINDOW, collate

SPLITS = ("train", "validation", "test")
CHUNK = 1000  # pairs that are tokenized together

# ---- one row to one pair ----

# how files name the roles
ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
ROLES |= {"prompter": "user"}
LAYOUTS = (
    "chosen and rejected (or completion_a, completion_b and choice), with a prompt of their own or a common beginning; "
    "or the columns of UltraFeedback, HH-RLHF, Orca, ShareGPT, AlpacaEval or SHP"
)
ASKS, SAYS = r"(?:### ?)?(?:Human|User|USER|prompter)", r"(?:### ?)?(?:Assistant|ASSISTANT|assistant)"
TURN = re.compile(rf"(?:\A\s*|\n\n)({ASKS}|{SAYS}):")  # the markup of HH-RLHF and its like
LOOSE = re.compile(rf"(?:\A\s*|\n)({ASKS}|{SAYS}):")  # without blank lines
# Which texts are transcripts: a prompt that begins with a request, has one after a blank line or asks for an answer, an
# answer that begins with either; without a prompt column, any with an answer in it.
PROMPT, ANSWER = rf"(\A\s*|\n\n){ASKS}:|(\A\s*|\n){SAYS}:\s*\Z", rf"\A\s*({ASKS}|{SAYS}):"
WHOLE = rf"\A\s*{ASKS}:|\n\n{SAYS}:"
MARKUP = re.compile(
    r"\A\s*(<\|im_start\|>|<\|start_header_id\|>|(<s>\s*)?\[INST\])"
)  # a template wrote the text already
ASKED = ("prompt", "instruction")
# where the answers are not whole conversations; Orca's request is its input
OTHER = ("question", "messages", "conversations", "conversation", "input")
# {columns of two answers and of which is preferred: {its value: the place of the preferred}}
PREFERENCES = {
    ("completion_a", "completion_b", "choice"): {"a": 0, "completion_a": 0, "b": 1, "completion_b": 1},
    ("output_1", "output_2", "preference"): {"1": 0, "2": 1},  # AlpacaEval, whose weights in between are rounded
    ("human_ref_A", "human_ref_B", "labels"): {"1": 0, "0": 1},  # SHP
}


def parse_turns(transcript: str) -> list[dict]:
    """Messages of a transcript ('Human: ...\n\nAssistant: ...'); text before the first turn is the system's."""
    head, *rest = TURN.split(transcript)
    if len(rest) <= 2 < len(loose := LOOSE.split(transcript)):
        head, *rest = loose
    turns = [{"role": "system", "content": head.strip()}] if head.strip() else []
    for speaker, content in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": "user" if re.fullmatch(ASKS, speaker) else "assistant", "content": content.strip()})
    return turns


def conversation(row: dict, column: str, role: str, transcript: str) -> list[dict]:
    """A column as checked messages, [{"role", "content", ...}, ...]: of messages, of a text that matches
    `transcript`, or one message of `role`."""
    value = decode(require(row, column), column)
    if isinstance(value, str):
        if MARKUP.match(value):
            raise BadRow(f"{column} in the markup of a chat template (expected text or messages)", describe(value))
        return parse_turns(value) if re.search(transcript, value) else [{"role": role, "content": value}]
    if not isinstance(value, (list, dict)):
        raise BadRow(f"wrong type in {column} (expected text or messages)", describe(value))
    turns = [to_message(each, column) for each in ([value] if isinstance(value, dict) else value)]
    return [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]


def to_message(given: Any, column: str) -> dict:
    """{"role", "content"} of a message, also as ShareGPT writes it, with the further keys that a template may render."""
    keys = given if isinstance(given, dict) else {}
    role, content = (
        next((keys[name] for name in names if keys.get(name) is not None), None)
        for names in (("role", "from"), ("content", "value"))  # a parquet file of both has both
    )
    role = ROLES.get(role) if isinstance(role, str) else None
    of_tool = ("name", "tool_call_id") if role == "tool" else ()
    more = {name: keys[name] for name in ("tool_calls", "reasoning_content", *of_tool) if keys.get(name)}
    content = "" if content is None and "tool_calls" in more else content
    if role is None or not isinstance(content, str):
        kind = f"wrong message in {column} (expected text as content and a role: {', '.join(ROLES)})"
        raise BadRow(kind, describe(given))
    data.refuse_meaning({name: value for name, value in keys.items() if name not in more}, fix=data.RIGHT)
    return {"role": role, "content": content, **more}


def to_sides(row: dict) -> None:
    """Give the row chosen and rejected, where other columns say which of its answers is preferred."""
    for (first, second, column), places in PREFERENCES.items():
        if first in row or second in row:
            answers, value = [require(row, name) for name in (first, second)], require(row, column)
            said = str(value).strip().lower()
            with contextlib.suppress(ValueError, OverflowError):
                said = str(round(float(said))) if column != "choice" and float(said) % 1 != 0.5 else said
            if said not in places or isinstance(value, bool):
                kind = f"{column} that names neither completion (expected {' or '.join(places)})"
                raise BadRow(kind, describe(value))
            row["chosen"], row["rejected"] = answers if places[said] == 0 else reversed(answers)
    if "completions" in row and "chosen" not in row:  # UltraFeedback: the best and the worst of several
        row["chosen"], row["rejected"] = _best_and_worst(require(row, "completions"))


def _best_and_worst(completions: Any) -> tuple[str, str]:
    try:
        scored = [(float(c.get("fine-grained_score", c.get("overall_score"))), c["response"]) for c in completions]
        best, worst = (choose(scored, key=lambda each: each[0]) for choose in (max, min))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadRow("completions without response and score", describe(completions)) from None
    if not best[0] > worst[0]:
        raise BadRow("completions of which none is preferred", f"all have score {best[0]:g}")
    return best[1], worst[1]


def to_pair(row: dict, place: int) -> dict:
    """The checked pair of a source's row at `place`; raises BadRow."""
    to_sides(row)
    shp = ("history",) if "human_ref_A" in row else ()
    asked, other = (next((name for name in names if row.get(name) is not None), None) for names in (ASKED, OTHER + shp))
    whole = WHOLE if asked is None and other is None else ANSWER
    sides = {side: conversation(row, side, "assistant", whole) for side in ("chosen", "rejected")}
    for side, (*_, last) in sides.items():
        if last["role"] != "assistant":
            raise BadRow(f"{side} does not end with an assistant turn", f"ends with {last['role']}")
        if not last["content"].strip() and "tool_calls" not in last:
            raise BadRow(f"empty {side}")
    (*lead, chosen), (*opposite, rejected) = sides.values()
    if lead != opposite:
        raise BadRow("chosen and rejected have different prompts", describe((lead or opposite)[-1]["content"]))
    asked = asked if lead else asked or other
    prompt = conversation(row, asked, "user", PROMPT) if asked else []
    said = "\n".join(message["content"] for message in prompt)
    for name in () if lead else (*ASKED, *OTHER[:-1]):  # what is not in the request would be left out of it
        if name != asked and isinstance(text := row.get(name), str) and text.strip() and text.strip() not in said:
            raise BadRow(f"{name} beside {asked}, which says something else", describe(text), data.leave_out(name))
    if prompt and prompt[-1] == {"role": "assistant", "content": ""}:  # where a transcript's answer would begin
        prompt.pop()
    # Many sets give the full conversations and repeat the user's request, as a string, in `prompt`.
    if lead and not {message["content"].strip() for message in prompt} <= {turn["content"].strip() for turn in lead}:
        raise BadRow("the prompt column disagrees with the conversation in chosen", describe(prompt[-1]["content"]))
    if not lead:
        prompt = prompt or _common_beginning(row, chosen, rejected)
        _without_prompt(prompt, chosen, rejected)
    prompt = _with_context(row, prompt, lead)
    if {**chosen, "content": chosen["content"].strip()} == {**rejected, "content": rejected["content"].strip()}:
        raise BadRow("identical chosen and rejected", describe(chosen["content"]))
    if prompt[-1]["role"] not in ("user", "tool"):
        raise BadRow("prompt that does not end with a user turn", f"ends with {prompt[-1]['role']}")
    if any(turn["role"] == "user" and not turn["content"].strip() for turn in prompt):
        raise BadRow("empty prompt")
    tools = data.take(row, "tools") or None
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        tools = json.loads(tools)
    if not isinstance(tools, list | None):
        raise BadRow("wrong type in tools (expected a list)", describe(tools))
    more = {"tools": tools} if tools else {}
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected], "row": place, **more}


def _common_beginning(row: dict, chosen: dict, rejected: dict) -> list[dict]:
    """TRL's implicit prompt: what two texts have in common, to its last space, which both of them lose. Only where no
    other column could hold the prompt."""
    texts = [message["content"] for message in (chosen, rejected)]
    common = "".join(re.findall(r"(?s)\A.*\s", os.path.commonprefix(texts)))
    others = [
        name for name, value in row.items() if value not in texts and name not in data.MEANING and _may_ask(value)
    ]
    if others or not common.strip() or not all(text[len(common) :].strip() for text in texts):
        kind = "no prompt (expected a prompt column, or a common beginning of chosen and rejected)"
        fix = f"--set dataset.columns.prompt={others[0]}, if that is the prompt" if others else data.RIGHT
        raise BadRow(kind, f"columns: {', '.join(row)}"[:200], fix)
    return [{"role": "user", "content": common.strip()}]


def _may_ask(value: Any) -> bool:
    """Whether a column may hold the prompt: messages, several words, or one that asks."""
    if isinstance(value, list):
        return any(isinstance(each, dict) and each.keys() & {"role", "from"} for each in value)
    return isinstance(value, str) and re.search(r"\s|[^\x00-\x7f]|[?!.:]\Z", value.strip()) is not None


def _without_prompt(prompt: list[dict], *answers: dict) -> None:
    """Take the prompt off two answers that both begin with it."""
    text = prompt[-1]["content"].strip()
    said = [answer["content"].lstrip() for answer in answers]
    if text and all(each.startswith(text) and re.match(r"\s+\S|[^\w\s]", each[len(text) :]) for each in said):
        for answer, each in zip(answers, said, strict=True):
            answer["content"] = each[len(text) :].lstrip()


def _with_context(row: dict, prompt: list[dict], lead: list[dict]) -> list[dict]:
    """The prompt with what stands in columns beside it: Alpaca's second half of a request, earlier turns, and the
    system's."""
    if not lead and isinstance(more := row.get("input"), str) and more.strip() not in ("", "None", "nan", "null"):
        data.take(row, "input")
        if more.strip() not in prompt[-1]["content"]:
            prompt[-1]["content"] += "\n\n" + more
    turns = lead or prompt
    if not lead and isinstance(row.get("history"), list):  # of messages, of [request, answer], or of these in turn
        earlier, history = [], data.take(row, "history")
        if all(isinstance(each, str) for each in history):
            if len(history) % 2:
                raise BadRow("history that ends with a request (expected requests and answers)", describe(history))
            history = [list(pair) for pair in zip(history[::2], history[1::2], strict=True)]
        for each in history:
            said = each if isinstance(each, list) else [each]
            for role, text in zip(("user", "assistant"), said, strict=False):
                message = {"role": role, "content": text} if isinstance(text, str) else text
                earlier.append(to_message(message, "history"))
        turns = earlier + turns
    for name in ("system", "system_prompt"):
        if isinstance(text := row.get(name), str) and text.strip():
            data.take(row, name)
            if turns[0]["role"] == "system" and turns[0]["content"].strip() != text.strip():
                raise BadRow(f"two system turns, one of them in {name}", describe(text))
            turns = turns if turns[0]["role"] == "system" else [{"role": "system", "content": text}, *turns]
    return turns


# ---- splits ----


def prompt_key(pair: dict) -> str:
    """The prompt's content as one string: pairs with the same key belong in the same split."""
    return json.dumps(pair["prompt"], sort_keys=True, ensure_ascii=False)


def load_splits(section: dict, sampled: tuple | None = None) -> tuple[dict[str, list[dict]], dict]:
    """({"train", "validation", "test"}: pairs, report) of a `dataset` section. A split the source does not have is
    carved from train by prompt, so that no prompt is in both. `sampled`: splits and report of `sample_pairs`.

    report: source, rows per split, and for a source that is read data.make_splits' own.
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
    return splits, report | {"source": name, "rows": {split: len(pairs) for split, pairs in splits.items()}}


# ---- verifiable pairs, of the model's own answers ----

DRAWS, TEMPERATURE, REQUESTS = 4, 1.0, 40  # answers to a request, how they are sampled, requests at a time


def sample_pairs(run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[dict, dict]:
    """(splits, report): of each request's answers one that does what it asks for and one that does not. Test pairs are the
    same for every seed. report: base_rates, {kind of request: share of the answers that do}.

    Raises StudyError where the requests do not give as many pairs as the run wants. A trial makes up what is missing."""
    splits, rates = {}, defaultdict(list)
    chunk = 4 if run.mode == "trial" else REQUESTS
    settings = {"max_new_tokens": run.evaluation.max_new_tokens, "temperature": TEMPERATURE, "batch_size": 2 * REQUESTS}
    for place, split in enumerate(SPLITS):
        size, seed = getattr(run.dataset, f"{split}_pairs"), 0 if split == "test" else run.dataset.split_seed
        asked, pairs, rng = generated.requests(split, seed), [], random.Random(f"flipped {split} {seed}")
        for start in range(0, len(asked), chunk):
            if len(pairs) >= size:
                break
            prompts = [[{"role": "user", "content": text}] for text in asked[start : start + chunk]]
            each = [prompt for prompt in prompts for _ in range(DRAWS)]
            answers = sample(model, tokenizer, each, seed=10_000 * (3 * seed + place) + start, **settings)
            for i, prompt in enumerate(prompts):
                request, own = prompt[0]["content"], [a["text"] for a in answers[i * DRAWS : (i + 1) * DRAWS]]
                does = [text for text in own if generated.fulfilled(request, text) == 1]
                fails = [text for text in own if text.strip() and text not in does]
                rates[generated.constraint(request)[0]].append(len(does) / DRAWS)
                if run.mode == "trial" and not (does and fails):
                    does, fails = [f"{request} Yes."], ["No."]
                if does and fails:
                    sides = [[{"role": "assistant", "content": text}] for text in (does[0], fails[0])]
                    chosen, rejected = sides[::-1] if split == "train" and rng.random() < run.dataset.flipped else sides
                    pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "row": len(pairs)})
        if len(pairs) < size:
            found = f"{len(pairs)} pairs from the answers to {len(asked)} requests"
            fix = "fewer, or a model that does what it is asked for"
            raise StudyError(f"dataset.{split}_pairs", found, f"{size}", fix)
        splits[split] = pairs[:size]
    return splits, {"base_rates": {kind: float(np.mean(shares)) for kind, shares in sorted(rates.items())}}


# ---- tokens ----


MARK = "x7x"  # a text that no template writes by itself
HI, CALL = {"role": "user", "content": "a"}, {"type": "function", "function": {"name": MARK, "arguments": {}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
PROBES = {  # what a pair may hold besides requests and answers: a conversation that holds it
    "system": [{"role": "system", "content": MARK}, HI],
    "tool": [HI, {**CALLING, "tool_calls": [{**CALL, "id": "call00000"}]}, {"role": "tool", "content": MARK}],
    "tools": [HI],
    "tool_calls": [HI, CALLING],
    "reasoning_content": [HI, {"role": "assistant", "content": "b", "reasoning_content": MARK}],
}


def holds(pair: dict) -> set[str]:
    """Which of PROBES a pair needs its chat template to write."""
    messages = [*pair["prompt"], *pair["chosen"], *pair["rejected"]]
    found = {name for message in messages for name in (message["role"], *message)}
    return (found | pair.keys()) & PROBES.keys()


def writes(tokenizer: PreTrainedTokenizerFast, what: str) -> bool:
    """Whether the chat template writes a conversation's `what` (of PROBES), and neither refuses it nor leaves it out."""
    schema = {"name": MARK, "description": "b", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": schema}] if what == "tools" else None
    with contextlib.suppress(Exception):  # a template raises anything
        return MARK in tokenizer.apply_chat_template(PROBES[what], tokenize=False, tools=tools)
    return False


def _tokens_behind_end(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """How many tokens the chat template writes behind the mark that ends the last answer (ChatML's line break); None
    where it writes no such mark. What an answer's text spells is no end."""
    text = str(tokenizer.apply_chat_template([HI, {"role": "assistant", "content": MARK}], tokenize=False))
    ids = tokenizer(text.rpartition(MARK)[2], add_special_tokens=False)["input_ids"]
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((count for count, token in enumerate(reversed(ids)) if token in marks), None)


def _end(ids: list[int], behind: int | None, eos: int) -> list[int]:
    """An answer's tokens up to its end, which is added where the template writes none."""
    ids = [*ids, eos] if behind is None else ids[: len(ids) - behind]
    while ids[-2:] == [eos, eos]:
        ids = ids[:-1]
    return ids


def _render(tokenizer: PreTrainedTokenizerFast, pairs: list[dict]) -> Iterator[tuple[list[int], ...]]:
    """(prompt, with chosen, with rejected) of pairs with the same tools, as token ids."""
    prompts, tools = [pair["prompt"] for pair in pairs], pairs[0].get("tools")
    alone = conversation_ids(tokenizer, prompts, add_generation_prompt=True, tools=tools)
    sides = [[pair["prompt"] + pair[side] for pair in pairs] for side in ("chosen", "rejected")]
    return zip(alone, *(conversation_ids(tokenizer, whole, tools=tools) for whole in sides), strict=True)


def _render_all(tokenizer: PreTrainedTokenizerFast, pairs: list[dict], counts: Counter, on_bad_row: str) -> Iterator:
    """(place, what `_render` gives) of each pair that the chat template writes whole."""
    lacks = {what for what in set().union(*map(holds, pairs)) if not writes(tokenizer, what)}
    refused = {i: f"no {', '.join(sorted(own))}" for i, pair in enumerate(pairs) if (own := holds(pair) & lacks)}
    places, rendered = [i for i in range(len(pairs)) if i not in refused], {}
    if places and not any("tools" in pair for pair in pairs):
        with contextlib.suppress(Exception):  # a template raises anything, of one of them
            rendered = dict(zip(places, _render(tokenizer, [pairs[i] for i in places]), strict=True))
    for i in [] if rendered else places:
        try:
            (rendered[i],) = _render(tokenizer, [pairs[i]])
        except Exception as error:
            refused[i] = str(error)[:100]
    if refused and on_bad_row != "drop":
        numbers = ", ".join(str(pairs[i].get("row", i)) for i in [*refused][:5]) + ", ..." * (len(refused) > 5)
        found = f"{len(refused)} pairs that it does not write whole ({next(iter(refused.values()))}): rows {numbers}"
        fix = "another model, or leave them out and have them counted: --set dataset.on_bad_row=drop"
        raise StudyError("the model's chat template", found, "a template that writes all of a pair", fix)
    counts.update(refused_by_template=len(refused))
    return iter(rendered.items())


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[dict],
    max_length: int | None = None,
    max_prompt: int | None = None,
    on_bad_row: str = "refuse",
) -> tuple[list[Row], dict[str, int]]:
    """Rows of token ids and counts for the record: pairs kept, dropped, truncated (`eos_dropped`: their answers), with a
    prompt that was truncated or is no prefix. Pairs that the chat template cannot write (a system turn, tools) are an
    error, or with "drop" counted.

    The prompt rendered alone must be a prefix of both whole conversations. Where it is not (a template that renders it
    differently, tokens that merge over the boundary) the completion begins where they diverge, as in TRL, and the pair
    is counted. Longer sequences lose their end; a pair with nothing left to compare is dropped and counted.
    """
    if tokenizer.eos_token_id is None:
        raise StudyError("tokenizer", "no end-of-sequence token", "a tokenizer with eos_token set")
    rows, counts, behind = [], Counter(pairs=len(pairs)), _tokens_behind_end(tokenizer)
    for index, (alone, *both) in _render_all(tokenizer, pairs, counts, on_bad_row):
        prompt = os.path.commonprefix([alone, *both])  # of any sequences
        if not prompt:
            where, found = f"row {pairs[index].get('row', index)}", "prompt and answer share no leading token"
            raise StudyError(where, found, "a chat template that renders the prompt alike with and without the answer")
        whole = [_end(ids[len(prompt) :], behind, tokenizer.eos_token_id) for ids in both]
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
SPECIAL |= {"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]}
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


def conversations(tokenizer, pairs: Sequence[dict], max_prompt: int | None = None) -> list[dict]:
    """{"ids", "prompt" (its length)} of every chosen and rejected answer, cut to LONGEST tokens."""
    rows, _ = encode_pairs(tokenizer, pairs, LONGEST, max_prompt, "drop")
    if not rows:
        found = f"no answer within {LONGEST} tokens in {len(pairs)} training pairs"
        fix = f"--set dataset.preprocessing.max_prompt_length={LONGEST // 2}"
        raise StudyError("base model", found, "prompts that leave room for an answer", fix)
    sides = ("chosen_ids", "rejected_ids")
    return [{"ids": row["prompt_ids"] + row[side], "prompt": len(row["prompt_ids"])} for row in rows for side in sides]


def _batches(lengths: Sequence[int], size: int, max_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices: epochs in random order, rows of like length together, at most `max_tokens` padded."""
    rng = random.Random(seed)
    while True:
        order, epoch = rng.sample(range(len(lengths)), len(lengths)), []
        for start in range(0, len(order), size * WINDOW):
            bucket = order[start : start + size * WINDOW]
            batches = token_budget_batches([lengths[index] for index in bucket], max_tokens, size)
            epoch += [[bucket[place] for place in batch] for batch in batches]
        rng.shuffle(epoch)
        yield from epoch


def make_tokenizer(pairs: Sequence[dict], recipe: Mapping) -> PreTrainedTokenizerFast:
    return made.train_bpe_tokenizer(texts_of(pairs), recipe["vocab_size"], CHAT_TEMPLATE, SPECIAL)


def make_base(pairs: list[dict], recipe: Mapping, history: Path, max_prompt: int | None = None) -> made.Base:
    """Tokenizer and model of the training pairs. The result is the same for the same pairs, recipe and number of
    threads, and the caller's random state is left alone."""
    tokenizer = make_tokenizer(pairs, recipe)
    rows = conversations(tokenizer, pairs, max_prompt)
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
    return model, tokenizer, made.pretrain(loss, optimizer, schedule, steps, history)


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


def load_run(run, sampled: tuple | None = None) -> tuple[dict[str, list[dict]], dict]:
    """`load_splits` of the run's data set, with the source as the record calls it."""
    section, (name, source) = run.dataset.model_dump(), data.source_of(run)
    if name != source:  # generated pairs stand in
        section |= {"name": name} | {f"{split}_pairs": run.dataset.limit or 8 for split in SPLITS}
    splits, report = load_splits(section, sampled)
    return splits, report | {"source": source}


def encode_split(
    run, tokenizer: PreTrainedTokenizerFast, split: str, pairs: list[dict], keep: Callable[[dict], Any] = dict
) -> tuple[list, dict]:
    """`encode_pairs` within the run's limits: (what `keep` makes of each row, counts). So many at a time as never fill the
    memory. Raises StudyError where no pair of the split is left."""
    limits, kept, counts = run.dataset.preprocessing, [], Counter()
    for start in range(0, len(pairs), CHUNK):
        some, cuts = pairs[start : start + CHUNK], (limits.max_length, limits.max_prompt_length)
        rows, numbers = encode_pairs(tokenizer, some, *cuts, run.dataset.on_bad_row)
        kept += [keep({**row, "pair": row["pair"] + start}) for row in rows]
        counts.update(numbers)
    if not kept:
        found = f"none of {len(pairs)} pairs leaves an answer within {limits.max_length} tokens"
        fix = f"--set dataset.preprocessing.max_prompt_length={limits.max_length // 2}, or a larger max_length"
        raise StudyError(f"dataset, split {split}", found, "at least one pair", fix)
    return kept, dict(counts)


def compared(pair: dict) -> tuple[str, tuple[str, ...], str]:
    """What data.audit compares: the prompt and the two answers."""
    prompt = "\n".join(f"{message['role']}: {message['content']}" for message in pair["prompt"])
    answers = tuple(pair[side][-1]["content"] for side in ("chosen", "rejected"))
    return prompt, answers, "\n".join((prompt, *answers))


def audit(run, shared: Path | None = None) -> dict:
    """The audit of the run's data; of sampled pairs, of those in `shared`, which `prepare` filled."""
    prepared = shared and [record.read_json(shared / f"{name}.json") for name in ("pairs", "report")]
    splits, report = prepared or load_run(run)
    make = partial(make_tokenizer, splits["train"], run.model.recipe and run.model.recipe.model_dump())
    tokenizer = made.tokenizer_of(run, texts_of(splits["train"]), make, needs_chat_template=True)
    parts = ("prompt", "chosen", "rejected")

    def measure(split: str, pairs: list[dict]) -> tuple[dict, dict]:
        rows, counts = encode_split(run, tokenizer, split, pairs, lambda row: [len(row[f"{p}_ids"]) for p in parts])
        return dict(zip(parts, zip(*rows, strict=True), strict=True)), counts

    turns = Counter(m["role"] for pairs in splits.values() for p in pairs for m in (*p["prompt"], *p["chosen"]))
    return data.audit(splits, report, compared, tokenizer, measure, turns=turns)


def prepare(run, folder: Path) -> None:
    """Make the inputs of all members in `folder`. A base model's training steps go to history.jsonl, for the live
    line."""
    longest = run.dataset.preprocessing.max_prompt_length
    if run.dataset.name in hub.SAMPLED:  # the model comes first: the pairs are of its own answers
        given, texts, make = None, generated.requests("train", 0), None
    else:
        given = load_run(run)
        texts, make = texts_of(given[0]["train"]), partial(make_base, given[0]["train"], max_prompt=longest)
    tokenizer, facts = made.base_model(run, folder, texts, make, needs_chat_template=True)
    model = models.load_base(run, facts["base"])
    splits, report = given or load_run(run, sample_pairs(run, model, tokenizer))
    rows, counts = {}, {}
    for split in SPLITS:
        rows[split], counts[split] = encode_split(run, tokenizer, split, splits[split])
    last = run.model.peft and run.model.peft.last_layers
    depth = engine.trunk_depth(model, last, [*itertools.chain(*rows.values())])
    reference = {split: sequence_logprobs(model, rows[split], depth=depth) for split in SPLITS}
    if depth:
        trunk = {split: torch.cat([row.pop("trunk")[1] for row in rows[split]]) for split in SPLITS}
        save_file(trunk, folder / "trunk.safetensors")
    enough = len(splits["train"]) >= 20  # to fit anything (not in trial mode)
    report |= {
        **facts,
        "trunk": {"depth": depth, "last_layers": last},
        "tokens": counts,
        "length_baseline": length_baseline(splits["test"]),
        "bag_of_words_baseline": bag_of_words_baseline(splits["train"], splits["test"]) if enough else None,
    }
    if run.dataset.name == "generated":
        report["label_noise"] = generated.label_noise(splits["test"])
    save_file(reference, folder / "reference.safetensors")
    made.write_inputs(folder, tokenizer, report, rows=rows, pairs=splits)
