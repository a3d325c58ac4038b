"""What somebody else's YAML, data or environment can do: be refused with one clear error, and never act or leak."""

import os
import re

import pytest
import yaml

from lib import config, record
from lib.run import cli, plan, runner
from tests.chaos import lives
from tests.conftest import TINY


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command line on one YAML: (exit code, what it said). Nothing may be started, and nothing written."""
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path / "outputs")
    folder = tmp_path / "params" / "td_dpo" / "laptop"
    folder.mkdir(parents=True)

    def run(content: bytes | dict | None = None, *arguments: str):
        if content is not None:
            (folder / "tiny.yaml").write_bytes(
                content if isinstance(content, bytes) else yaml.safe_dump(content).encode()
            )
        before = sorted(tmp_path.rglob("*"))
        code = cli.main(["full", "--scale", "laptop", "--params", str(tmp_path / "params"), *arguments])
        said = "".join(capsys.readouterr())
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        assert "Traceback" not in said
        return code, said

    run.folder = folder
    return run


BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
)


@pytest.mark.parametrize(("content", "reported"), [
    (BOMB, "or 20 aliases"),
    (b"a: &a [*a]\n", "a: unknown key"),
    (b"run_id: " + b"x" * (100 << 20), "more than 1,000,000 characters"),
    (b"[" * 100_000, "nested too deeply"),
    (b"run_id: caf\xe9\n", "is not UTF-8"),
    (b"run_id: !!python/object/apply:os.system ['touch /tmp/owned']\n", "no !!python is read"),
    (b"\xff\xfe\x00", "is not UTF-8"),
    ({**TINY, "run_id": "../outside"}, "run_id"),
    ({**TINY, "run_id": "/tmp/outside"}, "run_id"),
    ({**TINY, "run_id": ".."}, "run_id"),
    ({**TINY, "run_id": "a/b"}, "run_id"),
    ({**TINY, "results_dir": "/tmp/outside"}, "results_dir"),
    ({**TINY, "dataset": {**TINY["dataset"], "name": "../../no/such.jsonl"}}, "does not exist"),
    ({**TINY, "study": "../td_dpo"}, "study"),
], ids=lambda v: v[:30] if isinstance(v, str) else "")  # fmt: skip
def test_a_hostile_yaml_is_one_clear_error_before_anything_starts(command, content, reported):
    code, said = command(content)
    assert code == 2
    assert reported in said
    assert "nothing was started" in said
    assert len(said) < 3000, "an error a person can read"


def test_a_yaml_that_is_a_link_to_itself(command):
    (command.folder / "tiny.yaml").symlink_to("tiny.yaml")
    code, said = command()
    assert code == 2
    assert "symbolic links" in said


def test_data_that_is_a_link_to_itself_or_not_text(command, tmp_path):
    loop, latin = tmp_path / "loop.jsonl", tmp_path / "latin.jsonl"
    loop.symlink_to("loop.jsonl")
    latin.write_bytes(b'{"prompt": "a", "chosen": "b"}\n{"prompt": "caf\xe9", "chosen": "b", "rejected": "c"}\n')
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.csv").write_bytes(b"chosen,rejected\n" + "é".encode() * 600_000 + b"\xe9\n")
    (folder / "itself").symlink_to(folder)
    for path, reported in (
        (loop, "does not exist"),
        (latin, "can't decode byte 0xe9"),
        (folder, "can't decode byte 0xe9"),
    ):
        code, said = command({**TINY, "dataset": {**TINY["dataset"], "name": str(path)}})
        assert (code, reported in said) == (2, True), said


def test_names_of_cells_cannot_leave_their_folder(tiny):
    for name in ("../../x", "/tmp/x", "..", "a/../b", "\x1b[2Jx"):
        assert re.fullmatch(r"name[\w.+]+", config.cell_members(tiny(), {"dataset.name": name}, [1])[0].cell_name)


def test_what_acts_on_a_terminal_is_written_out(command, tmp_path):
    """Through a value, a file's name and an exception."""
    code, said = command({**TINY, "dataset": {**TINY["dataset"], "name": "./\x1b]0;owned\x07\x1b[2J.jsonl"}})
    assert (code, "\x1b" in said, "\x07" in said) == (2, False, False)
    assert "\\x1b[2J" in said
    (command.folder / "tiny.yaml").rename(command.folder / "\x1b[2Jtiny.yaml")
    code, said = command(None, "--set", "no.such=\x1b[2J")
    assert (code, "\x1b" in said) == (2, False)
    parameters = {"mode": "full", "scale": "laptop"}
    step = plan.Step("train", "td_dpo", "x", tmp_path, tmp_path / "run", parameters, "key", "never run")
    reported = runner.explain(step, ValueError("text of a data set: \x1b[31mred\x9b2J\r"))
    written = reported["exception"] + (tmp_path / "run/attempts/error.log").read_text()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", written)


@pytest.mark.slow
def test_no_planted_key_in_any_file_of_a_run_and_its_mirror(tmp_path, monkeypatch):
    """The keys are in the environment and in the message of an error that strikes a member; W&B's offline files
    count."""
    planted = {
        "OPENAI_API_KEY": "sk-planted-0123456789",
        "PGPASSWORD": "planted pass/word",
        "HF_TOKEN": "hf_planted012345",
        # fmt: skip
        "DATABASE_URL": "postgres://me:planted%40url@db/x",
        "SLACK_WEBHOOK": "https://hooks.x/planted/T0/B",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CHAOS_WORDS", "; ".join([*planted.values(), "planted@url"]))
    study = lives.Study(tmp_path / "study", {**lives.STUDY, "wandb": {"mode": "offline", "project": "p"}})
    fault = {
        "id": "f1",
        "role": "member",
        "event": "os.rename",
        "n": 1,
        "do": "errno:5",
        "path": f"{lives.RUN}/members/default-s2/predictions.jsonl",
    }
    assert study.live([fault]) == 1
    assert study.live([]) == 0
    assert (study.run / "members/default-s2/history.jsonl").exists()
    assert list(study.run.rglob("*.wandb")), "W&B's offline files are among those looked at"
    secrets = [*planted.values(), "planted@url", "planted%40url"]
    looked = 0
    for path in study.home.rglob("*"):
        if path.is_file():
            looked += 1
            found = [s for s in secrets if s.encode() in path.read_bytes()]
            assert not found, f"{path}: {found}"
    assert looked > 50
    assert "[OPENAI_API_KEY]" in record.read_json(study.run / "attempts/run.1.failed.ipynb", {}).__repr__()
    assert os.environ["OPENAI_API_KEY"] == "sk-planted-0123456789"
