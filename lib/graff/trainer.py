"""Training until the budget is used up: a scheduler decides each step, an optimizer applies one rate per block, and
evaluation happens inside the budget, which is a clock of two kinds; energy is read with its source or not at all."""

import math
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib import config, record, training
from lib.errors import StudyError
from lib.graff import data, planner as pl, schedulers

NO_CAP = 100_000
EVALUATIONS = 10  # over the budget
SAVE_SECONDS = 3.0  # of the wall clock between checkpoints, at the least: a laptop's whole budget takes 8
ENCODER_LR = 3e-4  # of the warm start
BLOCK = re.compile(r"\.layers\.(\d+)\.(self_attn|mlp)\.")


# ---- the budget

# Virtual seconds per unit: a forward pass is 1 unit per token, forward and backward 3, a decoded token 1.
UNIT_SECONDS = 5e-4
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class Clock:
    """Consumed seconds of a budget. `monotonic`: the wall clock between ticks; `virtual`: what was charged. Saved with
    each checkpoint; a resumed run goes on from what was used."""

    def __init__(self, kind: str, budget: float, now=time.monotonic):
        self.kind, self.budget, self.used, self.now = kind, budget, 0.0, now
        self.last: float | None = None

    def start(self) -> None:
        self.last = self.now()

    def charge(self, units: float) -> None:
        """Count work of so many units, on the virtual clock."""
        if self.kind == "virtual":
            self.used += units * UNIT_SECONDS

    def tick(self) -> float:
        """Consumed seconds by now."""
        if self.kind == "monotonic":
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = self.now()
            self.used, self.last = self.used + now - self.last, now
        return self.used

    @property
    def fraction(self) -> float:
        return min(1.0, self.used / self.budget)


class Energy:
    """Joules since the start, accumulated over resumes, with their source (nvml, polled, rapl), or None with the
    reason."""

    def __init__(self) -> None:
        self.source, self._read, self.reason = open_meter()
        self.joules = 0.0 if self.source else None
        self._last = self._read() if self.source else None

    def update(self) -> None:
        if self.source:
            now = self._read()
            if now >= self._last:  # a counter wraps, and starts again with its driver
                self.joules = (self.joules or 0.0) + now - self._last
            self._last = now


def open_meter():
    """(source, function that returns joules so far, None) or (None, None, reason): on a GPU NVML's counter of energy,
    else its power, polled; on a CPU RAPL's counter."""
    if not torch.cuda.is_available():
        try:
            RAPL.read_text()
        except OSError as error:
            return None, None, f"no GPU, and {RAPL} cannot be read ({error.strerror})"
        return "rapl", lambda: int(RAPL.read_text()) / 1e6, None
    try:
        import pynvml

        pynvml.nvmlInit()
        # by UUID: an index would ignore CUDA_VISIBLE_DEVICES
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        try:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        except pynvml.NVMLError:  # older than Volta, or a virtual device
            return "polled", PolledPower(lambda: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3), None
        return "nvml", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3, None
    except Exception as error:  # the package or the driver is missing, or the device tells neither
        return None, None, f"NVML gives neither energy nor power: {error}"


class PolledPower:
    """Power in watts, read twice a second by a thread and integrated by the trapezoid rule; a call reads it once more
    and returns the joules so far."""

    INTERVAL = 0.5

    def __init__(self, watts, now=time.monotonic):
        self.watts, self.now, self.joules, self.lock = watts, now, 0.0, threading.Lock()
        self.at, self.power = now(), watts()
        threading.Thread(target=self._poll, daemon=True).start()

    def __call__(self) -> float:
        with self.lock:
            at, power = self.now(), self.watts()
            self.joules += (at - self.at) * (power + self.power) / 2
            self.at, self.power = at, power
            return self.joules

    def _poll(self) -> None:
        while True:
            time.sleep(self.INTERVAL)
            self()


def area(times: list[float], values: list[float], budget: float) -> float:
    """Area under `values` over time by the trapezoid rule, from t = 0 to the budget (the last value holds), over the
    budget."""
    return float(np.trapezoid([*values, values[-1]], [*times, budget])) / budget


