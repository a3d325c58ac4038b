"""outputs/index.html: one plain page over all studies, made from the files of their records and from nothing else.

What a reader wants first comes first: the claims with their verdicts, the figure that shows them, the runs, provenance.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from lib.errors import StudyError
from lib.record import read_json, read_jsonl, redact, write_text
from lib.run import lock, member_page
from lib.run.notebook_html import PAGES, POLICY, notebook_html, placed

__all__ = ["index_html", "notebook_html"]
FOLDERS = ("laptop-full", "paper-full", "laptop-trial", "paper-trial")
COMMANDS = {
    "laptop-full": "./run_all.sh",
    "paper-full": "./run_all.sh full",
    "laptop-trial": "./run_all.sh trial",
    "paper-trial": "./run_all.sh trial --scale paper",
}
SYMBOLS = {"succeeded": "✓", "cached": "✓", "failed": "✗", "out_of_memory": "✗", "running": "…", "blocked": "■"}


def index_html(outputs_root: str | Path) -> Path:
    """Write <outputs_root>/index.html from the records below it; a missing or torn file leaves a gap, never an
    error."""
    import jinja2

    root = Path(outputs_root)
    groups = []
    for folder in _folders(root):
        studies = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = [group for study in studies if (group := _group(root, folder, study))]
        groups += sorted(found, key=lambda group: not group["claims"])  # what has verdicts before what has none
    script = (PAGES / "table.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": _number,
        "estimate": _estimate,
        "p": lambda value: _number(value, 2),
        "minutes": _minutes,
        "moment": _moment,
        "spent": _spent,
    }
    text = environment.get_template("index.html.j2").render(
        groups=groups,
        css=(PAGES / "style.css").read_text(encoding="utf-8"),
        script=script,
        policy=f"{POLICY}; script-src '{_hash(script)}'",
        symbols=SYMBOLS,
        commands=COMMANDS,
    )
    write_text(root / "index.html", redact(text))
    return root / "index.html"


def _hash(script: str) -> str:
    """What the page's policy permits: this very script and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _folders(root: Path) -> list[Path]:
    """The studies' own folders first, in the order of FOLDERS, each followed by its variations (`--set`, `--grid`)."""
    return [path for name in FOLDERS for path in (root / name, *sorted(root.glob(f"{name},*"))) if path.is_dir()]


def _group(root: Path, folder: Path, study: Path) -> dict | None:
    """What the page says of one study at one scale and in one mode."""
    runs = [
        _run(root, path)
        for path in sorted(study.iterdir())
        if path.is_dir()
        and path.name != "comparison"
        and ((path / "status.json").exists() or (path / "members").is_dir())
    ]
    comparison = study / "comparison"
    if not runs and not comparison.is_dir():
        return None
    own, _, variation = folder.name.partition(",")
    scale, _, mode = own.partition("-")
    aggregated = _dict(read_json(comparison / "aggregated_metrics.json"))
    return {
        "anchor": f"{folder.name}-{study.name}",
        "scale": scale,
        "mode": mode,
        "runs": runs,
        "command": _dict(read_json(comparison / "status.json")).get("command") or COMMANDS.get(own, ""),
        "name": (aggregated.get("title") or study.name.replace("_", "-").upper())
        + (f" ({variation})" if variation else ""),
        "claims": (claims := _claims(comparison)),
        "summary": _summary(aggregated),
        "scored_by": next((claim["scored_by"] for claim in claims if claim.get("scored_by")), ""),
        "figure": _figure(root, comparison / "figures", str(aggregated.get("primary_metric", "")))
        if mode == "full"
        else "",
        "forecast": next(reversed(_forecasts(folder, study.name)), None),
        "figures": [
            {
                "name": p.stem.removeprefix("comparison_").replace("_", " "),
                "files": [
                    (kind, _href(root, p.with_suffix(f".{kind}")))
                    for kind in ("png", "pdf", "csv")
                    if p.with_suffix(f".{kind}").exists()
                ],
            }
            for p in sorted((comparison / "figures").glob("*.png"))
        ],
        "analysis": [
            (text, _href(root, comparison / name))
            for text, name in (
                ("Analysis", "analysis.html"),
                ("its notebook", "analysis.ipynb"),
                ("verdicts as data", "claims.json"),
                ("metrics as data", "aggregated_metrics.json"),
            )
            if (comparison / name).exists()
        ],
        "analysis_error": _dict(_dict(read_json(comparison / "status.json")).get("error")),
        "provenance": _provenance([comparison, *(study / run["id"] for run in runs)]),
    }


def _run(root: Path, folder: Path) -> dict:
    status = _dict(read_json(folder / "status.json"))
    if status.get("status") == "running" and not lock.running(folder.parent.parent):
        status["status"] = "interrupted"  # its runner is gone
    links = [
        (text, _href(root, folder / name))
        for text, name in (
            ("page", "run.html"),
            ("notebook", "run.ipynb"),
            ("log", "train.log"),
            ("config", "config.yaml"),
            ("sweep", "sweep/sweep.html"),
            ("error", "attempts/error.log"),
        )
        if (folder / name).exists() and (text != "error" or status.get("status") in ("failed", "out_of_memory"))
    ]
    metric = _dict(status.get("key_metric"))
    return {
        "id": folder.name,
        "page": next((href for text, href in links if text == "page"), ""),
        "links": links,
        "status": str(status.get("status") or "no status"),
        "metric": metric.get("name", ""),
        "value": metric.get("value"),
        "minutes": status.get("minutes"),
        "ended": status.get("ended"),
        "command": str(status.get("command") or ""),
        "work": status.get("actual_member_seconds"),
        "predicted": status.get("predicted_member_seconds"),
        "error": _error(status.get("error")),
        **_members(root, folder, str(metric.get("name", ""))),
    }


