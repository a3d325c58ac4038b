"""GRAFF on a real (tiny) model: hypergradients and curvature along the trainer's own path, runs cut at many places."""

import copy
import json
import math

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lib.graff import data, member, planner as pl, prepare, schedulers, trainer
from tests.test_graff import curve, member_of, shared  # noqa: F401


def exact_norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture
def engine(shared, monkeypatch):  # noqa: F811
    """(model in float64 without dropout, probes, optimizer after two steps, two batches)."""
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)  # its own computes in float32
    run = member_of("graff", cold=True, changes={"model.lora.dropout": 0.0}).run
    given = data.load(shared)
    model = data.load_model(run, given, 1).double().train()
    probes = trainer.Probes(model, given.frequent)
    optimizer = pl.BlockAdam(probes.parameters, 1e-2, (0.9, 0.98), 0.01, probes.blocks, 4, 1e9)
    batches = [data.collate(given.rows["train"][4 * i : 4 * i + 4], given.tokenizer.pad_token_id) for i in range(4)]
    for batch in batches[:2]:
        gradient(model, probes, optimizer, batch)
        optimizer.step()
    return model, probes, optimizer, batches[2:]


def gradient(model, probes, optimizer, batch, a: float | None = None):
    """Fill p.grad as one step does; returns (token losses, weights, entropies)."""
    optimizer.zero_grad()
    losses, z, _ = probes.token_losses(model, batch, a is not None)
    w = pl.token_weights(a or 0.0, z)[0]
    (w * losses).mean().backward()
    return losses, w.detach(), z


def stepped(engine, a: float, eta: float, log_m: torch.Tensor, batch):
    """One step from the engine's state with this plan; what is behind it comes back as it was. -> (loss after,
    optimizer)."""
    model, probes, optimizer, _ = engine
    before = [p.detach().clone() for p in probes.parameters]
    moments = copy.deepcopy([optimizer.state[p] for p in probes.parameters]), optimizer.param_groups[0]["count"]
    gradient(model, probes, optimizer, batch[0], a)
    optimizer.eta, optimizer.m = eta, log_m.exp()
    optimizer.step()
    losses, _, _ = gradient(model, probes, optimizer, batch[1])
    g = [p.grad.clone() for p in probes.parameters]
    credit = {"jacobian": optimizer.jacobian(), "inputs": batch[0], "a": a, "eta": eta}
    with torch.no_grad():
        for p, old, state in zip(probes.parameters, before, moments[0], strict=True):
            p.copy_(old)
            optimizer.state[p] = state
    optimizer.param_groups[0]["count"] = moments[1]
    return losses.mean().item(), g, optimizer.delta, credit


def test_the_secants_two_gradients_have_the_same_dropout(shared, monkeypatch):  # noqa: F811
    """Where the step moved nothing they are equal, whatever was drawn in between."""
    run = member_of("graff", cold=True, changes={"model.lora.dropout": 0.3}).run
    given = data.load(shared)
    model = data.load_model(run, given, 1).train()
    probes = trainer.Probes(model, given.frequent)
    optimizer = pl.BlockAdam(probes.parameters, 1e-2, (0.9, 0.98), 0.01, probes.blocks, 4, 1e9)
    batch = data.collate(given.rows["train"][:4], given.tokenizer.pad_token_id)
    with torch.no_grad():  # B begins at zero, where no dropout shows in the gradient of A
        for p in probes.parameters:
            p.add_(0.02 * torch.randn_like(p))
    differences = []
    monkeypatch.setattr(pl, "curvature", lambda delta, y, *_: differences.append(y) or (torch.zeros(4), 0.0))
    for redrawn in (False, True):
        optimizer.zero_grad()
        probes.before_last_micro()
        losses, _, _ = probes.token_losses(model, batch, False)
        losses.mean().backward()
        torch.rand(7)
        if redrawn:
            probes.rng = (torch.get_rng_state(), probes.rng[1])
        optimizer.delta = optimizer.p = [torch.zeros_like(p) for p in probes.parameters]
        probes.secant(model, {"inputs": batch, "w": torch.ones_like(losses), "tokens": len(losses)}, optimizer)
    same, other = (max(float(y.abs().max()) for y in ys) for ys in differences)
    assert same == pytest.approx(0, abs=1e-7)
    assert other > 1e-4


