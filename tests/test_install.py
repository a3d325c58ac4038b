"""./run_all.sh makes its environment: by uv or pip, both stand-ins here, resumed after a failure, in a folder with a space
and an umlaut. And what lib imports is what pyproject.toml names."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import ROOT
from tests.test_repository import MODULES

PIP = """
import os, shutil, sys
from pathlib import Path
here, said = Path(os.environ["HERE"]), " ".join(sys.argv[1:])
if "config list" in said:
    print(os.environ.get("PIP_SAYS", ""))
elif "install" in said:
    print("pip", said, file=open(here / "log", "a"))
    if said.endswith(" uv"):
        if not (here / "spare_uv").exists():
            sys.exit("no such package: uv")
        shutil.copy(here / "spare_uv", Path(sys.prefix) / "bin" / "uv")
"""
NETWORK = """
import io, os, urllib.request
def urlopen(url, timeout):
    if "TORCH_INDEX" not in os.environ:
        raise OSError(f"{url}: no route")
    return io.BytesIO()
urllib.request.urlopen = urlopen
"""
PYTHON = """#!/bin/sh
case "$*" in *"-m venv"*) ;; *) exec "{real}" "$@" ;; esac
"{real}" "$@" --without-pip && for last; do :; done && cp -r "$HERE/site/." "$last/lib/python{version}/site-packages/"
"""
UV = """#!/bin/sh
case "$*" in *--help) exit 0 ;; "cache dir") echo "$HERE/cache"; exit 0 ;; esac
echo "uv $*" >> "$HERE/log"; env | grep -E '^(UV_|ALL_PROXY|SSL_CERT)' >> "$HERE/environment"
echo "Downloading torch (182.9MiB)" >&2; echo " + torch==2.13.0" >&2
if [ -f "$HERE/cut" ]; then rm "$HERE/cut"; echo "error: connection reset" >&2; exit 2; fi
"""


class Machine:
    """A checkout of the launcher alone, and a PATH with a Python that makes environments with a stand-in for pip."""

    def __init__(self, here):
        self.here, self.root, self.bin = here, here / "pfad mit Ü" / "studies", here / "bin"
        (self.root / "lib" / "run").mkdir(parents=True)
        for name in ("run_all.sh", "pyproject.toml", "constraints.txt", "lib/run/install.py"):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "lib" / "__main__.py").write_text("import sys\nprint('lib:', *sys.argv[1:])\n")
        self.write("site/pip/__init__.py", "")
        self.write("site/pip/__main__.py", PIP)
        self.write("site/sitecustomize.py", NETWORK)
        self.write("site/studies.pth", str(self.root))  # as an editable install leaves it
        python = PYTHON.format(real=os.path.realpath(sys.executable), version="{}.{}".format(*sys.version_info))
        self.write("bin/python3", python)
        for tool in ("bash", "cat", "cksum", "dirname", "cp", "env", "grep", "rm"):
            (self.bin / tool).symlink_to(shutil.which(tool))

    def write(self, name, text):
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *arguments, **variables):
        """(exit code, what it said, what was installed by this call)."""
        log = self.here / "log"
        log.unlink(missing_ok=True)
        environment = {
            "PATH": str(self.bin),
            "HERE": str(self.here),
            "HOME": str(self.here),
            "LC_ALL": "C.UTF-8",
            **variables,
        }
        command, streams = (
            [self.root / "run_all.sh", *arguments],
            {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        )
        done = subprocess.run(command, env=environment, text=True, timeout=300, **streams)
        return done.returncode, done.stdout, log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_uv_installs_torch_first_and_then_what_is_not_for_tests(machine):
    machine.write("bin/uv", UV)
    code, said, installed = machine.run("plan", "--study", "graff")
    assert (code, said.splitlines()[-1]) == (0, "lib: plan --study graff")
    assert "Downloading torch (182.9MiB)" in said
    assert "+ torch" not in said
    python, constraints = machine.root / ".venv/bin/python", f"-c {machine.root}/constraints.txt"
    assert installed == [
        f"uv pip install --python {python} {constraints} torch",
        f"uv pip install --python {python} {constraints} -e {machine.root}",
    ]
    assert machine.run("plan") == (0, "lib: plan\n", []), "a second call installs nothing and says nothing"
    assert machine.run("test")[2][-1].endswith(f" -e {machine.root}[test]")
    assert machine.run("test") == (0, "lib: test\n", []), "what tests need is added once"
    assert machine.run("plan")[2] == []
    with (machine.root / "constraints.txt").open("a") as file:
        file.write("six==1.16.0\n")
    assert machine.run("plan")[2][-1].endswith(f" -e {machine.root}"), "other versions are wanted"
    assert machine.run("test")[2][-1].endswith("[test]")


def test_uv_takes_over_what_pip_is_set_to(machine):
    machine.write("bin/uv", UV)
    said = [
        "global.index-url='https://mirror/simple'",
        "global.find-links='/user/wheels'",
        "global.extra-index-url='\\nfile:///a\\nfile:///b'",
        "install.trusted-host='mirror other'",
        ":env:.find-links='/one /two'",
        ":env:.default-timeout='180'",
        "global.cert='/ca.pem'",
        "global.require-hashes='false'",
    ]
    assert machine.run(PIP_SAYS="\n".join(said), TORCH_INDEX="1", UV_HTTP_TIMEOUT="9")[0] == 0
    found = dict(line.split("=", 1) for line in (machine.here / "environment").read_text().splitlines())
    assert found == {
        "UV_DEFAULT_INDEX": "https://mirror/simple",  # and torch from there too
        "UV_INDEX": "file:///a file:///b",
        "UV_FIND_LINKS": "/one,/two",
        "UV_INSECURE_HOST": "mirror other",
        "UV_HTTP_TIMEOUT": "9",  # what uv itself is set to counts
        "SSL_CERT_FILE": "/ca.pem",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="PyPI's torch for macOS has no CUDA")
@pytest.mark.parametrize(("answers", "backend"), [({"TORCH_INDEX": "1"}, True), ({}, False)])
def test_the_build_of_torch_is_chosen_where_its_index_answers(machine, answers, backend):
    machine.write("bin/uv", UV)
    assert machine.run(**answers)[0] == 0
    assert ("UV_TORCH_BACKEND=auto" in (machine.here / "environment").read_text()) is backend


def test_a_download_that_fails_is_one_line_and_the_same_command_resumes(machine):
    machine.write("bin/uv", UV)
    machine.write("cut", "")
    code, said, installed = machine.run("plan")
    assert (code, len(installed)) == (3, 1), "nothing goes on after a failure"
    assert said.splitlines()[-2] == "error: connection reset"
    assert "rerun the same command to resume" in said.splitlines()[-1]
    code, said, installed = machine.run("plan")
    assert (code, said.splitlines()[-1], len(installed)) == (0, "lib: plan", 2)


@pytest.mark.parametrize("old", [False, True])
def test_uv_is_put_into_the_environment_where_there_is_none_or_an_old_one(machine, old):
    machine.write("spare_uv", UV)
    if old:
        machine.write("bin/uv", "#!/bin/sh\nexit 2\n")
    code, _, installed = machine.run("plan")
    assert code == 0
    assert [line.split()[0] for line in installed] == ["pip", "uv", "uv"]
    assert "--only-binary=:all:" in installed[0]


def test_pip_installs_where_uv_cannot_be_had_or_is_not_wanted(machine):
    code, said, installed = machine.run("plan")
    assert (code, "uv cannot be had here: pip installs instead" in said) == (0, True)
    assert [line.endswith(what) for line, what in zip(installed, (" uv", " torch", f" -e {machine.root}"), strict=True)]
    (machine.root / ".venv" / ".installed").unlink()
    code, said, installed = machine.run("plan", STUDY_INSTALLER="pip")
    assert (code, "cannot be had" in said, len(installed)) == (0, False, 2)


def test_python_that_is_missing_too_old_or_gone(machine):
    machine.write("bin/uv", UV)
    code, said, _ = machine.run("plan", PYTHON="/nowhere/python3")
    assert (code, said.count("\n")) == (3, 1)
    assert said.startswith("Python: found /nowhere/python3; expected version 3.11 or newer; ")
    assert machine.run("plan")[0] == 0
    python = machine.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3")  # as after an upgrade of the system
    assert machine.run("plan")[0] == 0
    shutil.rmtree(machine.root / ".venv")
    (machine.bin / "python3").unlink()
    code, said, _ = machine.run("plan")
    assert (code, said.count("\n"), "found none on PATH" in said) == (3, 1, True)


def test_a_checkout_that_was_copied_runs_its_own_code(machine):
    machine.write("bin/uv", UV)
    assert machine.run("plan")[0] == 0
    copy = machine.here / "copy"
    shutil.copytree(machine.root, copy, symlinks=True)
    (copy / "lib" / "__main__.py").write_text("print('the copy')")
    machine.root = copy
    assert machine.run("plan")[:2] == (0, "the copy\n")


def test_a_venv_that_cannot_be_made_is_one_line(machine):
    (machine.root / ".venv").write_text("a file")
    code, said, _ = machine.run("plan")
    assert (code, "rerun the same command to resume" in said.splitlines()[-1]) == (3, True)


# ---- what is installed


def names(requirements):
    return {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in requirements}


def test_what_lib_imports_is_declared_and_what_only_tests_need_is_not():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared, extras = names(project["dependencies"]), project["optional-dependencies"]
    called = {"bs4": "beautifulsoup4", "sklearn": "scikit-learn", "yaml": "pyyaml", "pynvml": "nvidia-ml-py"}
    comes_with = {
        "jupyter_client": "ipykernel",
        "traitlets": "ipykernel",
        "sqlalchemy": "optuna",
        "pydantic_core": "pydantic",
    }
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    found = {(called | comes_with).get(name, name) for name in found - set(sys.stdlib_module_names) - {"lib"}}
    found = names(found)
    assert found - declared == names(extras["judge"] + extras["cluster"]), "and these say so where they are missing"
    assert declared - found == {"jupyterlab", "gguf", "sentencepiece"}, (
        "a command, and what transformers reads files with"
    )
    only_tests = names(extras["test"]) | names(extras["types"])
    assert not declared & only_tests
    pinned = names((ROOT / "constraints.txt").read_text().splitlines())
    assert (declared | only_tests | {"uv"}) - pinned == set(), "no version in constraints.txt"
