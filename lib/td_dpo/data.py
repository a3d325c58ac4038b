"""What all members of a grid share, made once by `prepare`: pairs from anywhere, the base model, tokenized rows,
reference log-probabilities and baselines that need no training.

Pairs come from a local file or directory, the hub, or are generated. Layouts of a row: chosen/rejected as message lists
or strings, with or without `prompt`; prompt|instruction with completion_a, completion_b and choice. A pair: {"prompt":
[messages, the last from the user], "chosen": [one assistant message], "rejected": [one assistant message], "row": int}.
Bad rows are refused with their numbers (`on_bad_row: drop` counts and leaves them out).
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from lib import hub, made, models, record
from lib.errors import StudyError
from lib.td_dpo import generated
from lib.td_dpo.engine import Row, conversation_ids, load_base, pad_token, sequence_logprobs, token_budget_batches

SPLITS = ("train", "validation", "test")
SPLIT_OF = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLIT_OF |= {"dev": "validation", "test": "test"}
Source = tuple[str, str, list]  # (split, file as named in messages, rows: each the row, or a BadRow in its place)

# ---- one row to one pair ----

LONGEST_ROW = 1_000_000  # bytes
ROLES = ("system", "user", "assistant")
TURN = re.compile(r"\n\n(Human|Assistant):")  # the markup of HH-RLHF
LAYOUTS = (
    "chosen and rejected (with or without prompt), or prompt|instruction with completion_a, completion_b and choice"
)


class BadRow(Exception):
    """What is wrong with one row: `kind` is the same for all rows with this fault, `detail` says what this row
    holds."""

    def __init__(self, kind: str, detail: str = ""):
        self.kind, self.detail = kind, detail
        super().__init__(f"{kind}: {detail}" if detail else kind)


def shown(value: Any, limit: int = 60) -> str:
    """A value for an error message: its type and its beginning."""
    text = repr(value[: 2 * limit] if isinstance(value, (str, list)) else value)
    return f"{type(value).__name__} {text[:limit]}{'...' if len(text) > limit else ''}"


def messages(value: list, column: str) -> list[dict]:
    """A checked message list: [{"role", "content"}, ...]; further keys of a message are left behind."""
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadRow(f"wrong type in {column} (expected messages with role and content)", shown(message))
        if message["role"] not in ROLES:
            raise BadRow(f"unknown role in {column} (expected {', '.join(ROLES)})", shown(message["role"]))
        if not isinstance(message["content"], str):
            raise BadRow(f"wrong type in {column}.content (expected text)", shown(message["content"]))
    return [{"role": message["role"], "content": message["content"]} for message in value]


def parse_turns(transcript: str) -> list[dict]:
    """Messages of an HH-RLHF transcript ('\n\nHuman: ...\n\nAssistant: ...'); text before the first is the
    system's."""
    head, *rest = TURN.split(transcript)
    turns = [{"role": "system", "content": head.strip()}] if head.strip() else []
    for speaker, content in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": "user" if speaker == "Human" else "assistant", "content": content.strip()})
    return turns


def prompt_messages(value: Any, column: str) -> list[dict]:
    """A prompt column as messages: a message list, an HH-RLHF transcript that ends with 'Assistant:', or one user
    turn."""
    if isinstance(value, list):
        return messages(value, column)
    if not isinstance(value, str):
        raise BadRow(f"wrong type in {column} (expected text or messages)", shown(value))
    if re.search(r"\n\nAssistant:\s*$", value):
        return parse_turns(value[: value.rindex("\n\nAssistant:")])
    return [{"role": "user", "content": value}]


