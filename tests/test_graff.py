"""The planner's mathematics against finite differences, the budget, answers, and runs that are cut off."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from lib import config, models
from lib.errors import StudyError
from lib.graff import data, member, planner as pl, prepare, schedulers, study, trainer
from lib.run import check
from tests.conftest import ROOT, until

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
GSM8K = GSM8K if GSM8K.exists() else Path("/work/shared/data/gsm8k")


def raw(kind="fixed", **scheduler) -> dict:
    return {
        "run_id": "r",
        "method": kind,
        "role": "control",
        "seed_list": [1],
        "model": {
            "name": "made",
            "recipe": {"hidden_size": 32, "layers": 2, "pretrain_steps": 3, "pretrain_batch_size": 4},
            "lora": {"r": 4, "dropout": 0.1},
        },
        "dataset": {"name": "generated", "train_examples": 60, "test_examples": 4, "dev_size": 4, "max_tokens": 128},
        "training": {
            "budget_minutes": 1,
            "clock": "virtual",
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "total_steps": 24,
            "optimizer": {"lr_init": 1e-3, "betas": [0.9, 0.98]},
            "scheduler": {"type": kind, **scheduler},
        },
        "evaluation": {"max_new_tokens": 4, "dev_subset": 2},
    }


def member_of(kind="fixed", seed=1, changes=None, **scheduler):
    run = config.restore(raw(kind, **scheduler), study="graff", scale="laptop", mode="full")
    return config.Member(run=config.seeded(config.apply(run, changes or {}), seed), cell={}, cell_name="c", seed=seed)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graff")
    prepare.prepare(member_of().run, folder)
    return folder


# ---- 1. hypergradients against finite differences, float64


def problem(n=4, size=5):
    """A loss over n blocks of `size`, smooth and not quadratic."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(n * size, n * size, generator=generator, dtype=torch.float64) / 4
    theta = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(n)]
    u = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(n)]
    return lambda t: torch.log1p((a @ torch.cat(t)) ** 2).sum(), theta, u


def gradient(loss, theta):
    theta = [t.clone().requires_grad_() for t in theta]
    return list(torch.autograd.grad(loss(theta), theta))


def test_gradient_of_w_and_of_the_encoder_matches_finite_differences():
    torch.manual_seed(1)
    loss, theta, u = problem()
    planner = pl.Planner().double()
    torch.nn.init.normal_(planner.decoder.weight, std=0.1)
    kept = torch.randn(4, 5).double(), torch.randn(4, pl.WIDTH).double() * 0.1, pl.edges(2)

    def after():
        plan, _ = planner(*kept)
        return loss([t - 0.05 * torch.exp(plan.log_eta + plan.log_m[i]) * u[i] for i, t in enumerate(theta)])

    with torch.no_grad():
        plan, _ = planner(*kept)
        delta = [-0.05 * torch.exp(plan.log_eta + plan.log_m[i]) * u[i] for i in range(4)]
    g = gradient(loss, [t + d for t, d in zip(theta, delta, strict=True)])
    cot = pl.cotangents(pl.block_sums(g, delta, torch.arange(4), 4), 0.0, g, delta, "raw", 1.0)
    pl.Outer(planner, 0.0, encoder_lr=0.0).step(kept, cot)
    for name, place in (
        ("decoder.weight", (0, 2)),
        ("decoder.weight", (1, 3)),
        ("encoder.weight", (4, 1)),
        ("messages.0.weight", (2, 5)),
        ("memory.weight_ih", (3, 3)),
    ):
        tensor = dict(planner.named_parameters())[name]
        values = []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                tensor[place] += shift
                values.append(float(after()))
                tensor[place] -= shift
        assert float(tensor.grad[place]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-10), name


# ---- 2. to 5. the planner's start, its guard, curvature, REACTOR


