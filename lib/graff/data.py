"""Problems and answers: generated ones, GSM8K and GSM1k, tokens, the order of rows, greedy answers and what counts.

`prepare` writes what all members of a run share, `load` reads it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models as tokenizer_models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    get_linear_schedule_with_warmup,
)

from lib import hub, made, models, record
from lib.errors import MissingError, StudyError
from lib.training import SeededOrder

# ---- answers: the two filters of lm-evaluation-harness's gsm8k task

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
ANNOTATION = re.compile(r"<<[^<>]*>>")


def clean(text: str) -> str:
    """Without `,` and `$` and a trailing dot, as the harness's exact match ignores them."""
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", text.strip()))


def strict(text: str) -> str | None:
    """The first `#### number`."""
    match = STRICT.search(text)
    return clean(match.group(1)) if match else None


def flexible(text: str) -> str | None:
    """The last thing that looks like a number."""
    matches = FLEXIBLE.findall(text)
    return clean(next(filter(None, matches[-1]))) if matches else None


def reference(answer: str, where: str = "answer") -> str:
    """The number after `####`. Raises StudyError where there is none."""
    number = strict(answer)
    if number is None:
        raise StudyError(where, f"no '#### number' in {answer[:60]!r}", "GSM8K's form: rationale, then '#### number'")
    return number


def target(answer: str) -> str:
    """What the model learns to write: the rationale without calculator annotations, then '#### N'."""
    return ANNOTATION.sub("", answer).strip()


# ---- problems

NAMES = ("Tom", "Ann", "Ben", "Eve", "Sam", "Mia")
THINGS = ("pens", "eggs", "cups", "toys", "keys", "hats")
HIGH = (
    10  # operands lie below it; one-step problems start below twice that, so that every second step occurs as a first
)


def problem(rng, steps: int) -> dict:
    """{"question", "answer"} in GSM8K's form: `steps` additions and subtractions, one line of rationale each."""
    name, thing = NAMES[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
    total = int(rng.integers(2, 2 * HIGH if steps == 1 else HIGH))
    question, worked = [f"{name} has {total} {thing}."], []
    for _ in range(steps):
        less = total > 2 and rng.random() < 0.5
        n = int(rng.integers(1, min(total, HIGH) if less else HIGH))
        verb, sign, result = ("gives away", "-", total - n) if less else ("gets", "+", total + n)
        question.append(f"{name} {verb} {n}.")
        worked.append(f"{total}{sign}{n}=<<{total}{sign}{n}={result}>>{result} {thing}.")
        total = result
    question.append(f"How many {thing} does {name} have?")
    return {"question": " ".join(question), "answer": "\n".join([*worked, f"#### {total}"])}


def generate_problems(count: int, seed: int, steps: int) -> list[dict]:
    rng = np.random.default_rng([seed, steps])
    return [problem(rng, steps) for _ in range(count)]


def load_split(name: str, split: str, revision: str | None = None, streaming: bool = False) -> list[dict]:
    """A split of GSM8K (or of a set in its form) from a folder of <split>.jsonl, a file, or the hub (`streaming`: row
    by row, without the hub's file on disk; the rows are held in memory either way). Every answer has its '####'."""
    path = Path(name)
    if path.exists():
        file = path / f"{split}.jsonl" if path.is_dir() else path
        if not file.exists():
            expected = "a folder with train.jsonl and test.jsonl"
            raise MissingError(f"dataset.name = {name}", f"no {split}.jsonl", expected)
        rows, name = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()], str(file)
    else:
        config = "main" if name == "openai/gsm8k" else None
        rows = hub.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
        try:
            rows = list(rows)
        except Exception as error:  # of a stream, which is fetched here
            raise hub.explain(error, name, kind="dataset", revision=revision) from error
    for number, row in enumerate(rows, 1):
        reference(row["answer"], f"{name}, row {number}")
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def split_dev(rows: list[dict], size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, dev): the `size` rows whose seeded hash is lowest are dev, whatever the order of the file."""
    hashes = [hashlib.sha256(f"{seed} {row['question']}".encode()).hexdigest() for row in rows]
    lowest = sorted(range(len(rows)), key=lambda i: hashes[i])[:size]
    dev = set(lowest)
    return [row for i, row in enumerate(rows) if i not in dev], [rows[i] for i in lowest]


STAND_IN = 32  # generated problems that stand in for a data set out of reach, in a trial


def load_problems(run) -> tuple[dict[str, list[dict]], str]:
    """({train, dev, test, gsm1k}, where they are from)."""
    dataset = run.dataset
    source = dataset.name
    if run.mode == "trial" and hub.out_of_reach(source):
        source = f"generated, standing in for {source}"
    if source.startswith("generated"):
        rows = generate_problems((dataset.train_examples or STAND_IN) + dataset.dev_size, dataset.split_seed, 2)
        test = generate_problems(dataset.test_examples or STAND_IN, dataset.split_seed + 1, 2)
    else:
        rows, test = (load_split(source, name, dataset.revision, dataset.streaming) for name in ("train", "test"))
    train, dev = split_dev(rows, dataset.dev_size, dataset.split_seed)
    gsm1k = load_split(dataset.gsm1k, "test") if dataset.gsm1k and run.mode == "full" else []
    return {"train": train[: dataset.limit], "dev": dev, "test": test[: dataset.limit], "gsm1k": gsm1k}, source


# ---- tokens and their order


def prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def encode(tokenizer, row: dict, longest: int) -> dict:
    """{"ids", "prompt" (its length)}: prompt, answer and the end token, the same prefix as in generation."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": row["question"]}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        ids = tokenizer(tokenizer.apply_chat_template(turn, **options), add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt(row["question"]))["input_ids"]
    space = "" if tokenizer.chat_template else " "
    answer = tokenizer(space + target(row["answer"]), add_special_tokens=False)["input_ids"]
    return {"ids": (ids + answer + [tokenizer.eos_token_id])[:longest], "prompt": len(ids)}


