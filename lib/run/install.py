"""Installs what the studies need into the environment whose Python runs this file: by uv or, where that cannot be had,
by pip. ./run_all.sh calls it; it needs nothing but Python.
"""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIP, CONSTRAINTS = [sys.executable, "-m", "pip", "--disable-pip-version-check"], ["-c", f"{ROOT}/constraints.txt"]
# pip's settings that are handed on, and uv's variable for each; of two names for one, the later one counts
NAMES = """index-url=UV_DEFAULT_INDEX extra-index-url=UV_INDEX find-links=UV_FIND_LINKS no-index=UV_NO_INDEX proxy=ALL_PROXY
trusted-host=UV_INSECURE_HOST default-timeout=UV_HTTP_TIMEOUT timeout=UV_HTTP_TIMEOUT cert=SSL_CERT_FILE"""
# what either of them says in a line for each of 170 packages
DULL = re.compile(r"\s*([-+~] |Collecting |Requirement already |Using |Looking in |━)")


def main(extra: str = "") -> int:
    """The exit code of the installer that failed, or 0."""
    uv = find_uv() if os.environ.get("STUDY_INSTALLER") != "pip" else ""
    # Python that may not write bytecode as it runs would compile everything each time: it is made here, as pip does.
    compiled = ["--compile-bytecode"] * bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    command = [uv, "pip", "install", "--python", sys.executable, *compiled] if uv else [*PIP, "install"]
    pipe = None if uv and sys.stderr.isatty() else subprocess.PIPE  # on a terminal uv draws bars
    environment = {**settings(uv), **os.environ} if uv else None
    print(f"installing into {sys.prefix} with {uv or 'pip'} (once; about 2 GB, more with CUDA)", flush=True)
    # torch first and alone: a range in another package must not choose a different build.
    for what in (["torch"], ["-e", f"{ROOT}[{extra}]" if extra else f"{ROOT}"]):
        line, errors = [*command, *CONSTRAINTS, *what], pipe and subprocess.STDOUT
        with subprocess.Popen(line, stdout=pipe, stderr=errors, env=environment, text=True) as process:
            for said in process.stdout or ():
                if not DULL.match(said):
                    print(said, end="", flush=True)
        if process.returncode:
            return process.returncode
    return 0


def find_uv() -> str:
    """uv's path: on PATH, if that one is new enough, else in this environment; "" where it cannot be had."""
    own = str(Path(sys.prefix) / "bin" / "uv")
    for uv in filter(None, map(shutil.which, ("uv", own))):
        if not subprocess.run([uv, "pip", "install", "--torch-backend=auto", "--help"], capture_output=True).returncode:
            return uv
    if not subprocess.call([*PIP, "install", "--quiet", "--only-binary=:all:", *CONSTRAINTS, "uv"]):
        return own
    print("uv cannot be had here: pip installs instead, which takes minutes", flush=True)
    return ""


def settings(uv: str) -> dict[str, str]:
    """What pip's variables and files say, as variables of uv, which reads none of them."""
    names, found = dict(re.findall(r"(\S+)=(\S+)", NAMES)), {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # as pip
    said = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout.splitlines()
    for section in ("global.", "install.", ":env:."):  # the later one counts
        for key, _, value in (line.partition("=") for line in said if line.startswith(section)):
            if name := names.get(key.removeprefix(section)):
                found[name] = ("," if name == "UV_FIND_LINKS" else " ").join(ast.literal_eval(value).split())
    try:
        os.makedirs(subprocess.run([uv, "cache", "dir"], capture_output=True, text=True).stdout.strip(), exist_ok=True)
    except OSError:  # in a home that cannot be written
        found["UV_NO_CACHE"] = "1"
    if sys.platform == "linux" and not {"UV_DEFAULT_INDEX", "UV_NO_INDEX"} & {*found, *os.environ}:
        try:  # which has torch for the GPU at hand, and without CUDA where there is none; PyPI has one build
            urllib.request.urlopen("https://download.pytorch.org/whl/cpu/torch/", timeout=5).close()
            found["UV_TORCH_BACKEND"] = "auto"
        except OSError:
            pass
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    sys.exit(main(*sys.argv[1:]))
