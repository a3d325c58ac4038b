"""What all members share, made once and kept on disk by content: problems, tokenizer, base model, the planner's warm start."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from lib import hub, models, record, stand_in
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
        every, test = (data.load(dataset.name, split, dataset.revision, dataset.streaming) for split in ("train", "test"))
    train, dev = data.split_dev(every, dataset.dev_size, dataset.split_seed)
    limit = dataset.limit
    extra = data.load(dataset.gsm1k, "test") if dataset.gsm1k and run.mode == "full" else []
    return {"train": train[:limit], "dev": dev, "test": test[:limit], "gsm1k": extra}, source


def prepare(run, folder: Path, warm: bool = True) -> None:
    """Fill `folder`; a made base model's pretraining is told in history.jsonl, for the live line."""
    problems, source = load_problems(run)
    base, closing = run.model.name, None
    if base == "made":
        history, _ = record.recorder(folder)
        (folder / "history.jsonl").unlink(missing_ok=True)
        real = None if source.startswith("generated") else problems["train"]
        closing = base_model.make(run.model.recipe.model_dump(), folder / "base", real,
                                  lambda step, steps, loss: history({"step": step, "steps": steps, "loss": loss}))
        base = str(folder / "base")
    elif run.mode == "trial" and hub.out_of_reach(base):
        texts = [r["question"] + " " + r["answer"] for r in problems["train"]]
        base = str(stand_in.write_stand_in(base, folder / "base", texts))
    if warm:
        from lib.graff import warm_start  # which prepares inputs of its own

        warm_start.make(folder / "warm_start.safetensors", run.scale, run.mode == "trial")
    tokenizer = models.load_tokenizer(base, run.model.revision if base == run.model.name else None,
                                      trust_remote_code=run.model.trust_remote_code)
    rows = {name: [base_model.encode(tokenizer, r, run.dataset.max_tokens) for r in problems[name]]
            for name in ("train", "dev")}
    counts = Counter(token for row in rows["train"] for token in row["ids"][row["prompt"]:])
    frequent = sorted(token for token, _ in counts.most_common(FREQUENT))
    tokenizer.save_pretrained(folder / "tokenizer")
    record.write_text(folder / "rows.json", json.dumps(rows))
    record.write_text(folder / "problems.json", json.dumps(problems, ensure_ascii=False))
    record.write_json(folder / "frequent.json", frequent)
    record.write_json(folder / "report.json", {
        "base": base, "stand_in": base != run.model.name != "made", "source": source, "pretraining_loss": closing,
        "examples": {name: len(mine) for name, mine in problems.items()},
        "answers_with_annotations": sum(bool(answers.ANNOTATION.search(r["answer"])) for r in problems["train"])})


def load(folder: Path) -> Inputs:
    """The inputs that `prepare` made in `folder` (which may have been renamed since)."""
    folder = Path(folder)
    report = record.read_json(folder / "report.json")
    base = str(folder / "base") if (folder / "base").is_dir() else report["base"]
    problems, rows, frequent = (record.read_json(folder / f"{name}.json") for name in ("problems", "rows", "frequent"))
    return Inputs(models.load_tokenizer(str(folder / "tokenizer")), problems, rows, torch.tensor(frequent), report, base)


def load_model(run, given: Inputs, seed: int):
    """The base model with LoRA in float32, A drawn from `seed`."""
    base = models.load_causal_lm(given.base, revision=None if Path(given.base).is_dir() else run.model.revision,
                                 torch_dtype=run.model.torch_dtype, trust_remote_code=run.model.trust_remote_code,
                                 gradient_checkpointing=run.training.gradient_checkpointing)
    lora = run.model.lora
    return models.add_lora(base, {"lora_r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout,
                                  "target_modules": lora.target_modules}, seed)
