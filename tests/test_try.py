"""`./run_all.sh try`: an idea that cannot be tried costs one line and no member; one that can is judged like a claim,
beside a baseline that is the shipped one, and every further try is counted."""

import json
import math
import re
import types

import numpy as np
import pytest
import yaml

from lib import config, plots, record
from lib.run import cli, ideas, keys, members, model_card, pages, plan, runner
from tests.conftest import ROOT
from tests.notebook import write_member

DPO = """
from torch.nn.functional import logsigmoid

def loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta):
    return -logsigmoid(beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)))
"""
LORA = """
from peft import LoraConfig

def adapter(model):
    return LoraConfig(r=8, lora_alpha=16, target_modules=["query_proj", "value_proj"])
"""
FIXED = "def schedule(fraction, state):\n    return 1.0\n"


def a_loss(body):
    return f"import torch\ndef loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta):\n    {body}"


@pytest.fixture
def attempt(tmp_path, monkeypatch, capsys):
    """`attempt(text, *options)`: (exit code, output) of a try of a file with this text; nothing is trained."""

    def began(options, *_):
        (options.root / "study" / "comparison").mkdir(parents=True, exist_ok=True)
        return 0

    monkeypatch.setattr(plan, "slowness", lambda run: 1.0)
    monkeypatch.setattr(members, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(cli, "execute", began)
    monkeypatch.setattr(ideas, "summary", lambda *_: [])

    def run(text, *options, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        code = cli.main(["try", str(path), "--results-dir", str(tmp_path / "out"), *options])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


# ---- what cannot be tried


@pytest.mark.parametrize(
    ("text", "against", "said"),
    [
        ("x = 1", "dpo", "0 of the functions that are tried"),
        (DPO + FIXED, "dpo", "2 of the functions that are tried"),
        ("import nothing_like_this", "dpo", "mine.py:1: raises ModuleNotFoundError"),
        ("def loss(:\n", "dpo", "mine.py:1: raises SyntaxError"),
        ("def loss(chosen, rejected, *, beta):\n    return chosen", "dpo", "loss(chosen, rejected, *, beta)"),
        (DPO.replace("*, beta", "*, beta, tau"), "dpo", "beta, tau)"),
        (a_loss("return 1 / 0"), "dpo", "mine.py:3: raises ZeroDivisionError: division by zero"),
        (a_loss("raise SystemExit(0)"), "dpo", "mine.py:3: raises SystemExit"),
        (a_loss("return policy_chosen * float('nan')"), "dpo", "returns [nan, nan, nan, nan]"),
        (a_loss("return (policy_chosen - policy_rejected).mean()"), "dpo", "returns a Tensor of shape ()"),
        (a_loss("return 0.5"), "dpo", "returns a float of shape ()"),
        (a_loss("return torch.ones(4)"), "dpo", "does not require grad"),
        (a_loss("return (policy_chosen - policy_chosen).sqrt()"), "dpo", "gradient [[nan"),
        ("def adapter(model):\n    return {'r': 8}", "lora", "returns dict; expected a configuration of PEFT"),
        (LORA.replace("query_proj", "no_such").replace("value_proj", "nor_this"), "lora", "No modules were targeted"),
        ("def schedule(fraction, state):\n    return 1 / fraction", "fixed", "mine.py:2: raises ZeroDivisionError"),
        ("def schedule(fraction, state):\n    return -fraction", "fixed", "returns -0.5 at fraction 0.5"),
        ("def schedule(fraction, state):\n    return None", "fixed", "returns None at fraction 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_costs_a_line_and_nothing_else(attempt, tmp_path, text, against, said):
    code, output = attempt(text, "--against", against, "--gain", "0.3")
    assert code == 2
    assert said in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_what_is_asked_for_wrongly(attempt, tmp_path):
    assert "did you mean dpo?" in attempt(DPO, "--against", "dop", "--gain", "0.3")[1]
    assert "one of discopop, discopop_card, dpo, td_dpo" in attempt(DPO, "--against", "lora", "--gain", "0.3")[1]
    assert "a share: 0.01 is a point" in attempt(FIXED, "--against", "fixed", "--gain", "6")[1]
    assert attempt(DPO, "--against", "dpo")[0] == 2
    assert "no such key" in attempt(DPO, "--against", "dpo", "--gain", "0.3", "--set", "loss.bta=1")[1]
    assert cli.main(["try", str(tmp_path / "none.py"), "--against", "dpo", "--gain", "0.3"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["plan", "idea.py"])
    assert not (tmp_path / "out").exists()


def test_a_first_look_that_the_minutes_do_not_cover_is_announced(attempt, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "slowness", lambda run: 20.0)
    code, said = attempt(DPO, "--against", "dpo", "--gain", "0.3", "--max-minutes", "15")
    assert code == 2
    assert re.search(r"fix: --max-minutes \d+", said)
    assert not list((tmp_path / "out").glob("*-try,*")), "a refused try does not count"
    code, said = attempt(DPO, "--against", "dpo", "--gain", "0.3")
    assert code == 0
    assert "more than the 15 minutes that a try has" in said
    monkeypatch.setattr(plan, "slowness", lambda run: 1.0)
    assert "first look" not in attempt(DPO, "--against", "dpo", "--gain", "0.3")[1]


# ---- what a try is made of


def made(tmp_path, pattern):
    """(try.json, {run_id: run}) of the one folder that matches."""
    (root,) = (tmp_path / "out").glob(pattern)
    files = sorted((root / "params").rglob("*.yaml"))
    runs = [config.load_run(path, scale="laptop", mode="full", results_dir=root / path.parts[-3]) for path in files]
    return record.read_json(root / "try.json"), {run.run_id: run for run in runs}


@pytest.mark.parametrize(
    ("text", "against", "setting", "cell"),
    [
        (DPO, "dpo", "loss.beta", {"beta": 0.05}),
        (DPO, "td_dpo", "loss.beta", {"beta": 0.05, "tau": 1.0}),
        (LORA, "adalora", "training.learning_rate", {"learning_rate": 3e-3}),
        (LORA, "iw_lora", "training.learning_rate", None),
        (FIXED, "hypergradient", "training.optimizer.lr_init", {"learning_rate": 3e-3}),
        (FIXED, "salelr_reconstructed", "training.optimizer.lr_init", {"learning_rate": 3e-3}),
    ],
)
def test_the_idea_differs_from_the_shipped_baseline_in_its_function_alone(
    attempt, tmp_path, text, against, setting, cell
):
    code, said = attempt(text, "--against", against, "--gain", "0.3")
    assert code == 0, said
    about, runs = made(tmp_path, "laptop-try,mine-*")
    mine, other = (config.members(runs[name])[0] for name in ("idea_mine", against))
    shipped = config.load_run(
        ROOT / "params" / about["study"] / "laptop" / f"{against}.yaml", scale="laptop", mode="full"
    )
    aliases = config.study_module(about["study"]).ALIASES
    if cell:
        assert other.cell == {aliases[key]: value for key, value in cell.items()}
    same = config.cell_members(shipped, other.cell, [other.seed])[0]
    assert keys.member_key(other) == keys.member_key(same)  # its record may be taken over
    assert config.get(config.dump(mine.run), setting) == config.get(config.dump(other.run), setting)
    assert keys.inputs_key(mine.run) == keys.inputs_key(other.run)
    assert runs["idea_mine"].seed_list == shipped.seed_list
    before = keys.member_key(mine)
    (tmp_path / "out").joinpath(next((tmp_path / "out").glob("*/idea/mine.py"))).write_text(f"{text}\n# more")
    assert keys.difference(before, keys.member_key(mine)) == "idea changed"


def test_every_try_is_counted_and_gets_seeds_of_its_own(attempt, tmp_path):
    asked = ("--against", "dpo", "--gain", "0.3")
    attempt(DPO, *asked)
    attempt(DPO, *asked)  # goes on where it was
    attempt(DPO, *asked, name="second.py")
    attempt(DPO, *asked, "--same-seeds", name="third.py")
    attempt(DPO, "--against", "td_dpo", "--gain", "0.3", name="other.py")
    first, second, third, other = (made(tmp_path, f"laptop-try,{n}-*") for n in ("mine", "second", "third", "other"))
    assert [each[0]["number"] for each in (first, second, third, other)] == [1, 2, 3, 1]
    assert second[1]["dpo"].seed_list == list(range(62, 82))
    assert not {*first[0]["seeds"]} & {*second[0]["seeds"]}
    assert third[0]["seeds"] == first[0]["seeds"]
    (claims,) = (tmp_path / "out").glob("laptop-try,third-*/td_dpo/claims.yaml")
    (claim,) = yaml.safe_load(claims.read_text())["claims"]
    assert "Idea 3" in claim["note"]
    assert "on the same seeds as idea 1: trying again is tuning on the judge" in claim["note"]


def test_a_setting_applies_to_both_sides(attempt, tmp_path):
    sets = ("--set", "loss.beta=2.5", "--set", "training.max_steps=60")
    code, said = attempt(DPO, "--against", "dpo", "--gain", "0.3", *sets)
    assert code == 0, said
    about, runs = made(tmp_path, "laptop-try,mine-*")
    for member in (config.members(run)[0] for run in runs.values()):
        assert member.run.loss.beta == 2.5
        assert member.run.training.max_steps == 60
    assert config.members(runs["dpo"])[0].cell == {"loss.beta": 2.5}
    assert about["command"].endswith("--set loss.beta=2.5 --set training.max_steps=60")


def test_records_of_the_same_baseline_are_taken_over(attempt, tmp_path):
    attempt(DPO, "--against", "dpo", "--gain", "0.3")
    run = made(tmp_path, "laptop-try,mine-*")[1]["dpo"]
    member = config.members(run)[0]
    folder = tmp_path / "out" / "laptop-full" / "td_dpo" / "dpo" / "members" / member.id
    record.write_json(folder / "metrics.json", {"status": "completed"})
    record.write_json(folder / "done.json", {"status": "completed", "key": keys.member_key(member)})
    attempt(DPO, "--against", "dpo", "--gain", "0.3")
    taken = run.results_dir / "dpo" / "members"
    assert [path.name for path in taken.iterdir()] == [member.id]
    assert not members.stale(member, taken / member.id)


def test_the_shipped_examples_can_be_tried():
    found = {path.stem: ideas.load(path)[0] for path in sorted((ROOT / "notebooks" / "try").glob("*.py"))}
    assert found == {"flipped": "td_dpo", "same": "iw_lora", "tenfold": "graff"}


# ---- what runs in the place of the method's own function


def test_a_loss_is_trained_with(attempt, tmp_path, monkeypatch):
    import torch

    from lib.td_dpo import losses

    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    path = tmp_path / "idea.py"
    path.write_text(DPO.replace("-logsigmoid(beta", "-logsigmoid(-beta"))
    four = torch.randn(4, 3)
    before = losses.preference_loss("dpo", *four, beta=0.1)[0]
    ideas.adopt(types.SimpleNamespace(idea=str(path), study="td_dpo"))
    rho = (four[0] - four[2]) - (four[1] - four[3])
    torch.testing.assert_close(losses.preference_loss("dpo", *four, beta=0.1)[0], before + 0.1 * rho)


def test_a_schedule_remembers_and_moves_the_rate(monkeypatch):
    import torch

    from lib.graff import schedulers

    def schedule(fraction, state):
        state.setdefault("seen", []).append((state["step"], state["loss"]))
        return 2.0 if state["step"] else 0.0

    given = schedulers.Given(None, 3, schedule)
    seen = schedulers.Seen(0.5, 0.0, torch.zeros(6))
    assert float(given.decide(seen).log_eta) == pytest.approx(math.log(1e-4))
    given.learn(0.7, None, 0.0, 0.0, 0.9)
    assert float(given.decide(seen).log_eta) == pytest.approx(math.log(2.0))
    again = schedulers.Given(None, 3, schedule)
    again.restore(given.state())
    assert again.memory == {"step": 1, "loss": 0.7, "seen": [(0, None), (1, 0.7)]}


def test_an_adapter_of_ones_own_trains_the_head_that_lora_trains():
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification

    from lib.iw_lora import data, trainer

    run = config.load_run(ROOT / "params/iw_lora/laptop/lora.yaml", scale="laptop", mode="full")
    recipe, trained = run.model.recipe.model_dump(), []
    for build in (
        lambda model: trainer.add_adapters(model, run.model.adapter, 10),
        lambda model: trainer.add_own(
            model, LoraConfig(r=8, lora_alpha=16, target_modules=["query_proj", "value_proj"])
        ),
    ):
        model = AutoModelForSequenceClassification.from_config(data.tiny_deberta(recipe, 64, 0).config)
        trained.append({name for name, p in build(model).named_parameters() if p.requires_grad})
    assert trained[0] == trained[1]
    assert any("pooler" in name for name in trained[0])


# ---- from the command to the word: the notebook that judges, on made scores


@pytest.fixture
def judged(tmp_path, monkeypatch, capsys):
    """`judged(text, gain, *options, better=...)`: what a try prints whose idea's scores are the baseline's and `better`;
    its training notebooks only write records, its analysis is the shipped one."""
    monkeypatch.setattr(plan, "slowness", lambda run: 1.0)
    monkeypatch.setattr(members, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(runner, "POLL", 0.01)
    monkeypatch.setattr(runner.Runner, "ensure_pool", lambda self: None)
    monkeypatch.setattr(runner, "check_success", lambda *_: None)
    monkeypatch.setattr(model_card, "write_all", lambda *_: None)
    monkeypatch.setattr(pages, "notebook_html", lambda *_: None)
    monkeypatch.setattr(plots, "save", lambda *_: None)  # figures are made, and not written

    def scores(member, better):
        study, own = member.run.study, np.random.default_rng([member.seed, member.run.idea is not None])
        shared = np.random.default_rng(member.seed)
        for i in range(80):
            value = shared.normal(6.0, 1.0) if study == "td_dpo" else float(shared.random() < 0.5)
            value += (better(own) if callable(better) else better) if member.run.idea else 0.0
            if study == "td_dpo":
                yield {"kind": "answer", "question": i, "turn": 1, "score": value}
            else:
                yield {"kind": "example", "example": i, "correct" if study == "iw_lora" else "exact_match": value}

    def execute(step, nonce, better):
        folder = step.folder
        if step.kind == "train":
            record.write_text(folder / "config.yaml", yaml.safe_dump(config.dump(step.run)))
            for member in config.members(step.run):
                metrics = {"status": "completed", "seconds": 6.0, "majority_baseline": 0.1, "base_exact_match": 0.1}
                steps = [{"step": n, "loss": 1.0 / n} for n in (1, 2)]
                rows = list(scores(member, better))
                write_member(step.run.results_dir, member, metrics, rows=rows, history=steps, code={})
                done = {"run_id": step.run.run_id, "status": "completed", "key": keys.member_key(member)}
                record.write_json(folder / "members" / member.id / "done.json", done)
        else:
            names = {"__name__": "notebook"}
            for cell in json.loads(step.notebook.read_text())["cells"]:
                if cell["cell_type"] == "code":
                    exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
                    if "parameters" in cell["metadata"].get("tags", ()):
                        names |= {**step.parameters, "nonce": nonce}
        record.write_text(runner.partial(step), "{}")

    def run(text, *options, better=0.0, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        monkeypatch.setattr(runner, "execute_notebook", lambda step, nonce: execute(step, nonce, better))
        code = cli.main(["try", str(path), "--results-dir", str(tmp_path / "out"), "--jobs", "1", *options])
        said = capsys.readouterr()
        assert code == 0, said.out + said.err
        return said.out

    return run


def test_words_of_three_ideas(judged, tmp_path):
    asked = ("--against", "dpo", "--gain", "0.3")
    said = judged(DPO, *asked, better=-1.0)
    assert "\nrefuted: mine.py scored 1.00 below DPO at beta 0.05 (95 % interval" in said
    assert "5 seeds); tested was at least 0.2, two thirds of the claimed 0.3" in said
    assert "Idea 1 tried against dpo" in said
    assert "Training took 1.0 minutes of one core" in said  # ten members of 6 seconds
    assert "laptop-try,mine-" in said.splitlines()[-1]
    assert "\nidentical: every score of second.py is that of DPO at beta 0.05" in judged(DPO, *asked, name="second.py")
    assert "\nsupported: third.py" in judged(DPO, *asked, name="third.py", better=0.5)
    assert "Idea 3 tried" in judged(
        DPO, *asked, name="third.py", better=0.5
    )  # up to date: judged again from the record


def test_an_open_claim_gets_seeds_until_a_word_or_the_last_look(judged):
    """Noise in every score, and a true gain of two thirds of what is claimed: no early word."""
    said = judged(FIXED, "--against", "fixed", "--gain", "0.12", better=lambda rng: float(rng.random() < 0.08))
    rounds = [line.split(":")[0] for line in said.splitlines() if line.startswith(("first look", "seeds for"))]
    assert rounds[:2] == ["first looks", "seeds for graff idea to 8"]
    assert re.search(r"\n(supported|refuted|inconclusive): mine.py scored 0\.\d+ above fixed at lr_init 0.003", said)
    assert rounds[-1] == "seeds for graff idea to 20" or "inconclusive" not in said


def test_an_adapter_is_judged_by_its_examples(judged):
    said = judged(LORA, "--against", "lora", "--gain", "0.03", better=lambda rng: float(rng.random() < 0.05))
    assert "\nsupported: mine.py scored 0.0" in said
    assert "above LoRA at learning_rate 0.002" in said
