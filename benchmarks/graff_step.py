"""What GRAFF's planner adds to a step, interleaved with fixed on the same batches, at Qwen3-0.6B's true shape (random
weights).

    python -m benchmarks.graff_step --rounds 20                                            (a GPU)
    python -m benchmarks.graff_step --minutes 25                                           (a CPU: as many rounds as
    fit) python -m benchmarks.graff_step --micro 2 --length 96 --rounds 6                       (a slow CPU: smaller
    micro-batches)

Three steps a round on one model in bfloat16 with rank-64 adapters: fixed, GRAFF's ordinary one, and the one in ten that
has the secant and the token weights' credit. Prints the medians' ratio, 9 ordinary to 1 due, and where the extra time
goes. Steps are BudgetTrainer's own parts in its order; data loading, evaluation and checkpoints are left out on both
sides. The warm-up is one micro-batch a step: it says how long a round takes, and a round that would end after --minutes
is not begun.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lib import config, models
from lib.graff import planner as pl, schedulers, trainer

KINDS = ("fixed", "ordinary", "due")
DUE = ("secant", "token credit", "Jacobian of Adam", "copy of the gradients, for the secant")  # in one step of ten


def now() -> float:
    """Seconds: of the wall clock on a GPU, of this process's processor time on a CPU, which others may be using."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def make(layers: int):
    """(model, probes): Qwen3-0.6B with `layers` layers and adapters of rank 64, weights random."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        head_dim=128,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    base = Qwen3ForCausalLM._from_config(shape, dtype=torch.bfloat16).to(models.current_device())
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = models.add_lora(base, {"lora_r": 64, "lora_alpha": 16, "target_modules": "all-linear"}, 0).train()
    return model, trainer.Probes(model, torch.arange(4096))


def method_of(kind: str, layers: int):
    scheduler = {"type": kind, **({"cold": True} if kind == "graff" else {})}
    raw = {
        "run_id": "b",
        "model": {"name": "m/m"},
        "dataset": {"name": "openai/gsm8k"},
        "training": {
            "budget_minutes": 1,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "optimizer": {"lr_init": 2e-4},
            "scheduler": scheduler,
        },
    }
    section = config.restore(raw, study="graff", scale="paper", mode="full").training.scheduler
    return schedulers.SCHEDULERS[kind](section, layers)


def stepper(model, around, kind: str):
    """(step(batches, due), {part: seconds of each call}) of one side; both sides share the model and its adapters."""
    method, parts, state = method_of(kind, around.layers), {}, {"credit": None}
    optimizer = pl.BlockAdam(around.parameters, 2e-4, (0.9, 0.98), 0.01, around.blocks, 2 * around.layers, 1.0)

    def timed(name, function, *given):
        started = now()
        out = function(*given)
        parts.setdefault(name, []).append(now() - started)
        return out

    def step(batches, due: bool):
        plan, count = None, sum(int((b["labels"] != -100).sum()) for b in batches)
        for place, batch in enumerate(batches):
            if due and place == len(batches) - 1:
                timed("copy of the gradients, for the secant", around.before_last_micro)
            losses, z, entropy = around.token_losses(model, batch, method.wants_entropy)
            if plan is None:
                plan = timed(
                    "planner: forward", method.decide, schedulers.Seen(0.5, entropy, torch.zeros(2 * around.layers))
                )
            w = pl.token_weights(float(plan.a), z)[0]
            ((w * losses).sum() / count).backward()
        cot = None
        if method.wants_gradient and optimizer.delta is not None:
            g = optimizer.gradients()
            c = timed("dot products", pl.block_sums, g, optimizer.delta, optimizer.blocks, optimizer.n)
            credit = state["credit"] if due else None
            c_a = timed("token credit", around.token_credit, model, credit, g) if credit else 0.0
            cot = timed("dot products", pl.cotangents, c, c_a, g, optimizer.delta, "cos", 1.0)
        timed("planner: replay and outer step", method.learn, 1.0, cot, 0.0, 2e-4, 0.9)
        optimizer.step()
        if due:
            timed("secant", around.secant, model, {"inputs": batch, "w": w.detach(), "tokens": count}, optimizer)
            state["credit"] = {
                "inputs": batch,
                "z": z,
                "a": 0.0,
                "eta": 2e-4,
                "jacobian": timed("Jacobian of Adam", optimizer.jacobian),
            }
        optimizer.zero_grad()

    if method.wants_entropy:
        entropy = around.entropy
        around.entropy = lambda hidden: timed("entropies of the label tokens", entropy, hidden)
    return step, parts


def report(arguments, seconds: dict[str, list[float]], parts: dict[str, list[float]]) -> dict[str, float]:
    """Prints and returns the overhead over whole rounds and each part's share of a fixed step."""
    whole = list(zip(*(seconds[name] for name in KINDS), strict=False))
    every, fixed = schedulers.EVERY, statistics.median(f for f, _, _ in whole)
    ratios = [((every - 1) * ordinary + due) / every / f for f, ordinary, due in whole]
    middle = {name: statistics.median(found) for name, found in zip(KINDS, zip(*whole, strict=True), strict=True)}
    both = ((every - 1) * middle["ordinary"] + middle["due"]) / every / middle["fixed"]
    print(
        f"{arguments}, {torch.get_num_threads()} threads, {models.current_device()}: a fixed step takes {fixed:.2f} s; "
        f"GRAFF / fixed: {both:.4f} by the medians of {len(whole)} rounds (by round {min(ratios):.4f} to {max(ratios):.4f})"
    )
    shares = {}
    for name, found in parts.items():
        calls = len(found) / len(whole)  # a round has one ordinary step and one that is due
        shares[name] = statistics.median(found) * calls * (1 / every if name in DUE else 1 / 2) / fixed
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"  {name}: {100 * share:.2f} % of a fixed step")
    print(f"  together: {100 * sum(shares.values()):.2f} %")
    return {"ratio": both, **shares}