def energy_to_level(joules: list, exact_match: list, level: float | None) -> float | None:
    """Joules when exact match first reaches `level`, between two evaluations by linear interpolation. None where no
    level is stated, nothing was read, it is never reached, or the base model (the first evaluation) is there already:
    then nothing was spent on reaching it."""
    if level is None or any(j is None or j != j for j in joules) or exact_match[0] >= level:
        return None
    spans = zip(joules, joules[1:], exact_match, exact_match[1:], strict=False)
    return next((j0 + (j1 - j0) * (level - e0) / (e1 - e0) for j0, j1, e0, e1 in spans if e1 >= level), None)


# ---- what a step looks at


class Probes:
    """What a step looks at in a model with adapters: token losses, entropies, the secant on one micro-batch, losses
    along a direction. `frequent` (V',) are the vocabulary rows that entropies are over."""

    def __init__(self, model, frequent: Tensor):
        self.base: PreTrainedModel = model.get_base_model()
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.parameters, places = [p for _, p in named], [BLOCK.search(name).groups() for name, _ in named]
        self.blocks = torch.tensor([2 * int(layer) + (kind == "mlp") for layer, kind in places])  # (P,) of each
        self.layers = self.base.config.num_hidden_layers
        self.frequent = frequent.to(self.base.device)
        self.size = sum(p.numel() for p in model.parameters())
        self.hidden: Tensor | None = None
        self.base.model.layers[0].register_forward_hook(self._keep)
        # logits_to_keep hands the head a slice; in bfloat16 on a CPU that takes a hundred times as long as a copy of it
        copy = torch.contiguous_format
        head = self.base.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, given: (given[0].clone(memory_format=copy),))

    def _keep(self, _module, _inputs, output) -> None:
        self.hidden = (output[0] if isinstance(output, tuple) else output).detach()

    # ---- what they cost on the virtual clock, in units (forward passes of a token)

    def entropy_units(self, inputs: dict) -> float:
        return len(self.frequent) * self.base.config.hidden_size / self.size * int((inputs["labels"] != -100).sum())

    def planner_units(self, scheduler) -> float:
        return scheduler.work(sum(p.numel() for p in self.parameters)) / self.size

    # ---- the loss, token by token

    def token_losses(self, model, inputs: dict, entropies: bool) -> tuple[Tensor, Tensor, float]:
        """((K,) losses of the label tokens in nats, (K,) standardized entropies, mean entropy over log |V'|)."""
        logits, labels = data.answer_logits(model, inputs)
        there = labels != -100
        exact = torch.promote_types(logits.dtype, torch.float32)
        losses = nn.functional.cross_entropy(logits[there].to(exact), labels[there], reduction="none")
        if not entropies:
            return losses, torch.zeros_like(losses), 0.0
        h = self.entropy(self.hidden[:, -labels.shape[1] - 1 : -1][there])
        z = (h - h.mean()) / h.std().clamp_min(1e-6)
        return losses, z, float(h.mean() / torch.log(torch.tensor(float(len(self.frequent)))))

    @torch.no_grad()
    def entropy(self, hidden: Tensor) -> Tensor:
        """(K,) entropy in nats of lm_head(norm(hidden)) over the frequent rows."""
        head = self.base.get_output_embeddings().weight[self.frequent]
        log_p = (self.base.model.norm(hidden).to(head.dtype) @ head.T).float().log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    # ---- two gradients of the same micro-batch

    def before_last_micro(self) -> None:
        """Remember the sum of gradients so far and the dropout's state, for `secant`."""
        self.so_far = [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]
        self.rng = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def secant(self, model, held: dict, optimizer) -> tuple[Tensor, float]:
        """(lambda per block (N,), global lambda) from the last micro-batch at theta_t (its share of the summed
        gradient) and at theta_{t+1}, with the same dropout mask and weights."""
        first = [p.grad if s is None else p.grad - s for p, s in zip(self.parameters, self.so_far, strict=True)]
        with torch.random.fork_rng():
            torch.set_rng_state(self.rng[0])
            torch.cuda.set_rng_state_all(self.rng[1])  # a GPU's dropout draws from its own generator
            losses = self.token_losses(model, held["inputs"], False)[0]
            second = torch.autograd.grad((held["w"] * losses).sum() / held["tokens"], self.parameters)
        y = torch._foreach_sub(list(second), first)
        share = held["tokens"] / len(losses)  # the micro-batch's own mean, not its part of the global batch
        return pl.curvature(optimizer.delta, torch._foreach_mul(y, share), optimizer.p, optimizer.m, self.blocks)

    @torch.no_grad()
    def along(self, model, inputs: dict, direction: list[Tensor], size: float) -> Tensor:
        """(K,) token losses at theta + size * direction; the parameters come back bit for bit."""
        before = [p.detach().clone() for p in self.parameters]
        torch._foreach_add_(self.parameters, direction, alpha=size)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses = self.token_losses(model, inputs, False)[0]
        for p, old in zip(self.parameters, before, strict=True):
            p.copy_(old)
        return losses

    def token_credit(self, model, credit: dict, g: list[Tensor]) -> float:
        """c_a by a central difference along v = m J g of the held micro-batch's token losses."""
        v = torch._foreach_mul(credit["jacobian"], g)
        norm = float(nn.utils.get_total_norm(v))
        if not norm > 0:
            return 0.0
        size = 1e-2 / norm  # the step that rounding and curvature leave most digits at, in float32
        up, down = (self.along(model, credit["inputs"], v, x) for x in (size, -size))
        dw = pl.token_weights(credit["a"], credit["z"])[1]
        return float(pl.token_credit(credit["eta"], dw, (up - down) / (2 * size)))

    def range(self, model, inputs: dict, optimizer, rho: float) -> float:
        """Largest less smallest mean loss at theta and theta +- rho u / |u|, for salelr_reconstructed."""
        size = rho * float(nn.utils.get_total_norm(self.parameters))
        size /= max(float(nn.utils.get_total_norm(optimizer.u)), 1e-30)
        means = [float(self.along(model, inputs, optimizer.u, x).mean()) for x in (0.0, size, -size)]
        return max(means) - min(means)


