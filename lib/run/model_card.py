"""A model card (README.md) beside every set of weights that a finished member keeps, made from its record and nothing
else.

The card of the checkpoint that was measured states data, configuration, metrics and, once there has been an analysis,
the study's verdicts; that of any other checkpoint says what it is. Times are left out: a resumed member ends with the
same card.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from lib import record
from lib.config import is_hub_id

NAME = "README.md"
SECTIONS = ("model", "dataset", "training", "loss", "evaluation")


def write(folder: Path) -> list[Path]:
    """Write the cards of the member in `folder`; the paths of those written."""
    spec, metrics = record.read_json(folder / "member.json"), record.read_json(folder / "metrics.json")
    written = []
    if not spec or not metrics:
        return written
    for checkpoint in sorted((folder / "checkpoints").glob("checkpoint-*")):
        marker = record.read_json(checkpoint / "complete.json")
        if marker:
            record.write_text(checkpoint / NAME, record.redact(card(checkpoint, marker["step"], folder, spec, metrics)))
            written.append(checkpoint / NAME)
    return written


def write_all(results: Path) -> None:
    """The cards of every finished member of a study: its verdicts may be new."""
    for done in sorted(Path(results).glob("*/members/*/done.json")):
        write(done.parent)


def card(checkpoint: Path, step: int, folder: Path, spec: dict, metrics: dict) -> str:
    """The card as Markdown with the hub's front matter."""
    settings, run = spec["config"], spec["run_id"]
    measured = metrics.get("best_step") or metrics.get("steps")
    lines = [
        "---",
        yaml.safe_dump(_front(checkpoint, settings, spec), sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {run}, {spec['member']}",
        "",
        f"{_what(checkpoint)} of `{settings['model']['name']}` after step {step} of a training with "
        f"**{settings['method']}** ({settings.get('role')}) in the study `{spec['study']}` at {spec['scale']} scale, "
        f"seed {spec['seed']}." + ("" if spec["mode"] == "full" else " A trial: it shows that the run works, no more."),
    ]
    if metrics.get("status") == "diverged":
        lines += ["", f"**This run diverged at step {metrics.get('diverged_at')}**: its end was not measured."]
    elif step != measured:
        lines += ["", f"These are not the weights whose metrics are in the record: those are of step {measured}."]
    lines += [
        "",
        "## Loading",
        "",
        *_loading(checkpoint, settings, spec["study"]),
        "",
        "## Data",
        "",
        *_table(_data(spec, metrics)),
        "",
        "## Configuration",
        "",
        *_table(
            row
            for name in SECTIONS
            if isinstance(settings.get(name), dict)
            for row in _flat(settings[name], f"{name}.")
        ),
    ]
    if step == measured and metrics.get("status") != "diverged":
        lines += [
            "",
            "## Metrics",
            "",
            f"From the member's `metrics.json`{_judge(folder)}.",
            "",
            *_table((k, v) for k, v in metrics.items() if not k.endswith("seconds") and v is not None),
        ]
    lines += ["", "## Verdicts", "", *_verdicts(folder, spec), ""]
    return "\n".join(lines)


def _front(checkpoint: Path, settings: dict, spec: dict) -> dict:
    """What the hub reads: only names that are the hub's."""
    base, data = settings["model"]["name"], settings["dataset"]["name"]
    return {
        **({"base_model": base} if is_hub_id(base) else {}),
        **({"datasets": [data]} if is_hub_id(data) else {}),
        "library_name": "peft" if (checkpoint / "adapter_config.json").exists() else "transformers",
        "tags": [spec["study"], settings["method"], f"{spec['scale']}-scale"],
    }


def _what(checkpoint: Path) -> str:
    if (checkpoint / "adapter_config.json").exists():
        kind = (record.read_json(checkpoint / "adapter_config.json") or {}).get("peft_type", "")
        return f"The {kind} adapters".replace("  ", " ")
    return "All weights" if (checkpoint / "config.json").exists() else "The trained parameters"


def _loading(checkpoint: Path, settings: dict, study: str) -> list[str]:
    model, here = settings["model"], checkpoint.name
    if (checkpoint / "adapter_config.json").exists():
        base = (record.read_json(checkpoint / "adapter_config.json") or {}).get("base_model_name_or_path") or model[
            "name"
        ]
        four_bit = model.get("quantization") == "nf4"
        extra = f', revision="{model["revision"]}"' if model.get("revision") and is_hub_id(base) else ""
        dtype = model.get("torch_dtype", "float32")
        quantised = (
            [
                f'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
                f'bnb_4bit_compute_dtype="{dtype}")'
            ]
            if four_bit
            else []
        )
        return [
            "```python",
            "from peft import PeftModel",
            f"from transformers import AutoModelForCausalLM{', BitsAndBytesConfig' if four_bit else ''}",
            "",
            *quantised,
            f'base = AutoModelForCausalLM.from_pretrained("{base}"{extra}, dtype="{dtype}"'
            f"{', quantization_config=nf4' if four_bit else ''})",
            f'model = PeftModel.from_pretrained(base, "{here}").eval()',
            "```",
        ]
    if (checkpoint / "config.json").exists():
        return [
            "```python",
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{here}").eval()',
            "```",
        ]
    return [
        "`model.safetensors` holds the trained parameters under their names in the model that the study builds from the "
        "base model and the configuration below; everything else is the base model's. "
        f"`lib/{study}/trainer.py` puts them back."
    ]


def _data(spec: dict, metrics: dict) -> Iterator[tuple[str, object]]:
    data, key = spec["config"]["dataset"], spec.get("key") or {}
    yield "name", data["name"]
    yield "revision", data.get("revision")
    yield "fingerprint", _known(key.get("data"))
    yield "pairs trained on", metrics.get("pairs")
    yield (
        "dropped, truncated",
        ", ".join(str(metrics[k]) for k in ("dropped_pairs", "truncated_pairs") if k in metrics) or None,
    )
    yield "base model's fingerprint", _known(key.get("model"))


def _known(fingerprint: str | None) -> str | None:
    return None if not fingerprint or fingerprint.endswith("@unpinned") else fingerprint


def _judge(folder: Path) -> str:
    judged = record.read_json(folder / "judged.json")
    return f"; the answers were graded by {judged['model']}" if judged else ""


def _verdicts(folder: Path, spec: dict) -> list[str]:
    """The study's claims as they stand; they are about all members of the study, of which this is one."""
    place = "`comparison/` beside the study's runs (`claims.json`, `analysis.html`)"
    found = record.read_json(folder.parents[2] / "comparison" / "claims.json") or []
    if not found:
        return [f"Not judged yet. The study's claims are judged over all its members, in {place}."]
    return [
        f"The study's claims are judged over all its members, in {place}; each verdict holds for {spec['scale']} scale "
        "alone.",
        "",
        *(f"- {claim['id']} **{claim['verdict']}**: {claim['sentence']}" for claim in found),
    ]


def _flat(values: dict, prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(rows) -> list[str]:
    """Two columns of Markdown; what is null is left out."""
    shown = [
        (name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in rows if value is not None
    ]
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in shown)]


def _cell(text: str) -> str:
    return record.inert(text).replace("|", "\\|").replace("\n", " ")
