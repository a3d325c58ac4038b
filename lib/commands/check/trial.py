"""What only running shows: a trial in a place of its own, watched by lib/run/watch.py, and what its evidence says.

The trial starts from nothing (its own outputs, its own cache), so that preparation is watched too.
"""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

from lib import config, record
from lib.commands.check.finding import Finding, named
from lib.config import Compute, Optuna, Wandb
from lib.run import watch

MOST_BATCHES = 2
NEVER_BEGAN = "the trial"  # where a finding is about all of it: no notebook of it has failed by itself
HOME_CACHES = (".cache", ".config", ".ipython", ".jupyter", ".local", ".nv", ".triton")
CACHES = (  # variables that name a place of this kind; the first two are our own `.cache` where nobody named another
    "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME", "MPLCONFIGDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "NUMBA_CACHE_DIR",
)  # fmt: skip
# Not read by a member: the runner, the search and the tracker read them, where a trial does not lead. Shown by the
# source.
RUNNERS = {"compute": Compute, "optuna": Optuna, "wandb": Wandb}


def findings(found: list[tuple[Path, config.Run]], scale: str, arguments: list[str]) -> Iterator[Finding]:
    """Run the trial of these YAMLs and judge it. `arguments`: what `trial` is told besides the scale (--params, --study
    …)."""
    with tempfile.TemporaryDirectory(prefix="study-check-") as place:
        outputs, told = Path(place, "outputs"), Path(place, "watch")
        told.mkdir()
        Path(place, "tmp").mkdir()
        done = subprocess.run(
            [sys.executable, "-P", "-m", "lib", "trial", "--scale", scale, *arguments],
            cwd=config.ROOT,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "STUDY_OUTPUTS": str(outputs),
                "STUDY_CACHE": str(Path(place, "cache")),
                "TMPDIR": str(Path(place, "tmp")),
                **watch.environment(told, [place, "/dev", "/proc", *_caches()]),
            },
        )
        evidence = watch.evidence(told)
        results = next(outputs.glob(f"{scale}-trial*"), outputs)  # named after what --set and --params changed
        failed = list(failures(results, done))
        yield from failed
        if any(finding.file == NEVER_BEGAN for finding in failed):  # all else would follow from it
            return
        for study in dict.fromkeys(run.study for _, run in found):
            mine = [(path, run) for path, run in found if run.study == study and trained(results, run)]
            yield from unread_keys(study, mine, evidence)
            yield from unlogged_metrics(study, results, scale)
            yield from empty_columns(study, results)
        if not failed:
            yield from untold_phases(evidence)
        yield from too_many_batches(evidence)
        yield from strays(evidence, scale)
        yield from not_off(results)


def _caches() -> list[str]:
    """Where Python, matplotlib, Jupyter, CUDA and the hub keep what belongs to no run."""
    named = [os.path.abspath(value) for name, value in os.environ.items() if value and name in CACHES]
    return [sys.prefix, *named, *(str(Path.home() / name) for name in HOME_CACHES)]


def failures(results: Path, done: subprocess.CompletedProcess) -> Iterator[Finding]:
    """Notebooks of the trial that did not succeed, each with the exception that stopped it."""
    named_any = False
    for path in sorted([*results.glob("*/*/status.json"), *results.glob("*/*/sweep/status.json")]):
        status = record.read_json(path) or {}
        if status.get("status") == "succeeded":
            continue
        error = status.get("error") or {}
        named_any = True
        cell = f"cell {error['cell']}" if error.get("cell") else ""
        yield Finding(
            "error",
            f"notebooks of {status.get('study')}/{status.get('run_id')}",
            cell,
            f"the trial failed: {error.get('exception', status.get('status'))}",
            str(error.get("again", "")),
        )
    if done.returncode and not named_any:
        yield Finding(
            "error",
            NEVER_BEGAN,
            "",
            f"ended with {done.returncode}: {record.redact((done.stderr or done.stdout)[-800:]).strip()}",
            "./run_all.sh trial",
        )


def unread_keys(study: str, found: list[tuple[Path, config.Run]], evidence: list[dict]) -> Iterator[Finding]:
    """Keys with a value that no process asked for, in any run of the study."""
    module, runs = config.study_module(study), {run.run_id for _, run in found}
    read = {row["key"] for row in evidence if row["kind"] == "read" and row["run_id"] in runs}
    known = config.keys(module.Run)
    leaves = [key for key in known if "." in key and not any(other.startswith(f"{key}.") for other in known)]
    used = attributes_used()
    for key in leaves:
        section = key.split(".")[0]
        holders = [path for path, run in found if config.get(config.dump(run), key) is not None]
        parents = {key[:i] for i, letter in enumerate(key) if letter == "."}
        if not holders or key in read or key in module.UNREAD or parents & set(module.UNREAD):
            continue
        if section in RUNNERS and (section, key.split(".")[1]) in used:
            continue
        yield Finding(
            "error",
            named(holders[0]),
            key,
            "no code reads it: whatever it says, the run is the same",
            f"read it where it belongs, or take it out of lib/{study}/sections.py and the YAMLs",
        )


