"""JupyterLab as a reader of the studies wants it: start_here open, the table of contents beside it, nothing from the
net.

What the reader opens and moves is kept in a workspace of its own; JupyterLab's settings and other workspaces are left
alone.
"""

import json
import os
import sys
from pathlib import Path

from lib import config, record

NOTEBOOKS = config.ROOT / "notebooks"
FIRST = "start_here.ipynb"
WORKSPACE = "studies"


def command(place: Path, more: list[str]) -> list[str]:
    """JupyterLab with its workspace and defaults in `place`; `more` are options of its own, which win."""
    return [
        *(sys.executable, "-m", "jupyter", "lab"),
        f"--ServerApp.root_dir={NOTEBOOKS}",
        f"--LabApp.default_url=/lab/workspaces/{WORKSPACE}/tree/{FIRST}",
        f"--LabApp.workspaces_dir={place}",
        f"--LabApp.app_settings_dir={place}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
        *more,
    ]


def environment() -> dict[str, str]:
    """This environment's kernel and this checkout's `lib` come first, whatever else the machine has under their names;
    and libraries do not tell in a notebook how they load."""
    first = {"JUPYTER_PATH": Path(sys.prefix) / "share" / "jupyter", "PYTHONPATH": config.ROOT}
    first = {key: os.pathsep.join(filter(None, (str(path), os.environ.get(key)))) for key, path in first.items()}
    quiet = {
        "PYTHONWARNINGS": "ignore:IProgress not found,ignore::FutureWarning",  # of tqdm and of transformers
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return {**quiet, **os.environ, **first}


def prepare(place: Path) -> None:
    """Defaults, which the reader's own settings win over: not to ask whether news are wanted. On first use the
    workspace: the table of contents open at the left of the notebook, in place of the list of files."""
    from jupyterlab_server.workspaces_handler import WorkspacesManager

    record.write_json(place / "overrides.json", {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}})
    manager = WorkspacesManager(str(place))
    if manager.load(WORKSPACE)["data"]:
        return
    contents = "@jupyterlab/toc:plugin"
    left = {"collapsed": False, "visible": True, "current": contents, "widgets": ["filebrowser", contents]}
    layout = {"main": None, "down": {}, "left": left, "right": {"collapsed": True}, "relativeSizes": [0.2, 0.8, 0]}
    made = {"data": {"layout-restorer:data": layout}, "metadata": {"id": WORKSPACE}}
    manager.save(WORKSPACE, json.dumps(made))


def lab(more: list[str]) -> None:
    """Become JupyterLab, which asks at Ctrl-C and takes its kernels along."""
    place = Path(os.environ.get("STUDY_CACHE", config.ROOT / ".cache")).absolute() / "lab"
    prepare(place)
    os.chdir(NOTEBOOKS)
    os.execve(sys.executable, command(place, more), environment())