def collate(rows: list[dict], pad: int) -> dict[str, Tensor]:
    """(B, T) input_ids, attention_mask and labels, padded on the right; labels are -100 on prompts and padding."""
    longest = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        n = len(row["ids"])
        ids[i, :n], mask[i, :n] = torch.tensor(row["ids"]), 1
        labels[i, row["prompt"] : n] = ids[i, row["prompt"] : n]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


WINDOW = 16  # batches that are sorted by length together


def shuffle_buffered(size: int, buffer: int, rng: np.random.Generator) -> list[int]:
    """A stream's shuffle: `buffer` rows wait, one drawn at random is replaced by the next of the file."""
    if buffer >= size:
        return rng.permutation(size).tolist()
    waiting, order = list(range(buffer)), []
    for new in range(buffer, size):
        place = int(rng.integers(buffer))
        order.append(waiting[place])
        waiting[place] = new
    return order + [waiting[i] for i in rng.permutation(buffer)]


def bucket_by_length(order: list[int], lengths: list[int], batch: int, rng: np.random.Generator) -> list[int]:
    """Rows of like length in one batch: sorted inside windows of 16 batches, whose batches are then shuffled. An
    incomplete batch stays the last."""
    out: list[int] = []
    for start in range(0, len(order), WINDOW * batch):
        rows = sorted(order[start : start + WINDOW * batch], key=lambda i: lengths[i])
        whole = len(rows) // batch
        for b in rng.permutation(whole):
            out += rows[b * batch : (b + 1) * batch]
        out += rows[whole * batch :]
    return out


class BucketedOrder(SeededOrder):
    """The order of training rows, new in each epoch. `lengths` in tokens; `buffer` None: an epoch is shuffled whole."""

    def __init__(self, lengths: list[int], batch: int, seed: int, buffer: int | None = None):
        super().__init__(len(lengths), seed)
        self.lengths, self.batch, self.buffer = lengths, batch, buffer

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = shuffle_buffered(self.size, self.buffer or self.size, rng)
        return iter(bucket_by_length(order, self.lengths, self.batch, rng))


# ---- exact match by greedy generation, and the loss of the right answers

LOOP, PERIOD, LOOK = 64, 16, 8  # tokens that repeat themselves, their period at most, looked for every so many tokens


class Looping(StoppingCriteria):
    """Ends a row whose last LOOP tokens repeat the same PERIOD or fewer: greedy decoding goes on like that to the last
    token it is allowed, and a model that answers nothing does so in nearly every row."""

    def __init__(self, prompt: int):
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        """(B,) whether the row ends here."""
        written = input_ids.shape[1] - self.prompt
        ends = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if written >= LOOP and written % LOOK == 0:
            tail = input_ids[:, -LOOP:]
            for period in range(1, PERIOD + 1):
                ends |= (tail[:, period:] == tail[:, :-period]).all(1)
        return ends


