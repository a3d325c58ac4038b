"""lib/config.py and the studies' config.py: what a run YAML may say, what it becomes, and what is said of it."""

import copy
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lib import config
from lib.errors import StudyError
from lib.run import check, cli, keys, members, plan

REFERENCE = config.ROOT.parent / "shared" / "reference" / "run_configs"
SHIPPED = sorted((config.ROOT / "params").glob("*/*/*.yaml"))
FIXED = sorted((config.ROOT / "params" / "published").glob("*.yaml"))
FIX = re.compile(r"^# (\w+\.[\w.]+): (.+?) \| .+$", re.MULTILINE)  # key: published value | why
STUDY_OF = {"Llama": "td_dpo", "DeBERTa": "iw_lora", "Qwen3": "graff"}


def as_published(path):
    """A configuration of params/published/ with its fixes undone, each by its comment line: as it was published."""
    raw = config.load_yaml(path)
    for key, value in FIX.findall(path.read_text()):
        section, _, last = key.rpartition(".")
        if value == "-":
            del config.get(raw, section)[last]
            if not config.get(raw, section):
                del raw[section]
        else:
            config.put(raw, key, yaml.safe_load(value))
    return raw


@pytest.fixture
def raw():
    return config.load_yaml(config.ROOT / "params/td_dpo/laptop/td_dpo.yaml") | {"seed_list": [42, 43, 44]}


@pytest.fixture
def write(tmp_path):
    def _write(content, name="run.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return _write


def load(path, **given):
    return config.load_run(path, **{"scale": "laptop", "mode": "full", **given})


def refused(function, *args, **given) -> str:
    with pytest.raises(StudyError) as caught:
        function(*args, **given)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- reading a file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("- a\n- b\n", "a list"),
        ("just words", "a str"),
        ("a: 1\na: 2\n", "written twice: a"),
        ("a: {b: 1, b: 2}", "written twice: b"),
        ("? [a]\n: x", "unhashable key"),
        ("a: [1, 2", "expected"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "but found another document"),
        ("a: " + "9" * 6000, "integer string conversion"),
        ("[" * 3000 + "]" * 3000, "recursion depth"),
        ("a: \x00", "special characters"),
        ("a: *nowhere", "undefined alias"),
        ("a: 2024-13-45", "month"),
    ],
)
def test_bad_files_are_refused_with_their_name(write, content, said):
    message = refused(config.load_yaml, write(content))
    assert "run.yaml" in message
    assert said in message


def test_alias_bomb_is_refused_and_ordinary_aliases_are_not(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
    ]
    assert "or 20 aliases" in refused(config.load_yaml, write("\n".join(lines)))
    assert config.load_yaml(write("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}"))["d"] == {"b": 1, "e": 2}


def test_size_encoding_and_absence(write, tmp_path):
    assert "more than 1,000,000 characters" in refused(config.load_yaml, write("a: " + "x" * 1_000_001))
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    assert "not UTF-8" in refused(config.load_yaml, tmp_path / "latin.yaml")
    assert "No such file" in refused(config.load_yaml, tmp_path / "absent.yaml")
    assert "directory" in refused(config.load_yaml, tmp_path)
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert config.load_yaml(tmp_path / "bom.yaml") == {"a": 1}


# --- values, keys and ranges ----------------------------------------------------------------------------------------


def test_numeric_strings_become_numbers_at_any_depth(write, raw):
    raw["training"]["learning_rate"] = "1e-5"
    raw["model"]["recipe"]["sft_learning_rate"] = "3E-3"
    raw["optuna"]["search_space"]["learning_rate"] = {"type": "loguniform", "low": "5e-6", "high": "5e-5"}
    raw["optuna"]["search_space"]["beta"]["choices"] = ["1e-2", 0.05]
    raw["grid"] = [{"product": {"beta": ["1e-2", "5e-2"], "tau": ["1"]}}, {"cells": [{"beta": "2.5e0", "tau": "2"}]}]
    run = load(write(raw))
    assert run.training.learning_rate == 1e-5
    assert run.model.recipe.sft_learning_rate == 3e-3
    assert run.optuna.search_space["learning_rate"].low == 5e-6
    assert run.optuna.search_space["beta"].choices == [0.01, 0.05]
    assert [member.cell for member in config.members(run)][::3] == [
        {"loss.beta": 0.01, "loss.tau": 1},
        {"loss.beta": 0.05, "loss.tau": 1},
        {"loss.beta": 2.5, "loss.tau": 2},
    ]
    assert isinstance(config.members(run)[0].run.loss.beta, float)


def test_unquoted_exponent_in_a_file(write, raw):
    text = yaml.safe_dump(raw).replace("learning_rate: 2e-4", "learning_rate: 1e-5")
    assert isinstance(yaml.safe_load(text)["training"]["learning_rate"], str)  # why the coercion exists
    assert load(write(text)).training.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("change", "key", "hint"),
    [
        ({"training": {"learning_rte": 1e-3}}, "training.learning_rte", "did you mean training.learning_rate?"),
        ({"trainning": {}}, "trainning", "did you mean training?"),
        ({"training": {"beta": 0.1}}, "training.beta", "did you mean loss.beta?"),
        ({"model": {"lora_r": 8}}, "model.lora_r", "did you mean model.peft.lora_r?"),
        ({"optuna": {"search_space": {"beta": {"tipe": "int"}}}}, "optuna.search_space.beta.tipe", ""),
        ({"wandb": {"api_key": "sesame"}}, "wandb.api_key", ""),
        ({True: "sesame"}, "True", "Keys should be strings"),
    ],
)
def test_unknown_keys_name_file_and_key_and_suggest(write, raw, change, key, hint):
    def merge(into, more):
        for name, value in more.items():
            if isinstance(into.get(name), dict) and isinstance(value, dict):
                merge(into[name], value)
            else:
                into[name] = value

    merge(raw, change)
    path = write(raw)
    message = refused(load, path)
    assert str(path) in message
    assert key in message
    assert hint in message
    assert "sesame" not in message  # the value of an unknown key may be a secret


