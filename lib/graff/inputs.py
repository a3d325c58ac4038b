"""What all members share, made once and kept on disk by content: problems, tokenizer, base model, the planner's warm
start."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from lib import hub, made, models, record
from lib.graff import answers, base_model, data

STAND_IN = 32  # generated problems that stand in for a data set out of reach, in a trial
FREQUENT = 4096  # vocabulary rows that the entropy is over


@dataclass
class Inputs:
    """`problems` by split: {"question", "answer"}; `rows` of train: {"ids", "prompt"}; `frequent` (V',) token ids."""

    tokenizer: object
    problems: dict[str, list[dict]]
    rows: dict[str, list[dict]]
    frequent: torch.Tensor
    report: dict
    base: str


def load_problems(run) -> tuple[dict[str, list[dict]], str]:
    """({train, dev, test, gsm1k}, where they are from)."""
    dataset = run.dataset
    source = dataset.name
    if run.mode == "trial" and hub.out_of_reach(source):
        source = f"generated, standing in for {source}"
    if source.startswith("generated"):
        every = data.generated((dataset.train_examples or STAND_IN) + dataset.dev_size, dataset.split_seed, 2)
        test = data.generated(dataset.test_examples or STAND_IN, dataset.split_seed + 1, 2)
    else:
        every, test = (
            data.load(dataset.name, split, dataset.revision, dataset.streaming) for split in ("train", "test")
        )
    train, dev = data.split_dev(every, dataset.dev_size, dataset.split_seed)
    limit = dataset.limit
    extra = data.load(dataset.gsm1k, "test") if dataset.gsm1k and run.mode == "full" else []
    return {"train": train[:limit], "dev": dev, "test": test[:limit], "gsm1k": extra}, source


def prepare(run, folder: Path, warm: bool = True) -> None:
    """Fill `folder`. Where the base model is made too, the warm start, which does not need it, is made beside it."""
    from lib.graff import warm_start  # which prepares inputs of its own

    problems, source = load_problems(run)
    file, both = folder / "warm_start.safetensors", warm and run.mode == "full" and run.model.name == "made"
    with warm_start.beside(file, run.scale) if both else contextlib.nullcontext():
        base, closing = make_base(run, folder, problems, source)
    if warm and not both:
        warm_start.make(file, run.scale, run.mode == "trial")
    tokenize(run, folder, problems, base, {"source": source, "pretraining_loss": closing})


def make_base(run, folder: Path, problems: dict[str, list[dict]], source: str) -> tuple[str, float | None]:
    """(name or folder of the base model, closing loss of its pretraining)."""
    real = None if source.startswith("generated") else problems["train"]
    texts = [r["question"] + " " + r["answer"] for r in problems["train"]]
    return made.base_model(
        run, folder, texts, lambda place, on_step: base_model.make(run.model.recipe.model_dump(), place, real, on_step)
    )


def tokenize(run, folder: Path, problems: dict[str, list[dict]], base: str, notes: dict) -> None:
    """Problems, rows, tokenizer and a report of them, with `notes`, into `folder`."""
    tokenizer = models.load_tokenizer(base, run.model.revision, trust_remote_code=run.model.trust_remote_code)
    rows = {
        name: [base_model.encode(tokenizer, r, run.dataset.max_tokens) for r in problems[name]]
        for name in ("train", "dev")
    }
    longest = run.dataset.max_tokens
    cut = {
        name: sum(len(row["ids"]) == longest and row["ids"][-1] != tokenizer.eos_token_id for row in mine)
        for name, mine in rows.items()
    }
    rows["train"] = [
        row for row in rows["train"] if len(row["ids"]) > row["prompt"]
    ]  # the others have nothing to learn from
    counts = Counter(token for row in rows["train"] for token in row["ids"][row["prompt"] :])
    frequent = sorted(token for token, _ in counts.most_common(FREQUENT))
    tokenizer.save_pretrained(folder / "tokenizer")
    record.write_text(folder / "rows.json", json.dumps(rows))
    record.write_text(folder / "problems.json", json.dumps(problems, ensure_ascii=False))
    record.write_json(folder / "frequent.json", frequent)
    record.write_json(
        folder / "report.json",
        {
            "base": base,
            "stand_in": base != run.model.name != "made",
            **notes,
            "examples": {name: len(mine) for name, mine in problems.items()},
            "cut_at_max_tokens": cut,
            "answer_tokens": answer_tokens(rows["train"]),
            "answers_with_annotations": sum(bool(answers.ANNOTATION.search(r["answer"])) for r in problems["train"]),
        },
    )


def answer_tokens(rows: list[dict]) -> dict[str, int]:
    """Of the answers as they are trained on: the middle one's length and the longest's, beside
    evaluation.max_new_tokens."""
    found = sorted(len(row["ids"]) - row["prompt"] for row in rows)
    return {"median": found[len(found) // 2], "longest": found[-1]} if found else {}


def load(folder: Path) -> Inputs:
    """The inputs that `prepare` made in `folder` (which may have been renamed since)."""
    folder = Path(folder)
    report = record.read_json(folder / "report.json")
    base = str(folder / "base") if (folder / "base").is_dir() else report["base"]
    problems, rows, frequent = (record.read_json(folder / f"{name}.json") for name in ("problems", "rows", "frequent"))
    return Inputs(
        models.load_tokenizer(str(folder / "tokenizer")), problems, rows, torch.tensor(frequent), report, base
    )


def load_model(run, given: Inputs, seed: int):
    """The base model with LoRA in float32, A drawn from `seed`."""
    base = models.load_causal_lm(
        given.base,
        revision=run.model.revision,
        torch_dtype=run.model.torch_dtype,
        trust_remote_code=run.model.trust_remote_code,
        gradient_checkpointing=run.training.gradient_checkpointing,
    )
    lora = run.model.lora
    return models.add_lora(
        base,
        {
            "lora_r": lora.r,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": lora.target_modules,
        },
        seed,
    )