def test_a_zero_decoder_changes_nothing_and_the_ablation_has_as_many_parameters():
    assert set(schedulers.SCHEDULERS) == set(study.READS)
    planner = pl.Planner()
    with torch.no_grad():
        plan, _ = planner(torch.randn(6, 5), torch.zeros(6, pl.WIDTH), pl.edges(3))
    assert (float(plan.log_eta), float(plan.a), plan.log_m.tolist()) == (0.0, 0.0, [0.0] * 6)
    assert pl.token_weights(0.0, torch.randn(5))[0].tolist() == [1.0] * 5
    sizes = [
        sum(
            p.numel()
            for p in schedulers.Graff(
                member_of("graff", cold=True, graph=g).run.training.scheduler, 3
            ).planner.parameters()
        )
        for g in (True, False)
    ]
    assert sizes[0] == sizes[1]
    assert 2_500 < sizes[0] < 3_500
    assert pl.edges(3, graph=False).shape[1] == 6 < pl.edges(3).shape[1]


@pytest.mark.parametrize(("row", "low", "high"), [(0, *pl.LOG_ETA), (2, -1.0, 1.0)])
@pytest.mark.parametrize("side", [-1, 1])
def test_an_output_at_its_bound_is_held_there_and_comes_back(row, low, high, side):
    """clamp's gradient is 0 beyond the bound: the exponent stood at 1 for good in the laptop runs."""
    planner, kept = pl.Planner(), (torch.randn(4, 5), torch.zeros(4, pl.WIDTH), pl.edges(2))
    with torch.no_grad():
        planner.decoder.bias[row] = (high if side > 0 else low) + side * 0.05
    before = planner.decoder.bias[row].item()
    push = [torch.zeros(()), torch.zeros(4), torch.zeros(())]
    push[row] = torch.tensor(-1.0 * side)  # descent would go further out
    pl.Outer(planner, 1e-2).step(kept, tuple(push))
    assert planner.decoder.bias[row].item() == before
    outer = pl.Outer(planner, 1e-2)
    push[row] = torch.tensor(1.0 * side)
    for _ in range(20):
        outer.step(kept, tuple(push))
    with torch.no_grad():
        value = float(planner(*kept)[0][row])
    assert low < value < high


def test_the_warm_start_keeps_the_blocks_apart():
    """With the encoder at W's own rate all states run into +-1 alike, and the multipliers stay at 1 whatever they are
    reported."""
    spread = {}
    for encoder_lr in (trainer.ENCODER_LR, 3e-3):
        torch.manual_seed(7)
        planner = pl.Planner()
        outer, h = pl.Outer(planner, 3e-3, encoder_lr), torch.zeros(4, pl.WIDTH)
        for step in range(300):
            x = torch.stack(
                [
                    torch.zeros(4),
                    torch.full((4,), 0.5),
                    torch.full((4,), 1 - step / 300),
                    torch.tensor([0.0, 0, 1, 1]),
                    torch.tensor([0.0, 1, 0, 1]),
                ],
                1,
            )
            kept = (x, h, pl.edges(2))
            with torch.no_grad():
                h = planner(*kept)[1]
            outer.step(
                kept,
                (
                    torch.tensor(-0.3 if step < 150 else 0.1),
                    torch.tensor([0.01, -0.01, 0.02, -0.02]),
                    torch.tensor(0.0),
                ),
            )
        spread[encoder_lr] = float((h - h.mean(0)).abs().sum(1).mean())
    assert spread[3e-3] < 0.05 < 0.5 < spread[trainer.ENCODER_LR], spread


def test_matched_hypergradient_descent_has_the_gain_of_the_warm_start(tmp_path):
    planner = pl.Planner()
    save_file(planner.state_dict(), tmp_path / "warm_start.safetensors")
    method = trainer.build_scheduler(member_of("hypergradient").run, 3, tmp_path)
    assert method.gain == pl.gain(planner, 3)
    assert 1 < method.gain < 1 + pl.WIDTH
    method.learn(1.0, (torch.tensor(-2.0), None, None), 0.0, 1e-3, 0.9)
    assert method.log_eta == pytest.approx(method.gain * 1e-3, rel=1e-4)  # Adam's first step is the rate


