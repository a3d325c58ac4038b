"""What is made before members train, once for all of them: problems (generated ones, GSM8K and GSM1k), the base model,
and the planner's warm start, which is also made by one command:

    .venv/bin/python -m lib.graff.prepare FILE.safetensors [paper]
"""

import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, decoders, pre_tokenizers
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from lib import config, data, hub, made, models
from lib.data import BadRow, describe, require, require_text
from lib.errors import StudyError
from lib.graff import member
from lib.graff.data import NUMBER, collate, encode, prompt, reference, strict, target
from lib.training import seeded_batches, to_device

# ---- problems

Problems = tuple[dict[str, list[dict]], dict]  # by split, and a report
NAMES = ("Tom", "Ann", "Ben", "Eve", "Sam", "Mia")
THINGS = ("pens", "eggs", "cups", "toys", "keys", "hats")
JUDGED = 2**32  # the seed of the test problems: none that a member can have


def problem(rng, steps: int, high: int = 10) -> dict:
    """{"question", "answer"} in GSM8K's form: `steps` additions and subtractions of numbers below `high`, one line of
    rationale each. One-step problems start below twice `high`, so that every second step occurs as a first."""
    name, thing = NAMES[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
    total = int(rng.integers(2, 2 * high if steps == 1 else high))
    question, worked = [f"{name} has {total} {thing}."], []
    for _ in range(steps):
        less = total > 2 and rng.random() < 0.5
        n = int(rng.integers(1, min(total, high) if less else high))
        verb, sign, result = ("gives away", "-", total - n) if less else ("gets", "+", total + n)
        question.append(f"{name} {verb} {n}.")
        worked.append(f"{total}{sign}{n}=<<{total}{sign}{n}={result}>>{result} {thing}.")
        total = result
    question.append(f"How many {thing} does {name} have?")
    return {"question": " ".join(question), "answer": "\n".join([*worked, f"#### {total}"])}


def generate_problems(count: int, seed: int, steps: int, high: int = 10) -> list[dict]:
    rng = np.random.default_rng([seed, steps])
    return [problem(rng, steps, high) for _ in range(count)]


def to_problem(row: dict) -> dict:
    """A row of GSM8K's form; raises BadRow. An answer that is a number alone (GSM1k's) is one."""
    question, answer = require_text(row, "question"), require(row, "answer")
    whole = int(answer) if isinstance(answer, float) and answer.is_integer() else answer  # of a column with gaps
    alone = type(whole) in (int, float) or (isinstance(answer, str) and NUMBER.fullmatch(answer.strip()))
    answer = f"#### {whole}" if alone else require_text(row, "answer")
    if reference(answer) is None:
        raise BadRow("no '#### number' that ends answer", describe(answer[-60:]))
    if strict(answer) != reference(answer):  # as it is scored: '#### + 5' would never be right
        answer = f"{answer.rpartition('####')[0].rstrip()}\n#### {reference(answer)}".lstrip()
    return {"question": question, "answer": answer}


def read_problems(name: str, wanted: tuple, section: Mapping, revision: str | None = None, **options) -> Problems:
    """(problems of the `wanted` splits, and of validation where it is given and train is wanted, report) of GSM8K or a
    set in its form. `section`: what make_splits reads."""
    config = "main" if name == "openai/gsm8k" or hub.local_path(name) else None
    sources = data.read(name, revision, config, **options)
    if "validation" in sources and "train" in wanted:
        wanted = (*wanted[:-1], "validation", wanted[-1])
    parse, expected = lambda row, _: to_problem(row), "question and answer, GSM8K's: rationale, then '#### number'"
    return data.make_splits(sources, wanted, parse, lambda row: row["question"], expected, section)


def split_dev(rows: list[dict], size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, dev): the `size` rows whose seeded hash is lowest are dev, whatever the order of the file."""
    if size >= len(rows):
        fix = f"--set dataset.dev_size={max(1, len(rows) // 10)}, or give a validation.* file"
        raise StudyError("dataset.dev_size", f"{size} of {len(rows)} training problems", "fewer than there are", fix)
    lowest = sorted(range(len(rows)), key=lambda i: sha256(f"{seed} {rows[i]['question']}".encode()).digest())[:size]
    dev = set(lowest)
    return [row for i, row in enumerate(rows) if i not in dev], [rows[i] for i in lowest]


STAND_IN = 32  # generated problems that stand in for a data set out of reach, in a trial


def load_problems(run) -> Problems:
    """({train, dev, test, gsm1k}, report)."""
    dataset, (name, source), report, given, high = run.dataset, data.source_of(run), {}, None, run.dataset.numbers_below
    if name == "generated":
        rows = generate_problems((dataset.train_examples or STAND_IN) + dataset.dev_size, dataset.split_seed, 2, high)
        test = generate_problems(dataset.test_examples or STAND_IN, JUDGED, 2, high)
    else:
        how = {"revision": dataset.revision, "streaming": dataset.streaming}
        splits, report = read_problems(name, ("test", "train"), vars(dataset), **how)
        rows, test, given = splits["train"], splits["test"], splits.get("validation")
    train, dev = (rows, given[: dataset.limit]) if given else split_dev(rows, dataset.dev_size, dataset.split_seed)
    gsm1k = []
    if dataset.gsm1k and run.mode == "full":
        named, *pin = [dataset.gsm1k] if config.is_local(dataset.gsm1k) else dataset.gsm1k.split("@")
        gsm1k = read_problems(named, ("test",), {"on_bad_row": dataset.on_bad_row}, *pin)[0]["test"]
    problems = {"train": train[: dataset.limit], "dev": dev, "test": test[: dataset.limit], "gsm1k": gsm1k}
    return problems, {"source": source, **report}


# ---- the base model that is made here: a tiny Qwen3, pretrained on generated problems, most of one step

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
PRETRAINING = 8000  # problems that it draws from
BPE_VOCABULARY = 2048  # tokens for text that is not generated


def text_of(row: dict) -> str:
    return prompt(row["question"]) + " " + target(row["answer"])


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words with the space before them, whole numbers to 199, signs: decoding gives the text back."""
    pieces = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\d+|\s|#+|[^\w\s#]"), "isolated")
    texts = [text_of(row) for row in generate_problems(2000, 0, 2)]
    words = {piece for text in texts for piece, _ in pieces.pre_tokenize_str(text)} | {str(i) for i in range(200)}
    return made.word_tokenizer(sorted(words), SPECIAL, pre_tokenizer=pieces, decoder=decoders.Fuse())


def pretraining_problems(seed: int, two_step_share: float) -> list[dict]:
    """Drawn apart from those that members train on, which have two steps."""
    rng = np.random.default_rng([seed, 1])
    return [problem(rng, 2 if i < two_step_share * PRETRAINING else 1) for i in range(PRETRAINING)]


def make_tokenizer(train: list[dict] | None) -> PreTrainedTokenizerFast:
    """The made model's, of the words of generated problems or of `train`."""
    if train is None:
        return word_tokenizer()
    return made.train_bpe_tokenizer([text_of(row) for row in train], BPE_VOCABULARY, None)


def make_base(train: list[dict] | None, recipe: dict, history: Path) -> made.Base:
    """Tokenizer and model, pretrained on generated problems (or on `train`)."""
    rows, steps = train or pretraining_problems(recipe["seed"], recipe["two_step_share"]), recipe["pretrain_steps"]
    tokenizer = make_tokenizer(train)
    encoded = [encode(tokenizer, row, 512) for row in rows]
    rng, size = np.random.default_rng(recipe["seed"]), recipe["pretrain_batch_size"]
    batches = ([encoded[i] for i in rng.integers(len(rows), size=size)] for _ in itertools.count())
    if train:  # these differ in length
        batches = seeded_batches(encoded, size, recipe["seed"], [len(row["ids"]) for row in encoded])
    hidden = recipe["hidden_size"]
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "head_dim": hidden // 4}
    shape |= {"num_hidden_layers": recipe["layers"], "max_position_embeddings": 2048, "tie_word_embeddings": True}
    device = models.current_device() if train else torch.device("cpu")
    model = made.stand_in("Qwen/Qwen3", tokenizer, seed=recipe["seed"], **shape).to(device).train()

    def loss() -> Tensor:
        inputs = collate(next(batches), tokenizer.pad_token_id)
        return model(**to_device(inputs, device)).loss

    optimizer = AdamW(model.parameters(), lr=recipe["pretrain_learning_rate"], weight_decay=0.01, foreach=True)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    return model, tokenizer, made.pretrain(loss, optimizer, schedule, steps, history)


# ---- what all members share, on disk

FREQUENT = 4096  # vocabulary rows that the entropy is over


def encode_split(run, tokenizer, split: str, problems: list[dict]) -> tuple[list[dict], int]:
    """(token ids of each problem, how many answers are cut). Raises StudyError where no answer is left of any."""
    longest = run.dataset.max_tokens
    rows = [encode(tokenizer, row, longest) for row in problems]
    if not any(len(row["ids"]) > row["prompt"] for row in rows):
        most = max((row["prompt"] for row in rows), default=0)
        found = f"no problem of {len(rows)} leaves room for an answer"
        fix = f"--set dataset.max_tokens={2 * max(most, 64)}"
        raise StudyError(f"dataset, split {split}", found, f"questions of less than {longest} tokens", fix)
    return rows, sum(len(r["ids"]) == longest and r["ids"][-1] != tokenizer.eos_token_id for r in rows)


def compared(row: dict) -> tuple[str, tuple[str, ...], str]:
    """What data.audit compares: the question and its number."""
    return row["question"], (reference(row["answer"]) or "",), f"{row['question']}\n{row['answer']}"


def audit(run) -> dict:
    """The audit of the run's data."""
    problems, report = load_problems(run)
    real = None if report["source"].startswith("generated") else problems["train"]
    texts = (row["question"] + " " + row["answer"] for row in problems["train"])
    tokenizer = made.tokenizer_of(run, texts, partial(make_tokenizer, real))

    def measure(split: str, problems: list[dict]) -> tuple[dict, dict]:
        if split not in ("train", "dev"):  # of which nothing is cut
            return {}, {}
        rows, cut = encode_split(run, tokenizer, split, problems)
        lengths = {"question": [r["prompt"] for r in rows], "answer": [len(r["ids"]) - r["prompt"] for r in rows]}
        return lengths, {"truncated": cut}

    return data.audit({name: rows for name, rows in problems.items() if rows}, report, compared, tokenizer, measure)


def prepare(run, folder: Path, loaded: Problems | None = None) -> Problems:
    """Problems (`loaded`, or those that the run names), base model, tokenizer, rows and a report of them, into `folder`;
    returns what was loaded."""
    problems, report = loaded = loaded or load_problems(run)
    texts = (row["question"] + " " + row["answer"] for row in problems["train"])
    real = None if report["source"].startswith("generated") else problems["train"]
    tokenizer, facts = made.base_model(run, folder, texts, partial(make_base, real))
    rows = {name: encode_split(run, tokenizer, name, problems[name])[0] for name in ("train", "dev")}
    # a row that is cut inside its prompt has nothing to learn from
    rows["train"] = [row for row in rows["train"] if len(row["ids"]) > row["prompt"]]
    counts = Counter(token for row in rows["train"] for token in row["ids"][row["prompt"] :])
    frequent = sorted(token for token, _ in counts.most_common(FREQUENT))
    made.write_inputs(folder, tokenizer, report | facts, rows=rows, problems=problems, frequent=frequent)
    return loaded


# ---- the planner's warm start: 300 steps as three episodes with different budgets on a small made model
# Encoder and decoder both learn here; online W alone does. The file's tensors do not depend on the number of blocks.

# An episode each; half the batch is half the time on the virtual clock, so half the budget.
STEPS, BATCHES = 100, (4, 8, 16)
BUDGET_MINUTES = 0.16  # per problem of the batch: room for the steps and the last evaluation
SMALL = {"hidden_size": 64, "layers": 2}
# At paper scale, on the run's own training split: 71 M parameters, of the published 70 M. GSM8K's problems have 158 tokens
# on average, generated ones 50.
PUBLISHED, LONGER = {"hidden_size": 768, "layers": 13, "pretrain_learning_rate": 5e-4}, 4


def episode_of(scale: str, trial: bool, batch: int, place: Path, seed: int):
    """The run of one episode."""
    published = scale == "paper" and not trial
    recipe = {**(PUBLISHED if published else SMALL), "pretrain_steps": 2 if trial else 300, "seed": seed}
    minutes = BUDGET_MINUTES * batch * (LONGER if published else 1)
    training = {"budget_minutes": minutes, "clock": "virtual", "total_steps": 2 if trial else STEPS}
    training |= {"global_batch_size": batch, "micro_batch_size": batch}
    training["optimizer"] = {"lr_init": 3e-3, "betas": [0.9, 0.98]}
    training["scheduler"] = {"type": "graff", "cold": True, "outer_lr": 3e-3}
    raw = {
        "run_id": "warm_start",
        "model": {"name": "made", "lora": {"r": 8}, "recipe": recipe},
        "dataset": {"name": "generated", "train_examples": 2000, "test_examples": 8, "dev_size": 8, "split_seed": seed},
        "training": training,
        "evaluation": {"max_new_tokens": 4, "dev_subset": 4},
    }
    return config.restore(raw, study="graff", scale=scale, mode="full", results_dir=place)


def warm_start(
    out: Path, scale: str = "laptop", trial: bool = False, seed: int = 0, loaded: Problems | None = None
) -> list[dict]:
    """Train the planner over the episodes, each on a fresh copy of the model; writes `out`; returns each one's
    metrics. At paper scale they are of `loaded`, the run's own training problems, elsewhere of generated ones."""
    metrics, planner, own = [], {}, None
    if scale == "paper" and loaded:
        splits, report = loaded
        few = {name: splits[name][:8] for name in ("dev", "test")}
        own = {"train": splits["train"], "gsm1k": [], **few}, {"source": report["source"]}
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        shared, runs = place / "inputs", [episode_of(scale, trial, batch, place, seed) for batch in BATCHES]
        shared.mkdir()
        prepare(runs[0], shared, own)
        for number, run in enumerate(runs):
            folder = place / f"episode-{number}"
            folder.mkdir()
            episode = config.Member(run=run, cell={}, cell_name="warm", seed=(len(BATCHES) * seed + number) % 2**32)
            metrics.append(member.train(episode, folder, shared, planner))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in planner.items()}, out)
    return metrics


if __name__ == "__main__":
    file, scale, problems = Path(sys.argv[1]), (*sys.argv[2:], "laptop")[0], None
    if scale == "paper":
        yaml = config.ROOT / "params/graff/paper/proposed-graff_30.yaml"
        problems = load_problems(config.load_run(yaml, scale=scale, mode="full"))
    for row in warm_start(file, scale, loaded=problems):
        print({key: row.get(key) for key in ("status", "steps", "used", "budget", "dev_loss")})
    print(f"saved {file}, {file.stat().st_size} bytes")