@torch.no_grad()
def generate_answers(model, tokenizer, questions: list[str], longest: int, batch: int) -> tuple[list[str], float]:
    """(what the model writes to each question, units of the virtual clock: prompt and decoded tokens, once each).

    Greedy whatever the model's own sampling configuration says; left padding with an explicit mask, sorted by length;
    the cache is on; a row that only repeats itself is ended."""
    model.eval()
    rows = [encode(tokenizer, {"question": question, "answer": ""}, 1 << 20) for question in questions]
    ids = [row["ids"][: row["prompt"]] for row in rows]
    order, texts, units = sorted(range(len(ids)), key=lambda i: len(ids[i])), [""] * len(ids), 0
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=longest, pad_token_id=pad, eos_token_id=end, use_cache=True
    )
    device = next(model.parameters()).device
    for start in record.batches("evaluation", range(0, len(order), batch)):
        mine = order[start : start + batch]
        width = max(len(ids[i]) for i in mine)
        left = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in mine], device=device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in mine], device=device)
        stop = StoppingCriteriaList([Looping(width)])
        out = model.generate(input_ids=left, attention_mask=mask, generation_config=greedy, stopping_criteria=stop)[
            :, width:
        ]
        units += left.numel() + out.numel()
        for i, written in zip(mine, out.tolist(), strict=True):
            written = written[: written.index(end)] if end in written else written
            text = tokenizer.decode(written, skip_special_tokens=True)
            texts[i] = text.split("Question:")[0]  # as the harness: what follows is a question the model asks itself
    return texts, units


def score(model, tokenizer, problems: list[dict], longest: int, batch: int) -> tuple[list[dict], float]:
    """([{"text", "reference", "strict", "flexible"}], units): strict and flexible are whether the answer is right."""
    texts, units = generate_answers(model, tokenizer, [p["question"] for p in problems], longest, batch)
    rows = []
    for text, row in zip(texts, problems, strict=True):
        right = reference(row["answer"])
        hits = {"strict": strict(text) == right, "flexible": flexible(text) == right}
        rows.append({"text": text, "reference": right, **hits})
    return rows, units


def answer_logits(model, inputs: dict) -> tuple[Tensor, Tensor]:
    """(logits, labels) of the batch's next tokens, from the first place on where some row has its answer."""
    labels = inputs["labels"][:, 1:]
    first = int((labels != -100).any(0).int().argmax())
    keep = labels.shape[1] + 1 - first
    out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=keep)
    return out.logits[:, :-1], labels[:, first:]


@torch.no_grad()
def answer_losses(model, tokenizer, rows: list[dict], batch: int) -> tuple[list[tuple[float, int]], float]:
    """([(summed loss in nats, label tokens)] of each of `rows`, units of the virtual clock)."""
    model.eval()
    device, losses, units = next(model.parameters()).device, [], 0
    for start in range(0, len(rows), batch):
        inputs = collate(rows[start : start + batch], tokenizer.pad_token_id)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        logits, labels = answer_logits(model, inputs)
        each = torch.nn.functional.cross_entropy(logits.mT.float(), labels, reduction="none")
        losses += list(zip(each.sum(1).tolist(), (labels != -100).sum(1).tolist(), strict=True))
        units += inputs["input_ids"].numel()
    return losses, units


def mean_loss(losses: list[tuple[float, int]]) -> float:
    return sum(total for total, _ in losses) / max(1, sum(tokens for _, tokens in losses))


# ---- the base model that is made here: a tiny Qwen3, pretrained on generated one-step problems

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
ONE_STEP = 8000  # problems that pretraining draws from
BPE_VOCABULARY = 2048  # tokens for text that is not generated