def test_projection_lands_on_the_boundary_and_leaves_the_inside_alone():
    decoder = pl.Planner().decoder
    torch.nn.init.normal_(decoder.weight)
    h = torch.randn(4, pl.WIDTH)
    ht = torch.cat([h.mean(0), torch.ones(1)])
    decoder.requires_grad_(False)
    before = torch.cat([decoder.weight[0], decoder.bias[:1]]).clone()
    value = float(before @ ht)
    assert pl.project(decoder, h, value + 1) == 0.0
    moved = pl.project(decoder, h, value - 0.5)
    after = torch.cat([decoder.weight[0], decoder.bias[:1]]).detach()
    assert float(after @ ht) == pytest.approx(value - 0.5, abs=1e-5)
    assert moved == pytest.approx(0.5 / float(ht.norm()), rel=1e-4)
    assert float((after - before).norm()) == pytest.approx(moved, rel=1e-3)


def test_curvature_of_a_quadratic_is_its_own_and_eta_lambda_scales_with_eta():
    curve, p, m = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([1.0, 1.0, 1.0]), torch.ones(1)
    for eta in (1e-2, 1e-3):
        s = [-eta * torch.tensor([0.0, 1.0, 0.0])]
        lam = pl.curvature(s, [curve * s[0]], [p], m, torch.tensor([0]))[1]
        assert lam == pytest.approx(4.0, rel=1e-4)
    assert pl.edge_of_stability("adam", 1.9, 0.9) == pytest.approx(36.1)
    assert pl.edge_of_stability("literal", 1.9, 0.9) == 1.9
    assert math.isinf(pl.edge_of_stability("off", 1.9, 0.9))


def test_reactor_solves_a_bandit():
    found = []
    for seed in range(5):
        arm = schedulers.Reactor(member_of("reactor", controller_lr=3e-2).run.training.scheduler, 2)
        arm.random_state = torch.Generator().manual_seed(seed).get_state()
        for _ in range(400):
            a = arm.act(torch.tensor([1.0, 0.0, 0.0, 0.0]))
            arm.reward(-((a - 0.8) ** 2))
        found.append(arm.policy["omega"][0].item())
    assert sum(found) / 5 == pytest.approx(0.8, rel=0.25)


def test_reactor_explores_differently_in_every_seed():
    drawn = []
    for seed in (42, 43, 42):
        torch.manual_seed(seed)
        torch.randn(3)  # whatever is drawn before
        arm = schedulers.Reactor(member_of("reactor").run.training.scheduler, 2)
        drawn.append([arm.act(torch.zeros(4)) for _ in range(3)])
    assert drawn[0] == drawn[2] != drawn[1]


def test_reactor_sees_where_the_loss_is_going(monkeypatch):
    """Its third input is tanh of the relative drop between the last two windows: positive while the loss falls."""
    arm, seen = schedulers.Reactor(member_of("reactor").run.training.scheduler, 2), []
    act = arm.act
    monkeypatch.setattr(arm, "act", lambda s: seen.append(float(s[2])) or act(s))
    for step in range(30):
        arm.decide(schedulers.Seen(fraction=step / 30, entropy=0.5, log_lambda=torch.zeros(2)))
        arm.learn(3.0 * 0.98**step, None, None, 1e-3, 0.9)
    assert seen[:2] == [0.0, 0.0], "two windows make the first drop"
    assert all(trend == pytest.approx(math.tanh(1 - 0.98**5), rel=1e-6) for trend in seen[2:])
    again = schedulers.Reactor(member_of("reactor").run.training.scheduler, 2)
    again.restore(arm.state())
    assert again.trend == arm.trend != 0


def test_block_adam_is_adamw_where_every_multiplier_is_one():
    torch.manual_seed(0)
    mine, theirs = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)], []
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    a = pl.BlockAdam(mine, 1e-2, (0.9, 0.98), 0.1, torch.tensor([0, 1]), 2, 1e9)
    b = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)
    for _ in range(20):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn(5)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(mine, theirs, strict=True))


# ---- 6. and 7. the budget