# ---- 1. and 4. on the model that is trained


def test_hypergradients_of_a_real_step_match_finite_differences(engine):
    model, probes, _, batches = engine
    log_m = torch.tensor([0.3, -0.2, 0.1, -0.2], dtype=torch.float64)
    _, g, delta, credit = stepped(engine, 0.4, 5e-3, log_m, batches)
    c = pl.block_sums(g, delta, probes.blocks, 4)
    h = 1e-4
    for i in range(4):
        shift = h * torch.eye(4, dtype=torch.float64)[i]
        up, down = (stepped(engine, 0.4, 5e-3, log_m + s, batches)[0] for s in (shift, -shift))
        assert float(c[i]) == pytest.approx((up - down) / (2 * h), rel=1e-3, abs=1e-9)
    up, down = (stepped(engine, 0.4, 5e-3 * math.exp(s), log_m, batches)[0] for s in (h, -h))
    assert float(c.sum()) == pytest.approx((up - down) / (2 * h), rel=1e-3)
    up, down = (stepped(engine, 0.4 + s, 5e-3, log_m, batches)[0] for s in (h, -h))
    credit["z"] = probes.token_losses(model, batches[0], True)[1]
    assert probes.token_credit(model, credit, g) == pytest.approx((up - down) / (2 * h), rel=1e-3)


def test_what_is_replayed_is_the_plan_whose_effect_the_gradient_tells(tmp_path, shared, monkeypatch):  # noqa: F811
    decided, replayed = [], []
    decide, step = schedulers.Graff.decide, pl.Outer.step

    def deciding(self, seen):
        plan = decide(self, seen)
        decided.append(self.pending)
        return plan

    monkeypatch.setattr(schedulers.Graff, "decide", deciding)
    monkeypatch.setattr(pl.Outer, "step", lambda self, kept, c: replayed.append(kept) or step(self, kept, c))
    member.train(member_of("graff", cold=True, changes={"training.total_steps": 6}), tmp_path, shared)
    assert len(decided) == 6
    assert all(a is b for a, b in zip(decided, replayed, strict=False))
    assert len(replayed) == 5


def test_eta_lambda_of_the_same_batch_scales_with_eta_and_of_two_batches_does_not(engine):
    model, probes, optimizer, batches = engine
    before = [p.detach().clone() for p in probes.parameters]
    moments = copy.deepcopy([optimizer.state[p] for p in probes.parameters])
    product = {}
    for eta in (1e-3, 1e-4):
        for kind in ("same", "two"):
            losses, w, z = None, None, None
            optimizer.zero_grad()
            probes.before_last_micro()
            losses, w, z = gradient(model, probes, optimizer, batches[0])
            optimizer.eta, optimizer.m = eta, torch.ones(4)
            optimizer.step()
            held = {"inputs": batches[0], "w": w, "tokens": len(losses)}
            if kind == "two":
                other = probes.token_losses(model, batches[1], False)[0]
                held = {"inputs": batches[1], "w": torch.ones_like(other), "tokens": len(other)}
            product[kind, eta] = eta * probes.secant(model, held, optimizer)[1]
            with torch.no_grad():
                for p, old, state in zip(probes.parameters, before, moments, strict=True):
                    p.copy_(old)
                    optimizer.state[p] = copy.deepcopy(state)
    assert product["same", 1e-3] / product["same", 1e-4] == pytest.approx(10, rel=0.3)
    assert product["two", 1e-3] / product["two", 1e-4] < 3


