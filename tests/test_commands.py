"""Every command that a page or a message names can be typed: it parses and, with its options, selects and validates
what it says. `./run_all.sh test -m slow tests/test_commands.py` executes those that train, as trials."""

import argparse
import ast
import json
import random
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest

from lib.run import cli, compose, judge_table
from tests.conftest import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "lib/run/README.md", "tests/chaos/README.md")]
PAGES += sorted((ROOT / "notebooks").glob("*/*.md")) + [ROOT / "benchmarks" / "README.md", ROOT / "docs" / "log.md"]
CODE = sorted((ROOT / "lib").rglob("*.py"))
START = "./run_all.sh"
STANDS_FOR = {  # what is put into a message when it is shown, by the last name in its code
    "scale": "laptop", "mode": "full", "study": "td_dpo", "only": " --run dpo", "run": " --set loss.beta=0.2",
    "minutes": "5", "argv": "plan", "path": "params/td_dpo/design.yaml",
}  # fmt: skip


# ---- what is written


def written_in(page: Path) -> list[str]:
    """The commands of a page: lines of its code blocks, without what is said of them, and what stands in backquotes.
    What is in brackets may be left out; `a | b` are two."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(rf"^ *({re.escape(START)}.*|\.venv/bin/.*)$", text, re.MULTILINE)
    said = [re.split(r"  +(?=[^ -])|  *#", line)[0] for line in lines]
    said += [" ".join(inline.split()) for inline in re.findall(rf"`({re.escape(START)}[^`]*|\.venv/bin/[^`]*)`", text)]
    found = []
    for command in said:
        for one in command.replace("[", "").replace("]", "").split(" | "):
            found.append(one if one.startswith((START, ".venv")) else f"{START} {one}")
    return found


def said_by(path: Path) -> list[str]:
    """The commands in a module's texts, its docstrings aside; values that are put into them stand for one of theirs."""
    tree = ast.parse(path.read_text())
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    apart = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr | ast.keyword)}
    texts, inside = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= set(map(id, node.values))
            texts.append("".join(_shown(part, constants) for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (apart | inside):
            texts.append(node.value)
    found = [f"{START}{rest}" for text in texts for rest in text.split(START)[1:]]
    return [re.split(r"[,;()\n]| and | or ", command)[0].strip() for command in found if command != START]


def _shown(part: ast.AST, constants: dict) -> str:
    if isinstance(part, ast.Constant):
        return part.value
    known = {**STANDS_FOR, **{name: value for name, value in constants.items() if isinstance(value, str)}}
    named = [getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(part)]
    return next((known[name] for name in named if name in known), "X")


class Parsed(Exception):
    pass


def parse(command: str):
    """The options of a command, None of one that passes them on; SystemExit where it cannot be typed."""
    words = shlex.split(command)[1:]
    if words[:1] in (["lab"], ["test"]):
        return None
    if words[:1] in (["compose"], ["judge-table"]):  # which have a parser of their own: no further than that

        def stop(self, given):
            raise Parsed(parse_args(self, given))

        parse_args = argparse.ArgumentParser.parse_args
        with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(Parsed):
            {"compose": compose, "judge-table": judge_table}[words[0]].main(words[1:])
        return None
    return cli.parser().parse_args(words)


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.relative_to(ROOT / "lib").as_posix())
def test_a_command_in_a_message_can_be_typed(path):
    for command in said_by(path):
        parse(command)


def test_the_commands_of_messages_are_found():
    """What the test above reads: few enough to be looked at when one is added."""
    found = sorted({command for path in CODE for command in said_by(path)})
    assert "./run_all.sh fetch --scale small" in found
    assert "./run_all.sh full --scale laptop --study td_dpo --run dpo --set loss.beta=0.2" in found
    assert len(found) > 15, found


@pytest.mark.parametrize(
    "wrong", ["./run_all.sh run again", "./run_all.sh sync where its records are", "./run_all.sh plna"]
)
def test_what_cannot_be_typed_is_noticed(wrong, tmp_path):
    (tmp_path / "a.py").write_text(f'"""Doc: ./run_all.sh no matter."""\nfix = f"{{1}}: {wrong}, or not"\n')
    (command,) = said_by(tmp_path / "a.py")
    assert command == wrong
    with pytest.raises(SystemExit):
        parse(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_command_of_a_page_can_be_typed(page):
    for command in written_in(page):
        if command.startswith(START):
            parse(command)
        else:
            name = command.split()[0].removeprefix(".venv/bin/")
            assert name in ("python", "pip", "pre-commit", "wandb", "ray", "hf", "ruff", "basedpyright"), command
            if name == "python":
                module = re.search(r"-m (\S+)", command)[1].replace(".", "/")
                assert list(ROOT.glob(f"{module}*")), command


# ---- what they do, executed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which a page's placeholders are files."""
    folder = tmp_path_factory.mktemp("typed")
    rows = [f"{method},{seed},{5 + (method == 'A') + seed / 9:.2f}" for method in "AB" for seed in range(5)]
    (folder / "scores.csv").write_text("\n".join(["method,seed,score", *rows]))
    (folder / "claims.yaml").write_text("claims: [{id: C1, treatment: A, baseline: B, gain: 1.0}]")
    rng, words = random.Random(0), ["one", "two", "three", "four", "five", "six"]
    pairs = [
        {"prompt": " ".join(rng.choices(words, k=6)), "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for name in ("rte", "sst2", "mnli"):
        texts = (
            ("sentence",)
            if name == "sst2"
            else ("premise", "hypothesis")
            if name == "mnli"
            else ("sentence1", "sentence2")
        )
        (folder / "glue" / name).mkdir(parents=True)
        for split in ("train", "validation"):
            rows = [dict.fromkeys(texts, " ".join(rng.choices(words, k=6))) | {"label": i % 2} for i in range(60)]
            (folder / "glue" / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "problems").mkdir()
    for split in ("train", "test"):
        rows = [
            {"question": f"What is {i} and {j}?", "answer": f"{i} + {j}\n#### {i + j}"}
            for i in range(9)
            for j in range(9)
        ]
        (folder / "problems" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def filled(command: str, place: Path) -> list[str]:
    """Its words, with files in the place of placeholders and the smallest study where S stands for any."""
    folder = place / ("problems" if "graff" in command else "glue")
    named = {"path/to/pairs": place / "pairs.jsonl", "FOLDER": folder, "scores.csv": place / "scores.csv"}
    named |= {"claims.yaml": place / "claims.yaml", "verdicts.json": place / "v.json", "claims.png": place / "c.png"}
    words = shlex.split(command)[1:]
    return [
        re.sub("|".join(map(re.escape, named)), lambda m: str(named[m[0]]), word) if word != "S" else "iw_lora"
        for word in words
    ]


COMMANDS = sorted({command for page in PAGES for command in written_in(page) if command.startswith(START)})
CHOOSES = ("--study", "--run", "--set", "--claims")  # without any of them, what other tests load
TRAIN = [c for c in COMMANDS if (shlex.split(c)[1:2] or ["full"])[0] in ("full", "trial", "decide", "check")]


@pytest.mark.parametrize("command", [command for command in TRAIN if any(option in command for option in CHOOSES)])
def test_a_command_that_trains_selects_and_validates_what_it_says(command, place, tmp_path, monkeypatch, capsys):
    """Planned instead of executed. What this machine lacks (a GPU, the hub) is no fault of the command."""
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path)
    words = filled(command, place)
    if "ipo" in words:
        pytest.skip("a run that the reader writes: tests/test_compose.py")
    options = parse(shlex.join([START, *words]))
    scale = options.scale or ("paper" if options.command == "full" else "laptop")
    options.scale, options.mode = scale, "full"
    loaded = cli.select_runs(options)
    assert loaded
    assert [finding for _, _, findings in loaded for finding in findings if finding.level == "error"] == []


QUICK = [c for c in COMMANDS if shlex.split(c)[1:2] in (["status"], ["report"], ["judge-table"])]


@pytest.mark.parametrize("command", QUICK)
def test_a_command_that_trains_nothing_ends_well(command, place, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path)
    assert cli.main(filled(command, place)) == 0


def as_trial(words: list[str]) -> list[str]:
    """The command's trial, of the same runs with the same settings: several commands have the same."""
    options = parse(shlex.join([START, *words]))
    chosen = [word for study in options.study or [] for word in ("--study", study)]
    chosen += [word for run in options.run or [] for word in ("--run", run)]
    chosen += [word for text in options.sets for word in ("--set", text)]
    scale = options.scale or ("paper" if options.command == "full" else "laptop")
    return (["check", "--static"] if options.command == "check" else ["trial", "--scale", scale]) + chosen


# a run `ipo` is one that the reader writes: tests/test_compose.py
TRIALS = {shlex.join(as_trial(shlex.split(c)[1:])): c for c in TRAIN if "--scale small" not in c and "ipo" not in c}


@pytest.mark.slow
@pytest.mark.parametrize("command", TRIALS.values(), ids=TRIALS.keys())
def test_a_command_that_trains_runs_as_a_trial(command, place, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path)
    assert cli.main(as_trial(filled(command, place))) == 0


# ---- their size


def test_the_readme_and_contributing_are_short():
    for name, most in {"README.md": 120, "CONTRIBUTING.md": 75, "CHANGELOG.md": 60}.items():
        lines = (ROOT / name).read_text().splitlines()
        assert len(lines) < most, name
        assert [line for line in lines if len(line) >= 128 and not line.startswith(("|", "    "))] == [], name