def curve(folder):
    return list(map(json.loads, (folder / "history.jsonl").read_text().splitlines()))


def trained(folder, shared, **scheduler):
    folder.mkdir(parents=True)
    kind = scheduler.pop("kind", "graff")
    return member.train(member_of(kind, **scheduler), folder, shared)


def test_the_last_evaluation_ends_by_the_budget(tmp_path, shared):
    changes = {"training.total_steps": None, "training.budget_minutes": 0.25}
    (tmp_path / "m").mkdir()
    found = member.train(member_of("cosine", changes=changes), tmp_path / "m", shared)
    assert found["in_budget"]
    assert found["used"] <= 15.0
    rows = curve(tmp_path / "m")
    assert rows[0]["used"] == 0.0
    assert rows[-1]["final"]
    assert [r["used"] for r in rows] == sorted(r["used"] for r in rows)
    full = schedulers.Cosine(member_of("cosine").run.training.scheduler, 2)
    assert float(full.decide(schedulers.Seen(1.0, 0, torch.zeros(4))).log_eta) == pytest.approx(math.log(1e-4))
    clock = trainer.Clock("virtual", 1.0)
    clock.charge(10 / trainer.UNIT_SECONDS)
    assert clock.fraction == 1.0


def test_a_budget_too_short_for_one_step_and_one_evaluation(tmp_path, shared):
    (tmp_path / "m").mkdir()
    with pytest.raises(StudyError, match="not even one step and one evaluation"):
        member.train(member_of(changes={"training.budget_minutes": 1e-4}), tmp_path / "m", shared)


@pytest.mark.parametrize("kind", ["salelr_reconstructed", "bats_reconstructed", "hypergradient"])
def test_every_other_scheduler_trains(tmp_path, shared, kind):
    assert trained(tmp_path / "m", shared, kind=kind)["status"] == "completed"
    losses = [r["loss"] for r in curve(tmp_path / "m") if "eta" in r]
    assert losses[-1] < losses[0]


def test_a_trial_of_the_search_reads_dev_alone(tmp_path, shared):
    """Test is scored once, by what the search found, and would take most of a trial's time."""
    changes = study.search_changes(member_of().run)
    (tmp_path / "m").mkdir()
    metrics = member.train(member_of(changes=changes), tmp_path / "m", shared)
    assert (metrics["exact_match"], metrics["test_loss"], metrics["dev_exact_match"] is None) == (None, None, False)


def test_a_pilot_reads_dev_alone_too():
    run = config.load_run(ROOT / "params/graff/small/graff.yaml", study="graff", scale="small", mode="full")
    planned = config.members(run)
    assert {m.pilot for m in planned} == {True, False}
    assert all(m.run.evaluation.test is not m.pilot for m in planned)


def test_a_missing_warm_start_names_the_command(tmp_path):
    run = member_of("graff", warm_start_ckpt=str(tmp_path / "none.safetensors")).run
    found = [f for f in check.findings(run) if f.key == "training.scheduler.warm_start_ckpt"]
    assert [f.level for f in found] == ["error"]  # before anything is started
    assert "lib.graff.prepare" in found[0].fix


def test_a_warm_start_of_another_size_is_read_from_either_format(tmp_path):
    planner = pl.Planner()
    torch.nn.init.normal_(planner.decoder.weight)
    save_file(planner.state_dict(), tmp_path / "w.safetensors")
    torch.save(planner.state_dict(), tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        run = member_of("graff", warm_start_ckpt=str(tmp_path / name)).run
        for layers in (2, 28):
            mine = trainer.build_scheduler(run, layers, tmp_path).planner.state_dict()
            assert all(torch.equal(mine[k], v) for k, v in planner.state_dict().items())


# ---- 8. and 9. answers, generation, energy

TABLE = [
    ("so #### 1,234", "1234", "1234"),
    ("#### $5", None, "5"),
    ("#### -7", "-7", "-7"),
    ("is 42.", None, "42"),
    ("#### 18.", "18", "18"),
    ("none", None, None),
    ("#### 3\n#### 4", "3", "4"),
    ("$1,000 left", None, "1000"),
    ("#### -1,234.50", "-1234.50", "-1234.50"),
    ("####5", None, "5"),
    ("#### 7 apples", "7", "7"),
    ("#### .", "", None),
    ("5 and then ...", None, ".."),
    ("#### 1,000,000.", "1000000", "1000000"),
    ("so -3", None, "-3"),
    ("$$", None, ""),
    ("Tom has 12 pens", None, "12"),
    ("3-4=-1", None, "-1"),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), TABLE)