def split_transcripts(chosen: str, rejected: str) -> tuple[list[dict], str, str]:
    """(prompt, chosen, rejected) of two strings without a prompt: what they share up to the last '\n\nAssistant:'."""
    mark = "\n\nAssistant:"
    cut = os.path.commonprefix([chosen, rejected]).rfind(mark)
    if cut < 0:
        expected = f"a prompt column, or a common beginning up to {mark!r}"
        raise BadRow(f"chosen and rejected are strings that share no prompt (expected {expected})", shown(chosen))
    answers = [side[cut + len(mark) :].strip() for side in (chosen, rejected)]
    if any(TURN.search("\n\n" + answer) for answer in answers):  # the conversations part before their last answers
        raise BadRow("chosen and rejected have different prompts", shown(answers[0]))
    return parse_turns(chosen[:cut]), *answers


def split_conversations(chosen: list[dict], rejected: list[dict], prompt: list[dict] | None) -> tuple:
    """(prompt, chosen, rejected) of two message lists; `prompt` from its own column, or None: then all but the last
    message."""
    for name, conversation in (("chosen", chosen), ("rejected", rejected)):
        if not conversation:
            raise BadRow(f"empty {name}", "no messages")
        if conversation[-1]["role"] != "assistant":
            raise BadRow(f"{name} does not end with an assistant turn", f"ends with {conversation[-1]['role']}")
    lead, other = chosen[:-1], rejected[:-1]
    if lead != other:
        raise BadRow("chosen and rejected have different prompts", shown((lead or other)[-1]["content"]))
    if prompt is not None and lead and lead != prompt:
        # Many sets give the full conversations and repeat the user's request, as a string, in `prompt`.
        contents = [message["content"].strip() for message in lead]
        if not all(message["content"].strip() in contents for message in prompt):
            raise BadRow("the prompt column disagrees with the conversation in chosen", shown(prompt[-1]["content"]))
    if prompt is None and not lead:
        raise BadRow("no prompt (expected a prompt column, or its messages at the head of chosen and rejected)")
    return lead or prompt, chosen[-1]["content"], rejected[-1]["content"]


def choice_key(value: Any) -> str:
    """'a', 'b', '0', '1' or '2' for the ways to write a choice; anything else for what is none."""
    return str(value).strip().lower().removeprefix("completion_").removesuffix(".0")


def to_pair(row: Any, number: int, first_choice: int = 0) -> dict:
    """A checked pair of source row `number` (0-based); raises BadRow. `first_choice`: the number that means
    completion_a."""
    if not isinstance(row, dict):
        raise BadRow("a row that is not an object with named columns", shown(row))
    try:
        size = len(json.dumps(row, ensure_ascii=False, default=str).encode())
    except UnicodeEncodeError:
        raise BadRow("text that is not valid Unicode (a lone surrogate)") from None
    if size > LONGEST_ROW:
        raise BadRow(f"a row of more than {LONGEST_ROW:,} bytes", f"{size:,} bytes")
    asked = next((name for name in ("prompt", "instruction") if row.get(name) is not None), None)
    choices = "completion_a" in row or "completion_b" in row
    needed = ["completion_a", "completion_b", "choice", asked or "prompt"] if choices else ["chosen", "rejected"]
    for name in needed:
        if row.get(name) is None:
            raise BadRow(f"missing {name}", f"columns: {', '.join(row)}"[:200])
    chosen, rejected = row[needed[0]], row[needed[1]]
    if choices:
        order = {"a": 0, "b": 1, str(first_choice): 0, str(first_choice + 1): 1}
        if (second := order.get(choice_key(row["choice"]))) is None:
            kind = "choice that names neither completion (expected a or b, completion_a or completion_b, 0/1, or 1/2)"
            raise BadRow(kind, shown(row["choice"]))
        chosen, rejected = (rejected, chosen) if second else (chosen, rejected)
    prompt = prompt_messages(row[asked], asked) if asked else None
    more = row.get("input")
    if asked == "instruction" and isinstance(more, str) and more.strip():  # Alpaca's second half of a request
        prompt[-1]["content"] += "\n\n" + more
    if isinstance(chosen, list) and isinstance(rejected, list):
        sides = messages(chosen, "chosen"), messages(rejected, "rejected")
        prompt, chosen, rejected = split_conversations(*sides, prompt)
    elif not (isinstance(chosen, str) and isinstance(rejected, str)):
        kind = "wrong type in chosen or rejected (expected both text, or both message lists)"
        raise BadRow(kind, f"{shown(chosen)}; {shown(rejected)}")
    elif prompt is None and chosen.strip() and rejected.strip():
        prompt, chosen, rejected = split_transcripts(chosen, rejected)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise BadRow(f"empty {name}")
    if chosen.strip() == rejected.strip():
        raise BadRow("identical chosen and rejected", shown(chosen))
    last = prompt[-1] if prompt else {"role": "no turns"}
    if last["role"] != "user":
        raise BadRow("prompt that does not end with a user turn", f"ends with {last['role']}")
    if not last["content"].strip():
        raise BadRow("empty prompt")
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "row": number}