def text_of(row: dict) -> str:
    return prompt(row["question"]) + " " + target(row["answer"])


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words with the space before them, whole numbers to 199, signs: decoding gives the text back."""
    split = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\d+|\s|#+|[^\w\s#]"), "isolated")
    texts = [text_of(row) for row in generate_problems(2000, 0, 2)]
    words = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)} | {str(i) for i in range(200)}
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL.values(), *sorted(words)])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def pretraining_batches(lengths: list[int], size: int, rng: np.random.Generator, real: bool) -> Iterator[list[int]]:
    """Rows of each batch, without end. Real problems differ in length: those of like length come into one batch."""
    while not real:
        yield rng.integers(len(lengths), size=size).tolist()
    while True:
        rows = bucket_by_length(rng.permutation(len(lengths)).tolist(), lengths, size, rng)
        for start in range(0, max(1, len(rows) - size + 1), size):
            yield rows[start : start + size]


def pretrain(recipe: dict, folder: Path, train: list[dict] | None, on_step: made.OnStep) -> float:
    """Tokenizer and model in `folder`, pretrained on one-step problems (or on `train`); returns the closing loss."""
    rows, steps = train or generate_problems(ONE_STEP, recipe["seed"], 1), recipe["pretrain_steps"]
    if train is None:
        tokenizer = word_tokenizer()
    else:
        tokenizer = made.train_bpe_tokenizer([text_of(row) for row in rows], BPE_VOCABULARY, None)
    encoded = [encode(tokenizer, row, 512) for row in rows]
    rng, size = np.random.default_rng(recipe["seed"]), recipe["pretrain_batch_size"]
    batches = pretraining_batches([len(row["ids"]) for row in encoded], size, rng, train is not None)
    hidden = recipe["hidden_size"]
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "head_dim": hidden // 4}
    shape |= {"num_hidden_layers": recipe["layers"], "max_position_embeddings": 2048, "tie_word_embeddings": True}
    model = made.stand_in("Qwen/Qwen3", tokenizer, seed=recipe["seed"], **shape).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe["pretrain_learning_rate"], weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 20), steps)

    def loss() -> Tensor:
        return model(**collate([encoded[i] for i in next(batches)], tokenizer.pad_token_id)).loss

    closing = made.pretrain(loss, parameters, optimizer, schedule, steps, on_step)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return closing


# ---- what all members share, on disk

FREQUENT = 4096  # vocabulary rows that the entropy is over


@dataclass
class Inputs:
    """`problems` by split: {"question", "answer"}; `rows` of train and dev: {"ids", "prompt"}; `frequent` (V',) token
    ids; `base`: name or folder of the base model."""

    tokenizer: Any
    problems: dict[str, list[dict]]
    rows: dict[str, list[dict]]
    frequent: Tensor
    report: dict
    base: str


def prepare(run, folder: Path) -> None:
    """Problems, base model, tokenizer, rows and a report of them, into `folder`."""
    problems, source = load_problems(run)
    texts = (row["question"] + " " + row["answer"] for row in problems["train"])
    real = None if source.startswith("generated") else problems["train"]

    def make(place: Path, on_step: made.OnStep) -> float:
        return pretrain(run.model.recipe.model_dump(), place, real, on_step)

    base, closing = made.base_model(run, folder, texts, make)
    tokenizer = models.load_tokenizer(base, run.model.revision, trust_remote_code=run.model.trust_remote_code)
    longest, rows, cut = run.dataset.max_tokens, {}, {}
    for name in ("train", "dev"):
        rows[name] = [encode(tokenizer, row, longest) for row in problems[name]]
        cut[name] = sum(len(r["ids"]) == longest and r["ids"][-1] != tokenizer.eos_token_id for r in rows[name])
    # a row that is cut inside its prompt has nothing to learn from
    rows["train"] = [row for row in rows["train"] if len(row["ids"]) > row["prompt"]]
    counts = Counter(token for row in rows["train"] for token in row["ids"][row["prompt"] :])
    tokenizer.save_pretrained(folder / "tokenizer")
    record.write_text(folder / "rows.json", json.dumps(rows))
    record.write_text(folder / "problems.json", json.dumps(problems, ensure_ascii=False))
    record.write_json(folder / "frequent.json", sorted(token for token, _ in counts.most_common(FREQUENT)))
    report = {
        "base": base,
        "stand_in": base != run.model.name != "made",
        "source": source,
        "pretraining_loss": closing,
        "examples": {name: len(split) for name, split in problems.items()},
        "cut_at_max_tokens": cut,
        "longest_answer": max((len(row["ids"]) - row["prompt"] for row in rows["train"]), default=0),
    }
    record.write_json(folder / "report.json", report)


def load(folder: Path) -> Inputs:
    """The inputs that `prepare` made in `folder` (which may have been renamed since)."""
    folder = Path(folder)
    report = record.read_json(folder / "report.json")
    base = str(folder / "base") if (folder / "base").is_dir() else report["base"]
    problems, rows, frequent = (record.read_json(folder / f"{name}.json") for name in ("problems", "rows", "frequent"))
    tokenizer = models.load_tokenizer(str(folder / "tokenizer"))
    return Inputs(tokenizer, problems, rows, torch.tensor(frequent), report, base)


def load_model(run, given: Inputs, seed: int):
    """The base model with LoRA in float32, A drawn from `seed`."""
    base = models.load_causal_lm(
        given.base,
        revision=run.model.revision,
        torch_dtype=run.model.torch_dtype,
        trust_remote_code=run.model.trust_remote_code,
        gradient_checkpointing=run.training.gradient_checkpointing,
    )
    section = {f"lora_{name}": getattr(run.model.lora, name) for name in ("r", "alpha", "dropout")}
    return models.add_lora(base, {**section, "target_modules": run.model.lora.target_modules}, seed)