def test_extraction(text, strict, flexible):
    assert (data.strict(text), data.flexible(text)) == (strict, flexible)


def harness():
    """({name: its filters of the task gsm8k as one function}, its exact match), from lm-evaluation-harness's own task
    file."""
    extraction = pytest.importorskip(
        "lm_eval.filters.extraction", reason="lm-eval brings 29 packages; it is not a dependency"
    )
    import lm_eval
    import yaml

    task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())

    def ignored(text: str) -> str:
        for regex in task["metric_list"][0]["regexes_to_ignore"]:
            text = re.sub(regex, "", text)
        return text.lower()

    made = {
        f["name"]: extraction.RegexFilter(**{k: v for k, v in f["filter"][0].items() if k != "function"})
        for f in task["filter_list"]
    }
    return made, lambda found, reference: ignored(found) == ignored(reference)


def test_extraction_agrees_with_the_harness_on_the_table_and_all_references():
    """As extracted, and as judged: every answer against every reference of the table, and each reference of the data
    set against itself and the one after it, by the harness's own filters and by ours."""
    made, equal = harness()
    if not GSM8K.exists():
        pytest.skip("GSM8K lies beside the checkout in ../shared")
    reported = [json.loads(line)["answer"] for name in ("train", "test") for line in (GSM8K / f"{name}.jsonl").open()]
    texts = reported + [row[0] for row in TABLE]
    references = [*reported[:40], "#### 1,234", "#### 5", "#### -7", "#### 42", "#### 1000"]
    for name, own in (("strict-match", data.strict), ("flexible-extract", data.flexible)):
        found = [f[0] for f in made[name].apply([[t] for t in texts], [{}] * len(texts))]
        assert [own(t) for t in texts] == [None if f == "[invalid]" else data.clean(f) for f in found]
        pairs = [(i, reported[i + shift]) for i in range(len(reported) - 1) for shift in (0, 1)]
        pairs += [(len(reported) + i, r) for i in range(len(TABLE)) for r in references]
        for i, reference in pairs:
            assert equal(found[i], reference) == (own(texts[i]) == data.reference(reference)), (texts[i], reference)


def test_all_references_of_gsm8k_are_read():
    if not GSM8K.exists():
        pytest.skip("GSM8K lies beside the checkout in ../shared")
    splits, _ = prepare.read_problems(str(GSM8K), ("test", "train"), {})
    rows = [r for name in ("train", "test") for r in splits[name]]
    assert len(rows) == 8792
    assert all(data.strict(r["answer"]) == data.flexible(r["answer"].split("####")[1]) for r in rows)
    train, dev = prepare.split_dev(rows[:7473], 512, 0)
    assert (len(train), len(dev)) == (6961, 512)
    assert dev == prepare.split_dev(rows[:7473][::-1], 512, 0)[1]


def test_a_data_set_without_answers_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "just 5"}\n')
    with pytest.raises(StudyError, match="no '#### number'"):
        prepare.read_problems(str(tmp_path), ("test", "train"), {})


def test_left_padded_batches_write_what_single_prompts_do(shared):
    given = data.load(shared)
    model = data.load_model(member_of().run, given, 1).eval()
    questions = [p["question"] for p in given.problems["train"][:5]] + ["Tom?"]
    together, units = data.generate_answers(model, given.tokenizer, questions, 8, 6)
    assert together == [data.generate_answers(model, given.tokenizer, [q], 8, 1)[0][0] for q in questions]
    assert units > 0