def attributes_used() -> set[tuple[str, str]]:
    """(section, key) of every `….<section>.<key>` in `lib`, but where configurations are made and shrunk; and what a
    section's own properties are made of."""
    used = {
        (section, node.attr)
        for section, kind in RUNNERS.items()
        for made in vars(kind).values()
        if isinstance(made, property)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(made.fget))))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    for path in (config.ROOT / "lib").rglob("*.py"):
        if (
            path.parent.name == "settings"
            or path.name in ("config.py", "sections.py")
            and path != Path(config.__file__)
        ):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = (
                    owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
                )
                used.add((name, node.attr))
    return used


def trained(results: Path, run: config.Run) -> bool:
    """Whether its trial came to its end: what one that failed did not come to read is no fault of its YAML."""
    return (record.read_json(results / run.study / run.run_id / "status.json") or {}).get("status") == "succeeded"


def untold_phases(evidence: list[dict]) -> Iterator[Finding]:
    if not any(row["kind"] == "batch" for row in evidence):
        yield Finding(
            "error", "lib", "", "no phase told of its batches", "take them through lib.record.batches(phase, items)"
        )


def too_many_batches(evidence: list[dict]) -> Iterator[Finding]:
    most: dict[str, int] = {}
    for row in evidence:
        if row["kind"] == "batch":
            most[row["phase"]] = max(row["number"], most.get(row["phase"], 0))
    for phase, number in sorted(most.items()):
        if number > MOST_BATCHES:
            yield Finding(
                "error",
                "trial_changes in lib/<study>/config.py",
                phase,
                f"{number} batches in a trial, at most {MOST_BATCHES} are allowed",
                "shrink what sets its length in the study's trial_changes",
            )


def strays(evidence: list[dict], scale: str) -> Iterator[Finding]:
    """Files written outside results_dir (and caches), and, at laptop scale, addresses asked."""
    for path in sorted({row["path"] for row in evidence if row["kind"] == "write"}):
        yield Finding(
            "error", named(path), "", "was written by a trial, outside its results_dir", "write below run.results_dir"
        )
    for address in sorted({row["address"] for row in evidence if row["kind"] == "connect"}):
        if scale == "laptop" and not address.startswith(("127.", "::1", "localhost")):
            yield Finding(
                "error",
                "the trial",
                address,
                "a connection was opened at laptop scale, which touches no network",
                "make or ship what it wanted",
            )


def not_off(results: Path) -> Iterator[Finding]:
    """W&B is disabled and the search is off in a trial."""
    for path in sorted(results.glob("*/*/wandb*")):
        yield Finding(
            "error",
            f"{path.parent.parent.name}/{path.parent.name}",
            "wandb.mode",
            "W&B was at work in a trial",
            "disabled in grid.trial",
        )
    for path in sorted([*results.glob("*/*/sweep/*.log"), *results.glob("*/*/sweep/trials/*")]):
        yield Finding(
            "error",
            f"{path.parts[-4]}/{path.parts[-3]}",
            "optuna",
            f"the search was on in a trial ({path.name})",
            "optuna.n_trials is 0 there: ask for it",
        )


def unlogged_metrics(study: str, results: Path, scale: str) -> Iterator[Finding]:
    """Metrics that the search, the analysis and the claims read by name, and that no member logged under that name.
    What is primary at another scale only is not asked of this one."""
    logged = {
        name for path in results.glob(f"{study}/*/members/*/metrics.json") for name in record.read_json(path) or {}
    }
    if not logged:
        return
    module = config.study_module(study)
    elsewhere = {name for name in module.PRIMARY_METRIC.values() if name != module.PRIMARY_METRIC[scale]}
    for name in (*module.METRICS, module.VALIDATION_METRIC, module.SECOND_METRIC):
        if name not in logged and name not in module.UNREAD and name not in elsewhere:
            near = config.did_you_mean(name, sorted(logged))
            yield Finding(
                "error",
                f"lib/{study}/member.py",
                name,
                "is read by this name and logged by none of the members",
                near if near != "remove it" else "return it from train()",
            )


def empty_columns(study: str, results: Path) -> Iterator[Finding]:
    """Columns of predictions.jsonl that are null or empty in every row: an answer key lost on the way."""
    rows = [row for path in results.glob(f"{study}/*/members/*/predictions.jsonl") for row in record.read_jsonl(path)]
    for kind in {row.get("kind") for row in rows}:
        mine = [row for row in rows if row.get("kind") == kind]
        for name in sorted(set().union(*mine)):
            if (
                all(row.get(name) in (None, "", []) for row in mine)
                and f"predictions.{name}" not in config.study_module(study).UNREAD
            ):
                yield Finding(
                    "error",
                    f"lib/{study}",
                    f"predictions.jsonl: {name}",
                    f"empty in all {len(mine)} rows ({kind})",
                    "carry it through the preprocessing: without it nothing can be scored",
                )