def problems(arguments, count: int, generator: torch.Generator) -> list[dict]:
    """`count` micro-batches of random tokens, a third of each row the question."""
    found = []
    for _ in range(count):
        ids = torch.randint(0, 4096, (arguments.micro, arguments.length), generator=generator).to(
            models.current_device()
        )
        labels = ids.clone()
        labels[:, : arguments.length // 3] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def main(given=None) -> dict[str, float]:
    """{"ratio", part: its share of a fixed step}; empty where no round fits into --minutes, and then it says what one
    takes."""
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 28), ("length", 256), ("micros", 8), ("micro", 8), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="of the wall clock, model and warm-up included"
    )
    arguments = parser.parse_args(given)
    begun = time.monotonic()
    model, around = make(arguments.layers)
    fixed, _ = stepper(model, around, "fixed")
    graff, parts = stepper(model, around, "graff")
    generator, seconds, made = torch.Generator().manual_seed(0), {name: [] for name in KINDS}, {}
    for number in range(arguments.rounds + 1):
        micros = arguments.micros if number else 1  # of the warm-up
        batches, started_round = problems(arguments, micros, generator), time.monotonic()
        for name in KINDS[number % 3 :] + KINDS[: number % 3]:
            started = now()
            (fixed if name == "fixed" else graff)(batches, name == "due")
            seconds[name].append(now() - started)
        print(
            f"round {number}: " + ", ".join(f"{name} {found[-1]:.2f} s" for name, found in seconds.items()), flush=True
        )
        took = (time.monotonic() - started_round) * arguments.micros / micros
        if number:
            made = report(arguments, seconds, parts)  # after each round: it may be cut off
        else:
            parts.clear()
            seconds = {name: [] for name in KINDS}
        if time.monotonic() - begun + took > 60 * arguments.minutes:
            print(f"a round takes about {took / 60:.1f} minutes: {number} done in {arguments.minutes:g}")
            break
    return made


if __name__ == "__main__":
    main()