def test_all_faults_of_a_file_come_at_once(write, raw):
    raw["training"] |= {"learning_rate": -1, "max_stepss": 3, "optimizer": "sgd"}
    raw["seed_list"] = []
    message = refused(load, write(raw))
    assert "4 faults" in message
    for key in ("training.learning_rate: -1", "training.max_stepss", "training.optimizer: 'sgd'", "seed_list"):
        assert key in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.learning_rate", 0),
        ("training.learning_rate", "fast"),
        ("training.learning_rate", True),
        ("training.learning_rate", float("nan")),
        ("training.learning_rate", float("inf")),
        ("training.warmup_ratio", 1.0),
        ("training.max_steps", 1.5),
        ("training.max_steps", 0),
        ("training.fp16", True),
        ("training.fp16", "no"),
        ("training.bf16", 1),
        ("loss.name", "dpoo"),
        ("loss.tau", 0),
        ("loss.tau", None),
        ("loss.beta", -0.1),
        ("dataset.validation_fraction", 0),
        ("dataset.preprocessing", "long"),
        ("dataset.preprocessing.max_prompt_length", 512),
        ("seed_list", [1, 1]),
        ("seed_list", [-1]),
        ("seed_list", [True]),
        ("seed_list", 42),
        ("run_id", "../other"),
        ("run_id", "a/b"),
        ("run_id", ".hidden"),
        ("run_id", ""),
        ("run_id", "x" * 200),
        ("run_id", "a\nb"),
        ("run_id", 7),
        ("role", "best"),
        ("model.recipe.heads", 5),
        ("model.quantization", "nf4"),
        ("model.quantization", "int3"),
        ("model.trust_remote_code", "false"),
        ("training.warmup_steps", 5),
        ("grid", [{"cells": [{"beta": 1}], "product": {}, "x": 1}]),
        ("compute.threads", "${opt.x}"),
        ("optuna", "${opt.x}"),
        ("grid", [{}]),
        ("grid", [{"cells": [{}]}]),
        ("grid", [{"product": {"beta": []}}]),
        ("loss", "${opt.loss}"),
        ("optuna.search_space.beta", {"type": "categorical", "choices": []}),
        ("optuna.direction", "up"),
        ("optuna.search_space.beta", {"type": "loguniform", "low": 0, "high": 1}),
        ("optuna.search_space.beta", {"type": "uniform", "low": 2, "high": 1}),
        ("optuna.search_space.beta", {"type": "int", "low": 1.5, "high": 3}),
        ("optuna.search_space.beta", {"type": "uniform", "choices": [1]}),
        ("loss.label_smoothing", 0.1),
    ],
)
def test_bad_values_are_refused(write, raw, key, value):
    config_raw = copy.deepcopy(raw)
    section = config_raw
    *path, last = key.split(".")
    for part in path:
        section = section[part]
    section[last] = value
    assert (path[0] if path else key) in refused(load, write(config_raw), study="td_dpo")


def test_missing_sections_are_named(write, raw):
    del raw["training"], raw["seed_list"]
    message = refused(load, write(raw), study="td_dpo")
    assert "training: missing" in message
    assert "seed_list: missing" in message


def test_context_keys_are_not_yaml_keys(write, raw):
    assert "--scale" in refused(load, write(raw | {"scale": "paper"}))


def test_no_mutated_file_is_anything_but_loaded_or_refused(write, raw):
    """Any value anywhere replaced by any plain thing: a StudyError, or a run; without an error finding it can start."""
    rng = random.Random(1)
    odd = [
        None,
        True,
        -1,
        0,
        3.7,
        1e300,
        "",
        "x",
        "1e-5",
        "${opt.beta}",
        "${opt.}",
        [],
        {},
        [[]],
        {"a": {}},
        [None],
        ["x", 1],
    ]
    files = [raw, *map(as_published, FIXED)]
    outcomes = set()
    for _ in range(400):
        mutated = copy.deepcopy(rng.choice(files))
        section, depth = mutated, rng.randint(0, 3)
        while True:
            key = rng.choice(list(section))
            if depth == 0 or not isinstance(section[key], dict) or not section[key]:
                break
            section, depth = section[key], depth - 1
        section[key] = rng.choice(odd)
        try:
            run = load(write(mutated))
            if not any(finding.level == "error" for finding in check.findings(run)):
                assert config.members(run)
                assert len(config.members(config.trial(run))) == 1
                assert config.steps(run) >= 0
                outcomes.add("can run")
        except StudyError:
            outcomes.add("refused")
    assert outcomes == {"can run", "refused"}


# --- the shipped and the published files ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_files_load_without_a_finding(path):
    run = config.load_run(path, scale=path.parent.name, mode="full")
    assert run.study == path.parts[-3]
    assert check.findings(run) == []
    assert config.load_yaml(path).keys() >= {
        "run_id",
        "method",
        "role",
        "model",
        "dataset",
        "training",
        "loss",
        "compute",
        "evaluation",
        "optuna",
        "seed_list",
        "grid",
    }


@pytest.mark.parametrize(
    ("path", "undo"),
    [*((path, False) for path in SHIPPED + FIXED), *((path, True) for path in FIXED)],
    ids=lambda value: f"{value.parent.name}/{value.stem}" if isinstance(value, Path) else "",
)
def test_dump_then_load_is_the_identity(path, undo, write):
    run = config.load_run(write(as_published(path)) if undo else path, scale="paper", mode="full")
    again = config.load_run(write(config.dump(run)), study=run.study, scale="paper", mode="full")
    restored = config.restore(config.dump(run), study=run.study, scale="paper", mode="full")
    notebook = config.from_notebook(config.parameters(run) | {"nonce": "n"})
    assert config.dump(run) == config.dump(again) == config.dump(restored) == config.dump(notebook)
    assert notebook.results_dir == run.results_dir
    shrunk = config.trial(run)
    assert config.trial(shrunk) == shrunk
    assert config.from_notebook(config.parameters(shrunk)) == shrunk.model_copy(update={"source": None})
    for member in config.members(run):
        assert config.trial(member.run).run_id == run.run_id


def test_members_of_the_laptop_study():
    counts, ids = {}, set()
    for path in SHIPPED:
        if path.parts[-3:-1] == ("td_dpo", "laptop"):
            run = config.load_run(path, scale="laptop", mode="full")
            members = config.members(run)
            counts[run.run_id] = len(members)
            ids |= {(m.run.run_id, m.id) for m in members}
    assert counts == {"dpo": 80, "discopop": 80, "td_dpo": 88, "td_dpo_anchored": 1, "discopop_card": 1}
    assert len(ids) == 250
    assert {("td_dpo", f"beta0.05-tau1-s{seed}") for seed in range(42, 62)} < ids  # a claim's cell has every seed
    assert ("td_dpo", "beta0.05-tau2-s42") in ids
    assert ("td_dpo", "beta0.05-tau2-s43") not in ids


