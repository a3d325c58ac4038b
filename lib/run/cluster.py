"""Several machines: what a slot of the pool would do is done on a node of a Ray cluster (`--cluster`), and gathered
back.

    ./run_all.sh full --cluster             the cluster this machine belongs to; or --cluster HOST:PORT

Plans, notebooks, caching and the local slot pool stay as they are. With STUDY_CLUSTER set, a slot's process is a client
(`run`) that sends code, shared inputs and the member's record so far to a node, and writes what comes back (files as
they change, output as it is printed) into the local record. A lost worker or node is an exception of Ray's: the member
is sent again, from the checkpoints gathered so far, to whichever node has room. Nodes need this environment's packages
and, for hub models, access to the hub; they share no file system with this machine, and no secret is sent to them.

Code travels as a tar of our own, and not as a `working_dir` of Ray's runtime environments: that would pack .venv and
outputs too unless each is excluded, and a member starts its own process from a scratch folder all the same.
"""

import contextlib
import functools
import io
import json
import os
import pkgutil
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lib.errors import MissingError, StudyError
from lib.run.pool import ROOT, end_with_parent

ATTEMPTS = 4  # a member that loses its node or worker this often is given up
EVERY = 1.0  # seconds between two looks at what changed
OURS = ("STUDY_CLUSTER", "STUDY_POOL", "STUDY_SLOTS")  # of this machine's processes, not of a node's
MARKERS = ("complete.json", "metrics.json", "done.json")  # they say that the rest is whole, and travel last
INSTALL = ".venv/bin/pip install -c constraints.txt -e '.[cluster]'"


def connect(address: str):
    """Ray, connected to the cluster at `address`. Raises MissingError where the extra or the cluster is not there."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingError("--cluster", "ray is not installed", "the extra `cluster`", INSTALL) from None
    if not ray.is_initialized():
        try:
            if address == "auto":  # what this machine has joined
                address = os.environ.get("RAY_ADDRESS") or Path("/tmp/ray/ray_current_cluster").read_text().strip()
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()  # Ray itself tries for many minutes
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
        except (OSError, ValueError, OverflowError, RuntimeError) as error:
            what = f"nothing answers at {address} ({str(error).strip().partition(chr(10))[0][:120]})"
            start = ".venv/bin/ray start --head on one machine, .venv/bin/ray start --address=HOST:6379 on the others"
            fix = f"{start}; then --cluster, or --cluster HOST:6379"
            raise MissingError("--cluster", what, "a running cluster", fix) from None
    return ray


@functools.cache
def _nodes(address: str) -> list[dict]:
    """The resources of every living node; asked once, and the connection given up."""
    ray = connect(address)
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    ray.shutdown()
    return found


def gpus(address: str) -> list[str]:
    """The kind of every GPU of the cluster."""
    found = []
    for node in _nodes(address):
        kinds = [name.partition(":")[2] for name in node if name.startswith("accelerator_type:")]
        found += [kinds[0] if kinds else "GPU"] * int(node.get("GPU", 0))
    return sorted(found)


def slots(address: str) -> int:
    """Members at a time: one per GPU, else per core."""
    return len(gpus(address)) or max(1, int(sum(node.get("CPU", 0) for node in _nodes(address))))


# ---- files, as bytes


def pack_files(folder: Path, names: list[str]) -> bytes:
    """A tar of these files of a folder; one that vanishes meanwhile is left out."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                archive.add(folder / name, arcname=name, recursive=False)
    return buffer.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """The files of a tar into a folder, each replaced in one step."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for entry in archive:
            target = folder / entry.name
            if not entry.isfile() or not target.resolve().is_relative_to(folder.resolve()):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.arriving.tmp")
            partial.write_bytes(archive.extractfile(entry).read())
            partial.replace(target)


def list_files(folder: Path) -> dict[str, tuple]:
    """{name: (size, time)} of a folder's files, those last that say that others are whole; half-written ones are left
    out."""
    files = {}
    for path in sorted(folder.rglob("*"), key=lambda path: MARKERS.index(path.name) if path.name in MARKERS else -1):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.name.endswith((".tmp", ".partial", ".lock")):
                files[path.relative_to(folder).as_posix()] = (path.stat().st_size, path.stat().st_mtime_ns)
    return files


def code() -> bytes:
    """The working tree's code and what belongs to it, as this machine runs it."""
    tops = ("lib", "params", "tests", ".cache/mt_bench")  # MT-Bench's questions, which members answer
    files = [f"{top}/{name}" for top in tops for name in list_files(ROOT / top)] + [".cache/judge_prompts.jsonl"]
    return pack_files(ROOT, [name for name in files if not name.endswith(".pyc")])


# ---- on a node


