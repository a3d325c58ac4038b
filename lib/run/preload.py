"""What the pool's fork server imports once for all members and kernels: importing this module does it.

Importing torch, transformers and peft costs 10 s; a record of fifty members must not pay it fifty times. Third-party
packages only: what a child needs of `lib` it reads from disk itself, so an edit needs no restart.
"""

import gc
import importlib
import logging
import signal

PACKAGES = """numpy pandas torch transformers datasets accelerate peft optuna ipykernel.kernelapp matplotlib.pyplot
seaborn scipy.stats sklearn.linear_model pydantic yaml safetensors.torch transformers.models.llama.modeling_llama
IPython.display"""

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names optional kernels that are not installed
# Without the collector, which would go through what large packages leave behind again and again: a quarter quicker.
# It does not look at it later either (3 % of a laptop member's time, and copies of what all children share).
gc.disable()
for name in PACKAGES.split():
    importlib.import_module(name)
gc.collect()
gc.freeze()
gc.enable()
