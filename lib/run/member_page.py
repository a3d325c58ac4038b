"""A page for every member of a run: what the point that stands for it in a figure or table is made of.

Made from the member's record alone. What it holds of a data set is text on the page and nothing else.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from lib.record import inert, read_json, read_jsonl, redact, write_text
from lib.run.notebook_html import PAGES, POLICY

NAME = "member.html"
SHOWN_ROWS = 6  # of its predictions
LOG_LINES = 40
WIDTH, HEIGHT, LEFT = 640, 150, 8  # of a curve, in the units of its own drawing
CURVES = 6


def write_pages(run_folder: Path, command: str = "") -> int:
    """Write members/<id>/member.html for every member with a record, searched ones too; how many there are."""
    folders = [
        p.parent for p in [*run_folder.glob("members/*/member.json"), *run_folder.glob("sweep/trials/*/member.json")]
    ]
    for folder in sorted(folders):
        write_text(folder / NAME, redact(page(folder, run_folder, command)))
    return len(folders)


def page(folder: Path, run_folder: Path, command: str = "") -> str:
    spec, done = _dict(read_json(folder / "member.json")), _dict(read_json(folder / "done.json"))
    history, error = _rows(folder / "history.jsonl"), _dict(read_json(folder / "error.json"))
    config = _dict(spec.get("config"))
    command = (
        command
        or f"./run_all.sh {spec.get('mode')} --scale {spec.get('scale')} --study {spec.get('study')} "
        f"--run {shlex.quote(run_folder.name)}"
    )
    status = str(done.get("status") or ("failed" if error else "unfinished"))
    return _template().render(
        title=f"{run_folder.name}: {folder.name}",
        css=(PAGES / "style.css").read_text(encoding="utf-8"),
        policy=POLICY,
        trail=_trail(folder, run_folder),
        status=status,
        method=config.get("method", ""),
        seed=spec.get("seed"),
        cell=_dict(spec.get("cell")),
        again=f"rm -r {shlex.quote(str(_shown(folder)))} && {command}",
        metrics=[
            (k, v) for k, v in _dict(read_json(folder / "metrics.json")).items() if k != "status" and v is not None
        ],
        used=_dict(read_json(folder / "resources.json")),
        error=error.get("exception", ""),
        curves=list(_curves(history)),
        rows=_predictions(folder),
        log=_tail(folder / "train.log"),
        settings=list(_flat({k: v for k, v in config.items() if isinstance(v, dict) and k not in ("optuna", "wandb")})),
    )


def _template():
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = _plain
    return environment.get_template("member.html.j2")


def _trail(folder: Path, run_folder: Path) -> list[tuple[str, str]]:
    index = run_folder.parent.parent.parent / "index.html"
    places = [
        ("All studies", index),
        (f"Run {run_folder.name}", run_folder / "run.html"),
        ("Analysis", run_folder.parent / "comparison" / "analysis.html"),
    ]
    files = [(name, folder / name) for name in ("history.jsonl", "predictions.jsonl", "metrics.json", "train.log")]
    return [
        (text, quote(os.path.relpath(path, folder)))
        for text, path in [*places, *files]
        if path.exists() or path == index
    ]


def _shown(folder: Path) -> Path:
    """The folder as it is typed from the repository, where it lies below it."""
    parts = folder.resolve().parts
    return Path(*parts[parts.index("outputs") :]) if "outputs" in parts else folder


def _curves(history: list[dict]) -> Iterator[dict]:
    """The recorded numbers that change over the steps, each as a polyline with its ends in words; the first few."""
    names = [n for n in dict.fromkeys(k for row in history for k in row) if n not in ("step", "steps", "epoch")]
    names = sorted(
        names, key=lambda n: (n != "loss", not n.startswith(("validation", "tuning", "dev")))
    )  # else as recorded
    drawn = 0
    for name in names:
        points = [
            (row["step"], row[name]) for row in history if isinstance(row.get(name), int | float) and "step" in row
        ]
        if len(points) < 2 or drawn == CURVES:
            continue
        drawn += 1
        (first, last), values = (points[0][0], points[-1][0]), [value for _, value in points]
        low, high = min(values), max(values)
        across = lambda step, a=first, b=last: LEFT + (WIDTH - 2 * LEFT) * (step - a) / max(1, b - a)  # noqa: E731
        down = lambda value, a=low, b=high: LEFT + (HEIGHT - 2 * LEFT) * (1 - (value - a) / ((b - a) or 1))  # noqa: E731
        yield {
            "name": name.replace("_", " "),
            "low": _plain(low),
            "high": _plain(high),
            "first": first,
            "last": last,
            "line": " ".join(f"{across(step):.1f},{down(value):.1f}" for step, value in points),
            "words": f"{name.replace('_', ' ')} from {_plain(values[0])} at step {first} to {_plain(values[-1])} at step "
            f"{last}, between {_plain(low)} and {_plain(high)}",
        }


def _predictions(folder: Path) -> dict:
    rows = _rows(folder / "predictions.jsonl")[:SHOWN_ROWS]
    names = [n for n in dict.fromkeys(k for row in rows for k in row) if n != "kind"][:8]
    return {"names": names, "rows": [[_plain(row.get(n)) for n in names] for row in rows]} if rows else {}


def _tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 20_000))
            return inert("\n".join(file.read().decode(errors="replace").splitlines()[-LOG_LINES:]))
    except OSError:
        return ""


def _rows(path: Path) -> list[dict]:
    try:
        return read_jsonl(path)
    except Exception:  # a page of a damaged record shows what is left of it
        return []


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = "–" if value is None else str(value)
        return text if len(text) <= 400 else text[:400] + " …"
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("-", "−")


def _dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}
