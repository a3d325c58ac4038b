"""Reference log-probabilities: computed once for a whole grid of runs and kept on disk by content.

They depend on the base model, its quantisation and the tokenised rows, and on nothing a run of the grid varies (loss,
beta, tau, seed, adapter). TRL's own cache keys on the randomly initialised adapter too, so every new seed misses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.td_dpo.logprobs import sample_logprobs, sequence_logprobs
from lib.td_dpo.tokens import rows_digest

__all__ = ["log_ratio_of_samples", "reference_key", "reference_logprobs", "sequence_logprobs"]


def reference_key(rows: list[dict], model_fingerprint: str, quantization: str, dtype: torch.dtype) -> str:
    """Content key of a reference: base model, quantisation, compute type, tokenised rows."""
    parts = (model_fingerprint, quantization, str(dtype), rows_digest(rows))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _write(path: Path, table: Tensor) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file({"chosen": table[:, 0].contiguous(), "rejected": table[:, 1].contiguous()}, name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read(path: Path, size: int) -> Tensor | None:
    """The cached table, or None where there is none or it is damaged (it is then computed again)."""
    try:
        columns = load_file(path)
        table = torch.stack([columns["chosen"], columns["rejected"]], dim=1)
    except Exception:  # safetensors has one error class per kind of damage, and any of them means: not usable
        return None
    return table if table.shape == (size, 2) else None


def without_adapters(model: torch.nn.Module) -> contextlib.AbstractContextManager:
    """The frozen reference of a model with adapters is the model with them switched off."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()


def reference_logprobs(
    model: torch.nn.Module,
    rows: list[dict],
    *,
    cache_dir: str | os.PathLike,
    model_fingerprint: str,
    quantization: str = "none",
    pad: int = 0,
) -> Tensor:
    """(N, 2) summed reference log-probabilities (chosen, rejected), in nats, from the cache or computed and cached.

    `model` is the base model, or the model with its adapters (they are switched off). Processes that ask for the same
    table at once wait for the first, which computes it.
    """
    key = reference_key(rows, model_fingerprint, quantization, model.dtype)
    path = Path(cache_dir) / f"{key}.safetensors"
    if (table := _read(path, len(rows))) is not None:
        return table
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if (table := _read(path, len(rows))) is None:
            with without_adapters(model):
                table = sequence_logprobs(model, rows, pad=pad)
            _write(path, table)
    return table


def log_ratio_of_samples(
    model: torch.nn.Module, reference_model: torch.nn.Module | None, samples: list[dict]
) -> Tensor:
    """(N,) sum over tokens of log pi - log pi_0, in nats, of answers {"prompt_ids", "completion_ids"} sampled from pi.

    Their mean is the sampled KL(pi || pi_0) (the k1 estimator). With `reference_model=None` the reference is `model`
    with its adapters switched off.
    """
    policy = sample_logprobs(model, samples)
    with without_adapters(model) if reference_model is None else contextlib.nullcontext():
        return policy - sample_logprobs(reference_model or model, samples)
