"""Tokenisers, base models, 4-bit, adapters: what every study loads, from a local directory or the hub.

Trainables are always float32, whatever the compute dtype: in bfloat16 an update of 5e-7 is mostly rounded away.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lib.errors import MissingError, StudyError
from lib.weights import hub

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device() -> torch.device:
    """The current CUDA device where there is one, else the CPU (no MPS: its results are not deterministic)."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


_current_device = device  # `device` is also a parameter below


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """torch dtype of a configuration value."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise StudyError("model.torch_dtype", repr(name), f"one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _missing(name: object, found: str, expected: str, mend: str = "--set model.name=<path>") -> MissingError:
    return MissingError(f"model.name = {name}", found, expected, mend)


def _locate(name: str, needs: str) -> str:
    """`name` as a local directory (checked for the file `needs`) where it exists, else as a hub id; never waits for the
    hub."""
    path = hub.local_path(name, root=ROOT)
    if path is None:
        if not hub.HUB_ID.match(name):
            raise _missing(
                name,
                f"no such directory (from {Path.cwd()} or {ROOT})",
                "a directory with config.json and *.safetensors, or a hub id",
            )
        hub.prepare()
        return name
    if not (path / needs).is_file():
        held = ", ".join(sorted(item.name for item in path.iterdir())[:8]) if path.is_dir() else "a file"
        raise _missing(
            name,
            f"no {needs} in {path} (it holds {held or 'nothing'})",
            "a directory written by save_pretrained or hf download",
        )
    return str(path)


def load_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False, needs_chat_template: bool = False
) -> PreTrainedTokenizerBase:
    """Tokeniser with a pad token, padding on the right (training; generation sets left itself).

    Without a pad token it pads with the unknown or the end token: masks come from lengths, so padding is never scored.
    """
    source = _locate(name, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError, ValueError or what a tokeniser's backend raises
        raise hub.explain(error, name, kind="model", key="model.name", revision=revision) from error
    if needs_chat_template and not tokenizer.chat_template:
        raise StudyError(
            f"model.name = {name}",
            "a tokeniser without a chat template",
            "a chat model's tokeniser",
            "name the chat or instruct version of the model",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def quantization_config(
    quantization: str, torch_dtype: torch.dtype, storage: torch.dtype = torch.uint8
) -> BitsAndBytesConfig | None:
    """NF4 with double quantisation (QLoRA), computing in `torch_dtype`; `storage` is bfloat16 under FSDP. None for
    'none'."""
    if quantization == "none":
        return None
    if quantization != "nf4":
        raise StudyError("model.quantization", repr(quantization), "none or nf4")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype,
        bnb_4bit_quant_storage=storage,
    )


def load_causal_lm(
    name: str,
    *,
    revision: str | None = None,
    torch_dtype: str | torch.dtype = "float32",
    quantization: str = "none",
    quant_storage: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    device: str | torch.device | None = None,
    auto_class: Any = AutoModelForCausalLM,
    **options: Any,
) -> PreTrainedModel:
    """A model from a local directory or the hub, in evaluation mode, on `device` (default: the CUDA device, else the
    CPU).

    `auto_class` serves other heads (AutoModelForSequenceClassification). `options` go to from_pretrained:
    attn_implementation, num_labels, use_safetensors=None (the default is safetensors only; a few models publish none).
    """
    dtype = dtype_of(torch_dtype)
    source = _locate(name, "config.json")
    place = torch.device(device) if device is not None else _current_device()
    if Path(source).is_dir() and options.get("use_safetensors", True) and not any(Path(source).glob("*.safetensors")):
        raise _missing(
            name,
            f"no *.safetensors in {source}",
            "weights in the safetensors format",
            "load the model once and save it with save_pretrained",
        )
    quantized = quantization_config(quantization, dtype, dtype_of(quant_storage) if quant_storage else torch.uint8)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # it floods a log
    try:
        model = auto_class.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **{"use_safetensors": True, **options},
            **({"quantization_config": quantized, "device_map": {"": place}} if quantized else {}),
        )
    except ImportError as error:
        raise MissingError(
            f"model.quantization = {quantization}",
            str(error)[:200],
            "bitsandbytes and accelerate",
            ".venv/bin/pip install bitsandbytes",
        ) from error
    except torch.OutOfMemoryError:
        raise _missing(
            name,
            f"{place} has not enough free memory for it",
            "a GPU that holds the model",
            "--set model.quantization=nf4, a smaller model, or a larger GPU",
        ) from None
    except Exception as error:
        raise hub.explain(error, name, kind="model", key="model.name", revision=revision) from error
    if quantized is None:
        model = model.to(place)
    model.config.use_cache = False  # training; generate() turns it on for itself
    if gradient_checkpointing:
        # Non-reentrant: the reentrant form needs inputs that require gradients, which a frozen embedding does not give.
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.eval()


def load_model(section: Any, **options: Any) -> PreTrainedModel:
    """load_causal_lm from a `model` section (a model of the configuration or a plain dict); `options` win."""
    section = section if isinstance(section, dict) else section.model_dump()
    known = ("revision", "torch_dtype", "quantization", "trust_remote_code", "gradient_checkpointing")
    return load_causal_lm(
        section["name"], **{**{key: section[key] for key in known if section.get(key) is not None}, **options}
    )


def add_lora(model: PreTrainedModel, peft: Any, seed: int, *, task_type: str = "CAUSAL_LM") -> nn.Module:
    """Float32 LoRA adapters per a `peft` section (lora_r, lora_alpha, lora_dropout, target_modules), drawn from `seed`.

    The base is frozen. No prepare_model_for_kbit_training: it casts the whole unquantised rest to float32 and fails
    under FSDP.
    """
    from peft import LoraConfig, get_peft_model

    section = peft if isinstance(peft, dict) else peft.model_dump()
    config = LoraConfig(
        r=section.get("lora_r", 64),
        lora_alpha=section.get("lora_alpha", 16),
        lora_dropout=section.get("lora_dropout") or 0.0,
        target_modules=section.get("target_modules") or "all-linear",
        bias="none",
        task_type=task_type,
    )
    with torch.random.fork_rng():  # the caller's random state is as it was
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise StudyError(
                "model.peft.target_modules",
                f"{config.target_modules}: {str(error)[:160]}",
                "names of linear layers of this model, or all-linear",
            ) from error
    return float32_trainables(adapted)


def float32_trainables(model: nn.Module) -> nn.Module:
    """Recast every trainable parameter to float32, in place, and assert it. After TRL, which casts adapters to
    bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    assert_float32_trainables(model)
    return model