def _members(root: Path, folder: Path, metric: str) -> dict:
    """How many members ended how, from their sentinels ('12 completed, 1 diverged'), how many seeds, and each with its
    page."""
    counts: dict[str, int] = {}
    listed, seeds = [], set()
    for path in sorted((folder / "members").glob("*/")):
        ended = _dict(read_json(path / "error.json")).get("status", "unfinished")
        status = str(_dict(read_json(path / "done.json")).get("status", ended)).replace("_", " ")
        counts[status] = counts.get(status, 0) + 1
        seeds.add(path.name.rpartition("-s")[2])
        value = _dict(read_json(path / "metrics.json")).get(metric)
        page = _href(root, path / member_page.NAME) if (path / member_page.NAME).exists() else ""
        listed.append({"id": path.name, "status": status, "page": page, "value": value})
    return {
        "members": ", ".join(f"{count} {name}" for name, count in counts.items()),
        "seeds": len(seeds),
        "listed": listed,
    }


def _forecasts(folder: Path, study: str) -> list[dict]:
    """Whole executions that this study was part of: what was predicted beside what it took."""
    try:
        return [row for row in read_jsonl(folder / "forecasts.jsonl") if study in row.get("studies", ())]
    except StudyError:  # a damaged file leaves a gap
        return []


def _claims(comparison: Path) -> list[dict]:
    found = read_json(comparison / "claims.json", [])
    found = found.get("claims", []) if isinstance(found, dict) else found
    return [
        {
            **claim,
            "verdict": str(claim.get("verdict") or "not evaluated").replace("_", " "),
            "interval": _interval(claim.get("interval95")),
        }
        for claim in found
        if isinstance(claim, dict)
    ]


def _interval(value: object) -> str:
    """`0.985 to 1.009`; an end that is null has no bound."""
    if not isinstance(value, list | tuple) or len(value) != 2 or all(v is None for v in value):
        return "–"
    return " to ".join("no bound" if v is None else _estimate(v) for v in value)


def _summary(aggregated: dict) -> str:
    """The best proposed run beside the best baseline, in one sentence."""
    proposed, baseline = _dict(aggregated.get("best_proposed")), _dict(aggregated.get("best_baseline"))
    if not proposed or not baseline:
        return ""
    metric = str(aggregated.get("primary_metric", "primary metric")).replace("_", " ")
    text = (
        f"{metric[:1].upper()}{metric[1:]}: best proposed {proposed.get('run_id')} {_number(proposed.get('value'))}, "
        f"best baseline {baseline.get('run_id')} {_number(baseline.get('value'))}"
    )
    gap = aggregated.get("gap")
    return text + (f", gap {gap:+.1f} %".replace("-", "−") if isinstance(gap, int | float) else "") + "."


def _figure(root: Path, folder: Path, metric: str) -> str:
    """The figure that shows the result: the primary metric's, else the claims', else the first; embedded with its
    words, its points linked to their members' pages."""
    from lib.plots import embedded  # with matplotlib

    wanted = (
        "comparison_primary*.png",
        f"comparison_{metric}*.png",
        "comparison_seeds.png",
        "comparison_claims.png",
        "*.png",
    )
    path = next((found[0] for pattern in wanted if (found := sorted(folder.glob(pattern)))), None)
    if path is None:
        return ""
    words, links = path.with_name(f"{path.stem}.alt.txt"), read_json(path.with_name(f"{path.stem}.links.json"), [])
    alt = words.read_text(encoding="utf-8").strip() if words.exists() else path.stem.replace("_", " ")
    here = os.path.relpath(folder.parent, root)
    return placed(
        embedded(
            path.read_bytes(),
            alt,
            [{**link, "href": os.path.normpath(os.path.join(quote(here), link["href"]))} for link in links],
        )
    )


def _provenance(folders: list[Path]) -> list[tuple[str, str]]:
    """(what, value) of the first provenance record found; nested parts as 'name: value' lists."""
    found = next((record for f in folders if (record := _dict(read_json(f / "provenance.json")))), {})
    return [
        (
            str(key).replace("_", " "),
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
        )
        for key, value in found.items()
        if value not in (None, "", {}, [])
    ]


def _error(error: object) -> dict:
    return error if isinstance(error, dict) else {"exception": str(error)} if error else {}


def _dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _href(root: Path, path: Path) -> str:
    return quote(path.relative_to(root).as_posix())


def _number(value: object, digits: int = 3) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}g}"
    return (f"{value:.0f}" if "e+0" in text else text).replace("-", "−")


def _estimate(value: object) -> str:
    """Estimates and the ends of their intervals to the same three decimals, so that they can be compared."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return (f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}").replace("-", "−")


def _minutes(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else "–"


def _moment(value: object) -> str:
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M")
    return str(value or "")


def _spent(seconds: object) -> str:
    """Minutes of work, to a tenth."""
    return f"{seconds / 60:.1f}" if isinstance(seconds, int | float) else "–"
