"""What the trainings of all studies share: a transformers.Trainer that records every step and resumes bit for bit.

A study subclasses StudyTrainer and supplies its loss, what a step and an evaluation record, and whatever else a
resumed run must remember. Order, history, divergence, checkpoints and resume are here and nowhere else.
"""

import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from peft import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, load_model, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lib import record

MARKER = "complete.json"  # written last and fsynced: without it a folder is the remains of a kill inside a save
STATE = "state.pt"  # of a checkpoint: what a study remembers besides its weights

# ---- the processes of one training (one, but for a sharded model: lib/run/sharding.py) ----


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather(value: Any) -> list:
    """The processes' values, by rank. (Accelerate's own knows of one process until a Trainer has been made.)"""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def on_rank_zero(function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, which alone calls it, on every rank: for what changes files."""
    return all_gather(function() if rank() == 0 else None)[0]


# ---- batches and random state ----


def pad_rows(rows: list[list[int]], fill: int) -> torch.Tensor:
    """(B, L) rows of different lengths, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def collate(rows: list[dict], pad: int) -> dict[str, torch.Tensor]:
    """(B, T) input_ids, attention_mask and labels of rows {"ids", "prompt" (its length)}, padded on the right; labels are
    -100 on prompts and padding."""
    return {
        "input_ids": pad_rows([row["ids"] for row in rows], pad),
        "attention_mask": pad_rows([[1] * len(row["ids"]) for row in rows], 0),
        "labels": pad_rows([[-100] * min(r["prompt"], len(r["ids"])) + r["ids"][r["prompt"] :] for r in rows], -100),
    }


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


WINDOW = 16  # batches that are sorted by length together


class SeededOrder(torch.utils.data.Sampler):
    """A new permutation each epoch that depends on the seed, the epoch, the number of rows and, where they are given, their
    `lengths`; on nothing else. With these, rows of like length come into one batch of `batch`: sorted inside windows of 16
    batches, whose batches are then shuffled. An incomplete batch stays the last."""

    def __init__(self, size: int, seed: int, epoch: int = 0, lengths: list[int] | None = None, batch: int = 1):
        self.size, self.seed, self.epoch, self.lengths, self.batch = size, seed, epoch, lengths, batch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def shuffle(self, rng: np.random.Generator) -> list[int]:
        return rng.permutation(self.size).tolist()

    def __iter__(self) -> Iterator[int]:
        rng, size = np.random.default_rng([self.seed, self.epoch]), self.batch
        order, window = self.shuffle(rng), WINDOW * size
        if self.lengths is None:
            yield from order
            return
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=self.lengths.__getitem__)
            whole = len(rows) // size
            for b in rng.permutation(whole):
                yield from rows[b * size : (b + 1) * size]
            yield from rows[whole * size :]


def seeded_batches(rows: list, size: int, seed: int, lengths: list[int] | None = None) -> Iterator[list]:
    """Batches of rows without end, those of a training: epoch after epoch in SeededOrder, an epoch's last with what is left."""
    for epoch in itertools.count():
        order = list(SeededOrder(len(rows), seed, epoch, lengths, size))
        for start in range(0, len(order), size):
            yield [rows[place] for place in order[start : start + size]]


# ---- checkpoints: complete, or they do not count ----


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def mark_complete(checkpoint: Path, state: dict) -> None:
    """Force everything in `checkpoint` to disk, then write its marker holding `state`."""
    for file in checkpoint.iterdir():
        _fsync(file)
    record.write_json(checkpoint / MARKER, state)
    _fsync(checkpoint)
    _fsync(checkpoint.parent)


def read_marker(checkpoint: Path) -> dict | None:
    """The state a complete checkpoint was marked with; None where it is not complete."""
    return record.read_json(checkpoint / MARKER)


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first, so that a kill halfway leaves nothing that counts."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    _fsync(checkpoint)
    shutil.rmtree(checkpoint)


def checkpoint_folders(folder: str | os.PathLike) -> list[Path]:
    """All checkpoint folders under `folder`, complete or not, by step."""
    folders = [p for p in Path(folder).glob("checkpoint-*") if p.is_dir() and p.name[11:].isdigit()]
    return sorted(folders, key=lambda p: int(p.name[11:]))