def assert_float32_trainables(model: nn.Module) -> None:
    """Every trainable parameter is float32, and there is one."""
    wrong = [
        f"{name} ({parameter.dtype})"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dtype != torch.float32
    ]
    if wrong:
        raise AssertionError(f"{len(wrong)} trainable parameters are not float32: {', '.join(wrong[:3])}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise AssertionError("the model has no trainable parameter")


def disable_dropout(model: nn.Module) -> nn.Module:
    """Every dropout rate in the model set to 0, in place (also the rates that attention layers keep as a number).

    Before add_lora it leaves the adapters' own dropout alone; after it, it turns that off too.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in ("attention_dropout", "dropout_p", "drop_prob"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return model


def fingerprint(source: str | Path | nn.Module, revision: str | None = None) -> str:
    """sha256 of a model: config and safetensors of a directory or a cached hub id, or names and values of a loaded
    one."""
    digest = hashlib.sha256()
    if isinstance(source, nn.Module):
        for name, tensor in sorted(source.state_dict().items()):
            if isinstance(tensor, torch.Tensor):
                raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + raw.numpy().tobytes())
        return digest.hexdigest()
    path = hub.local_path(str(source), root=ROOT)
    if path is None:
        path = _cached_snapshot(str(source), revision)
    files = sorted([*path.glob("*.safetensors"), *path.glob("config.json")]) if path.is_dir() else [path]
    if not files:
        raise _missing(source, f"no config.json or *.safetensors in {path}", "a model's directory")
    for file in files:
        # In the hub's cache a file links to a blob that is named by its content.
        blob = file.resolve().name if file.is_symlink() else _sha256(file)
        digest.update(f"{file.name} {blob}\n".encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    if path.name == "config.json":  # transformers stamps its version and where it was loaded from
        config = {
            key: value
            for key, value in json.loads(path.read_text("utf-8")).items()
            if key not in {"transformers_version", "_name_or_path"}
        }
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _cached_snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:
        raise hub.explain(error, name, kind="model", key="model.name", revision=revision) from error
