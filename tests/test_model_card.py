"""What a finished member keeps: weights with a card made from its record, which load back to the metrics of the
record."""

import re

import pytest
import yaml

from lib import config, record, training as checkpoints
from lib.made import write_stand_in
from lib.run import members, model_card
from lib.td_dpo import engine, generated
from lib.td_dpo.member import load

LORA = {"lora_r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture
def trained(tiny, monkeypatch):
    """make(**sections): a member of one seed trained in this process; (its folder, its inputs)."""
    monkeypatch.setenv("STUDY_SLOTS", "0")

    def make(**changes):
        run = tiny(seed_list=[1], **changes)
        job = members.submit(run)
        members.collect(job)
        return job.folders["default-s1"], load(run, members.prepare_inputs(run))

    return make


def scores(model, given) -> dict:
    """The metrics of the test pairs, as lib/td_dpo/member.py measures them."""
    rows = engine.pair_scores(model, given.rows["test"], given.reference["test"])
    return {
        "implicit_accuracy": sum(r["rho"] > 0 for r in rows) / len(rows),
        "margin": sum(r["rho"] for r in rows) / len(rows),
    }


def run_code_of(card: str, folder, monkeypatch, **names):
    """The model that the card's own lines load."""
    monkeypatch.chdir(folder.parent)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code, names)
    return names["model"]


@pytest.mark.parametrize("kind", ["lora", "nf4", "full"])
def test_what_the_card_loads_has_the_recorded_metrics(trained, tmp_path, monkeypatch, kind):
    sections = {
        "full": {},
        "lora": {
            "model": {
                "name": "made",
                "recipe": {
                    "vocab_size": 320,
                    "hidden_size": 32,
                    "layers": 2,
                    "heads": 2,
                    "sft_steps": 8,
                    "sft_batch_size": 8,
                },
                "peft": LORA,
            }
        },
    }
    if kind == "nf4":
        texts = [
            m["content"] for pair in generated.make_pairs(40, 1, 1)["train"] for m in (*pair["prompt"], *pair["chosen"])
        ]
        write_stand_in("meta-llama/Llama-2-7b-chat-hf", tmp_path / "base", texts, vocab_size=384)
        sections["nf4"] = {"model": {"name": str(tmp_path / "base"), "quantization": "nf4", "peft": LORA}}
    folder, given = trained(
        **sections[kind],
        training={
            "max_steps": 6,
            "global_batch_size": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "eval_steps": 2,
            "save_steps": 2,
        },
    )
    metrics = record.read_json(folder / "metrics.json")
    kept = folder / "checkpoints" / f"checkpoint-{metrics['steps']}"
    assert checkpoints.read_marker(kept)
    card = (kept / model_card.NAME).read_text()
    files = {path.name for path in kept.iterdir()}
    assert ("adapter_model.safetensors" in files) == (kind != "full")
    assert ("model.safetensors" in files) == (kind == "full"), "adapters only: the base model is not copied"
    found = scores(run_code_of(card, kept, monkeypatch), given)
    assert found["implicit_accuracy"] == metrics["implicit_accuracy"]
    assert found["margin"] == pytest.approx(metrics["margin"], rel=1e-5, abs=1e-6)
    assert abs(found["margin"]) > 1e-3, "the untrained model has a margin of 0: these are trained weights"


