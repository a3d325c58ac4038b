"""What all members of a grid share, made once and kept on disk by content: pairs, tokeniser, base model, tokenised
rows, reference log-probabilities and the baselines that need no training."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib import hub, made, models, record
from lib.td_dpo import base_model, baselines, data, generated
from lib.td_dpo.reference import reference_logprobs
from lib.td_dpo.tokens import encode_pairs, pad_token

SPLITS = ("train", "validation", "test")


@dataclass
class Inputs:
    """`rows` and `reference` by split; `pairs` the text of every pair; `report` counts and baselines for the record."""

    tokenizer: object
    rows: dict[str, list[dict]]
    reference: dict[str, Tensor]
    pairs: dict[str, list[dict]]
    report: dict
    base: str


def uses_stand_in(run) -> bool:
    """Trial at paper scale, hub out of reach: a tiny random model of the same architecture stands in."""
    return run.mode == "trial" and out_of_reach(run.model.name)


def out_of_reach(name: str) -> bool:
    """A hub id that cannot be asked for here."""
    return "/" in name and hub.out_of_reach(name)


def prepare(run, folder: Path) -> None:
    """Make the inputs in `folder`. The base model's training steps are told in history.jsonl, for the live line."""
    splits, report = pairs_of(run)
    base = base_of(run, splits["train"], folder)
    tokenizer = models.load_tokenizer(
        base, run.model.revision, trust_remote_code=run.model.trust_remote_code, needs_chat_template=True
    )
    limits = run.dataset.preprocessing
    rows, counts = {}, {}
    for split in SPLITS:
        rows[split], counts[split] = encode_pairs(tokenizer, splits[split], limits.max_length, limits.max_prompt_length)
    model = load_base(run, base)
    reference = {
        split: reference_logprobs(
            model,
            rows[split],
            cache_dir=folder / "reference",
            model_fingerprint=models.fingerprint(model),
            quantization=run.model.quantization,
            pad=pad_token(tokenizer),
        )
        for split in SPLITS
    }
    report |= {
        "tokens": counts,
        "base": str(base),
        "stand_in": uses_stand_in(run),
        "length_baseline": baselines.length_baseline(splits["test"]),
        "bag_of_words_baseline": _bag_of_words(splits),
    }
    if run.dataset.name == "generated":
        report["label_noise"] = generated.label_noise(splits["test"])
    tokenizer.save_pretrained(folder / "tokenizer")
    save_rows(folder / "rows.safetensors", rows)
    save_file({split: table.contiguous() for split, table in reference.items()}, folder / "reference.safetensors")
    record.write_text(folder / "pairs.json", json.dumps(splits, ensure_ascii=False))
    record.write_json(folder / "report.json", report)


def _bag_of_words(splits: dict) -> float | None:
    """None where the pairs are too few to fit anything (trial mode)."""
    return baselines.bag_of_words_baseline(splits["train"], splits["test"]) if len(splits["train"]) >= 20 else None


def pairs_of(run) -> tuple[dict, dict]:
    """The run's pairs and the loader's report; generated ones in the data set's own columns where the hub is out of
    reach."""
    section = run.dataset.model_dump()
    if run.mode == "trial" and out_of_reach(run.dataset.name):
        size = run.dataset.limit or 8
        splits, report = data.load_splits(
            section | {"name": "generated", "train_pairs": size, "validation_pairs": size, "test_pairs": size}
        )
        return splits, {**report, "source": f"generated, standing in for {run.dataset.name}"}
    return data.load_splits(section)


def base_of(run, pairs: list[dict], folder: Path) -> str:
    """Name or path of the base model; 'made' ones and stand-ins are made in `folder`/base."""
    texts = [m["content"] for pair in pairs for m in itertools.chain(pair["prompt"], pair["chosen"], pair["rejected"])]
    return made.base_model(
        run,
        folder,
        texts,
        lambda place, on_step: base_model.make_base(pairs, run.model.recipe.model_dump(), place, on_step),
    )[0]


def load_base(run, base: str, **options):
    """The base model as the run trains it (quantization, dtype, device)."""
    keys = ("revision", "torch_dtype", "quantization", "trust_remote_code")
    return models.load_causal_lm(base, **{key: getattr(run.model, key) for key in keys}, **options)


def save_rows(path: Path, rows: dict[str, list[dict]]) -> None:
    """Ragged token lists as flat integer tensors with their lengths: loads in milliseconds."""
    tensors = {}
    for split, mine in rows.items():
        tensors[f"{split}.pair"] = torch.tensor([row["pair"] for row in mine], dtype=torch.int32)
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            tensors[f"{split}.{name}"] = torch.tensor(
                list(itertools.chain.from_iterable(r[name] for r in mine)), dtype=torch.int32
            )
            tensors[f"{split}.{name}.lengths"] = torch.tensor([len(r[name]) for r in mine], dtype=torch.int32)
    save_file(tensors, path)


def load_rows(path: Path) -> dict[str, list[dict]]:
    tensors = load_file(path)
    rows = {}
    for split in SPLITS:
        columns = {"pair": tensors[f"{split}.pair"].tolist()}
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            flat, ends = tensors[f"{split}.{name}"].tolist(), tensors[f"{split}.{name}.lengths"].cumsum(0).tolist()
            columns[name] = [flat[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)] if ends else []
        rows[split] = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return rows


def load(folder: Path) -> Inputs:
    """The inputs that `prepare` made in `folder` (which may have been renamed since)."""
    folder = Path(folder)
    report = record.read_json(folder / "report.json")
    base = str(folder / "base") if (folder / "base").is_dir() else report["base"]
    tokenizer = models.load_tokenizer(str(folder / "tokenizer"), needs_chat_template=True)
    pairs = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    return Inputs(
        tokenizer,
        load_rows(folder / "rows.safetensors"),
        load_file(folder / "reference.safetensors"),
        pairs,
        report,
        base,
    )
