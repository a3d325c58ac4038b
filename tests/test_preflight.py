"""lib/run/preflight.py: what is missing on a machine, said with what to do, and without a secret."""

import importlib.util
import os
from pathlib import Path

import pytest

from lib import config, hub
from lib.run import preflight
from lib.run.preflight import Gpu, Machine
from tests.judge_endpoint import write_bench

A100 = Gpu("NVIDIA A100-SXM4-80GB", 85.0, (8, 0))
LLAMA_PAGE = "https://huggingface.co/meta-llama/Llama-2-7b-chat-hf"


@pytest.fixture
def run(tmp_path):
    shipped = config.load_run(config.ROOT / "params/td_dpo/paper/td_dpo.yaml", scale="paper", mode="full")
    return config.apply(shipped, {"evaluation.mt_bench": str(write_bench(tmp_path / "mt_bench"))})


LLAMA = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
         "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False}  # fmt: skip
FILES = [
    {"path": "model-00001-of-00002.safetensors", "size": 9_976_576_152},
    {"path": "model-00002-of-00002.safetensors", "size": 3_500_296_424},
    # fmt: skip
    {"path": "pytorch_model-00001-of-00002.bin", "size": 9_976_576_152},
    {"path": "config.json", "size": 614},
]


def reads(url, token):
    """What the hub answers to a GET: the model's configuration, the sizes of its files."""
    return FILES if "/tree/" in url else LLAMA


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with nothing missing; keyword arguments take something away."""

    def _machine(gpus=(A100,), hub=(200, ""), free=1e12, drop=(), read=reads, **environ):
        known = {
            "HOME": str(tmp_path),
            "HF_TOKEN": "hf_secret",
            "WANDB_API_KEY": "wb_secret",
            "OPENAI_API_KEY": "sk-secret",
        }
        known = {key: value for key, value in (known | environ).items() if key not in drop}
        for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):  # asked by the study
            monkeypatch.setenv(name, known.get(name, ""))
        return Machine(
            environ=known,
            gpus=lambda _: list(gpus),
            free_bytes=lambda _: int(free),
            read=read,
            hub=hub if callable(hub) else lambda url, token: hub,
        )

    return _machine


def said(run, machine):
    found = preflight.find_missing([run], machine)
    text = "\n".join(map(str, found))
    assert "secret" not in text
    assert all(finding.fix for finding in found)
    return {finding.key: finding for finding in found}


def test_nothing_is_missing_where_everything_is_there(run, machine):
    assert preflight.find_missing([run], machine()) == []


def test_a_trial_and_the_laptop_need_nothing(run, machine):
    bare = machine(gpus=(), hub=(None, ""), drop=("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"))
    assert preflight.find_missing([config.trial(run)], bare) == []
    laptop = config.load_run(config.ROOT / "params/td_dpo/laptop/td_dpo.yaml", scale="laptop", mode="full")
    assert preflight.find_missing([laptop], bare) == []


def test_a_bare_machine_is_told_everything_at_once(run, machine):
    bare = machine(gpus=(), hub=(None, ""), free=1e9, drop=("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"))
    found = said(run, bare)
    assert {key: finding.level for key, finding in found.items()} == {
        "compute.gpus": "error",
        "model.name": "error",
        "dataset.name": "error",
        "wandb.mode": "error",
        "results_dir": "error",
        "evaluation.judge": "warning",
    }
    models = [f for f in preflight.find_missing([run], bare) if f.key == "model.name"]
    assert [("gated" in f.what, "does not answer" in f.what) for f in models] == [(True, False), (False, True)]
    assert LLAMA_PAGE in models[0].fix
    assert "wandb.mode=offline" in found["wandb.mode"].fix


@pytest.mark.parametrize(
    ("gpus", "key"),
    [
        ((), "compute.gpus"),
        ((Gpu("T4", 15.6, (7, 5)),), "compute.min_gpu_memory_gb"),
        ((Gpu("V100", 45, (7, 0)),), "model.torch_dtype"),
        ((Gpu("NVIDIA A100-PCIE-40GB", 39.5, (8, 0)),), None),
        ((A100, A100), None),
        ((Gpu("NVIDIA H100", 85, (9, 0)),), None),
    ],
)
def test_gpus(run, machine, gpus, key):
    found = said(config.apply(run, {"compute.gpu_type": "a100-80gb"}), machine(gpus=gpus))
    assert {k for k, finding in found.items() if finding.level == "error"} == ({key} if key else set())
    assert ("compute.gpu_type" in found) == (key is None and "H100" in gpus[0].name or key == "model.torch_dtype")


def test_several_gpus_for_one_member(run, machine):
    spread = config.apply(run, {"compute.gpus": 4, "compute.strategy": "fsdp"})
    assert "4 GPUs" in said(spread, machine(gpus=(A100,) * 3))["compute.min_gpu_memory_gb"].what
    assert said(spread, machine(gpus=(A100,) * 4)) == {}


def test_gpus_of_several_kinds_are_refused_and_one_kind_is_named(run, machine):
    t4 = Gpu("NVIDIA T4-like", 85.0, (8, 0))
    mixed = said(run, machine(gpus=(t4, A100, A100)))["compute.gpu_type"]
    assert mixed.level == "error"
    assert "NVIDIA T4-like, NVIDIA A100" in mixed.what
    assert mixed.fix.endswith("CUDA_VISIBLE_DEVICES=0")
    wanted = config.apply(run, {"compute.gpu_type": "a100-80gb"})
    assert said(wanted, machine(gpus=(t4, A100, A100)))["compute.gpu_type"].fix.endswith("CUDA_VISIBLE_DEVICES=1,2")
    named = machine(gpus=(t4, A100, A100), CUDA_VISIBLE_DEVICES="7,GPU-ab,3")
    assert said(wanted, named)["compute.gpu_type"].fix.endswith("CUDA_VISIBLE_DEVICES=GPU-ab,3")
    assert "--num-gpus=0" in said(wanted, machine(gpus=(t4, A100), STUDY_CLUSTER="a:1"))["compute.gpu_type"].fix
    assert said(config.apply(run, {"compute.gpus": 0}), machine(gpus=(t4, A100))) == {}, "it trains on the CPU"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((None, ""), "does not answer"),
        ((403, "GatedRepo"), "access was refused"),
        ((401, "GatedRepo"), "access was refused"),
        ((404, "RepoNotFound"), "no such model"),
        ((401, "RepoNotFound"), "no such model"),
        ((200, ""), None),
        ((429, ""), None),
        ((500, ""), None),
    ],
)
def test_hub_answers(run, machine, answer, words):
    def hub(url, token):
        assert token == "hf_secret"
        return answer if "/api/models/meta-llama/Llama-2-7b-chat-hf/" in url else (200, "")

    found = said(run, machine(hub=hub))
    assert set(found) == ({"model.name"} if words else set())
    assert words is None or words in found["model.name"].what


def test_a_license_without_a_token(run, machine):
    found = said(
        run, machine(hub=lambda url, token: (401, "GatedRepo") if "models" in url else (200, ""), drop=("HF_TOKEN",))
    )
    assert list(found) == ["model.name"]
    assert LLAMA_PAGE in found["model.name"].fix
    assert "hf auth login" in found["model.name"].fix


def test_the_token_may_be_in_a_file(machine, tmp_path):
    environ = machine(drop=("HF_TOKEN",)).environ
    assert preflight.token(environ) is None
    (tmp_path / ".cache/huggingface").mkdir(parents=True)
    (tmp_path / ".cache/huggingface/token").write_text("hf_file_secret\n")
    assert preflight.token(environ) == "hf_file_secret"


def test_cached_snapshots_need_no_hub(run, machine, tmp_path):
    def no_hub(url, token):
        raise AssertionError("asked the hub for what is cached")

    hub_folder = tmp_path / ".cache/huggingface/hub"
    for repository, revision in (
        ("models--meta-llama--Llama-2-7b-chat-hf", run.model.revision),
        ("datasets--argilla--dpo-mix-7k", run.dataset.revision),
    ):
        folder = hub_folder / repository / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    assert said(run, machine(hub=no_hub, HF_HUB_OFFLINE="1")) == {}
    pinned = config.apply(run, {"dataset.revision": "f" * 40})
    assert "HF_HUB_OFFLINE" in said(pinned, machine(hub=no_hub, HF_HUB_OFFLINE="1"))["dataset.name"].what


def test_offline_is_honoured_without_asking(run, machine):
    def no_hub(url, token):
        raise AssertionError("asked the hub although it is switched off")

    found = said(run, machine(hub=no_hub, HF_HUB_OFFLINE="TRUE"))
    assert set(found) == {"model.name", "dataset.name"}
    assert run.dataset.revision in found["dataset.name"].fix


def test_local_models_and_data_ask_nobody(run, machine, tmp_path):
    local = config.apply(run, {"model.name": str(tmp_path), "dataset.name": str(tmp_path)})
    assert said(local, machine(hub=(None, ""), drop=("HF_TOKEN",))) == {}


def test_wandb_key(run, machine, tmp_path):
    bare = machine(drop=("WANDB_API_KEY",))
    assert "api.wandb.ai" in said(run, bare)["wandb.mode"].what
    assert said(config.apply(run, {"wandb.mode": "offline"}), bare) == {}
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password wb_secret\n")
    netrc.chmod(0o600)
    assert said(run, bare) == {}
    netrc.write_text("machine\n\n???")
    assert set(said(run, bare)) == {"wandb.mode"}


def test_a_judge_is_only_a_warning_and_a_local_server_will_do(run, machine):
    found = said(run, machine(drop=("OPENAI_API_KEY",)))
    assert found["evaluation.judge"].level == "warning"
    assert said(run, machine(drop=("OPENAI_API_KEY",), OPENAI_BASE_URL="http://localhost:8000/v1")) == {}


PASSWORD = "postgresql://me:${env.DB_PASSWORD}@db/x"


@pytest.mark.parametrize(("taken", "settings", "key", "what", "mend"), [
    ({"gpus": ()}, {}, "compute.gpus", "1 GPU with at least 40 GB needed for each member, none found", "--scale laptop"),
    ({"gpus": (Gpu("T4", 15.6, (7, 5)),)}, {}, "compute.min_gpu_memory_gb", "found T4 (16 GB)", "compute.min_gpu_memory_gb"),
    ({"gpus": (A100,)}, {"compute.gpus": 4, "compute.strategy": "fsdp"}, "compute.min_gpu_memory_gb", "4 GPUs", "machine"),
    ({"gpus": (Gpu("V100", 45, (7, 0)),)}, {}, "model.torch_dtype", "compute capability 7.0", "Ampere GPU or newer"),
    ({}, {"training.per_device_train_batch_size": 128, "training.token_budget": None}, "training.per_device_train_batch_size",
     "the GPU has 85", "--set training.per_device_train_batch_size="),
    ({}, {"training.per_device_train_batch_size": 128, "training.token_budget": 2**19}, "training.token_budget",
     "the GPU has 85", "--set training.token_budget="),
    ({}, {"training.gradient_checkpointing": False}, "training.token_budget", "GB of GPU memory", "--set"),
    ({"drop": ("HF_TOKEN",), "hub": (401, "GatedRepo")}, {}, "model.name", "is gated", "hf auth login"),
    ({"hub": (403, "GatedRepo")}, {}, "model.name", "access was refused", LLAMA_PAGE),
    ({"hub": (404, "RepoNotFound")}, {}, "model.name", "no such model", "correct model.name"),
    ({"hub": (None, ""), "read": lambda *_: None}, {}, "model.name", "does not answer", "--set model.name=DIR"),
    ({"hub": (None, ""), "read": lambda *_: None}, {}, "dataset.name", "does not answer", "--set dataset.name=DIR"),
    ({"HF_HUB_OFFLINE": "1"}, {}, "dataset.name", "HF_HUB_OFFLINE is set", "argilla/dpo-mix-7k --repo-type dataset"),
    ({"free": 20e9}, {}, "results_dir", "20.0 GB free", "larger disk"),
    ({"drop": ("WANDB_API_KEY",)}, {}, "wandb.mode", "no W&B key", "wandb login"),
    ({"drop": ("OPENAI_API_KEY",)}, {}, "evaluation.judge", "no judge endpoint", "OPENAI_BASE_URL"),
    ({"package": "openai"}, {}, "evaluation.judge", "openai is not installed",
     "pip install -c constraints.txt -e '.[judge]', then ./run_all.sh judge"),
    ({}, {"optuna.storage": PASSWORD}, "optuna.storage", "DB_PASSWORD is not set", "export DB_PASSWORD="),
    ({"password": "s3cr3t-secret", "package": "psycopg"}, {"optuna.storage": PASSWORD}, "optuna.storage",
     "psycopg is not installed", "pip install -c constraints.txt -e '.[postgresql]'"),
])  # fmt: skip
def test_every_missing_thing_is_one_line_that_names_it_and_what_mends_it(
    run, machine, monkeypatch, taken, settings, key, what, mend
):
    monkeypatch.delenv("DB_PASSWORD", raising=False)
    taken, find_spec = dict(taken), importlib.util.find_spec
    if "password" in taken:
        monkeypatch.setenv("DB_PASSWORD", taken.pop("password"))
    if absent := taken.pop("package", ""):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find_spec(name))
    found = said(config.apply(run, settings), machine(**taken))
    assert what in found[key].what
    assert mend in found[key].fix
    assert "\n" not in str(found[key])


def test_disk_is_what_is_still_to_be_downloaded_and_trained(run, machine, tmp_path):
    """13.5 GB of safetensors (not the .bin beside them), a GB of data, and the members' adapters: 0.64 GB each, two
    kept, nine parts of it while one trains."""
    here = run.model_copy(update={"results_dir": tmp_path / "results"})
    members, adapter = len(config.members(here)), 4 * 159_907_840 / 1e9
    needed = 13.48 + 1 + members * 2 * adapter + 9 * adapter

    def told(runs, **changes):
        found = [f for f in preflight.find_missing(runs, machine(free=1e9, **changes)) if f.key == "results_dir"]
        return float(found[0].what.split("about ")[1].split(" GB")[0])

    assert told([here]) == pytest.approx(needed, abs=1)
    assert told([here], gpus=(A100,) * 4) == pytest.approx(needed + 3 * 9 * adapter, abs=1)
    other = here.model_copy(update={"run_id": "other"})
    assert told([here, other]) == pytest.approx(2 * needed - 14.48, abs=2), "the download is shared"
    for member in config.members(here):
        path = tmp_path / "results" / here.run_id / "members" / member.id / "done.json"
        path.parent.mkdir(parents=True)
        path.touch()
    assert told([here]) == pytest.approx(13.48 + 1, abs=1), "what is trained is on the disk already"
    assert preflight.find_missing([here], machine(free=16e9)) == []


QWEN = {
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
DEBERTA = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "vocab_size": 128100,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(("path", "shape", "millions"), [
    ("graff/paper/graff_30", QWEN, 40.4),  # what peft counts for Qwen3-0.6B at r = 64 on all seven projections
    # of 184: a gate is counted too
    ("iw_lora/paper/rte_lora", DEBERTA, 1.7), ("iw_lora/paper/rte_full", DEBERTA, 211.6),
])  # fmt: skip
def test_the_other_studies_checkpoints_are_counted_too(path, shape, millions):
    run = config.load_run(config.ROOT / "params" / f"{path}.yaml", scale="paper", mode="full")
    assert preflight.trained_weights(run, preflight.shape(shape)) / 1e6 == pytest.approx(millions, abs=0.1)


def test_memory_of_the_papers_shape(run):
    model = preflight.shape(LLAMA)
    assert preflight.adapter_weights(model, 64) == 159_907_840  # what peft counts for Llama-2-7b at r = 64, all-linear
    assert preflight.model_bytes(model, "nf4", "bfloat16") / 1e9 == pytest.approx(3.87, abs=0.05)
    assert preflight.model_bytes(model, "none", "bfloat16") / 1e9 == pytest.approx(13.48, abs=0.05)
    one = preflight.training_bytes(run, model)
    assert 12e9 < one < 40e9, "the YAML asks for a GPU of 40 GB"
    spread = config.apply(run, {"compute.gpus": 4, "compute.strategy": "fsdp"})
    assert preflight.training_bytes(spread, model) < one
    assert preflight.shape({"model_type": "t5"}) is None


def test_downloads_lie_in_the_repositorys_cache_unless_the_environment_says_where(monkeypatch, tmp_path):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as home:
        home.setenv("HF_HOME", str(tmp_path))
        hub.keep_downloads_here()
        assert preflight.hub_cache(os.environ) == tmp_path / "hub"
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", "")
    monkeypatch.delenv("HF_HUB_CACHE")
    hub.keep_downloads_here()
    assert preflight.hub_cache(os.environ) == tmp_path / "cache" / "hub"
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_DATASETS_CACHE")


def test_asking_the_hub_never_raises_and_is_short(monkeypatch):
    assert preflight.ask_hub("http://127.0.0.1:9/nothing", None) == (None, "")
    assert preflight.ask_hub("no url at all", None) == (None, "")


def test_real_probes_answer_on_this_machine():
    machine = Machine()
    assert isinstance(machine.gpus(machine.environ), list)
    assert machine.gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert machine.free_bytes(Path("/not/there/yet")) > 0