def on_node(request: dict, code: bytes, inputs: bytes, sent: bytes) -> Iterator[dict]:
    """Run request["target"] in a process of its own; yields {"log", "files", "gone"} as they change, at last {"code"}.

    Ray takes this function along by value: it needs nothing of `lib` on the node.
    """
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="study-node-", ignore_cleanup_errors=True))
        scratch, record = Path(scratch), Path(scratch, "record")
        for content, name in ((code, "code"), (inputs, "inputs"), (sent, "record")):
            (scratch / name).mkdir()
            unpack(content, scratch / name)
        argument = {**request["argument"], "folder": str(record), "inputs": str(scratch / "inputs")}
        argument |= {"final": str(scratch / "final")} if "final" in argument else {}
        (scratch / "request.json").write_text(json.dumps({"target": request["target"], "argument": argument}))
        environment = {name: value for name, value in os.environ.items() if name not in OURS}
        environment |= {"PYTHONPATH": str(scratch / "code"), "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
        environment |= {"OMP_NUM_THREADS": str(request["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {} if request["gpus"] else {"CUDA_VISIBLE_DEVICES": ""}  # Ray hides none from who asks for none
        command = [sys.executable, "-m", "lib.run.cluster", str(scratch / "request.json")]
        log = stack.enter_context(open(scratch / "log", "wb"))
        own = {"env": environment, "cwd": scratch / "code", "start_new_session": True}
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **own)
        stack.callback(lambda: child.poll() is None and os.killpg(child.pid, signal.SIGKILL))
        known, position, ended = list_files(record), 0, None
        while ended is None:
            ended = child.poll()  # before the look: what was written until then is sent
            place = scratch / "final" if (scratch / "final").is_dir() else record  # where `prepare` has put its result
            now, text = list_files(place), (scratch / "log").read_bytes()[position:]
            changed, gone = [n for n in now if now[n] != known.get(n)], [n for n in known if n not in now]
            if changed or gone or text:
                yield {"log": text.decode(errors="replace"), "files": pack_files(place, changed), "gone": gone}
            known, position = now, position + len(text)
            if ended is None:
                time.sleep(EVERY)
        yield {"code": ended}


# ---- the client, in a slot of the local pool


def run(argument: dict) -> None:
    """In place of argument["target"]: have a node do it. Ends as it ended there."""
    ray = connect(os.environ["STUDY_CLUSTER"])
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    inner, folder = argument["argument"], Path(argument["folder"])
    trains = "spec" in inner
    compute = (inner["spec"] if trains else inner)["config"]["compute"]
    request = {"target": argument["target"], "argument": inner, "threads": argument["threads"], "gpus": compute["gpus"]}
    gpus = compute["gpus"] if trains else min(1, compute["gpus"])
    takes = {"num_cpus": argument["slots"] * argument["threads"], "num_gpus": gpus, "max_retries": 0}
    task = ray.remote(on_node).options(num_returns="streaming", scheduling_strategy="SPREAD", **takes)
    inputs = Path(inner.get("inputs", folder))
    shared = ray.put(pack_files(inputs, list(list_files(inputs)) if "inputs" in inner else []))
    source = ray.put(code())
    lost = ("WorkerCrashedError", "NodeDiedError", "ObjectLostError", "LocalRayletDiedError", "OutOfMemoryError")
    lost = tuple(getattr(ray.exceptions, name) for name in lost)
    for attempt in range(1, ATTEMPTS + 1):
        # only a member's own record is sent along; a measurement's folder is its run's, with all members in it
        names = [name for name in list_files(folder) if name != "train.log"] if trains else []
        try:
            ended = gather(map(ray.get, task.remote(request, source, shared, pack_files(folder, names))), folder)
            gone = f"killed by signal {-ended} on its node" if ended < 0 else ""
        except lost as error:
            gone = f"{type(error).__name__}: the node or its worker was lost"
        if not gone:
            if ended == 0 and "final" in inner:  # `prepare` gives its folder its final name when it is whole
                shutil.rmtree(inner["final"], ignore_errors=True)
                folder.rename(inner["final"])
            sys.exit(ended)
        print(f"attempt {attempt}: {gone}; sent again, from the last checkpoint", flush=True)
    what, fix = f"lost {ATTEMPTS} times on the cluster", "look at .venv/bin/ray status, then rerun the same command"
    raise StudyError(f"{argument['target']} for {folder.name}", what, "a node that keeps it", fix)


def gather(parts: Iterator[dict], folder: Path) -> int:
    """Write what a node sends into the local folder; the exit code it ended with."""
    for part in parts:
        if "code" in part:
            return part["code"]
        print(part["log"], end="", flush=True)
        unpack(part["files"], folder)
        for name in part["gone"]:
            (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                (folder / name).parent.rmdir()  # an emptied checkpoint
    raise StudyError("--cluster", "a node ended its work without a word", "an exit code")


if __name__ == "__main__":  # the process on a node
    end_with_parent()
    work = json.loads(Path(sys.argv[1]).read_text())
    pkgutil.resolve_name(work["target"])(work["argument"])