def test_the_guard_caps_the_rate_where_the_curvature_is_high(tmp_path, shared, monkeypatch):  # noqa: F811
    """A bound below what the rate brings: with it every applied eta lambda lies at or below it, without it one does
    not."""
    largest = {}
    for guard in ("adam", "off"):
        folder = tmp_path / guard
        folder.mkdir()
        changes = {"training.total_steps": 16, "training.optimizer.lr_init": 0.1, "training.budget_minutes": 10}
        member.train(member_of("graff", changes=changes, cold=True, guard=guard, stability_guard=0.01), folder, shared)
        rows = [r for r in curve(folder) if r.get("lambda")]
        # the cap uses the estimate of the step before
        largest[guard] = max(r["eta"] * old["lambda"] for old, r in zip(rows, rows[1:], strict=False))
    edge = pl.edge_of_stability("adam", 0.01, 0.9)
    assert largest["adam"] <= edge * 1.0001 < largest["off"]


# ---- 6. resume: at any micro-batch of any step, and what the clock keeps


class Cut(Exception):
    """Stands for a kill: nothing is cleaned up."""


def cut_at(monkeypatch, where: set[int]):
    """compute_loss raises at the micro-batches counted by `where`, over all lives together."""
    compute, count = trainer.BudgetTrainer.compute_loss, [0]

    def cutting(self, *given, **named):
        count[0] += 1
        if count[0] in where:
            raise Cut
        return compute(self, *given, **named)

    monkeypatch.setattr(trainer.BudgetTrainer, "compute_loss", cutting)


SLOW = ("reactor", "salelr_reconstructed", "bats_reconstructed", "hypergradient")


