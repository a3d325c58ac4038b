"""The W&B mirror of a run: written from its record after it has ended, so that nothing of W&B can stop or slow a run.

    python -m lib.tracking RUN_FOLDER MODE          MODE: online | offline

The files of the record stay the source of truth. A member is the W&B run `<run_id>--<member>` in the group `<run_id>`; the
final run, that of the cell chosen on validation, carries the run_id itself. Trials of a search are not mirrored.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lib import record


def rows_by_step(folder: Path) -> list[dict]:
    """A member's history, training and evaluation rows of one step merged, under the key `global_step`."""
    steps: dict[int, dict] = {}
    for row in record.read_jsonl(folder / "history.jsonl"):
        steps.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k != "step" and v is not None})
    return [{"global_step": step, **row} for step, row in sorted(steps.items())]


def mirror(folder: Path, mode: str) -> int:
    """Mirror the run in `folder` (its members, and the chosen cell as its final run where it has no search), or, where
    `folder` is a run's sweep, the final run of the best. Returns how many W&B runs were written."""
    made, run_folder = record.read_json(folder / "metrics.json"), folder
    if folder.name == "sweep":
        run_folder = folder.parent
        final = [(run_folder.name, run_folder / "members" / made["final_members"][0], made["final"])] if made["final"] else []
        wanted = final
    else:
        shutil.rmtree(folder / "wandb", ignore_errors=True)  # an earlier mirror of this run: the record is what counts
        members = [d for d in sorted((folder / "members").iterdir()) if d.name in made["members"]]
        wanted = [(f"{folder.name}--{d.name}", d, record.read_json(d / "metrics.json", {})) for d in members]
        if not (record.read_json(members[0] / "member.json")["config"]["optuna"] or {}).get("n_trials"):
            chosen = next(d for d in members if d.name.rsplit("-s", 1)[0] == made["chosen_cell"])
            wanted.append((folder.name, chosen, made["metrics"]))
    for name, source, summary in wanted:
        _write(name, run_folder, source, summary, mode)
    return len(wanted)


def _write(name: str, run_folder: Path, member: Path, summary: dict, mode: str) -> None:
    import wandb

    settings = record.read_json(member / "member.json")["config"]
    tracked = settings.get("wandb") or {}
    run = wandb.init(
        project=tracked.get("project") or "fine-tuning-studies",
        entity=tracked.get("entity"),
        id=name,
        name=name,
        group=run_folder.name,
        mode=mode,
        dir=str(run_folder),
        resume="allow",
        config=settings,
        settings=wandb.Settings(silent=True, console="off", init_timeout=15, x_disable_stats=True, save_code=False),
    )
    run.define_metric("*", step_metric="global_step")
    for row in rows_by_step(member):
        run.log(row)
    run.summary.update({k: v for k, v in summary.items() if v is not None})
    run.finish()


class Mirrors:
    """The mirrors that are under way, one process each beside the runs; `close` waits for them a little and no longer."""

    def __init__(self):
        self.processes: list[tuple[Path, subprocess.Popen]] = []

    def start(self, folder: Path, mode: str) -> None:
        if mode == "disabled":
            return
        with contextlib.suppress(OSError), open(folder / "wandb.log", "w") as log:
            self.processes.append(
                (
                    folder,
                    subprocess.Popen(
                        [sys.executable, "-P", "-m", "lib.tracking", str(folder), mode],
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    ),
                )
            )

    def close(self, seconds: float) -> None:
        """Wait for what is left, at most `seconds` in all; then end it. The record is whole without it."""
        deadline = time.monotonic() + seconds
        for folder, process in self.processes:
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if code != 0:
                how = "not finished in time" if code is None else "failed"
                print(f"W&B mirror of {folder.name}: {how} (see {folder / 'wandb.log'}); the record is whole", file=sys.stderr)


if __name__ == "__main__":
    print(mirror(Path(sys.argv[1]), sys.argv[2]), "W&B runs written")