# ---- what a run is trained with


def build_scheduler(run, layers: int, shared: Path, planner: dict | None = None) -> Any:
    """The run's scheduler; `planner`: tensors that the warm start goes on from, learning the encoder too."""
    section, file = run.training.scheduler, Path(shared) / "warm_start.safetensors"
    if planner is not None:
        scheduler = schedulers.Graff(section, layers, ENCODER_LR)
        if planner:
            scheduler.planner.load_state_dict(planner)
        return scheduler
    scheduler: Any = schedulers.SCHEDULERS[section.type](section, layers)
    if path := section.warm_start_ckpt:
        path = file if path == "made" else Path(path)
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        scheduler.planner.load_state_dict(tensors)
    if hasattr(scheduler, "gain") and file.exists():  # hypergradient descent, matched to the planner
        planner = pl.Planner()
        planner.load_state_dict(load_file(file))
        scheduler.gain = pl.gain(planner, layers)
    return scheduler


def build_optimizer(run, probes: Probes) -> pl.BlockAdam:
    """One Adam for all schedulers."""
    section, clip = run.training.optimizer, run.training.clip_grad_norm
    own = section.lr_init, tuple(section.betas), section.weight_decay
    return pl.BlockAdam(probes.parameters, *own, probes.blocks, 2 * probes.layers, clip)


# ---- training