@pytest.mark.parametrize("kind", ["graff", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_resume_at_any_place_is_bit_identical(tmp_path, shared, monkeypatch, kind):  # noqa: F811
    """Checkpoints at every step; cut between the two micro-batches of an accumulation, with a token credit pending
    after the secant of step 10, in the middle of REACTOR's hold, and again at the step that was resumed."""
    monkeypatch.setattr(trainer, "EVALUATIONS", 10_000)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    extra = {"graff": {"cold": True, "outer_lr": 1e-2}}.get(kind, {})
    mine = member_of(kind, changes={"training.total_steps": 14, "evaluation.max_new_tokens": 2}, **extra)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = member.train(mine, tmp_path / "whole", shared)
    generator = torch.Generator().manual_seed(5)
    places = {6, 22, 23, *(int(i) for i in torch.randint(8, 30, (2,), generator=generator))}
    cut_at(monkeypatch, places)
    lives = 0
    while True:
        lives += 1
        try:
            cut = member.train(mine, tmp_path / "cut", shared)
            break
        except Cut:
            pass
    assert lives == len(places) + 1
    strip = [[{k: v for k, v in r.items() if k != "at"} for r in curve(tmp_path / n)] for n in ("whole", "cut")]
    assert strip[0] == strip[1]
    assert whole == cut
    predicted = [(tmp_path / n / "predictions.jsonl").read_bytes() for n in ("whole", "cut")]
    assert predicted[0] == predicted[1]


def test_a_member_killed_after_its_last_checkpoint_scores_the_same_weights(tmp_path, shared, monkeypatch):  # noqa: F811
    changes = {"training.total_steps": 6, "training.optimizer.lr_init": 0.05}
    mine, scored, evaluate = member_of("fixed", changes=changes), [], member.evaluate

    def keep(budgeted):
        scored.append([p.detach().clone() for p in budgeted.probes.parameters])
        if len(scored) == 1:
            raise Cut
        return evaluate(budgeted)

    monkeypatch.setattr(member, "evaluate", keep)
    with pytest.raises(Cut):
        member.train(mine, tmp_path, shared)
    assert member.train(mine, tmp_path, shared)["status"] == "completed"
    assert all(torch.equal(p, q) for p, q in zip(*scored, strict=True))


def test_a_cut_run_on_the_wall_clock_never_gets_its_budget_back(tmp_path, shared, monkeypatch):  # noqa: F811
    now = [0.0]
    make = trainer.Clock.__init__

    def init(self, kind, budget):
        make(self, kind, budget, now=lambda: now[0])

    monkeypatch.setattr(trainer.Clock, "__init__", init)
    compute = trainer.BudgetTrainer.compute_loss

    def slow(self, *given, **named):
        now[0] += 1.0
        if now[0] == 15.0:
            raise Cut
        return compute(self, *given, **named)

    monkeypatch.setattr(trainer.BudgetTrainer, "compute_loss", slow)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    mine = member_of(
        "fixed", changes={"training.clock": "monotonic", "training.total_steps": None, "training.budget_minutes": 1}
    )
    with pytest.raises(Cut):
        member.train(mine, tmp_path, shared)
    spent = json.loads((tmp_path / "spent.json").read_text())["used"]
    assert spent == 14.0
    checkpointed = [r["used"] for r in curve(tmp_path) if "exact_match_subset" in r][-1]
    assert checkpointed < spent  # steps after the checkpoint are done again, their time is not given back
    now[0] = 1000.0  # another machine, another origin
    member.train(mine, tmp_path, shared)
    steps = [r for r in curve(tmp_path) if "eta" in r]
    again = next(r for r in steps if r["used"] > checkpointed)
    assert again["used"] == spent + 2.0
    assert steps[-1]["used"] <= 60.0


def test_a_run_that_overran_its_budget_has_no_exact_match(tmp_path, shared, monkeypatch):  # noqa: F811
    monkeypatch.setattr(trainer.BudgetTrainer, "next_step", lambda self: -1e9)  # foresees nothing
    found = member.train(
        member_of("fixed", changes={"training.total_steps": 30, "training.budget_minutes": 0.1}), tmp_path, shared
    )
    assert not found["in_budget"]
    assert (found["exact_match"], found["dev_exact_match"]) == (None, None)
    assert '"example"' not in {json.loads(line)["kind"] for line in (tmp_path / "predictions.jsonl").open()}


@pytest.mark.parametrize(("kind", "minutes"), [("graff", 0.05), ("graff", 0.15), ("graff", 0.3), ("reactor", 0.15)])
def test_the_last_evaluation_ends_by_the_budget_whatever_it_is(tmp_path, shared, kind, minutes):  # noqa: F811
    """A step with a secant takes longer than the ones before it: it used to be forgotten by the time of the next
    one."""
    changes = {"training.total_steps": None, "training.budget_minutes": minutes}
    found = member.train(
        member_of(kind, changes=changes, **({"cold": True} if kind == "graff" else {})), tmp_path, shared
    )
    assert found["in_budget"], (found["used"], found["budget"])


def test_a_run_that_a_cap_ends_says_so_and_r_t_is_of_the_running_mean_of_the_loss(tmp_path, shared):  # noqa: F811
    for steps, capped in ((6, True), (None, False)):
        changes = {"training.total_steps": steps, "training.budget_minutes": 1 if steps else 0.25}
        (tmp_path / str(steps)).mkdir()
        found = member.train(member_of("fixed", changes=changes), tmp_path / str(steps), shared)
        assert (found["status"], found["capped"]) == ("completed", capped)
    rows = [row for row in curve(tmp_path / "6") if "eta" in row]
    mean = least = best = rows[0]["loss"]
    total = of_batches = 0.0
    for row in rows:
        mean = 0.9 * mean + 0.1 * row["loss"]
        least = min(least, mean)
        total += (mean - least) / row["used"]
        best = min(best, row["loss"])
        of_batches += (row["loss"] - best) / row["used"]
        assert row["r_t"] == pytest.approx(total)
    assert 0 <= rows[-1]["r_t"] < of_batches, "single batches' losses are further above the least of them"


def test_gsm1k_is_scored_after_the_budget_where_a_file_is_named(tmp_path):
    file = tmp_path / "gsm1k.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in prepare.generate_problems(3, 99, 2)))
    mine = member_of("fixed", changes={"training.total_steps": 2, "dataset.gsm1k": str(file)})
    (tmp_path / "inputs").mkdir()
    (tmp_path / "m").mkdir()
    prepare.prepare(mine.run, tmp_path / "inputs")
    found = member.train(mine, tmp_path / "m", tmp_path / "inputs")
    assert found["gsm1k_gap"] is not None
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "m" / "predictions.jsonl").open()]
    assert (kinds.count("gsm1k"), kinds.count("example")) == (3, 4)
