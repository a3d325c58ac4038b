"""start_here runs headlessly, and `./run_all.sh lab` opens it as promised, in a real browser."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

from lib import record
from lib.run import cli, pages, plan, runner
from tests.browser import PROGRAM, browser
from tests.conftest import PATIENCE, ROOT, TINY, until

START = ROOT / "notebooks" / cli.FIRST
in_a_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
AT = """(() => { const e = [...document.querySelectorAll('%s')].find(e => e.textContent.trim() == '%s');
  if (!e) return null; const b = e.getBoundingClientRect(); return [b.x + 5, b.y + 5]; })()"""


def test_start_here_runs_headlessly(pool_socket, tmp_path):
    small = {k: TINY[k] for k in ("model", "dataset", "training", "evaluation")}
    parameters = {**small, "results_dir": str(tmp_path), "mode": "full", "scale": "laptop"}
    folder = tmp_path / "start_here"
    step = plan.Step("train", "td_dpo", "start_here", START, folder, parameters, "key", "never run")
    notebook = runner.execute_notebook(step, "nonce")
    assert record.read_json(folder / "done.json") == {"nonce": "nonce"}
    assert record.read_json(folder / "metrics.json")["members"]["default-s42"]["status"] == "completed"
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.get("name") == "stderr"], "libraries' chatter on a stranger's first page"
    shown = [
        o["data"]["text/plain"]
        for o in outputs
        if "text/html" in o.get("data", {}) and "<img" in o["data"]["text/html"]
    ]
    assert len(shown) == 4  # three ideas and the member
    steps = TINY["training"]["max_steps"]
    assert f": {steps} steps." in shown[3]
    nbformat.write(notebook, folder / "run.ipynb")
    page = pages.notebook_html(folder / "run.ipynb").read_text()
    assert page.count("<img") == 4
    assert "A picture without a description" not in page


@pytest.fixture
def server(tmp_path):
    """`lib lab` on a copy of the repository, which the browser may save into: ask(path) speaks to its API."""
    for name in ("lib", "notebooks", "params"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    foreign = tmp_path / "home" / ".local" / "share" / "jupyter" / "kernels" / "python3"  # another kernel of this name
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "Another", "language": "python"})
    )
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "STUDY"))}
    environment |= {
        "PYTHONPATH": str(tmp_path),
        "STUDY_CACHE": str(tmp_path / "cache"),
        "HOME": str(tmp_path / "home"),
        "JUPYTER_PREFER_ENV_PATH": "0",
    }
    options = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=x",
    ]
    with open(tmp_path / "lab.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lib", "lab", *options],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def ask(path: str):
        return json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}?token=x", timeout=PATIENCE))

    ask.url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(ask), (tmp_path / "lab.log").read_text, process)
        yield ask
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # its kernels are of its session
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(ask) -> bool:
    try:
        return bool(ask("status"))
    except OSError:
        return False


def free_port() -> int:
    """One that is not given out to who asks for any, as the tests beside this one do: it is still free a moment
    later."""
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", random.randrange(10_000, 30_000))) as probe,
        ):
            return probe.getsockname()[1]


def opened(page, server, address: str):
    page.call("Emulation.setDeviceMetricsOverride", width=1400, height=1000, deviceScaleFactor=1, mobile=False)
    page.call("Page.navigate", url=server.url + address)
    until(lambda: page.sees("!!document.querySelector('.jp-Notebook .jp-MarkdownOutput')?.offsetParent"), address)
    until(lambda: [s["kernel"]["execution_state"] for s in server("sessions")] == ["idle"], "a kernel")


def click(page, selector: str, text: str) -> None:
    x, y = until(lambda: page.sees(AT % (selector, text)), text)
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@in_a_browser
def test_lab_opens_start_here_and_nothing_else(server):
    assert server("kernelspecs")["kernelspecs"]["python3"]["spec"]["argv"][0] != "/bin/false"
    with browser() as page:
        opened(page, server, "/?token=x")  # what the browser is opened with
        assert page.ask("location.pathname").endswith("/tree/start_here.ipynb")
        time.sleep(2)  # the question about news came a moment after all else
        assert page.ask("document.querySelectorAll('.Toastify__toast, .jp-Dialog').length") == 0
        assert {url.split("/")[2] for url in page.asked if url.startswith(("http", "ws"))} == {server.url.split("/")[2]}
        assert page.reported == []


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize(
    ("notebook", "refused"),
    [
        ("start_here", 0),
        ("td_dpo/train", 0),
        ("iw_lora/train", 0),
        ("graff/train", 0),
        ("sweep", 0),
        ("td_dpo/analysis", 1),
        ("iw_lora/analysis", 1),
        ("graff/analysis", 1),
    ],
)
def test_every_notebook_runs_top_to_bottom_in_lab(server, notebook, refused):
    """`refused`: an analysis, where no study has been run, ends at its first cell and says what runs it."""
    path = f"{notebook}.ipynb"
    with browser() as page:
        opened(page, server, f"/lab/tree/{path}?token=x")
        click(page, ".lm-MenuBar-itemLabel", "Run")
        click(page, ".lm-Menu-itemLabel", "Run All Cells")

        def cells() -> list:
            page.call(
                "Input.dispatchKeyEvent", type="keyDown", key="s", code="KeyS", windowsVirtualKeyCode=83, modifiers=2
            )
            page.call(
                "Input.dispatchKeyEvent", type="keyUp", key="s", code="KeyS", windowsVirtualKeyCode=83, modifiers=2
            )
            time.sleep(2)
            return [c for c in server(f"contents/{path}")["content"]["cells"] if c["cell_type"] == "code"]

        def errors() -> list:
            return [o for c in cells() for o in c["outputs"] if o["output_type"] == "error"]

        until(lambda: all(c["execution_count"] for c in cells()) or errors(), path)
        assert ["./run_all.sh" in o["evalue"] for o in errors()] == [True] * refused
        assert not [o["text"] for c in cells() for o in c["outputs"] if o.get("name") == "stderr"]
