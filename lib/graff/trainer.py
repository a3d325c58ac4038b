"""Training until the budget is used up: transformers.Trainer with a scheduler that decides each step and an optimiser
that applies one rate per block. Evaluation happens inside the budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lib import record, training as checkpoints
from lib.errors import StudyError
from lib.graff import base_model, methods, planner as pl
from lib.graff.block_adam import BlockAdam
from lib.graff.clock import Clock, Energy
from lib.graff.order import Bucketed
from lib.graff.probes import Probes

NO_CAP = 100_000
EVALUATIONS = 10  # over the budget
SAVE_SECONDS = 3.0  # of the wall clock between checkpoints, at the least: a laptop's whole budget takes 8
STATE = "budget.pt"


class _Steps(TrainerCallback):
    """Calls the trainer between backward and step, and after the step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **_):
        record.count("training", (state.global_step + 1) * args.gradient_accumulation_steps)

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.trainer.before_step()

    def on_optimizer_step(self, args, state, control, **_):
        self.trainer.after_step()

    def on_step_end(self, args, state, control, **_):
        self.trainer.schedule(control)


class BudgetTrainer(Trainer):
    """See the module. `evaluate_now(model, whole) -> (row of history, units)`; `on_record` gets one row per step."""

    def __init__(
        self,
        model,
        rows: list[dict],
        args: TrainingArguments,
        *,
        run,
        probes: Probes,
        method,
        clock: Clock,
        pad: int,
        optimizer,
        fingerprint: str,
        on_record: Callable,
        evaluate_now: Callable,
        energy: Energy,
    ):
        self.run, self.probes, self.method, self.clock, self.energy = run, probes, method, clock, energy
        self.fingerprint, self.on_record, self.evaluate_now = fingerprint, on_record, evaluate_now
        self.lengths = [len(row["ids"]) for row in rows]
        self.spent = Path(args.output_dir).parent / "spent.json"
        self.lam, self.lambdas, self.log_mean = (
            0.0,
            None,
            None,
        )  # curvature: largest, per block, running mean of its log
        self.recent, self.eval_seconds, self.evaluations = (
            [],
            0.0,
            0,
        )  # seconds of the last steps, one with a secant among them
        self.dtau_mean, self.best, self.regret = None, math.inf, 0.0
        self.final, self.diverged_at, self.credit, self.saved = False, None, None, time.monotonic()
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            data_collator=lambda batch: base_model.collate(batch, pad),
            callbacks=[_Steps(self)],
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is divided here, by the label tokens of the global batch

    def _get_train_sampler(self, train_dataset=None):
        data = self.run.dataset
        return Bucketed(
            self.lengths,
            self.args.per_device_train_batch_size,
            self.args.seed,
            data.shuffle_buffer if data.streaming else None,
        )

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["ids", "prompt"]

    def floating_point_ops(self, inputs):
        return 0

    def log(self, logs, start_time=None):
        """The record is written by `after_step`."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.before = self.clock.tick()
        self.plan, self.token_losses, self.micro = None, [], 0
        found, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.micros = len(found)
        return found, tokens

    # ---- one step: decide in the first micro-batch's forward, learn before the update, look again after it

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.micro += 1
        if self.micro == self.micros and self.due(self.method.wants_secant):
            self.probes.before_last_micro(model)
        return super().training_step(model, inputs, num_items_in_batch)

    def due(self, wanted: bool) -> bool:
        return wanted and self.state.global_step >= methods.EVERY and self.state.global_step % methods.EVERY == 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, z, entropy = self.probes.token_losses(model, inputs, self.method.wants_entropy)
        self.clock.charge(
            3 * inputs["input_ids"].numel() + self.probes.entropy_units(inputs, self.method.wants_entropy)
        )
        if self.plan is None:
            self.plan = self.method.decide(methods.Seen(self.clock.fraction, entropy, self.log_lambda()))
        w = torch.ones_like(losses)
        if self.method.loss_weights:
            w = pl.token_weights(float(self.plan.a), z)[0]
        elif isinstance(self.method, methods.Bats):
            w = self.method.weights(losses)
        self.token_losses.append(losses.detach())
        self.held = (inputs, w.detach(), z, int(num_items_in_batch))
        return (w * losses).sum() / num_items_in_batch

    def log_lambda(self) -> Tensor:
        n = 2 * self.method.layers
        return torch.zeros(n) if self.lambdas is None else (self.lambdas.log() - self.log_mean).clamp(-2, 2)

    def before_step(self) -> None:
        optimizer, method = self.inner(), self.method
        self.loss = float(torch.cat(self.token_losses).mean())
        beta1 = self.run.training.optimizer.betas[0]
        eta0, cot, found = self.run.training.optimizer.lr_init, None, None
        if method.wants_gradient and optimizer.delta is not None:
            g = optimizer.gradients()
            found = pl.block_sums(g, optimizer.delta, optimizer.blocks, optimizer.n)
            c_a = self.probes.token_credit(self.model, self.credit, g) * methods.EVERY if self.credit else 0.0
            if self.credit:
                self.clock.charge(2 * self.credit["inputs"]["input_ids"].numel())
            cot = pl.cotangents(
                found, c_a, g, optimizer.delta, self.run.training.scheduler.norm or "cos", self.weight()
            )
        self.clock.charge(self.probes.planner_units(method))
        method.learn(self.loss, cot, self.lam, eta0, beta1)
        self.c_eta, self.credit = None if found is None else float(found.sum()), None
        warm = min(1.0, self.clock.fraction / methods.WARM_UP)
        self.eta = min(eta0 * math.exp(float(self.plan.log_eta)), method.cap(self.lam, beta1)) * warm
        if isinstance(optimizer, BlockAdam):
            optimizer.eta, optimizer.m = self.eta, self.plan.log_m.exp()
        else:
            torch.nn.utils.clip_grad_norm_(
                [p for p in self.model.parameters() if p.requires_grad], self.run.training.clip_grad_norm
            )
            if self.run.training.scheduler.type == "prodigy":  # schedule-free has a warm-up of its own
                optimizer.param_groups[0]["lr"] = warm  # of its own estimate d, not of eta_0

    def weight(self) -> float:
        """What regret weights the hypergradients by: a step's time (the last one's: this one is not over) over its
        running mean, or 1 / time (literal)."""
        if (self.run.training.scheduler.regret or "area") == "literal":
            return 1.0 / max(self.clock.used, 1e-9)
        return 1.0 if not self.dtau_mean else self.dtau / self.dtau_mean

    def after_step(self) -> None:
        optimizer, method = self.inner(), self.method
        if self.due(method.wants_secant):
            lambdas, lam = self.probes.secant(self.model, self.held, optimizer, optimizer.m)
            self.clock.charge(3 * self.held[0]["input_ids"].numel())
            lambdas = lambdas.clamp_min(1e-12)
            self.lam = max(lam, 0.9 * self.lam + 0.1 * lam)
            self.log_mean = lambdas.log() if self.log_mean is None else 0.9 * self.log_mean + 0.1 * lambdas.log()
            self.lambdas = lambdas
        if self.due(method.wants_probe and method.wants_gradient):
            self.credit = {
                "inputs": self.held[0],
                "z": self.held[2],
                "a": float(self.plan.a),
                "eta": self.eta,
                "jacobian": optimizer.jacobian(),
            }
        if self.due(isinstance(method, methods.Salelr)):
            method.ranged(self.probes.range(self.model, self.held[0], optimizer, method.RHO))
            self.clock.charge(3 * self.held[0]["input_ids"].numel())
        if isinstance(method, methods.Bats):
            method.after(torch.cat(self.token_losses))
        used = self.clock.tick()
        self.energy.update()
        self.dtau = used - self.before
        self.dtau_mean = self.dtau if self.dtau_mean is None else 0.9 * self.dtau_mean + 0.1 * self.dtau
        self.recent = [*self.recent, self.dtau][-2 * methods.EVERY :]
        self.best = min(self.best, self.loss)
        self.regret += (self.loss - self.best) / max(used, 1e-9)
        step = self.state.global_step + 1
        eta = (
            self.eta
            if isinstance(optimizer, BlockAdam)
            else optimizer.param_groups[0]["lr"] * optimizer.param_groups[0].get("d", 1.0)
        )
        held = round(step / max(self.clock.fraction, 1e-9))  # by the budget, which ends most runs before the cap
        self.on_record(
            {
                "step": step,
                "steps": min(held, self.args.max_steps),
                "used": used,
                "fraction": self.clock.fraction,
                "loss": self.loss,
                "eta": eta,
                "log_m": self.plan.log_m.tolist(),
                "a": float(self.plan.a),
                "lambda": self.lam or None,
                "c_eta": self.c_eta,
                "regret": self.regret,
                **method.log,
            }
        )
        if self.clock.kind == "monotonic":
            record.write_json(self.spent, {"used": used})
        if not math.isfinite(self.loss):
            self.diverged_at = step

    def next_step(self) -> float:
        """Seconds that the next step may take: as the longest of the last ones, and a micro-batch more for the first
        secant."""
        first = self.due(self.method.wants_secant) and self.lambdas is None
        return max(self.recent) * (1 + first / self.micros)

    def schedule(self, control) -> None:
        """Evaluate ten times over the budget, and stop where another step would leave no time for the last
        evaluation."""
        if self.diverged_at is not None:
            control.should_training_stop, control.should_evaluate, control.should_save = True, False, False
            return
        used, budget = self.clock.used, self.clock.budget
        last = self.state.global_step >= self.args.max_steps
        if self.state.global_step == 1 and used + 1.2 * self.eval_seconds > budget:
            raise StudyError(
                "training.budget_minutes",
                f"{budget:.3g} s hold not even one step and one evaluation "
                f"({used:.3g} s and {self.eval_seconds:.3g} s)",
                "a budget for at least that",
                f"--set training.budget_minutes={2 * (used + 1.2 * self.eval_seconds) / 60:.2g}",
            )
        self.final = last or used + self.next_step() + 1.2 * self.eval_seconds >= budget
        place = int(EVALUATIONS * self.clock.fraction)
        room = used + self.next_step() + 1.2 * self.eval_seconds * (1 + self.probes.subset_share) < budget
        control.should_evaluate = self.final or (place > self.evaluations and room)
        control.should_save = self.final or (control.should_evaluate and time.monotonic() - self.saved >= SAVE_SECONDS)
        control.should_training_stop = self.final

    def evaluate(self, *_, **__):
        self.control.should_evaluate = False
        self.evaluations = int(EVALUATIONS * self.clock.fraction)
        before = self.clock.used
        row, units, seconds_for_all = self.evaluate_now(self.model, self.final)
        self.clock.charge(units)
        used = self.clock.tick()
        if self.clock.kind == "monotonic":
            self.eval_seconds = max(self.eval_seconds, (used - before) * seconds_for_all)
        self.energy.update()
        self.on_record(
            {"step": self.state.global_step, "used": used, "joules": self.energy.joules, "final": self.final, **row}
        )
        self.model.train()
        return {}

    def inner(self):
        return getattr(self.optimizer, "optimizer", self.optimizer)

    # ---- checkpoints: the trained parameters, the optimiser (Trainer's), and everything a decision depends on

    def state_to_save(self) -> dict:
        names = (
            "lam",
            "lambdas",
            "log_mean",
            "recent",
            "eval_seconds",
            "evaluations",
            "dtau",
            "dtau_mean",
            "best",
            "regret",
            "credit",
            "final",
        )
        optimizer = self.inner()
        kept = {k: getattr(optimizer, k) for k in ("delta", "eta", "m")} if isinstance(optimizer, BlockAdam) else {}
        return {
            "used": self.clock.used,
            "joules": self.energy.joules,
            "method": self.method.state(),
            "optimizer": kept,
            **{k: getattr(self, k) for k in names},
        }

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach().contiguous().cpu() for n, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, folder / "model.safetensors")
        torch.save(self.state_to_save(), folder / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        restore_weights(model or self.model, Path(resume_from_checkpoint))
        saved = torch.load(Path(resume_from_checkpoint) / STATE, weights_only=True)
        self.method.restore(saved.pop("method"))
        self.energy.joules = saved.pop("joules")
        self.inner().__dict__.update(saved.pop("optimizer"))
        used = saved.pop("used")
        if self.clock.kind == "monotonic":  # what was spent after the checkpoint is spent
            used = max(used, (record.read_json(self.spent) or {}).get("used", 0.0))
        self.clock.used = used
        self.__dict__.update(saved)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        place = Path(self.args.output_dir)
        mine = place / f"checkpoint-{self.state.global_step}"
        checkpoints.mark_complete(
            mine, {"step": self.state.global_step, "fingerprint": self.fingerprint, "done": self.final}
        )
        checkpoints.keep_last_and_best(place, mine, None)
        self.saved = time.monotonic()


def restore_weights(model, checkpoint: Path) -> None:
    saved, mine = load_file(checkpoint / "model.safetensors"), dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in saved.items():
            mine[name].copy_(tensor)