def last_complete_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The complete checkpoint with the highest step under `folder` (a member's `checkpoints`), or None."""
    return next((p for p in reversed(checkpoint_folders(folder)) if read_marker(p) is not None), None)


def keep_last_and_best(place: Path, last: Path, best_step: int | None) -> None:
    """Remove every other checkpoint."""
    for other in checkpoint_folders(place):
        if other != last and other.name != f"checkpoint-{best_step}":
            remove_checkpoint(other)


def resume_point(folder: Path, fingerprint: str) -> tuple[Path | None, dict]:
    """(the checkpoint from which the member in `folder` resumes, what it was marked with): the last complete one of this
    `fingerprint`. What is incomplete or of another configuration is removed, and so is what a kill between a save and its
    tidying left: only the last and its best are kept. Histories are cut back to it, each at once; a half-written last line
    goes too."""
    place, marker = folder / "checkpoints", {"step": -1}
    for each in checkpoint_folders(place):
        if (read_marker(each) or {}).get("fingerprint") != fingerprint:
            remove_checkpoint(each)
    if checkpoint := last_complete_checkpoint(place):
        marker = read_marker(checkpoint)
        keep_last_and_best(place, checkpoint, marker.get("best_step"))
    for path in (folder / "history.jsonl", folder / "timing.jsonl"):
        if path.exists():
            record.write_jsonl(path, (row for row in record.read_jsonl(path) if row["step"] <= marker["step"]))
    return checkpoint, marker


def load_checkpoint(model: torch.nn.Module, checkpoint: str | Path) -> torch.nn.Module:
    """Load the weights that transformers or PEFT saved (all, or the adapter) into `model`, in place."""
    if hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device=str(model.device)))
    else:
        load_model(model, str(Path(checkpoint) / "model.safetensors"), device=str(model.device))
    return model


# ---- training ----


class Outcome(NamedTuple):
    """How a training ended. `step`: steps done, or the step that diverged. `best_step`: that of the
    checkpoint with the best evaluation (the earliest of equals), None where none is chosen."""

    status: str  # completed | diverged
    step: int
    best_step: int | None = None


