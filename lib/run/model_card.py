"""A model card (README.md) with every set of weights that a finished member keeps, made from its record and nothing
else (assets/card.md.j2).

The card of the checkpoint that was measured states data, configuration, metrics and, once there has been an analysis,
the study's verdicts; that of any other checkpoint says what it is. Times are left out: a resumed member ends with the
same card.
"""

from pathlib import Path

from lib.hub import is_hub_id
from lib.record import escape_controls, read_json, redact, write_text

NAME = "README.md"


def write(folder: Path) -> None:
    """Write the cards of the member in `folder`, one with each checkpoint."""
    spec, metrics = read_json(folder / "member.json"), read_json(folder / "metrics.json")
    for checkpoint in sorted((folder / "checkpoints").glob("checkpoint-*")) if spec and metrics else ():
        if marker := read_json(checkpoint / "complete.json"):
            write_text(checkpoint / NAME, redact(card(checkpoint, marker["step"], folder, spec, metrics)))


def write_all(results: Path) -> None:
    """The cards of every finished member of a study: its verdicts may be new."""
    for done in sorted(Path(results).glob("*/members/*/done.json")):
        write(done.parent)


def card(checkpoint: Path, step: int, folder: Path, spec: dict, metrics: dict) -> str:
    """The card as Markdown with the hub's front matter."""
    import jinja2
    from huggingface_hub import ModelCardData

    settings, adapter = spec["config"], read_json(checkpoint / "adapter_config.json", {})
    model, data = settings["model"]["name"], settings["dataset"]["name"]
    front = ModelCardData(
        base_model=model if is_hub_id(model) else None,
        datasets=[data] if is_hub_id(data) else None,
        library_name="peft" if adapter else "transformers",
        tags=[spec["study"], settings["method"], f"{spec['scale']}-scale"],
    )
    base = adapter.get("base_model_name_or_path") or model
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "assets")
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = _cell
    return environment.get_template("card.md.j2").render(
        front=front,
        spec=spec,
        metrics=metrics,
        step=step,
        adapter=adapter,
        checkpoint=checkpoint,
        base=base,
        revision=settings["model"].get("revision") if is_hub_id(base) else None,
        audit=read_json(folder.parents[1] / "audit.json", {}),
        judge=read_json(folder / "judged.json", {}).get("model"),
        claims=read_json(folder.parents[2] / "comparison" / "claims.json", []),
    )


def _cell(value: object) -> str:
    """A value as it may stand in a cell of a Markdown table."""
    text = escape_controls(f"{value:.6g}" if isinstance(value, float) else str(value))
    return text.replace("|", "\\|").replace("\n", " ")
