"""Reading W&B: what it holds of a run, what that lacks of the record, and a study's records back from it, checked.

The analysis always reads a folder of records. `fetch` makes one from W&B, file by file, each compared with the SHA-256
that its run's configuration states; so a study judged from W&B and one judged from local records are the same
computation on the same bytes. Histories are also logged row by row for W&B's charts; `lacking` compares those too.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from lib import config, record
from lib.errors import MissingError, StudyError
from lib.run.preflight import Machine, wandb_host, wandb_key
from lib.run.tracking import FROM, Entry, by_step, sha256, stated

SECONDS = 15  # for one request to W&B
SERVICE_SECONDS = 300.0  # for the client's own process to start, on a slow disk; one that dies is not waited for


def quiet() -> None:
    """Only what is asked for leaves this machine: no telemetry of the client, no request before the first of ours."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")


def key_or_mend() -> None:
    """Raises MissingError where no key is at hand: the client would ask for one at the terminal."""
    if not wandb_key(Machine().environ):
        raise MissingError(
            "W&B",
            f"there is no key for {wandb_host(Machine().environ)}",
            "a key",
            ".venv/bin/wandb login (or set WANDB_API_KEY), then the same command again",
        )


def api(seconds: int = SECONDS):
    """A connection for reading. Raises MissingError where W&B does not answer, or refuses the key."""
    quiet()
    import wandb

    try:
        wandb.setup(
            wandb.Settings(
                silent=True,
                x_graphql_retry_max=1,
                x_graphql_retry_wait_min_seconds=0.3,
                x_graphql_retry_wait_max_seconds=1,
                x_graphql_timeout_seconds=seconds,
                x_service_wait=SERVICE_SECONDS,
            )
        )
        made = wandb.Api(timeout=seconds)
        made.default_entity  # noqa: B018 (asks the server who we are)
        return made
    except Exception as error:  # the client raises errors of half a dozen kinds, some of them plain ValueErrors
        raise MissingError(
            "W&B",
            f"no answer that can be used ({first_line(error)})",
            "a server that knows this key",
            "check the connection and WANDB_BASE_URL; ./run_all.sh sync goes on later",
        ) from None


def first_line(error: BaseException) -> str:
    return record.redact(f"{type(error).__name__}: {error}").strip().splitlines()[0][:200]


def find(connection, entity: str | None, project: str, name: str):
    """The W&B run of that id, read afresh; None where there is none."""
    connection.flush()
    try:
        return connection.run("/".join(filter(None, (entity or connection.default_entity, project, name))))
    except Exception as error:
        if "could not find" in str(error).lower() or "not found" in str(error).lower():
            return None
        raise


def rows(found) -> dict[int, dict]:
    """{step: row} of a run's history: of rows with one global_step, the last; W&B's own keys left out."""
    steps = {}
    for row in found.scan_history(use_cache=False):
        if row.get("global_step") is not None:
            steps[row["global_step"]] = {k: v for k, v in row.items() if not k.startswith("_")}
    return dict(sorted(steps.items()))


def md5(path: Path) -> str:
    return base64.b64encode(hashlib.md5(path.read_bytes(), usedforsecurity=False).digest()).decode()


def lacking(entry: Entry, found) -> list[str]:
    """In what the W&B run `found` differs from the record; [] where they are equal."""
    if found is None:
        return ["run"]
    stored = {file.name: file.md5 for file in found.files()}
    kept = found.summary
    return [
        *(["state"] if found.state != "finished" else []),
        *(["config"] if any(stated(found.config.get(k)) != v for k, v in entry.whole_config.items()) else []),
        *(["summary"] if any(kept.get(k) != v for k, v in entry.summary.items() if v is not None) else []),
        *(["history"] if rows(found) != by_step(record.read_jsonl(entry.history)) else []),
        *[name for name, path in entry.files.items() if stored.get(name) != md5(path)],
    ]


def fetch(
    into: Path,
    *,
    run_ids: Iterable[str],
    study: str,
    scale: str,
    mode: str = "full",
    entity: str | None = None,
    project: str,
    place: str | None = None,
) -> Path:
    """The records of these runs from W&B in the folder `into`/<study>, as the runner leaves them; returns that folder.

    `place`: where they were made (default `<scale>-<mode>/<study>`; a variation made with --set has another). A file
    that is there already with the right checksum is kept. Raises StudyError where a run is not on W&B, or a file of it
    is missing or not the one that its run states; MissingError where W&B cannot be reached.
    """
    key_or_mend()
    connection, results = api(), Path(into) / study
    path = "/".join(filter(None, (entity or connection.default_entity, project)))
    planned = []
    for run_id in run_ids:
        group = list(connection.runs(path, filters={"group": run_id}, order="+created_at", lazy=False))
        place_wanted = place or f"{scale}-{mode}/{study}"
        mine = [r for r in group if (r.config.get("record") or {}).get("place") == place_wanted]
        final = next((r for r in reversed(mine) if r.config["record"].get("member") is None), None)
        if final is None:
            raise StudyError(
                f"W&B {path}",
                f"no finished run {run_id} of {place_wanted}",
                "the run and its members",
                "./run_all.sh sync where its records are",
            )
        named = {r.id: r for r in mine}
        for member, name in _members(final).items():
            if name not in named:
                raise StudyError(
                    f"W&B {path}/{name}",
                    f"member {member} of {run_id} is not there",
                    "every member of the run",
                    "./run_all.sh sync where its records are",
                )
        for found in [final, *(named[name] for name in _members(final).values())]:
            download(found, results)
        settings = {k: v for k, v in final.config.items() if k != "record"}
        planned.append({**_declared(results / run_id, settings), "study": study, "scale": scale, "mode": mode})
    record.write_json(results / "comparison" / "runs.json", planned)
    return results


def _members(final) -> dict[str, str]:
    return final.config["record"].get("members", {})


def _declared(folder: Path, settings: dict) -> dict:
    """The run as its YAML declared it (a member's configuration has its cell's values in place)."""
    path = folder / "config.yaml"
    return config.load_yaml(path) if path.exists() else settings


def download(found, results: Path) -> None:
    """The files of one W&B run, each checked against the SHA-256 in the run's configuration."""
    wanted = found.config["record"].get("files", {})
    there = {file.name: file for file in found.files()}
    for name, checksum in wanted.items():
        target = (results / name).resolve()
        if not target.is_relative_to(results.resolve()):
            raise StudyError(f"W&B run {found.id}", f"a file named {name!r}", "a path inside the study's results")
        if target.exists() and sha256(target) == checksum:
            continue
        if name in there:
            there[name].download(root=str(results), replace=True)
        if not target.exists() or sha256(target) != checksum:
            target.unlink(missing_ok=True)
            raise StudyError(
                f"W&B run {found.id}",
                f"{name} is {'not what its checksum says' if name in there else 'missing'}",
                f"SHA-256 {checksum}",
                "./run_all.sh sync where its records are",
            )


def results(study: str, scale: str, mode: str, results_dir: str | Path | None, source: dict | None = None) -> Path:
    """Where an analysis reads: its `results_dir` (default outputs/<scale>-<mode>/<study>), or, where `source` names
    them ({"project": ..., "run_ids": [...], "entity": ..., "place": ...}), the records of those runs from W&B."""
    own = Path(results_dir or config.ROOT / "outputs" / f"{scale}-{mode}" / study)
    if not source:
        return own
    into = own.parent if results_dir else config.ROOT / "outputs" / f"{scale}-{mode},{FROM}"
    return fetch(into, study=study, scale=scale, mode=mode, **source)
