"""A model card (README.md) with every set of weights that a finished member keeps, made from its record and nothing
else (assets/card.md.j2).

The card of the checkpoint that was measured states data, configuration, metrics and, once there has been an analysis,
the study's verdicts; that of any other checkpoint says what it is. Times are left out: a resumed member ends with the
same card.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    for checkpoint in sorted((folder / "checkpoints").glob("checkpoint-*")) if spec and metrics else ():
        if marker := record.read_json(checkpoint / "complete.json"):
            record.write_text(checkpoint / NAME, record.redact(card(checkpoint, marker["step"], folder, spec, metrics)))
            written.append(checkpoint / NAME)
    return written


def write_all(results: Path) -> None:
    """The cards of every finished member of a study: its verdicts may be new."""
    for done in sorted(Path(results).glob("*/members/*/done.json")):
        write(done.parent)


def card(checkpoint: Path, step: int, folder: Path, spec: dict, metrics: dict) -> str:
    """The card as Markdown with the hub's front matter."""
    import jinja2

    settings, adapter = spec["config"], record.read_json(checkpoint / "adapter_config.json")
    model, data, key = settings["model"], settings["dataset"], spec.get("key") or {}
    front = {
        **({"base_model": model["name"]} if is_hub_id(model["name"]) else {}),
        **({"datasets": [data["name"]]} if is_hub_id(data["name"]) else {}),
        "library_name": "peft" if adapter else "transformers",
        "tags": [spec["study"], settings["method"], f"{spec['scale']}-scale"],
    }
    if adapter:
        kind, what = "adapters", f"The {adapter['peft_type']} adapters"
    elif (checkpoint / "config.json").exists():
        kind, what = "model", "All weights"
    else:
        kind, what = "parameters", "The trained parameters"
    base = (adapter or {}).get("base_model_name_or_path") or model["name"]
    lost = [str(metrics[k]) for k in ("dropped_pairs", "truncated_pairs") if k in metrics]
    pinned = {k: v for k, v in key.items() if not str(v).endswith("@unpinned")}
    about_data = {
        "name": data["name"],
        "revision": data.get("revision"),
        "fingerprint": pinned.get("data"),
        "pairs trained on": metrics.get("pairs"),
        "dropped, truncated": ", ".join(lost) or None,
        "base model's fingerprint": pinned.get("model"),
    }
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).from_string(
        (Path(__file__).parent / "assets" / "card.md.j2").read_text(encoding="utf-8")
    )
    return template.render(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        spec=spec,
        settings=settings,
        metrics=metrics,
        step=step,
        what=what,
        kind=kind,
        here=checkpoint.name,
        base=base,
        revision=model.get("revision") if is_hub_id(base) else None,
        data=_table(about_data.items()),
        configuration=_table(_flat({name: settings.get(name) for name in SECTIONS})),
        numbers=_table((k, v) for k, v in metrics.items() if not k.endswith("seconds")),
        judge=(record.read_json(folder / "judged.json") or {}).get("model"),
        claims=record.read_json(folder.parents[2] / "comparison" / "claims.json") or [],
    )


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(rows: Iterable[tuple[str, object]]) -> str:
    """Two columns of Markdown; what is null is left out."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows:
        if value is not None:
            text = record.escape_controls(f"{value:.6g}" if isinstance(value, float) else str(value))
            text = text.replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {name} | {text} |")
    return "\n".join(lines)