def test_a_folder_of_the_models_name_where_one_stands_changes_no_key(write, raw, tmp_path, monkeypatch):
    member = config.members(load(write(raw)))[0]
    before = keys.member_key(member)["all"]
    for name in ("made", "generated"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert keys.member_key(member)["all"] == before


def test_a_file_that_a_run_names_is_part_of_its_members_key(tmp_path):
    """A warm start that is made again under the same name is another one."""
    path, found = tmp_path / "warm.safetensors", []
    raw = config.load_yaml(config.ROOT / "params/graff/laptop/graff.yaml")
    raw["training"]["scheduler"]["warm_start_ckpt"] = str(path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    for content in ("one", "other, longer"):
        path.write_text(content)
        run = config.load_run(tmp_path / "run.yaml", study="graff", scale="laptop", mode="full")
        found.append((keys.member_key(config.members(run)[0])["all"], members.inputs_folder(run)))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_two_runs_of_one_method_that_train_the_same_cell_get_a_warning(write, raw):
    """The claims name methods and cells, not runs: they are not evaluated where two answer to one."""
    first = write(raw)
    second = first.with_name("fast.yaml")
    changed = {**raw, "run_id": "fast", "training": {**raw["training"], "learning_rate": 1e-4}}
    second.write_text(yaml.safe_dump(changed))
    runs = check.runs_of(check.load_folder(first.parent, "laptop", "full"))
    (said,) = [finding for finding in check.claims_findings("td_dpo", runs, "laptop") if finding.key == "keys"]
    assert said.level == "warning"
    assert "no claim about it can be evaluated" in said.what


def test_searches_get_equal_trials_and_the_paper_scale_is_the_specs():
    own = {p.stem for p in SHIPPED if p.parts[-3:-1] == ("td_dpo", "paper")}
    for scale, tuned in (("laptop", {"dpo", "discopop", "td_dpo"}), ("paper", own)):
        runs = [config.load_run(p, scale=scale, mode="full") for p in SHIPPED if p.parts[-3:-1] == ("td_dpo", scale)]
        trials = {run.run_id: run.optuna.n_trials for run in runs if run.optuna.n_trials}
        assert set(trials) == tuned
        assert len(set(trials.values())) == 1
    for run in runs:
        assert run.dataset.revision == "f8869fc91bde5c71a104667292addcbbfd15985d"
        assert (run.model.quantization, run.model.peft.lora_r, run.model.peft.lora_alpha) == ("nf4", 64, 16)
        assert config.steps(run) == 144
        pairs = run.training.per_device_train_batch_size * run.compute.devices
        assert run.training.global_batch_size == 8 * pairs, "16 pairs in a pass, as far as the token budget allows"
        space = run.optuna.search_space["learning_rate"]
        assert (space.type, space.low, space.high) == ("loguniform", 5e-6, 5e-5)
        assert run.seed_list[:3] == [42, 43, 44], "the published ones are the first look"


@pytest.mark.parametrize("path", FIXED, ids=lambda p: p.stem)
def test_a_published_configuration_is_fixed_where_it_says_so(path):
    raw, before, fixes = config.load_yaml(path), as_published(path), FIX.findall(path.read_text())
    assert fixes
    assert raw["run_id"] == path.stem
    assert all(config.get(raw, key) != config.get(before, key) for key, _ in fixes)
    assert len([line for line in path.read_text().splitlines() if line.startswith("# ")]) == len(fixes) + 2
    if REFERENCE.is_dir():
        assert before == config.load_yaml(REFERENCE / path.name)


def test_the_fixed_configurations_run_and_no_scale_sweeps_them_in():
    loaded = check.load_folder(FIXED[0].parent, "paper", "trial")
    assert [path for path, _, _ in loaded] == FIXED
    assert len(FIXED) == 6
    for path, run, found in loaded:
        assert found == [], path.name
        assert run.mode == "trial"
        assert len(config.members(run)) == 1
    for scale in config.SCALES:
        options = cli.parser().parse_args(["plan", "--scale", scale])
        options.mode = "full"
        assert not {path for path, _, _ in cli.select_runs(options)} & {*FIXED}


class TestPublished:
    @pytest.fixture(scope="class")
    @staticmethod
    def loaded(tmp_path_factory):
        folder = tmp_path_factory.mktemp("published")
        for path in FIXED:
            (folder / path.name).write_text(yaml.safe_dump(as_published(path), sort_keys=False))
        return {path.stem: (run, findings) for path, run, findings in check.load_folder(folder, "paper", "full")}

    def test_all_six_load_and_are_recognized(self, loaded):
        assert len(loaded) == 6
        for name, (run, _) in loaded.items():
            assert not isinstance(run, StudyError), run
            assert run.study == next(study for part, study in STUDY_OF.items() if part in name)
            assert run.role == name.split("-")[0]
            assert run.run_id == name
            assert len(config.members(config.trial(run))) == 1

    def test_td_dpo_names_and_contradictions(self, loaded):
        run, findings = loaded["proposed-Llama-2-Chat-7B-Argilla-DPO-Mix-7k"]
        assert (run.method, run.loss.name, run.model.quantization) == ("td_dpo", "td_dpo", "nf4")
        assert run.optuna.objective_metric == "validation_implicit_accuracy"
        assert run.searched == {"loss.beta": "beta", "loss.tau": "tau"}
        assert len(config.members(run)) == 36  # the choices of the marked keys are the grid
        said = {finding.key: finding for finding in findings}
        assert said["optuna.direction"].level == "error"
        assert said["optuna.direction"].fix == "direction: maximize"
        assert "is 512, not the global batch of 128" in said["training.gradient_accumulation_steps"].what
        assert "every 250 steps never happens in a run of 144" in said["training.eval_steps"].what
        assert "100 covers most of a run of 144" in said["training.warmup_steps"].what
        assert [key for key, finding in said.items() if finding.level == "error"] == ["optuna.direction"]

    def test_names_that_meant_something_else_warn_once_each(self, loaded):
        renamed = {"loss.name": "dpo_loss is TD-DPO at tau 1", "loss.average_log_probs": "averages them"}
        renamed |= {"optuna.objective_metric": "raw (Delta > 0)"}
        for name in ("proposed", "comparative-1"):
            run, findings = loaded[f"{name}-Llama-2-Chat-7B-Argilla-DPO-Mix-7k"]
            said = {key: [f for f in findings if f.key == key] for key in renamed}
            expected = 0 if name == "proposed" else 1  # td_dpo_loss is TD-DPO there too
            assert [len(found) for found in said.values()] == [expected, 1, 1]
            assert all(
                f.level == "warning" and renamed[f.key] in f.what and f.fix for found in said.values() for f in found
            )
            assert (run.loss.average_log_probs, run.optuna.objective_metric) == (False, "validation_implicit_accuracy")
        stated = {"loss.name": "td_dpo", "loss.tau": 1.0, "optuna.objective_metric": "validation_raw_accuracy"}
        stated |= {"grid": [{"product": {"beta": [0.01]}}]}
        said = {f.key for f in check.findings(config.apply(run, stated))}
        assert said & {*renamed} == {"loss.average_log_probs"}

    def test_iw_lora_fp16_is_an_error_with_its_fix(self, loaded):
        for name in ("proposed-DeBERTaV3-base-86-M--GLUE-MNLI", "comparative-1-DeBERTaV3-base-86-M--GLUE-MNLI"):
            run, findings = loaded[name]
            errors = [finding for finding in findings if finding.level == "error"]
            assert [finding.key for finding in errors] == ["training.fp16"]
            assert "bf16" in errors[0].fix
            assert any("choose on what is reported" in f.what for f in findings if f.key == "optuna.objective_metric")
            assert config.steps(run) == 36_816
        run, _ = loaded["proposed-DeBERTaV3-base-86-M--GLUE-MNLI"]
        assert (run.method, run.loss.penalty, run.loss.alpha, run.loss.sensitivity_buffer_size) == (
            "iw_lora",
            "importance",
            1e-4,
            1024,
        )
        assert loaded["comparative-1-DeBERTaV3-base-86-M--GLUE-MNLI"][0].method == "lora"

    def test_graff_split_buffer_and_warm_start(self, loaded):
        run, findings = loaded["proposed-iter1-Qwen3-0.6B-gsm8k"]
        assert (run.method, run.training.scheduler.type, run.model.torch_dtype) == ("graff", "graff", "bfloat16")
        levels = {finding.key: finding.level for finding in findings}
        assert levels["dataset.eval_split"] == "error"
        assert levels["training.scheduler.warm_start_ckpt"] == "error"
        assert levels["dataset.shuffle_buffer"] == levels["evaluation.interval_steps"] == "warning"
        assert "training.gradient_accumulation_steps" not in levels  # 8 x 8 is 64
        reactor, findings = loaded["comparative-1-iter1-Qwen3-0.6B-gsm8k"]
        assert reactor.method == "reactor"
        assert reactor.training.scheduler.outer_lr is None
        assert any(f.key == "training.scheduler.baseline_decay" and "per window" in f.what for f in findings)

    def test_corrected_files_have_no_error(self, loaded, tmp_path):
        checkpoint = tmp_path / "warm.safetensors"
        checkpoint.touch()
        fixes = {
            "td_dpo": {"optuna.direction": "maximize"},
            "iw_lora": {"training.fp16": False},
            "graff": {"dataset.eval_split": "dev"},
        }
        for run, _ in loaded.values():
            values = dict(fixes[run.study])
            if run.method == "graff":
                values["training.scheduler.warm_start_ckpt"] = str(checkpoint)
            assert not [f for f in check.findings(config.apply(run, values)) if f.level == "error"]


# --- settings, aliases, paths ---------------------------------------------------------------------------------------


def test_overrides_take_dotted_names_and_aliases(write, raw):
    run = load(
        write(raw),
        overrides={
            "beta": "0.5",
            "training.learning_rate": "1e-5",
            "wandb.mode": "online",
            "grid": "null",
            "tau": "2",
            "optuna.n_trials": "3",
            "seed_list": "[7]",
        },
    )
    assert (run.loss.beta, run.training.learning_rate, run.wandb.mode, run.grid) == (0.5, 1e-5, "online", None)
    assert [member.id for member in config.members(run)] == ["default-s7"]
    assert config.wandb_mode(run) == "online"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("betta", "1", "did you mean beta?"),
        ("training.lr", "1", "no such key"),
        ("beta", "[", "--set beta"),
        ("beta", "high", "loss.beta"),
        ("run_id", "x", "another run_id"),
        ("scale", "paper", "no such key"),
        ("training.max_steps", "-3", "training.max_steps"),
    ],
)
def test_bad_overrides_are_refused(write, raw, key, value, said):
    assert said in refused(load, write(raw), overrides={key: value})