def test_the_card_says_what_the_record_says_and_verdicts_when_there_are_some(trained):
    folder, _ = trained()
    metrics, spec = record.read_json(folder / "metrics.json"), record.read_json(folder / "member.json")
    card = (folder / "checkpoints" / f"checkpoint-{metrics['steps']}" / model_card.NAME).read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["td_dpo", "laptop-scale"]
    assert "datasets" not in front, "generated data are no data set of the hub"
    reported = dict(re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", card, re.MULTILINE))
    assert float(reported["implicit_accuracy"]) == pytest.approx(metrics["implicit_accuracy"], rel=1e-5)
    assert float(reported["loss.beta"]) == spec["config"]["loss"]["beta"]
    assert int(reported["pairs trained on"]) == metrics["pairs"]
    assert "seconds" not in card
    assert "Not judged yet" in card
    results = folder.parents[2]
    record.write_json(
        results / "comparison" / "claims.json", [{"id": "C7", "verdict": "refuted", "sentence": "All is well."}]
    )
    before = card
    model_card.write_all(results)
    card = (folder / "checkpoints" / f"checkpoint-{metrics['steps']}" / model_card.NAME).read_text()
    assert "- C7 **refuted**: All is well." in card
    assert card.split("## Verdicts")[0] == before.split("## Verdicts")[0]


def test_other_weights_are_not_given_the_measured_ones_metrics(tmp_path):
    folder = tmp_path / "results" / "run" / "members" / "default-s1"
    settings = {
        "method": "dpo",
        "role": "comparative",
        "model": {
            "name": "meta-llama/Llama-2-7b-chat-hf",
            "revision": "abc",
            "quantization": "nf4",
            "torch_dtype": "bfloat16",
        },
        "dataset": {"name": "argilla/dpo-mix-7k", "revision": "def"},
        "loss": {"name": "dpo", "beta": 0.1},
    }
    record.write_json(
        folder / "member.json",
        {
            "config": settings,
            "run_id": "run",
            "member": "default-s1",
            "study": "td_dpo",
            "scale": "paper",
            "mode": "full",
            "seed": 1,
        },
    )
    record.write_json(
        folder / "metrics.json", {"status": "completed", "best_step": 4, "steps": 8, "implicit_accuracy": 0.75}
    )
    for step in (4, 8):
        record.write_json(folder / f"checkpoints/checkpoint-{step}/complete.json", {"step": step})
        record.write_json(
            folder / f"checkpoints/checkpoint-{step}/adapter_config.json",
            {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b-chat-hf"},
        )
    (folder / "checkpoints/checkpoint-6").mkdir()  # what a kill left: no card
    model_card.write(folder)
    cards = sorted(folder.glob("checkpoints/*/README.md"))
    assert [path.parent.name for path in cards] == ["checkpoint-4", "checkpoint-8"]
    best, last = ((folder / f"checkpoints/checkpoint-{step}/README.md").read_text() for step in (4, 8))
    assert "0.75" in last
    assert "0.75" not in best
    assert "those are of step 8" in best
    assert yaml.safe_load(last.split("---")[1])["base_model"] == "meta-llama/Llama-2-7b-chat-hf"
    assert 'revision="abc"' in last
    assert "load_in_4bit=True" in last
    record.write_json(folder / "metrics.json", {"status": "diverged", "diverged_at": 7, "steps": 7})
    model_card.write(folder)
    assert "diverged at step 7" in (folder / "checkpoints/checkpoint-4/README.md").read_text()


@pytest.mark.parametrize("study", ["iw_lora", pytest.param("graff", marks=pytest.mark.slow)])
def test_the_other_studies_weights_have_a_card_too(study, tmp_path, monkeypatch):
    path = next(
        p for p in sorted((config.ROOT / "params" / study / "laptop").glob("*.yaml")) if p.stem in ("iw_lora", "fixed")
    )
    run = config.load_run(path, study=study, scale="laptop", mode="trial", results_dir=tmp_path)
    monkeypatch.setenv("STUDY_SLOTS", "0")
    (member, *_) = config.members(run)
    job = members.submit(run, [member])
    members.collect(job)
    cards = sorted(job.folders[member.id].glob("checkpoints/*/README.md"))
    assert cards
    card = cards[-1].read_text()
    assert "The trained parameters" in card
    assert "A trial" in card
    if study == "iw_lora":
        from transformers import DataCollatorWithPadding

        from lib.iw_lora import trainer

        given = trainer.load(members.prepare_inputs(run))
        model = trainer.build(member.run, given, member.seed + 1, 2)  # another head, other adapters, until loaded
        batch = DataCollatorWithPadding(given.tokenizer)(given.rows["validation"])
        recorded = record.read_json(job.folders[member.id] / "metrics.json")["validation_loss"]
        assert trainer.task_loss(model.eval(), batch).item() != pytest.approx(recorded, rel=1e-5)
        run_code_of(card, cards[-1].parent, monkeypatch, model=model)
        assert trainer.task_loss(model.eval(), batch).item() == pytest.approx(recorded, rel=1e-5)
