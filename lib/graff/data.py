"""Problems as members see them: their answers, tokens, the order of rows, greedy answers and what counts.

lib/graff/prepare.py writes what all members of a run share, `load` reads it.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import IterableDataset
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lib import models, record
from lib.training import SeededOrder, collate, to_device

# ---- answers: the two filters of lm-evaluation-harness's gsm8k task

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
NUMBER = re.compile(r"([-+]?\s*\$?\s*(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)(?:\s*%|(?:\s+[^\d\W][^\s\d]*){1,3})?\.?")
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


def reference(answer: str) -> str | None:
    """The number after the last `####` (a sign, `$`, thousands commas, decimals, a unit after it); None where it is
    not one number."""
    match = NUMBER.fullmatch(answer.rpartition("####")[2].strip()) if "####" in answer else None
    return re.sub(r"[+\s]", "", clean(match.group(1))) if match else None


def target(answer: str) -> str:
    """What the model learns to write: the rationale without calculator annotations, then '#### N'."""
    return ANNOTATION.sub("", answer).strip()


# ---- tokens and their order


def prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def encode(tokenizer, row: dict, longest: int) -> dict:
    """{"ids", "prompt" (its length)}: prompt, answer and the end token, the same prefix as in generation."""
    question, space, chat = prompt(row["question"]), " ", tokenizer.chat_template
    if chat:
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        turn = {"role": "user", "content": row["question"]}
        question, space = tokenizer.apply_chat_template([turn], **options), ""
    ids = tokenizer(question, add_special_tokens=not chat)["input_ids"]
    answer = tokenizer(space + target(row["answer"]), add_special_tokens=False)["input_ids"]
    return {"ids": (ids + answer + [tokenizer.eos_token_id])[:longest], "prompt": len(ids)}


class BucketedOrder(SeededOrder):
    """The order of training rows, new in each epoch. `lengths` in tokens; `buffer` None: an epoch is shuffled whole, else as
    datasets shuffles a stream: so many rows wait, one drawn at random is replaced by the next."""

    def __init__(self, lengths: list[int], batch: int, seed: int, buffer: int | None = None):
        super().__init__(len(lengths), seed, 0, lengths, batch)
        self.buffer = buffer or self.size

    def shuffle(self, rng: np.random.Generator) -> list[int]:
        if self.buffer >= self.size:
            return super().shuffle(rng)
        rows = IterableDataset.from_generator(lambda: ({"row": row} for row in range(self.size)))
        return [each["row"] for each in rows.shuffle(int(rng.integers(2**32)), buffer_size=self.buffer)]


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
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": longest, "use_cache": True}
    greedy = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **options)
    device = next(model.parameters()).device
    for start in record.batches("evaluation", range(0, len(order), batch)):
        mine = order[start : start + batch]
        left = tokenizer.pad({"input_ids": [ids[i] for i in mine]}, padding_side="left", return_tensors="pt").to(device)
        width = left["input_ids"].shape[1]
        stop = StoppingCriteriaList([Looping(width)])
        out = model.generate(**left, generation_config=greedy, stopping_criteria=stop)[:, width:]
        units += left["input_ids"].numel() + out.numel()
        for i, written in zip(mine, out.tolist(), strict=True):
            text = tokenizer.decode(written, skip_special_tokens=True)  # without the padding behind an ended answer
            texts[i] = text.split("Question:")[0]  # as the harness: what follows is a question the model asks itself
    return texts, units


def score(model, tokenizer, problems: list[dict], longest: int, batch: int) -> tuple[list[dict], float]:
    """([{"text", "reference", "strict", "flexible"}], units): strict and flexible are whether the answer is right."""
    texts, units = generate_answers(model, tokenizer, [p["question"] for p in problems], longest, batch)
    each = zip(texts, [reference(row["answer"]) for row in problems], strict=True)
    rows = [{"text": t, "reference": r, "strict": strict(t) == r, "flexible": flexible(t) == r} for t, r in each]
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
        inputs = to_device(collate(rows[start : start + batch], tokenizer.pad_token_id), device)
        logits, labels = answer_logits(model, inputs)
        there, each = labels != -100, torch.zeros(labels.shape, device=device)
        each[there] = torch.nn.functional.cross_entropy(logits[there].float(), labels[there], reduction="none")
        losses += list(zip(each.sum(1).tolist(), (labels != -100).sum(1).tolist(), strict=True))
        units += inputs["input_ids"].numel()
    return losses, units


def mean_loss(losses: list[tuple[float, int]]) -> float:
    return sum(total for total, _ in losses) / max(1, sum(tokens for _, tokens in losses))


# ---- what all members share


def load(folder: Path) -> SimpleNamespace:
    """What prepare.prepare wrote into `folder`: besides models.load_inputs' own, `problems` by split, {"question",
    "answer"}; `rows` of train and dev, {"ids", "prompt"}; `frequent` (V',) token ids."""
    given = models.load_inputs(Path(folder), "problems", "rows", "frequent")
    given.frequent = torch.tensor(given.frequent)
    return given


def load_model(run, given: SimpleNamespace, seed: int):
    """The base model with LoRA in float32, A drawn from `seed`."""
    base = models.load_base(run, given.base)
    # of the model's own, generate() would take what ours leaves open: a repetition penalty, say
    base.generation_config = GenerationConfig()
    section = {f"lora_{name}": getattr(run.model.lora, name) for name in ("r", "alpha", "dropout")}
    return models.add_lora(base, {**section, "target_modules": run.model.lora.target_modules}, seed)