@pytest.mark.parametrize("name", ["td_dpo/laptop/td_dpo", "iw_lora/laptop/iw_lora", "graff/small/hypergradient"])
def test_a_setting_takes_effect_whatever_else_supplies_its_key(name):
    """In every member and in no search, one after the other for each key that a grid or a search supplies."""
    path, (study, scale, _) = config.ROOT / f"params/{name}.yaml", name.split("/")
    plain = load(path, scale=scale)
    supplied = {key for member in config.members(plain) for key in member.cell}
    supplied |= {config.resolve(study, key) for key in plain.optuna.search_space}
    for key in supplied:
        run = config.load_run(
            path, scale=path.parent.name, mode="full", overrides={key: "0.0123", "seed_list": "[7, 8]"}
        )
        members = config.members(run)
        assert {config.get(config.dump(member.run), key) for member in members} == {0.0123}, key
        assert {member.seed for member in members if not member.pilot} <= {7, 8}
        assert 0 < len(members) < len(config.members(plain))
        assert key not in {config.resolve(study, name) for name in run.optuna.search_space}
        assert bool(run.optuna.n_trials) == bool(run.optuna.search_space) or not plain.optuna.n_trials
        assert not check.has_error(check.findings(run)) or study == "graff"


def test_settings_that_contradict_each_other_are_refused(write, raw):
    both = {"beta": "0.2", "grid": "[{cells: [{beta: 0.1, tau: 1}]}]"}
    assert "grid supplies what another --set does" in refused(load, write(raw), overrides=both)
    assert config.members(load(write(raw), overrides=both | {"beta": "0.1"}))[0].cell["loss.beta"] == 0.1
    searched = {"tau": "1", "optuna.search_space.tau": "{type: uniform, low: 1, high: 2}"}
    assert "optuna.search_space supplies" in refused(load, write(raw), overrides=searched)
    section, path = {"loss": "{penalty: importance, alpha: 0.2}"}, config.ROOT / "params/iw_lora/laptop/iw_lora.yaml"
    assert {member.cell["loss.alpha"] for member in config.members(load(path, overrides=section))} == {0.2}