# ---- files to rows ----


def read_jsonl(text: bytes) -> list:
    """One JSON value per line; a line that cannot be read becomes a BadRow in its place."""
    rows = []
    for number, line in enumerate(text.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            if line.strip():
                rows.append(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            rows.append(BadRow("a line that is not JSON", f"line {number}: {str(error)[:80]}; it begins {line[:40]!r}"))
    return rows


def read_json(text: bytes) -> list:
    """A JSON array of rows, an object whose `data` is one, or (as many hub files are) one row per line."""
    if text.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") and b"\n" in text.strip():
        return read_jsonl(text)
    value = json.loads(text.decode("utf-8-sig"))
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(value, list):
        raise ValueError(f"JSON {type(value).__name__}, not an array of rows")
    return value


def read_csv(text: bytes) -> list:
    """Rows as strings; a cell that holds a JSON message list becomes that list."""
    csv.field_size_limit(1 << 30)  # rows that are too long are refused later, with their number
    reader = csv.DictReader(io.StringIO(text.decode("utf-8-sig"), newline=""), strict=True)
    header = reader.fieldnames or []
    if len(set(header)) != len(header):
        raise ValueError(f"column names that repeat: {', '.join(header)}")
    rows: list = []
    for row in reader:
        if extra := row.pop(None, None):
            rows.append(BadRow("more fields than the header has", f"line {reader.line_num}: {len(extra)} too many"))
            continue
        for name, cell in row.items():
            if isinstance(cell, str) and cell.lstrip().startswith("[{"):
                with contextlib.suppress(ValueError):  # text that only looks like it
                    row[name] = json.loads(cell)
        rows.append(row)
    return rows


def read_parquet(text: bytes) -> list:
    return pq.read_table(pa.BufferReader(text)).to_pylist()


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv}


def read_file(path: Path) -> list:
    """Rows of one local file by its suffix."""
    if path.suffix not in READERS:
        raise StudyError(str(path), f"a file of type '{path.suffix or 'none'}'", f"one of {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path.read_bytes())
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        found = f"not {path.suffix[1:].upper()} in UTF-8: {str(error)[:160]}"
        raise StudyError(str(path), found, "a complete file of rows") from None


def files_of(folder: Path) -> dict[str, list[Path]]:
    """Data files of a directory by split: train.*, test.*, validation.* in it or, as on the hub, shards such as
    data/train-00000-of-00002.parquet; a single file is the train split."""
    splits: dict[str, list[Path]] = defaultdict(list)
    for place in (folder, folder / "data"):
        files = [path for path in sorted(place.glob("*")) if path.suffix in READERS and path.is_file()]
        for path in files:
            if split := SPLIT_OF.get(re.split(r"[-.]", path.stem)[0]):
                splits[split].append(path)
        if not splits and len(files) == 1:
            splits["train"] = files
        if splits:
            break
    for split, paths in splits.items():
        whole = any(path.stem in SPLIT_OF for path in paths)
        if len(paths) > 1 and (whole or len({path.suffix for path in paths}) > 1):
            found = f"several files for {split}: {', '.join(path.name for path in paths)}"
            raise StudyError(str(folder), found, "one file per split, or its shards", "remove or rename the others")
    if not splits:
        found = f"no data files for a split; it holds {', '.join(sorted(os.listdir(folder))[:8]) or 'nothing'}"
        expected = f"train.*, test.*, validation.* or data/train-*.parquet ({', '.join(READERS)})"
        raise StudyError(str(folder), found, expected, "rename the files, or name one file")
    return splits


def find_sources(name: str, revision: str | None) -> list[Source]:
    """All rows of the named data set, file by file."""
    if path := hub.local_path(name):
        files = {"train": [path]} if path.is_file() else files_of(path)
        return [(split, str(file), read_file(file)) for split, paths in files.items() for file in paths]
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in READERS
    if looks_local or not hub.HUB_ID.match(name):
        found = f"no such file or directory (from {Path.cwd()} or {hub.ROOT})"
        expected = "an existing path, a hub id, or 'generated'"
        raise StudyError(f"dataset.name = {name}", found, expected, "--set dataset.name=<path>")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # they flood a log
    found = hub.load_dataset(name, revision=revision)
    known = SPLIT_OF if len(found) > 1 else dict.fromkeys(found, "train")
    if not known.keys() & found.keys():
        fix = "save its rows as train.jsonl, test.jsonl in a directory and name that"
        raise StudyError(f"dataset.name = {name}", f"splits {', '.join(found)}", "a train split", fix)
    return [(known[split], f"{name}[{split}]", rows.to_list()) for split, rows in found.items() if split in known]


# ---- rows to pairs ----


def first_choice(sources: list[Source]) -> int:
    """The number that means completion_a in all files: 0 where choices are 0/1, 1 where they are 1/2; ambiguity is an
    error."""
    rows = [row for _, _, rows in sources for row in rows if isinstance(row, dict)]
    numbers = {choice_key(row.get("choice")) for row in rows} & {"0", "1", "2"}
    if {"0", "2"} <= numbers or numbers == {"1"}:
        where = ", ".join(file for _, file, _ in sources)[:300]
        found = f"the rows' numbers in column choice are {', '.join(sorted(numbers))}: 1 could be either completion"
        raise StudyError(where, found, "0 and 1, or 1 and 2, or a and b", "write a and b in column choice")
    return int("2" in numbers)


def convert(sources: list[Source], *, drop: bool) -> tuple[dict[str, list[dict]], dict]:
    """(pairs by split, report of what was left out). Without `drop`, all faults of all files are one StudyError."""
    base, offset = first_choice(sources), Counter()  # of a split's row numbers: its earlier shards
    splits: dict[str, list[dict]] = defaultdict(list)
    faults: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)  # (file, kind) -> [(row, detail)]
    for split, file, rows in sources:
        pairs = splits[split]  # present even where every row is bad
        for index, row in enumerate(rows):
            try:
                if isinstance(row, BadRow):
                    raise row
                pairs.append(to_pair(row, offset[split] + index, base))
            except BadRow as fault:
                faults[file, fault.kind].append((index, fault.detail))
        offset[split] += len(rows)
    if faults and not drop:
        where = ", ".join(dict.fromkeys(file for file, _ in faults))[:300]
        found = "; ".join(f"{_described(kind, bad)} in {Path(file).name}" for (file, kind), bad in faults.items())
        expected = f"{LAYOUTS}; a prompt that ends with a user turn and two different answers; rows are counted from 0"
        fix = "correct these rows, or leave them out and have them counted: --set dataset.on_bad_row=drop"
        raise StudyError(where, found, expected, fix)
    dropped = [
        {"file": file, "reason": kind, "count": len(bad), "rows": [row for row, _ in bad]}
        for (file, kind), bad in faults.items()
    ]
    lost = sum(entry["count"] for entry in dropped)
    for split, pairs in splits.items():
        if not pairs:
            where = ", ".join(file for part, file, _ in sources if part == split)
            found = f"0 usable rows in split {split} ({lost} dropped)" if lost else f"0 rows in split {split}"
            raise StudyError(where, found, "at least one preference pair", "give a file that has rows")
    return dict(splits), {"count": lost, "reasons": dropped}


def _described(kind: str, bad: list[tuple[int, str]]) -> str:
    """'3 rows: empty chosen (rows 4, 9, 11; row 4: no messages)'."""
    several, (first, detail) = "s" * (len(bad) > 1), bad[0]
    rows = ", ".join(str(row) for row, _ in bad[:5]) + ", ..." * (len(bad) > 5)
    more = f"; row {first}: {detail}" if several and detail else f": {detail}" if detail else ""
    return f"{len(bad)} row{several}: {kind} (row{several} {rows}{more})"


# ---- splits ----


def prompt_key(pair: dict) -> str:
    """The prompt's content as one string: pairs with the same key belong in the same split."""
    return json.dumps(pair["prompt"], sort_keys=True, ensure_ascii=False)


def carve(pairs: list[dict], fraction: float, seed: int, salt: str) -> tuple[list[dict], list[dict]]:
    """(kept, held out): a seeded `fraction` of the pairs, whole prompts at a time, both in source order."""
    groups = Counter(map(prompt_key, pairs))
    target = max(1, round(fraction * len(pairs)))
    # Ordered by a hash of seed and prompt: a prompt's place depends on no other row of the file.
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{salt}:{seed}:{key}".encode()).digest())
    before = itertools.accumulate((groups[key] for key in order), initial=0)
    held = {key for key, count in zip(order[:-1], before, strict=False) if count < target}  # at least one prompt stays
    return [p for p in pairs if prompt_key(p) not in held], [p for p in pairs if prompt_key(p) in held]


def fingerprint(splits: dict[str, list[dict]]) -> str:
    """sha256 of the content (splits, prompts, answers, order); where it was read from does not matter."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for pair in splits.get(split, []):
            whole = [split, pair["prompt"], pair["chosen"], pair["rejected"]]
            digest.update(json.dumps(whole, sort_keys=True).encode())
    return digest.hexdigest()


def load_splits(section: dict) -> tuple[dict[str, list[dict]], dict]:
    """({"train", "validation", "test"}: pairs, report) of a `dataset` section. A split the source does not have is
    carved from train by prompt, so that no prompt is in both.

    report: source, files, rows per split, carved splits, dropped rows with reasons, overlap of test with train,
    fingerprint.
    """
    name, seed, fraction = section["name"], section.get("split_seed") or 0, section.get("validation_fraction") or 0.1
    key, carved = f"dataset.name = {name}", {}
    if name == "generated":
        splits = generated.make_pairs(*(section[f"{split}_pairs"] for split in SPLITS), seed=seed)
        files, dropped = {}, {"count": 0, "reasons": []}
    else:
        sources = find_sources(name, section.get("revision"))
        files = {split: [file for part, file, _ in sources if part == split] for split in SPLITS}
        splits, dropped = convert(sources, drop=section.get("on_bad_row") == "drop")
        if len(splits) == 1:
            splits = {"train": next(iter(splits.values()))}
        if "train" not in splits:
            raise StudyError(key, f"splits {', '.join(splits)}", "a train split", "name the file to train on train.*")
    for split in ("test", "validation"):
        if split not in splits:
            splits["train"], splits[split] = carve(splits["train"], fraction, seed, split)
            carved[split] = fraction
            if not splits[split]:
                found = f"too few different prompts in train to hold out a {split} split"
                fix = f"give a {split}.* file next to train.*"
                raise StudyError(key, found, "at least three different prompts, or files for all splits", fix)
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
        "fingerprint": fingerprint(splits),
    }
    return splits, report


# ---- tokens ----

COUNTS = ("pairs", "kept", "dropped", "truncated", "eos_dropped", "prompt_not_prefix", "prompt_truncated")
COUNTS += ("identical_after_truncation",)


def _one_eos(ids: list[int], eos: int) -> list[int]:
    """Cut after the answer's end token (ChatML templates write a line break after it); add it if the template does
    not."""
    return ids[: ids.index(eos) + 1] if eos in ids else [*ids, eos]


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
    model = make_model(tokenizer, recipe).train()
    steps, parameters = recipe["sft_steps"], list(model.parameters())
    rate = recipe["sft_learning_rate"]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    batches = _batches([len(ids) for ids, _ in rows], recipe["sft_batch_size"], MAX_TOKENS, recipe["seed"])

    def loss() -> torch.Tensor:
        return _loss(model, [rows[index] for index in next(batches)], tokenizer.pad_token_id)

    closing = made.pretrain(loss, parameters, optimizer, schedule, steps, on_step)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return closing


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
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = r"(?u)\b\w+\b|[^\w\s]"
    vectorizer = CountVectorizer(min_df=min(3, 2 * len(train)), max_features=20_000, token_pattern=words)
    chosen, rejected = answers(train)
    vectorizer.fit(chosen + rejected)

    def features(first: list[str], second: list[str]) -> sparse.csr_matrix:
        return (vectorizer.transform(first).log1p() - vectorizer.transform(second).log1p()).tocsr()  # pyright: ignore[reportAttributeAccessIssue]

    # A classifier needs both labels: a seeded half of the pairs is turned round.
    signs = np.where(np.random.default_rng(seed).random(len(train)) < 0.5, 1.0, -1.0)
    if len(train) > 1 and abs(signs.sum()) == len(train):
        signs[0] = -signs[0]
    model = LogisticRegression(C=0.01, fit_intercept=False, solver="liblinear", random_state=seed, max_iter=200)
    model.fit(sparse.diags(signs) @ features(chosen, rejected), signs)
    scores = model.decision_function(features(*answers(test)))
    return float(np.mean((np.sign(scores) + 1) / 2))


# ---- what members share ----


def prepare(run, folder: Path) -> None:
    """Make the inputs of all members in `folder`. A base model's training steps go to history.jsonl, for the live
    line."""
    splits, report = pairs_of(run)

    def make(place: Path, on_step: made.OnStep) -> float:
        return make_base(splits["train"], run.model.recipe.model_dump(), place, on_step)

    base, _ = made.base_model(run, folder, texts_of(splits["train"]), make)
    tokenizer = models.load_tokenizer(
        base, run.model.revision, trust_remote_code=run.model.trust_remote_code, needs_chat_template=True
    )
    limits = run.dataset.preprocessing
    rows, counts = {}, {}
    for split in SPLITS:
        rows[split], counts[split] = encode_pairs(tokenizer, splits[split], limits.max_length, limits.max_prompt_length)
    model = load_base(run, base)
    reference = {split: sequence_logprobs(model, rows[split], pad=pad_token(tokenizer)) for split in SPLITS}
    enough = len(splits["train"]) >= 20  # to fit anything (not in trial mode)
    report |= {
        "tokens": counts,
        "base": base,
        "stand_in": base != run.model.name != "made",
        "length_baseline": length_baseline(splits["test"]),
        "bag_of_words_baseline": bag_of_words_baseline(splits["train"], splits["test"]) if enough else None,
    }
    if run.dataset.name == "generated":
        report["label_noise"] = generated.label_noise(splits["test"])
    tokenizer.save_pretrained(folder / "tokenizer")
    save_file(reference, folder / "reference.safetensors")
    record.write_text(folder / "rows.json", json.dumps(rows))
    record.write_text(folder / "pairs.json", json.dumps(splits, ensure_ascii=False))
    record.write_json(folder / "report.json", report)


def pairs_of(run) -> tuple[dict, dict]:
    """The run's pairs and the loader's report; in a trial without the hub, generated ones in the data set's place."""
    section = run.dataset.model_dump()
    if run.mode == "trial" and hub.out_of_reach(run.dataset.name):
        size = run.dataset.limit or 8
        splits, report = load_splits(section | {"name": "generated"} | {f"{split}_pairs": size for split in SPLITS})
        return splits, {**report, "source": f"generated, standing in for {run.dataset.name}"}
    return load_splits(section)