class BudgetTrainer(training.StudyTrainer):
    """See the module. One step: decide in the first micro-batch's forward, learn before the update, look again after
    it."""

    SAVED = ("lam", "lambdas", "log_mean", "recent", "eval_seconds", "evaluations", "dtau", "dtau_mean")
    SAVED += ("running", "credit", "final", "capped")

    def __init__(self, run, seed: int, folder: Path, given: SimpleNamespace, model, scheduler):
        self.run, self.given, self.scheduler, self.probes = run, given, scheduler, Probes(model, given.frequent)
        self.adam = build_optimizer(run, self.probes)  # self.optimizer is accelerate's wrapper of it
        self.answers_at_once = run.evaluation.batch_size or 4 * run.training.micro_batch_size
        self.clock, self.energy = Clock(run.training.clock, 60 * run.training.budget_minutes), Energy()
        self.dev, self.subset = given.problems["dev"], given.problems["dev"][: run.evaluation.dev_subset]
        self.lengths, self.spent = [len(row["ids"]) for row in given.rows["train"]], folder / "spent.json"
        # curvature: the largest, per block, and the running mean of its log
        self.lam, self.lambdas, self.log_mean = 0.0, None, None
        self.recent: list[float] = []  # seconds of the last steps, one with a secant among them
        self.eval_seconds, self.evaluations, self.dtau_mean = 0.0, 0, None
        self.final, self.credit, self.saved_at = False, None, time.monotonic()
        self.capped = False  # ended by total_steps before its budget
        self.running: tuple | None = None  # the running mean of the loss, its least, R_T
        parts = {name: config.dump(run)[name] for name in ("model", "dataset", "training", "evaluation")}
        super().__init__(
            model,
            given.rows["train"],
            lambda rows: data.collate(rows, given.tokenizer.pad_token_id),
            folder=folder,
            fingerprint=record.digest([parts, seed]),
            max_steps=run.training.total_steps or NO_CAP,
            seed=seed,
            optimizers=(self.adam, torch.optim.lr_scheduler.LambdaLR(self.adam, lambda _: 1.0)),
            per_device_train_batch_size=run.training.micro_batch_size,
            gradient_accumulation_steps=run.training.accumulation,
            max_grad_norm=0.0,
            gradient_checkpointing=run.training.gradient_checkpointing,
            bf16=run.training.mixed_precision == "bf16" and torch.cuda.is_available(),
            logging_strategy="no",
        )
        self.model_accepts_loss_kwargs = True  # the loss is divided here, by the label tokens of the global batch

    def _get_train_sampler(self, train_dataset=None):
        section = self.run.dataset
        buffer = section.shuffle_buffer if section.streaming else None
        return data.BucketedOrder(self.lengths, self.args.per_device_train_batch_size, self.args.seed, buffer)

    def due(self, wanted: bool) -> bool:
        return wanted and self.state.global_step >= schedulers.EVERY and self.state.global_step % schedulers.EVERY == 0

    # ---- one step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.before = self.clock.tick()
        self.plan, self.token_losses = None, []
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.micros = len(batches)
        return batches, tokens

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.accelerator.sync_gradients and self.due(self.scheduler.wants_secant):
            self.probes.before_last_micro()
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy of the answers' tokens, each with its weight. The history holds it unweighted."""
        wanted = self.scheduler.wants_entropy
        losses, z, entropy = self.probes.token_losses(model, inputs, wanted)
        self.clock.charge(3 * inputs["input_ids"].numel() + (self.probes.entropy_units(inputs) if wanted else 0.0))
        if self.plan is None:
            self.plan = self.scheduler.decide(schedulers.Seen(self.clock.fraction, entropy, self.log_lambda()))
        w = self.scheduler.token_weights(self.plan, losses, z)
        self.token_losses.append(losses.detach())
        self.held = {"inputs": inputs, "w": w.detach(), "z": z, "tokens": int(num_items_in_batch)}
        return (w * losses).sum() / num_items_in_batch

    def log_lambda(self) -> Tensor:
        """(N,) curvature per block as the planner reads it."""
        if self.lambdas is None:
            return torch.zeros(2 * self.probes.layers)
        return (self.lambdas.log() - self.log_mean).clamp(-2, 2)

    def on_pre_optimizer_step(self, args, state, control, **_):
        """Learn from this batch's gradient what the last step's plan did, then set this step's rates."""
        optimizer, scheduler = self.adam, self.scheduler
        self.loss = float(torch.cat(self.token_losses).mean())
        beta1, eta0 = self.run.training.optimizer.betas[0], self.run.training.optimizer.lr_init
        cotangents, self.c_eta = None, None
        if scheduler.wants_gradient and optimizer.delta is not None:
            g, c_a = optimizer.gradients(), 0.0
            c = pl.block_sums(g, optimizer.delta, optimizer.blocks, optimizer.n)
            if self.credit:
                c_a = self.probes.token_credit(self.model, self.credit, g) * schedulers.EVERY
                self.clock.charge(2 * self.credit["inputs"]["input_ids"].numel())
            norm = self.run.training.scheduler.norm or "cos"
            cotangents = pl.cotangents(c, c_a, g, optimizer.delta, norm, self.regret_weight())
            self.c_eta = float(c.sum())
        self.clock.charge(self.probes.planner_units(scheduler))
        scheduler.learn(self.loss, cotangents, self.lam, eta0, beta1)
        self.credit = None
        warm = min(1.0, self.clock.fraction / schedulers.WARM_UP)
        self.eta = min(eta0 * math.exp(float(self.plan.log_eta)), scheduler.cap(self.lam, beta1)) * warm
        optimizer.eta, optimizer.m = self.eta, self.plan.log_m.exp()

    def regret_weight(self) -> float:
        """What regret weights the hypergradients by: a step's time (the last one's: this one is not over) over its
        running mean, or 1 / time (literal)."""
        if self.run.training.scheduler.regret == "literal":
            return 1.0 / max(self.clock.used, 1e-9)
        return 1.0 if not self.dtau_mean else self.dtau / self.dtau_mean

    def on_optimizer_step(self, args, state, control, **_):
        """Measure curvature where it is due, keep what the next step learns from, and write the step down."""
        optimizer, scheduler, held = self.adam, self.scheduler, self.held
        if self.due(scheduler.wants_secant):
            lambdas, lam = self.probes.secant(self.model, held, optimizer)
            self.clock.charge(3 * held["inputs"]["input_ids"].numel())
            self.lambdas = lambdas.clamp_min(1e-12)
            self.lam = max(lam, 0.9 * self.lam + 0.1 * lam)
            log = self.lambdas.log()
            self.log_mean = log if self.log_mean is None else 0.9 * self.log_mean + 0.1 * log
        if self.due(scheduler.wants_probe and scheduler.wants_gradient):
            self.credit = {"inputs": held["inputs"], "z": held["z"], "a": float(self.plan.a), "eta": self.eta}
            self.credit["jacobian"] = optimizer.jacobian()
        if self.due(scheduler.wants_range):
            scheduler.observe_range(self.probes.range(self.model, held["inputs"], optimizer, scheduler.RHO))
            self.clock.charge(3 * held["inputs"]["input_ids"].numel())
        scheduler.after(torch.cat(self.token_losses))
        used = self.clock.tick()
        self.energy.update()
        self.dtau = used - self.before
        self.dtau_mean = self.dtau if self.dtau_mean is None else 0.9 * self.dtau_mean + 0.1 * self.dtau
        self.recent = [*self.recent, self.dtau][-2 * schedulers.EVERY :]
        mean, least, total = self.running or (self.loss, self.loss, 0.0)
        mean = 0.9 * mean + 0.1 * self.loss  # the least of single batches is an easy batch
        least = min(least, mean)
        total += (mean - least) / max(used, 1e-9)
        self.running = mean, least, total
        step = self.state.global_step + 1
        by_budget = round(step / max(self.clock.fraction, 1e-9))  # which ends most runs before the cap
        self.write(
            {
                "step": step,
                "steps": min(by_budget, self.args.max_steps),
                "used": used,
                "fraction": self.clock.fraction,
                "loss": self.loss,
                "eta": self.eta,
                "log_m": self.plan.log_m.tolist(),
                "a": float(self.plan.a),
                "lambda": self.lam or None,
                "c_eta": self.c_eta,
                "r_t": total,
                **scheduler.log,
            }
        )
        self.keep_spent()

    def keep_spent(self) -> None:
        """What was spent after a checkpoint is spent, a kill or no."""
        if self.clock.kind == "monotonic":
            record.write_json(self.spent, {"used": self.clock.used, "joules": self.energy.joules})

    # ---- when to evaluate, save and stop

    def next_step(self) -> float:
        """Seconds that the next step may take: as the longest of the last ones, and a micro-batch more for the first
        secant."""
        first = self.due(self.scheduler.wants_secant) and self.lambdas is None
        return max(self.recent) * (1 + first / self.micros)

    def finished(self) -> bool:
        return self.final

    def schedule(self) -> None:
        """Evaluate ten times over the budget, and stop where another step would leave no time for the last
        evaluation."""
        if not math.isfinite(self.loss):
            self.diverge()
            return
        used, evaluation, last = self.clock.used, 1.2 * self.eval_seconds, super().finished()
        if self.state.global_step == 1 and used + evaluation > self.clock.budget:
            found = f"{self.clock.budget:.3g} s hold not even one step and one evaluation "
            found += f"({used:.3g} s and {self.eval_seconds:.3g} s)"
            fix = f"--set training.budget_minutes={2 * (used + evaluation) / 60:.2g}"
            raise StudyError("training.budget_minutes", found, "a budget for at least that", fix)
        by_budget = used + self.next_step() + evaluation >= self.clock.budget
        self.final, self.capped = last or by_budget, last and not by_budget
        place, share = int(EVALUATIONS * self.clock.fraction), len(self.subset) / len(self.dev)
        room = used + self.next_step() + evaluation * (1 + share) < self.clock.budget
        control, now = self.control, time.monotonic()
        control.should_evaluate = self.final or (place > self.evaluations and room)
        control.should_save = self.final or (control.should_evaluate and now - self.saved_at >= SAVE_SECONDS)
        control.should_training_stop = self.final
        if control.should_save:
            self.saved_at = now

    # ---- evaluation

    def begin(self) -> None:
        """The base model's exact match at t = 0, uncharged; it shows what the last evaluation may cost at most."""
        started = time.monotonic()
        row, units = self.answer(whole=False)
        virtual = self.clock.kind == "virtual"
        seconds = units * UNIT_SECONDS if virtual else time.monotonic() - started
        self.eval_seconds = seconds * len(self.dev) / len(self.subset)
        self.write({"step": 0, "used": 0.0, "joules": 0.0, "final": False, **row})
        if self.energy.source:
            self.energy.update()
            self.energy.joules = 0.0
        self.clock.start()

    def validate(self) -> dict:
        self.evaluations = int(EVALUATIONS * self.clock.fraction)
        before = self.clock.used
        row, units = self.answer(whole=self.final)
        self.clock.charge(units)
        used = self.clock.tick()
        if self.clock.kind == "monotonic":
            whole = 1.0 if self.final else len(self.dev) / len(self.subset)
            self.eval_seconds = max(self.eval_seconds, (used - before) * whole)
        self.energy.update()
        self.keep_spent()
        return {"used": used, "joules": self.energy.joules, "final": self.final, **row}

    def answer(self, whole: bool) -> tuple[dict, float]:
        """(exact match and loss on the dev subset, units of the virtual clock); `whole`: all of dev is answered, into
        final.json."""
        evaluation, tokenizer, n = self.run.evaluation, self.given.tokenizer, len(self.subset)
        problems, batch = self.dev if whole else self.subset, self.answers_at_once
        rows, units = data.score(self.model, tokenizer, problems, evaluation.max_new_tokens, batch)
        batch = min(batch, 4 * self.run.training.micro_batch_size)  # whose logits are kept
        losses, more = data.answer_losses(self.model, tokenizer, self.given.rows["dev"][:n], batch)
        if whole:
            record.write_json(self.folder / "final.json", rows)
        right = sum(row["strict"] for row in rows[:n]) / n
        return {"exact_match_subset": right, "dev_loss": data.mean_loss(losses)}, units + more

    # ---- everything a decision depends on, in a checkpoint

    def extra_state(self) -> dict:
        kept = {name: getattr(self.adam, name) for name in ("delta", "eta", "m")}
        mine = {"used": self.clock.used, "joules": self.energy.joules, "scheduler": self.scheduler.state()}
        return {**mine, "optimizer": kept, "trainer": {name: getattr(self, name) for name in self.SAVED}}

    def load_extra_state(self, state):
        self.scheduler.restore(state["scheduler"])
        self.adam.__dict__.update(state["optimizer"])
        self.__dict__.update(state["trainer"])
        self.energy.joules, self.clock.used = state["joules"], state["used"]
        if self.clock.kind == "monotonic":
            spent = record.read_json(self.spent, {})
            self.clock.used = max(self.clock.used, spent.get("used", 0.0))
            if self.energy.source:
                self.energy.joules = max(self.energy.joules or 0.0, spent.get("joules") or 0.0)
        self.clock.start()