@pytest.mark.parametrize(
    ("path", "overrides", "said"),
    [
        ("td_dpo/laptop/dpo", {"epochs": "2"}, "max_steps is 120"),
        ("td_dpo/laptop/dpo", {"epochs": "2", "max_steps": "null"}, ""),
        ("td_dpo/laptop/dpo", {"dataset.name": "a/b", "dataset.train_pairs": "20"}, "generated data"),
        ("td_dpo/laptop/dpo", {"loss.name": "sft", "method": "sft", "beta": "0.2"}, "sft has none"),
        ("iw_lora/laptop/lora", {"alpha": "0.2"}, "it has no penalty"),
        ("iw_lora/laptop/lora", {"loss.penalty": "none"}, ""),
        ("iw_lora/laptop/iw_lora", {"alpha": "0.2"}, ""),
        ("iw_lora/small/lora", {"model.recipe.layers": "3"}, "the model is"),
        ("iw_lora/laptop/lora", {"model.name": "a/b", "model.recipe": "null"}, ""),
        ("graff/laptop/graff", {"dataset.name": "a/b", "dataset.numbers_below": "9"}, "generated problems"),
    ],
)
def test_a_setting_that_a_run_does_not_read_is_refused(path, overrides, said):
    run = config.load_run(
        config.ROOT / f"params/{path}.yaml", scale=path.split("/")[1], mode="full", overrides=overrides
    )
    found = [str(finding) for finding in check.findings(run) if "changes nothing" in finding.what]
    assert [said in line for line in found] == [True] * bool(said)


def test_what_is_set_is_set_in_the_runs_that_are_selected(write, raw, tmp_path, monkeypatch):
    """Others stay as their YAMLs have them, unless their record lies in the same place, where all was made with it."""
    for name in ("mine", "other", "recorded"):
        write(raw | {"run_id": name, "grid": None}, f"{name}.yaml")
    chosen = ["plan", "--run", "mine", "--params", str(tmp_path), "--results-dir", str(tmp_path / "results")]
    options = cli.parser().parse_args([*chosen, "--set", "seed_list=[7]"])
    options.mode, options.scale = "full", "laptop"
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path / "results")
    results = cli.root_of(options) / "td_dpo"
    (results / "recorded").mkdir(parents=True)
    whole = check.runs_of(cli.whole_of(options, cli.select_runs(options)))
    assert [(run.run_id, run.seed_list == [7]) for run in whole] == [("mine", 1), ("other", 0), ("recorded", 1)]
    assert {run.results_dir for run in whole} == {results}


def test_an_override_for_a_loss_that_does_not_read_it():
    path = config.ROOT / "params/td_dpo/laptop/dpo.yaml"
    assert "dpo does not read it" in refused(load, path, overrides={"tau": "1"})


def test_aliases_resolve_to_keys_that_exist():

    for study in config.studies():
        module = config.study_module(study)
        assert set(module.ALIASES.values()) <= set(config.keys(module.Run))
        assert set(module.METRICS.values()) == {"maximize", "minimize"}
    td_dpo = config.study_module("td_dpo")
    assert {td_dpo.VALIDATION_METRIC, td_dpo.SECOND_METRIC} <= set(td_dpo.METRICS)
    assert config.resolve("iw_lora", "iw_reg_alpha") == "loss.alpha"
    assert config.resolve("graff", "adapter_lr_init") == "training.optimizer.lr_init"
    assert config.resolve("graff", "graff_outer_lr") == "training.scheduler.outer_lr"
    assert config.resolve("td_dpo", "lora_r") == "model.peft.lora_r"


def test_a_study_needs_no_more_than_four_names(tmp_path):
    shutil.copytree(config.ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "lib" / "mine").mkdir()
    (tmp_path / "lib" / "mine" / "study.py").write_text(
        "from lib import config\n\n\nclass Training(config.Section):\n    rate: config.Positive\n\n\n"
        "class Run(config.Run):\n    method: config.Name = 'mine'\n    training: Training\n\n\n"
        "METRICS = {'score': 'maximize'}\n\n\ndef prepare(run, folder): ...\n\n\ndef train(member, folder, shared): ...\n"
    )
    run = {"run_id": "a", "training": {"rate": 1}, "optuna": {"objective_metric": "score"}, "seed_list": [1, 2]}
    path = tmp_path / "params" / "mine" / "laptop" / "a.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(run | {"grid": [{"product": {"training.rate": ["1e-3", 1]}}]}))
    code = (
        "from lib import config; from lib.run import check, keys; ((_, run, found),) = "
        "check.load_folder('params', 'laptop', 'full'); module = config.study_module('mine');"
        "print(run.role, found, [m.id for m in config.members(run)], [m.id for m in config.members(config.trial(run))],"
        "module.primary_metric(run), [*keys.member_code(config.members(run)[0])])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert done.stdout.strip() == (
        "comparative [] ['rate0.001-s1', 'rate0.001-s2', 'rate1-s1', 'rate1-s2'] ['rate0.001-s1'] score "
        "['lib.config', 'lib.mine.study']"
    )