class StudyTrainer(Trainer, TrainerCallback):
    """A transformers.Trainer whose run is a record: history.jsonl and timing.jsonl in the member's `folder`, complete
    checkpoints in its `checkpoints`.

    A study supplies `compute_loss`, `measure` and `validate`, and where it needs them the hooks below these. The
    trainer is its own callback: `on_pre_optimizer_step` (gradients are there) and `on_optimizer_step` (not cleared yet)
    are a study's to define.
    """

    best_metric: str | None = None  # of `validate`: the highest value's checkpoint is kept as the best
    lengths: list[int] | None = None  # of the training rows, where those of like length come into one batch

    def __init__(
        self,
        model: Any,
        rows: list,
        collate: Callable[[list], dict],
        *,
        folder: str | Path,
        fingerprint: str,
        log_every: int | None = None,
        optimizers: tuple = (None, None),
        **arguments: Any,
    ):
        """`fingerprint`: of everything that a checkpoint must have been made under for a run to go on from it.
        `arguments`: `max_steps`, `seed` and more of transformers' TrainingArguments; all that prints, saves or evaluates by
        itself is off."""
        self.folder, self.fingerprint, self.log_every = Path(folder), fingerprint, log_every
        self.diverged = False
        self.best_step: int | None = None
        self.best_value: float | None = None
        args = TrainingArguments(
            output_dir=str(self.folder / "checkpoints"),
            use_cpu=model.device.type == "cpu",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            report_to="none",
            **{"save_steps": None} | arguments,  # transformers' own is 500
        )
        args._n_gpu = min(1, args.n_gpu)  # of several that this process sees: no DataParallel, no multiplied batch
        super().__init__(model, args, collate, rows, callbacks=[self], optimizers=optimizers)
        self.remove_callback(PrinterCallback)

    # -- what a study supplies

    def measure(self) -> dict:
        """What history holds of the step that has just ended: at least its `loss`."""

    def throughput(self, seconds: float) -> dict:
        """What timing.jsonl holds of the step besides its seconds."""
        return {}

    def validate(self) -> dict:
        """What history holds of an evaluation; its random numbers do not touch the training's."""
        return {}

    def begin(self) -> None:
        """Before the first step of a run that starts from nothing."""

    def schedule(self) -> None:
        """Decide after a step whether to evaluate and save: at the intervals (None: not in between) and at the end."""
        intervals = (self.args.eval_steps, self.args.save_steps)
        due = [self.finished() or bool(every and self.state.global_step % every == 0) for every in intervals]
        self.control.should_evaluate, self.control.should_save = due

    def finished(self) -> bool:
        """Whether the step that has just ended was the last one."""
        return self.state.global_step >= self.args.max_steps

    def extra_state(self) -> dict:
        """What a resumed run needs besides weights, optimizer, schedule and random state (plain values, tensors)."""

    def load_extra_state(self, state: dict) -> None:
        """Take over what `extra_state` returned when the checkpoint was saved."""

    # -- running

    def fit(self) -> Outcome:
        """Train from the last complete checkpoint of this fingerprint, else from the start; a finished run is loaded."""
        checkpoint, marker = on_rank_zero(lambda: resume_point(self.folder, self.fingerprint))
        self.best_step, self.best_value = marker.get("best_step"), marker.get("best_value")
        if marker.get("done"):
            self._load_from_checkpoint(str(checkpoint))
            self.state.global_step = marker["step"]
        else:
            if checkpoint is None:
                self.begin()
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return Outcome("diverged" if self.diverged else "completed", self.state.global_step, self.best_step)

    def on_step_begin(self, args, state, control, **_):
        record.count("training", (state.global_step + 1) * args.gradient_accumulation_steps)

    def on_step_end(self, args, state, control, **_):
        self.schedule()
        if record.stopping() and not self.diverged:
            control.should_save = True

    def on_save(self, args, state, control, **_):
        if record.stopping() and not self.finished():
            print(f"asked to stop: step {state.global_step} is saved", flush=True)
            record.stop()

    def diverge(self) -> None:
        """End the run here; a diverged model is neither evaluated nor saved."""
        self.diverged = self.control.should_training_stop = True
        self.control.should_evaluate = self.control.should_save = False

    def write(self, row: dict) -> None:
        """Append a row to the member's history; every `log_every` steps print a line."""
        if rank() > 0:
            return
        record.append_jsonl(self.folder / "history.jsonl", row)
        if self.log_every and row.get("loss") is not None and row["step"] % self.log_every == 0:
            print(f"step {row['step']}/{self.args.max_steps} loss {row['loss']:.4f}", flush=True)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.started = time.perf_counter()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def log(self, logs, start_time=None):
        if "grad_norm" not in logs:  # transformers' closing summary
            return
        measured, gradient_norm = self.measure(), float(logs["grad_norm"])
        # `measure` waits for the device, so its work is included; a clock may stand still (coarse, or suspended)
        seconds = max(time.perf_counter() - self.started, 1e-9)
        where = {"step": self.state.global_step, "epoch": self.state.epoch}
        self.write({**where, **measured, "grad_norm": gradient_norm, "learning_rate": logs["learning_rate"]})
        row = {"step": self.state.global_step, "seconds": seconds, **self.throughput(seconds)}
        if rank() == 0:
            record.append_jsonl(self.folder / "timing.jsonl", row)
        if not (math.isfinite(measured["loss"]) and math.isfinite(gradient_norm)):
            self.diverge()

    def evaluate(self, *_, **__):
        """Write down `validate`; a new best asks for a checkpoint."""
        self.control.should_evaluate = False
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # what it samples leaves the training's random numbers as they were
            measured = self.validate()
        if measured:
            self.write({"step": self.state.global_step, **measured})
        value = measured.get(self.best_metric)
        if value is not None and (self.best_value is None or value > self.best_value):
            self.best_step, self.best_value = self.state.global_step, value
            self.control.should_save = True
        self.model.train()
        return {}

    def _get_train_sampler(self, train_dataset=None):
        rows, size = train_dataset or self.train_dataset, self.args.per_device_train_batch_size
        return SeededOrder(len(rows), self.args.seed, 0, self.lengths, size)

    def floating_point_ops(self, inputs):
        return 0  # transformers counts all parameters at every step for a figure nobody reads

    # -- saving

    def _save(self, output_dir=None, state_dict=None):
        """Exactly the trained parameters (PEFT's own form cuts AdaLoRA's matrices: a resumed run would differ)."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach().contiguous().cpu() for n, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, folder / "model.safetensors")
        torch.save(self.extra_state(), folder / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        assert set(saved) == trained, "a checkpoint of other parameters"
        self.model.load_state_dict(saved, strict=False)
        self.load_extra_state(torch.load(Path(resume_from_checkpoint) / STATE, weights_only=True))

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        all_gather(None)  # every process has written its part
        on_rank_zero(self._complete_checkpoint)

    def _complete_checkpoint(self) -> None:
        place, step = Path(self.args.output_dir), self.state.global_step
        checkpoint = place / f"checkpoint-{step}"
        marker = {"step": step, "fingerprint": self.fingerprint, "done": self.finished()}
        mark_complete(checkpoint, {**marker, "best_step": self.best_step, "best_value": self.best_value})
        keep_last_and_best(place, checkpoint, self.best_step)


# ---- what a step costs ----


def make_stepper(
    model: torch.nn.Module, training, loss: Callable[[Any], torch.Tensor], after: Callable[[], Any] = lambda: None
) -> Callable[[Any], float]:
    """A function that takes one AdamW step on `loss(batch)`, then calls `after`, and returns its seconds. `training`
    has learning_rate, weight_decay, max_grad_norm and bf16: as in a training, whose times these stand for."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    model.train()

    def step(batch: Any) -> float:
        start = time.perf_counter()
        with torch.autocast(trained[0].device.type, torch.bfloat16, enabled=training.bf16):
            value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        after()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def time_interleaved(steppers: list[Callable], batches: Iterator, rounds: int, warm_up: int) -> list[list[float]]:
    """Seconds of each stepper on the same batches, (rounds, steppers). Who goes first rotates, so that nobody profits
    from warm caches or suffers from a clock that slows down; `warm_up` rounds come before the clock counts."""
    orders, rows = list(itertools.permutations(range(len(steppers)))), []
    for number in record.batches("measuring steps", range(rounds + warm_up)):
        batch, seconds = next(batches), [0.0] * len(steppers)
        for which in orders[number % len(orders)]:
            seconds[which] = steppers[which](batch)
        rows.append(seconds)
    return rows[warm_up:]
