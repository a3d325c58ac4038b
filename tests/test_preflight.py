"""lib/run/preflight.py: what is missing on a machine, said with what to do, and without a secret."""

import importlib.util
import os
import types

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from lib import config, hub
from lib.config import ROOT
from lib.run import preflight
from lib.run.preflight import Gpu
from tests.judge_endpoint import write_bench

A100 = Gpu("0", "NVIDIA A100-SXM4-80GB", 85.0, (8, 0))
T4 = Gpu("0", "T4", 15.6, (7, 5))
LLAMA_PAGE = "https://huggingface.co/meta-llama/Llama-2-7b-chat-hf"
TOKENS = {"HF_TOKEN": "hf_secret", "WANDB_API_KEY": "wb_secret", "OPENAI_API_KEY": "sk-secret"}
CLEARED = ("OPENAI_BASE_URL", "DB_PASSWORD", "HF_ENDPOINT", "HF_HUB_OFFLINE", "STUDY_CLUSTER", "CUDA_VISIBLE_DEVICES")


def answer(kind, status):
    return kind("refused", response=types.SimpleNamespace(status_code=status, headers={}, request=None))


GATED = answer(GatedRepoError, 401)


@pytest.fixture
def run(tmp_path):
    shipped = config.load_run(config.ROOT / "params/td_dpo/paper/proposed-td_dpo.yaml", scale="paper", mode="full")
    return config.apply(shipped, {"evaluation.mt_bench": str(write_bench(tmp_path / "mt_bench"))})


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with nothing missing; keyword arguments take something away. `hub`: what the hub answers for the
    model, None where it is out of reach."""

    def _machine(gpus=(A100,), hub_answer="yes", free=1e12, drop=(), **environ):
        known = {"HOME": str(tmp_path)} | TOKENS | environ
        for name in (*CLEARED, *drop):
            monkeypatch.delenv(name, raising=False)
        for name in known.keys() - set(drop):
            monkeypatch.setenv(name, known[name])

        def auth_check(self, name, repo_type):
            assert hub_answer is not None, "asked the hub, which is out of reach"
            if hub_answer != "yes" and repo_type == "model":
                raise hub_answer

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(HfApi, "auth_check", auth_check)
        monkeypatch.setattr(hub, "_answers", lambda endpoint, seconds: hub_answer is not None)
        monkeypatch.setattr(preflight, "visible_gpus", lambda: list(gpus))
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))

    _machine()
    return _machine


def findings(run):
    """{key: the last finding about it}; whatever is missing, no secret is reported and each has a fix."""
    found = preflight.find_missing([run], preflight.visible_gpus())
    assert "secret" not in "\n".join(map(str, found))
    assert all(finding.fix and "\n" not in str(finding) for finding in found)
    return {finding.key: finding for finding in found}


def test_nothing_is_missing_where_everything_is_there(run, machine):
    assert preflight.find_missing([run], preflight.visible_gpus()) == []


def test_a_trial_and_the_laptop_need_nothing(run, machine):
    machine(gpus=(), hub_answer=None, drop=TOKENS)
    assert preflight.find_missing([config.trial(run)], []) == []
    assert (
        findings(config.load_run(config.ROOT / "params/td_dpo/laptop/td_dpo.yaml", scale="laptop", mode="full")) == {}
    )


def test_of_a_bare_machine_everything_is_said_at_once(run, machine):
    machine(gpus=(), hub_answer=None, free=1e9, drop=TOKENS)
    found = findings(run)
    errors = {"compute.gpus", "model.name", "dataset.name", "wandb.mode", "results_dir"}
    assert {key for key, finding in found.items() if finding.level == "error"} == errors
    assert found.keys() - errors == {"evaluation.judge"}
    assert "out of reach" in found["model.name"].what
    assert "wandb.mode=offline" in found["wandb.mode"].fix


@pytest.mark.parametrize(
    ("gpus", "key"),
    [
        ((), "compute.gpus"),
        ((Gpu("0", "T4", 15.6, (7, 5)),), "compute.gpus"),
        ((Gpu("0", "V100", 45, (7, 0)),), "model.torch_dtype"),
        ((Gpu("0", "NVIDIA A100-PCIE-40GB", 39.5, (8, 0)),), None),
        ((A100, A100), None),
        ((Gpu("0", "NVIDIA H100", 85, (9, 0)),), None),
    ],
)
def test_gpus(run, machine, gpus, key):
    machine(gpus=gpus)
    found = findings(config.apply(run, {"compute.gpu_type": "a100-80gb"}))
    assert {k for k, finding in found.items() if finding.level == "error"} == ({key} if key else set())
    assert ("compute.gpu_type" in found) == (key is None and "H100" in gpus[0].name or key == "model.torch_dtype")


@pytest.mark.parametrize(
    ("run", "key"), [("iw_lora/small/lora", "training.bf16"), ("graff/small/fixed", "training.mixed_precision")]
)
def test_bfloat16_needs_a_gpu_that_multiplies_it_whatever_its_key(run, key):
    asked = config.load_run(ROOT / f"params/{run}.yaml", scale="small", mode="full", overrides={"compute.gpus": "1"})
    found = {g.name: [f.key for f in preflight._gpus(asked, [g], None)] for g in (A100, Gpu("0", "V100", 45, (7, 0)))}
    assert found == {A100.name: [], "V100": [key]}


def test_a_revision_of_a_model_that_came_in_a_wheel_is_not_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path))
    (folder := tmp_path / "models/HuggingFaceTB/SmolLM2-135M-Instruct").mkdir(parents=True)
    (folder / "provenance.json").write_text("{}")
    path = ROOT / "params/td_dpo/small/dpo.yaml"
    run, other = (
        config.load_run(path, scale="small", mode="full", overrides=overrides)
        for overrides in (None, {"model.revision": "main"})
    )
    assert not list(preflight._hub([run]))
    (found,) = preflight._hub([other])
    assert (found.key, found.fix) == ("model.revision", f"where the hub answers: rm -r {folder}")


def test_several_gpus_for_one_member(run, machine):
    spread = config.apply(run, {"compute.gpus": 4, "compute.strategy": "fsdp"})
    machine(gpus=(A100,) * 3)
    assert "needs 4 GPUs with" in findings(spread)["compute.gpus"].what
    machine(gpus=(A100,) * 4)
    assert findings(spread) == {}
    assert [f.key for f in preflight.find_missing([spread], [A100] * 4, 3)] == ["--jobs"]
    assert preflight.find_missing([spread], [A100] * 4, 4) == []


def test_gpus_of_several_kinds_are_refused_and_each_kind_is_named(run, machine):
    gpus = (
        Gpu("7", "NVIDIA T4-like", 85.0, (8, 0)),
        Gpu("GPU-ab", A100.name, 85.0, (8, 0)),
        Gpu("3", *A100[1:]),
    )
    machine(gpus=gpus)
    mixed = findings(run)["compute.gpu_type"]
    assert mixed.level == "error"
    assert "NVIDIA T4-like, NVIDIA A100" in mixed.what
    assert mixed.fix.startswith(
        f"CUDA_VISIBLE_DEVICES=7 (NVIDIA T4-like) or CUDA_VISIBLE_DEVICES=GPU-ab,3 ({A100.name})"
    )
    assert "--num-gpus=0" in mixed.fix
    assert findings(config.apply(run, {"compute.gpus": 0})) == {}, "it trains on the CPU"


def test_visible_gpus_are_those_that_cuda_would_show(monkeypatch):
    import pynvml

    names = {"GPU-0": "A", "GPU-1": "B", "GPU-2": "C"}

    def by_uuid(uuid):
        if uuid not in names:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    for name, function in {
        "Init": lambda: None,
        "DeviceGetCount": lambda: len(names),
        "DeviceGetHandleByIndex": lambda index: f"GPU-{index}",
        "DeviceGetHandleByUUID": by_uuid,
        "DeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=80e9),
        "DeviceGetCudaComputeCapability": lambda handle: (9, 0),
        "DeviceGetName": names.get,
    }.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", function)
    for shown, devices in (
        (None, "0 1 2"),
        ("2,0", "2 0"),
        ("1, GPU-2", "1 GPU-2"),
        ("1,-1,0", "1"),
        ("1,9,0", "1"),
        ("", ""),
    ):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if shown is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert [gpu.device for gpu in preflight.visible_gpus()] == devices.split(), shown
    assert preflight.visible_gpus() == []


# ---- the hub


@pytest.mark.parametrize(
    ("hub_answer", "words"),
    [
        (None, "out of reach"),
        (GATED, "access was refused"),
        (answer(HfHubHTTPError, 403), "access was refused"),
        (answer(RepositoryNotFoundError, 404), "no such model"),
        (answer(RepositoryNotFoundError, 401), "no such model"),
        (answer(HfHubHTTPError, 401), "no such model"),
        (ConnectionError("reset"), "out of reach"),
        (answer(HfHubHTTPError, 429), None),
        (answer(HfHubHTTPError, 500), None),
    ],
)
def test_what_the_hub_answers(run, machine, hub_answer, words):
    machine(hub_answer=hub_answer)
    found = findings(run)
    assert ("model.name" in found) == bool(words)
    assert words is None or words in found["model.name"].what
    assert ("dataset.name" in found) == (hub_answer is None)


def test_each_model_is_asked_for_once(run, machine, monkeypatch):
    asked = []
    monkeypatch.setattr(
        HfApi, "auth_check", lambda self, name, repo_type: asked.append((self.endpoint, name, repo_type))
    )
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    preflight.find_missing([run, run.model_copy(update={"run_id": "other"})], [A100])
    names = (("meta-llama/Llama-2-7b-chat-hf", "model"), ("argilla/dpo-mix-7k", "dataset"))
    assert asked == [("https://mirror.example", *name) for name in names]


def test_a_license_without_a_token(run, machine):
    machine(hub_answer=GATED, drop=("HF_TOKEN",))
    found = findings(run)
    assert list(found) == ["model.name"]
    assert "is gated" in found["model.name"].what
    assert LLAMA_PAGE in found["model.name"].fix
    assert "hf auth login" in found["model.name"].fix


def test_cached_snapshots_need_no_hub(run, machine, tmp_path):
    machine(hub_answer=None, HF_HUB_OFFLINE="1")
    for repository, revision in (
        ("models--meta-llama--Llama-2-7b-chat-hf", run.model.revision),
        ("datasets--argilla--dpo-mix-7k", run.dataset.revision),
    ):
        folder = tmp_path / "hub" / repository / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    assert list(findings(run)) == ["model.name"], "a configuration alone, of a download that was cut off"
    model = tmp_path / "hub/models--meta-llama--Llama-2-7b-chat-hf/snapshots" / run.model.revision
    (model / "a.safetensors").touch()
    assert list(findings(run)) == ["model.name"], "and the weights, without a tokenizer"
    (model / "tokenizer.json").touch()
    assert findings(run) == {}
    assert findings(config.apply(run, {"dataset.revision": None})) == {}, "any will do"
    pinned = config.apply(run, {"dataset.revision": "f" * 40})
    assert "HF_HUB_OFFLINE" in findings(pinned)["dataset.name"].what
    refs = tmp_path / "hub/datasets--argilla--dpo-mix-7k/refs"
    refs.mkdir()
    (refs / "v1").write_text(run.dataset.revision)
    assert findings(config.apply(run, {"dataset.revision": "v1"})) == {}


def test_offline_is_honored_without_asking(run, machine, monkeypatch):
    machine(HF_HUB_OFFLINE="TRUE")
    monkeypatch.setattr(HfApi, "auth_check", None)
    monkeypatch.setattr(hub, "_answers", None)
    found = findings(run)
    assert set(found) == {"model.name", "dataset.name"}
    assert run.dataset.revision in found["dataset.name"].fix


def test_local_models_and_data_ask_nobody(run, machine, tmp_path):
    machine(hub_answer=None, drop=("HF_TOKEN",))
    assert findings(config.apply(run, {"model.name": str(tmp_path), "dataset.name": str(tmp_path)})) == {}


def test_downloads_lie_in_the_repositorys_cache_unless_the_environment_says_where(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, "")  # so that what is set here is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    hub.keep_downloads_here()
    assert "HF_HUB_CACHE" not in os.environ
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    hub.keep_downloads_here()
    assert os.environ["HF_HUB_CACHE"] == str(tmp_path / "cache/hub")


# ---- the rest


def test_wandb_key(run, machine, tmp_path):
    machine(drop=("WANDB_API_KEY",))
    assert "api.wandb.ai" in findings(run)["wandb.mode"].what
    assert findings(config.apply(run, {"wandb.mode": "offline"})) == {}
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password wb_secret\n")
    netrc.chmod(0o600)
    assert findings(run) == {}
    netrc.write_text("machine\n\n???")
    assert set(findings(run)) == {"wandb.mode"}


def test_a_judge_is_only_a_warning_and_a_local_server_will_do(run, machine):
    machine(drop=("OPENAI_API_KEY",))
    assert findings(run)["evaluation.judge"].level == "warning"
    machine(drop=("OPENAI_API_KEY",), OPENAI_BASE_URL="http://localhost:8000/v1")
    assert findings(run) == {}


@pytest.mark.parametrize(("taken", "settings", "key", "what", "fix"), [
    ({"gpus": ()}, {}, "compute.gpus", "needs 1 GPU with at least 40 GB, here: none", "--scale laptop"),
    ({"gpus": (), "CUDA_VISIBLE_DEVICES": ""}, {}, "compute.gpus", "none (CUDA_VISIBLE_DEVICES=)", "--scale laptop"),
    ({"gpus": (T4,)}, {}, "compute.gpus", "here: T4 (16 GB)", "compute.min_gpu_memory_gb"),
    ({"gpus": (Gpu("0", "V100", 45, (7, 0)),)}, {}, "model.torch_dtype", "8.0; here: 7.0", "Ampere GPU or newer"),
    ({"drop": ("HF_TOKEN",), "hub_answer": GATED}, {}, "model.name", "is gated", "hf auth login"),
    ({"hub_answer": GATED}, {}, "model.name", "access was refused", LLAMA_PAGE),
    ({"hub_answer": answer(RepositoryNotFoundError, 404)}, {}, "model.name", "no such model", "correct model.name"),
    ({"hub_answer": None}, {}, "model.name", "huggingface.co is out of reach", "--set model.name=DIR"),
    ({"hub_answer": None}, {}, "dataset.name", "huggingface.co is out of reach", "--set dataset.name=DIR"),
    ({"HF_HUB_OFFLINE": "1"}, {}, "dataset.name", "HF_HUB_OFFLINE is set", "argilla/dpo-mix-7k --repo-type dataset"),
    ({"free": 20e9}, {}, "results_dir", "20.0 GB free", "larger disk"),
    ({"drop": ("WANDB_API_KEY",)}, {}, "wandb.mode", "no W&B key", "wandb login"),
    ({"drop": ("OPENAI_API_KEY",)}, {}, "evaluation.judge", "no judge endpoint", "OPENAI_BASE_URL"),
    ({"absent": "openai"}, {}, "evaluation.judge", "openai is not installed",
     "pip install -c constraints.txt -e '.[judge]', then ./run_all.sh judge"),
])  # fmt: skip
def test_every_missing_thing_is_one_line_that_names_it_and_its_fix(
    run, machine, monkeypatch, taken, settings, key, what, fix
):
    taken, find_spec = dict(taken), importlib.util.find_spec
    absent = taken.pop("absent", "")
    machine(**taken)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find_spec(name))
    found = findings(config.apply(run, settings))
    assert what in found[key].what
    assert fix in found[key].fix


def test_a_folder_that_is_not_there_yet_has_the_room_of_the_one_above_it(run, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    here = run.model_copy(update={"results_dir": tmp_path / "not/there/yet"})
    monkeypatch.setitem(preflight.NEEDED_GB, "paper", 1e9)
    (finding,) = set(preflight._disk(here))
    assert f"at {tmp_path}, about 1e+09 GB" in finding.what


def test_the_hub_is_asked_within_seconds_and_nothing_is_raised(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for endpoint in ("http://127.0.0.1:9", "no url at all"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert preflight.refusal("a/b", "model", None).exit_code == 3
    assert isinstance(hub.ask(lambda: __import__("time").sleep(5), 0.01), TimeoutError)