def test_relative_paths_become_absolute_and_hub_ids_stay(write, raw, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    path = write(raw)
    assert load(path, overrides={"dataset.name": "./data"}).dataset.name == str(tmp_path / "data")
    assert load(path, overrides={"dataset.name": "argilla/dpo-mix-7k"}).dataset.name == "argilla/dpo-mix-7k"
    (tmp_path / "generated").mkdir()
    assert load(path).dataset.name == "generated"  # a folder of that name changes nothing
    absent = load(path, overrides={"dataset.name": "./absent.jsonl"})
    assert [f.key for f in check.findings(absent) if f.level == "error"] == ["dataset.name"]


def test_results_dir_is_absolute(write, raw):
    assert load(write(raw)).results_dir == config.ROOT / "outputs/laptop-full/td_dpo"
    assert load(write(raw), mode="trial").results_dir == config.ROOT / "outputs/laptop-trial/td_dpo"
    assert load(write(raw), results_dir="outputs/x").results_dir == config.ROOT / "outputs/x"


def test_apply_is_validated_and_leaves_the_run_alone(write, raw):
    run = load(write(raw))
    changed = config.apply(run, {"beta": 0.05, "loss.tau": 2, "lora_r": 8})
    assert (changed.loss.beta, changed.loss.tau, changed.model.peft.lora_r) == (0.05, 2, 8)
    assert run.searched == {"loss.beta": "beta", "loss.tau": "tau"}
    with pytest.raises(StudyError):
        config.apply(run, {"beta": -1})
    with pytest.raises(ValueError, match="frozen"):
        run.loss.beta = 3


# --- members --------------------------------------------------------------------------------------------------------


def test_cells_are_a_union_in_the_order_written(write, raw):
    raw["grid"] = [
        {"cells": [{"tau": 1, "beta": 0.5}], "seeds": [44]},
        {"product": {"beta": [0.5, 0.01], "tau": [1.0]}, "seeds": [42, 44]},
    ]
    run = load(write(raw))
    assert [m.id for m in config.members(run)] == [
        "beta0.5-tau1-s44",
        "beta0.5-tau1-s42",
        "beta0.01-tau1-s42",
        "beta0.01-tau1-s44",
    ]
    assert config.members(run)[0].run.grid == run.grid


def test_cell_names_are_exact_and_safe(write, raw):
    raw["grid"] = [{"product": {"beta": [0.1, 0.1000001, 1e-7], "tau": [1]}}]
    names = [m.cell_name for m in config.members(load(write(raw)))[::3]]
    assert names == ["beta0.1-tau1", "beta0.1000001-tau1", "beta1e-07-tau1"]
    raw["grid"] = [{"cells": [{"beta": 0.1, "tau": 1, "model.name": "../../etc/passwd"}]}]
    assert "/" not in config.members(load(write(raw)))[0].id


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ({"beta": 0.1}, "which nothing supplies"),
        ({"beta": 0.1, "tau": 1, "optuna.n_trials": 3}, "differs between members"),
        ({"betaa": 1}, "did you mean beta?"),
        ({"run_id": "x"}, "differs between members"),
    ],
)
def test_bad_cells_are_findings(write, raw, cell, said):
    raw["grid"] = [{"cells": [cell]}]
    run = load(write(raw))
    refused(config.members, run)
    findings = [f for f in check.findings(run) if f.level == "error"]
    assert len(findings) == 1
    assert said in str(findings[0])


def test_a_bad_first_cell_is_refused_when_the_file_is_read(write, raw):
    raw["grid"] = [{"cells": [{"beta": -1, "tau": 1}]}]
    assert "loss.beta: -1" in refused(load, write(raw))


def test_a_marker_that_nothing_supplies(write, raw):
    raw["grid"] = None
    del raw["optuna"]["search_space"]["tau"]
    message = refused(load, write(raw))
    assert "loss.tau: ${opt.tau}, which nothing supplies" in message
    assert "grid:" in message
    raw["training"]["learning_rate"] = "${opt.learning_rate}"  # a continuous search has no cells
    raw["optuna"]["search_space"]["tau"] = {"type": "uniform", "low": 0.5, "high": 2}
    run = load(write(raw))
    assert "best.yaml" in refused(config.members, run)
    shrunk = config.members(config.trial(run))[0].run  # but it does run
    assert (shrunk.training.learning_rate, shrunk.loss.tau) == (1e-4, 0.5)


# --- trial ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_trial_shrinks_every_phase(path):
    run = config.load_run(path, scale=path.parent.name, mode="trial")
    members = config.members(run)
    assert len(members) == 1
    assert (run.mode, run.optuna.n_trials, getattr(run.training, "epochs", 1)) == (
        "trial",
        0,
        1,
    )  # a budget has no epochs
    assert config.steps(run) <= 2
    assert check.findings(members[0].run) == []
    assert config.wandb_mode(run) == run.wandb.mode == "disabled"
    if run.study == "graff":
        assert run.dataset.limit <= 2 * run.training.global_batch_size
        assert run.evaluation.dev_subset <= run.dataset.dev_size <= 4
        return
    if run.study != "td_dpo":
        assert run.dataset.limit <= 2 * run.training.batch_size
        assert run.loss.penalty == "none" or run.loss.sensitivity_warmup_steps <= 2
        return
    batch = run.training.per_device_train_batch_size
    assert run.dataset.limit <= 2 * batch
    assert run.training.global_batch_size == batch
    assert run.evaluation.questions <= 2
    assert run.evaluation.kl_prompts <= 2 * batch
    assert run.training.eval_steps <= 2
    assert run.model.recipe is None or run.model.recipe.sft_steps == 2


def test_trial_keeps_what_is_smaller_already(write, raw):
    run = load(write(raw), mode="trial", overrides={"max_steps": "1", "dataset.limit": "3"})
    assert (run.training.max_steps, run.dataset.limit) == (1, 3)
    assert config.wandb_mode(load(write(raw), mode="trial", overrides={"wandb.mode": "online"})) == "disabled"