def test_answers_are_greedy_whatever_the_model_has_settled(shared, monkeypatch):
    given, load_base = data.load(shared), models.load_base

    def answers() -> tuple:
        model = data.load_model(member_of().run, given, 1).eval()
        return data.generate_answers(model, given.tokenizer, [p["question"] for p in given.problems["train"][:4]], 8, 4)

    def settled(*given):
        model = load_base(*given)
        model.generation_config = GenerationConfig(repetition_penalty=50.0)
        return model

    greedy = answers()
    monkeypatch.setattr(models, "load_base", settled)
    assert answers() == greedy


def test_energy_is_null_where_nothing_can_be_read(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU has a counter")
    monkeypatch.setattr(trainer, "RAPL", tmp_path / "none")
    energy = trainer.Energy()
    energy.update()
    assert (energy.joules, energy.source) == (None, None)
    assert "cannot be read" in energy.reason
    assert trainer.area([0.0, 1.0], [0.0, 1.0], 2.0) == pytest.approx(0.75)


class FakeNvml:
    """pynvml for a device that tells its total energy, its power only, or nothing."""

    NVMLError = RuntimeError

    def __init__(self, total: bool, power: bool):
        self.total, self.power, self.joules = total, power, 7.0

    def nvmlInit(self):
        """As the library's own."""

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.total:
            raise RuntimeError("Not Supported")
        return 1e3 * self.joules

    def nvmlDeviceGetPowerUsage(self, handle):
        if not self.power:
            raise RuntimeError("Not Supported")
        return 250_000  # mW


@pytest.fixture
def device(monkeypatch):
    """A function that puts a FakeNvml's device in the place of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="1"))
    return lambda library: monkeypatch.setitem(sys.modules, "pynvml", library)


def test_energy_is_the_counter_less_what_it_lost(device):
    library = FakeNvml(True, True)
    device(library)
    energy = trainer.Energy()
    assert (energy.source, energy.reason, energy.joules) == ("nvml", None, 0.0)
    for now in (19.5, 1.0, 4.0):  # the driver was loaded again in between
        library.joules = now
        energy.update()
    assert energy.joules == pytest.approx(15.5)


def test_energy_begins_with_the_budget(device, monkeypatch):
    """What the base model's answers took before it is not charged, as their time is not."""
    library = FakeNvml(True, True)
    device(library)
    budgeted = trainer.BudgetTrainer.__new__(trainer.BudgetTrainer)
    budgeted.energy, budgeted.clock = trainer.Energy(), trainer.Clock("virtual", 60.0)
    budgeted.dev = budgeted.subset = [None]
    monkeypatch.setattr(budgeted, "write", lambda row: None)

    def answer(whole):
        library.joules += 12_000
        return {}, 0.0

    monkeypatch.setattr(budgeted, "answer", answer)
    budgeted.begin()
    library.joules += 5
    budgeted.energy.update()
    assert budgeted.energy.joules == pytest.approx(5.0)


@pytest.mark.parametrize(("library", "reason"), [(FakeNvml(False, False), "Not Supported"), (None, "pynvml")])
def test_a_device_that_tells_nothing_and_a_missing_pynvml_give_the_reason(device, library, reason):
    device(library)
    energy = trainer.Energy()
    assert (energy.joules, energy.source) == (None, None)
    assert reason in energy.reason


def test_power_is_polled_without_being_asked_and_integrated(device, monkeypatch):
    assert trainer.PolledPower.INTERVAL <= 1.0
    times = iter([0.0, 2.0, 3.0])
    monkeypatch.setattr(trainer.PolledPower, "INTERVAL", 3600)
    read = trainer.PolledPower(lambda: 250.0, lambda: next(times))
    assert [read(), read()] == [500.0, 750.0]
    monkeypatch.setattr(trainer.PolledPower, "INTERVAL", 0.01)
    device(FakeNvml(False, True))
    energy = trainer.Energy()
    assert energy.source == "polled"
    until(lambda: energy._read.joules > 0)  # the thread read it
