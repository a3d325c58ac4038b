"""Checkpoints that are either complete or do not count, and histories cut back to the checkpoint a run resumes from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_model

from lib import record

MARKER = "complete.json"  # written last and fsynced: without it a folder is the remains of a kill inside a save


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def mark_complete(checkpoint: Path, state: dict) -> None:
    """Force everything in `checkpoint` to disk, then write its marker holding `state`."""
    for file in checkpoint.iterdir():
        sync(file)
    record.write_json(checkpoint / MARKER, state)
    sync(checkpoint)
    sync(checkpoint.parent)


def read_marker(checkpoint: Path) -> dict | None:
    """The state a complete checkpoint was marked with; None where it is not complete."""
    try:
        return json.loads((checkpoint / MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first, so that a kill half-way leaves nothing that counts."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    sync(checkpoint)
    shutil.rmtree(checkpoint)


def checkpoint_folders(folder: str | os.PathLike) -> list[Path]:
    """All checkpoint folders under `folder`, complete or not, by step."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.is_dir() and p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def last_complete_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The complete checkpoint with the highest step under `folder` (a member's `checkpoints`), or None."""
    return next((p for p in reversed(checkpoint_folders(folder)) if read_marker(p) is not None), None)


def truncate_history(path: Path, step: int) -> None:
    """Keep the lines of a JSON-lines history up to and with `step`; a half-written last line goes too. Atomic."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    record.write_text(path, "".join(kept))


def load_checkpoint(model: torch.nn.Module, checkpoint: str | Path) -> torch.nn.Module:
    """Load a checkpoint's weights (all of them, or the adapter) into `model`, in place; e.g. an Outcome's `best`."""
    if hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device=str(model.device)))
    else:
        load_model(model, str(Path(checkpoint) / "model.safetensors"), device=str(model.device))
    return model


def usable(place: Path, fingerprint: str | None) -> Path | None:
    """The last complete checkpoint marked with `fingerprint`. What is incomplete or of another configuration is
    removed, and so is what a kill between a save and its tidying left: only the last and its best are kept."""
    found = None
    for folder in checkpoint_folders(place):
        marker = read_marker(folder)
        if fingerprint is None or marker is None or marker["fingerprint"] != fingerprint:
            remove_checkpoint(folder)
        else:
            found = folder
    if found is not None:
        keep_last_and_best(place, found, read_marker(found).get("best_step"))
    return found


def keep_last_and_best(place: Path, last: Path, best_step: int | None) -> None:
    """Remove every other checkpoint."""
    for other in checkpoint_folders(place):
        if other != last and other.name != f"checkpoint-{best_step}":
            remove_checkpoint(other)