# --- checks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "level", "key"),
    [
        ({"optuna.direction": "minimize"}, "error", "optuna.direction"),
        ({"optuna.objective_metric": "validation_implict_accuracy"}, "error", "optuna.objective_metric"),
        (
            {"optuna.search_space": {"betta": {"type": "uniform", "low": 0, "high": 1}}},
            "error",
            "optuna.search_space.betta",
        ),
        (
            {"optuna.search_space": {"beta": {"type": "uniform", "low": -1, "high": 1}}},
            "error",
            "optuna.search_space.beta",
        ),
        (
            {"optuna.search_space": {"compute.threads": {"type": "int", "low": 1, "high": 2}}},
            "error",
            "optuna.search_space.compute.threads",
        ),
        ({"optuna.search_space": {}}, "error", "optuna.search_space"),
        (
            {"optuna.search_space": {"beta": {"type": "categorical", "choices": [0.01]}}},
            "warning",
            "optuna.search_space.beta",
        ),
        ({"training.global_batch_size": 24}, "error", "training.global_batch_size"),
        ({"training.gradient_accumulation_steps": 2}, "warning", "training.gradient_accumulation_steps"),
        ({"training.eval_steps": 200}, "warning", "training.eval_steps"),
        ({"training.warmup_ratio": 0, "training.warmup_steps": 120}, "warning", "training.warmup_steps"),
        ({"training.bf16": True}, "error", "training.bf16"),
        ({"method": "dpo"}, "error", "method"),
        ({"method": "td_dpo_averaged", "loss.average_log_probs": True}, "", ""),
        ({"method": "graff_with_ipo"}, "", ""),
        ({"dataset.name": "argilla/dpo-mix-7k", "evaluation.judge": "none"}, "warning", "dataset.train_pairs"),
        ({"loss.average_log_probs": True}, "warning", "loss.average_log_probs"),
        ({"model.name": "/nowhere/model", "model.recipe": None}, "error", "model.name"),
    ],
)
def test_contradictions_are_found(write, raw, changes, level, key):
    run = config.apply(load(write(raw)), changes)
    found = [(finding.level, finding.key) for finding in check.findings(run)]
    assert (level, key) in found if level else found == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "ipoo"}, ["did you mean ipo?", "CONTRIBUTING.md says how to add one to LOSSES"]),
        ({"name": "mine"}, ["CONTRIBUTING.md says how to add one to LOSSES"]),
        *(({"name": name, "average_log_probs": True}, [f"{name} averages"]) for name in ("ipo", "sigmoid_norm", "sft")),
        ({"name": "hinge", "average_log_probs": True}, []),
        ({"name": "aot", "label_smoothing": 0.1}, []),
        ({"name": "dpo", "label_smoothing": 0.1}, ["0 for dpo"]),
    ],
)
def test_an_option_that_a_loss_contains_or_does_not_read_is_refused(write, raw, change, said):
    raw["loss"] = {"beta": 0.1} | change
    raw |= {"grid": None, "method": "mine", "optuna": {"n_trials": 0}}
    words = refused(load, write(raw)) if said else ""
    assert said or not check.has_error(check.findings(load(write(raw))))
    assert [word for word in said if word not in words] == []


def test_an_unknown_entry_of_any_table_is_answered_with_where_to_add_one():
    for study, module in ((study, config.study_module(study)) for study in config.studies()):
        (path, *_) = sorted((config.ROOT / "params" / study / "laptop").glob("*.yaml"))
        for table, key in module.BY_NAME.items():
            assert f"to add one to {table}" in refused(load, path, overrides={key: "nobodys"}), study


def test_a_method_may_have_a_name_of_its_own_but_not_another_schedulers(write):
    raw = config.load_yaml(config.ROOT / "params/graff/laptop/cosine.yaml")
    for method, wrong in {"cosine_long": 0, "slow": 0, "graff": 1, "fixed_rate": 1}.items():
        found = [f.key for f in check.findings(load(write(raw | {"method": method}))) if f.level == "error"]
        assert found == ["method"] * wrong, method


def test_iw_lora_and_graff_refuse_what_they_do_not_read():
    lora = {
        "run_id": "r",
        "seed_list": [1],
        "model": {"name": "m/m", "adapter": {"type": "lora", "tfinal": 3}},
        "dataset": {"name": "glue", "subset": "rte"},
        "training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-4},
    }
    assert "lora does not read it" in refused(config.restore, lora, study="iw_lora", scale="paper", mode="full")
    lora["model"]["adapter"] = {"type": "adalora", "init_r": 8, "target_r": 8, "tinit": 1, "tfinal": 1, "delta_t": 1}
    assert "nothing is pruned" in refused(config.restore, lora, study="iw_lora", scale="paper", mode="full")
    lora["model"]["adapter"] |= {"init_r": 12, "tfinal": 0}
    assert "tfinal" in refused(config.restore, lora, study="iw_lora", scale="paper", mode="full")
    lora["model"]["adapter"]["tfinal"] = 1
    run = config.restore(lora, study="iw_lora", scale="paper", mode="full")
    assert (run.method, config.steps(run)) == ("adalora", 312)
    keys = [
        f.key
        for f in check.findings(
            config.apply(
                run, {"dataset.splits.validation": "test", "compute.strategy": "fsdp", "training.warmup_steps": 400}
            )
        )
    ]
    assert {"dataset.splits", "compute.strategy", "training.warmup_steps"} <= set(keys)
    graff = {
        "run_id": "g",
        "model": {"name": "m/m"},
        "dataset": {"name": "openai/gsm8k"},
        "training": {
            "budget_minutes": 30,
            "global_batch_size": 64,
            "micro_batch_size": 7,
            "optimizer": {"lr_init": 1e-4},
            "scheduler": {"type": "cosine"},
        },
    }
    run = config.restore(graff, study="graff", scale="paper", mode="full")
    assert [f.key for f in check.findings(run)] == ["training.global_batch_size"]
    graff["training"]["scheduler"]["controller_lr"] = 1e-4
    assert "cosine does not read it" in refused(config.restore, graff, study="graff", scale="paper", mode="full")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("loss", "kl_reference_model", False),
        ("model", "load_in_4bit", True),
        ("dataset", "split", {"train": 0.8, "val": 0.1}),
        ("dataset", "split", "random"),
        ("training", "seed_list", [1]),
        ("training", "evaluation_strategy", "epoch"),
        ("training", "save_strategy", "no"),
        ("training", "save_total_limit", 5),
        ("training", "report_to", "none"),
        ("training", "evaluation_strategy", "no"),
    ],
)
def test_published_keys_are_honored_or_refused(write, raw, section, key, value):
    raw[section][key] = value
    assert f"{section}.{key}" in refused(load, write(raw))


def test_published_strategies_are_read_and_not_kept(write, raw):
    raw["training"] |= {"evaluation_strategy": "steps", "save_strategy": "best", "save_total_limit": 1}
    run = load(write(raw))
    assert config.dump(run)["training"].keys() == config.dump(load(write(config.dump(run))))["training"].keys()
    assert "save_strategy" not in config.dump(run)["training"]
    assert "did you mean" in refused(config.resolve, "td_dpo", "training.eval_strategy")
    assert "no such key" in refused(config.apply, run, {"training.save_total_limit": 2})
    raw["training"]["eval_steps"] = None
    assert "an interval, as its strategy is steps" in refused(load, write(raw))


def test_folders(tmp_path, raw):
    for place in ("td_dpo/laptop/a.yaml", "td_dpo/paper/b.yaml", "td_dpo/laptop/claims.yaml", "c.yml"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(yaml.safe_dump(raw | {"run_id": "same"}))
    (tmp_path / "broken.yaml").write_text("run_id: x")
    found = {path.name: (run, findings) for path, run, findings in check.load_folder(tmp_path, "laptop", "trial")}
    assert set(found) == {"a.yaml", "c.yml", "broken.yaml"}
    assert "belongs to no study" in str(found["broken.yaml"][0])
    assert found["a.yaml"][0].mode == "trial"
    assert "also the run_id" in str(found["a.yaml"][1] + found["c.yml"][1])
    refused(check.load_folder, tmp_path / "absent", "laptop", "full")


# --- notebooks ------------------------------------------------------------------------------------------------------


def test_from_notebook_works_from_any_directory(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {
        "In": [],
        "Out": {},
        "exit": exit,
        "_": 1,
        "config": config,
        "os": os,
        "load": load,
        **raw,
        "study": "td_dpo",
        "scale": "laptop",
        "mode": "full",
        "results_dir": "outputs/here",
    }
    run = config.from_notebook(space)
    assert run.results_dir == config.ROOT / "outputs/here"
    assert config.from_notebook({**raw, "mode": "trial"}).optuna.n_trials == 0  # the study is recognized


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("trainning", {}, "did you mean training?"),
        ("learning_rate", 1e-3, "did you mean training.learning_rate?"),
        ("beta", 0.1, "did you mean loss.beta?"),
        ("foo", None, "unknown parameter"),
    ],
)
def test_unknown_parameters_are_refused(raw, name, value, said):
    assert said in refused(config.from_notebook, {**raw, "study": "td_dpo", "nonce": "n", name: value})


def test_later_cells_do_not_count_as_parameters_in_jupyterlab(raw):
    cells = ["", "%matplotlib inline", "run_id = 'td_dpo'\nmodel = {}", "rows = [1]"]
    space = {"In": cells, "rows": [1], **raw}
    written = "run_id = 'x'\n" + "\n".join(f"{key} = 0" for key in raw)
    opened = {"In": [*cells, written + "\nnonce = None"], "nonce": None}  # as each notebook's parameters cell has it
    assert config.from_notebook(space | opened).run_id == "td_dpo"
    assert "rows" in refused(config.from_notebook, space | {"In": [*cells, written], "nonce": "n"})
    assert "beta" in refused(config.from_notebook, space | {"In": [*cells, written + "\nbeta = 1"], "beta": 1})


def test_a_name_taken_by_another_object(raw):
    assert "model: missing" in refused(config.from_notebook, {**raw, "study": "td_dpo", "model": object()})


def test_importing_and_loading_is_light():
    code = (
        "import sys; from lib import config; from lib.run import check, preflight; import lib.td_dpo.judge;"
        "check.load_folder('params', 'paper', 'full'); absent = {'openai', 'torch', 'transformers', 'trl', "
        "'pandas', 'huggingface_hub'}; heavy = absent & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(config.ROOT), check=True)


def test_several_runs_may_be_named():
    """The last --run used to win without a word."""
    said = cli.parser().parse_args(["plan", "--run", "fixed", "--run", "graff*"])
    assert [name for name in ("fixed", "cosine", "graff_mlp") if plan.matches(said, name)] == ["fixed", "graff_mlp"]
    assert plan.matches(cli.parser().parse_args(["plan"]), "anything")


@pytest.mark.parametrize(
    ("study", "run", "key", "value"),
    [
        ("td_dpo", "dpo", "model.torch_dtype", "bfloat16"),
        ("iw_lora", "lora", "training.bf16", True),
        ("graff", "fixed", "training.mixed_precision", "bf16"),
    ],
)
def test_a_gpu_asked_for_at_small_scale_brings_bfloat16_along(study, run, key, value):
    path = config.ROOT / f"params/{study}/small/{run}.yaml"

    def found(**overrides):
        given = config.load_run(path, scale="small", mode="full", overrides=overrides)
        assert not [f for f in check.findings(given) if f.level == "error"]
        return config.get(config.dump(given), key)

    assert found(**{"compute.gpus": "1"}) == value
    assert found(**{"compute.gpus": "0"}) != value
    on_gpu = config.load_run(path, scale="small", mode="full", overrides={"compute.gpus": "1"})
    assert plan.member_seconds(on_gpu) is None, "a CPU's seconds would be a wrong forecast"


def test_bfloat16_that_graff_would_not_compute_in_is_a_warning():
    path, key = config.ROOT / "params/graff/small/fixed.yaml", "training.mixed_precision"
    run = config.load_run(path, scale="small", mode="full", overrides={key: "bf16"})
    assert [(f.level, f.key) for f in check.findings(run)] == [("warning", key)]


@pytest.mark.parametrize("scale", ["laptop", "small"])
def test_real_pairs_are_scored_by_accuracy_as_no_code_knows_their_answers(scale, tmp_path):
    (tmp_path / "pairs.jsonl").touch()
    path, data = config.ROOT / f"params/td_dpo/{scale}/dpo.yaml", {"dataset.name": str(tmp_path / "pairs.jsonl")}
    run = config.load_run(path, scale=scale, mode="full", overrides=data)
    assert (run.evaluation.judge, not check.findings(run)) == ("none", True)
    if scale == "small":
        own = config.load_run(path, scale=scale, mode="full", overrides={"dataset.name": "verifiable"})
        assert (run.dataset.limit, own.dataset.limit, own.evaluation.judge) == (160, None, "verifier")


def test_more_verifier_questions_than_there_are_are_refused():
    path, key = config.ROOT / "params/td_dpo/small/dpo.yaml", "evaluation.questions"
    for number, expected in (("214", []), ("215", [("error", key)])):
        run = config.load_run(path, scale="small", mode="full", overrides={key: number})
        assert [(f.level, f.key) for f in check.findings(run)] == expected


def test_mnli_of_the_hub_needs_no_split_to_be_named():
    overrides = {"dataset.name": "nyu-mll/glue", "dataset.subset": "mnli"}
    path = config.ROOT / "params/iw_lora/small/lora.yaml"
    assert not check.findings(config.load_run(path, scale="small", mode="full", overrides=overrides))
