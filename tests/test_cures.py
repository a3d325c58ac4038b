"""What is said where a person mistypes: the nearest thing there is, and a cure that can be typed."""

import pytest

from lib import config, record
from lib.errors import MissingError, StudyError
from lib.run import cli, progress


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["paln"], "found 'paln'; did you mean plan?"),
        (["statsu"], "did you mean status?"),
        (["xyzzy"], "expected one of full, trial, plan"),
        (["plan", "--scale", "lptop"], "did you mean laptop?"),
        # options that the command does not read
        (["full", "--scale", "small", "--dry-run"], "--dry-run is for judge"),
        (["trial", "--mode", "full"], "--mode is for plan and status"),
        (["full", "--model", "gpt2"], "--model is for judge"),
        (["plan", "--gain", "0.3"], "--gain is for try"),
        (["plan", "idea.py"], "idea is for try"),
        (["status", "--site", "DIR"], "--site is for report"),
    ],
)
def test_a_mistyped_command_is_answered_with_the_nearest_or_what_an_option_is_for(capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--study", "td_dpo", "--run", "dpoo"], "did you mean dpo?"),
        (["--study", "td_dpo", "--run", "dpo", "--run", "discopop_crad"], "did you mean discopop_card?"),
        (["--study", "td_dpo", "--run", "zzz*"], "./run_all.sh plan --scale laptop"),
        (["--study", "td_dpoo"], "did you mean td_dpo?"),
        (["--study", "iw_lora", "--claims", "C1,C1O"], "did you mean C1"),
    ],
)
def test_a_mistyped_choice_is_answered_with_the_nearest(capsys, words, said):
    assert cli.main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("about: DPO: the baseline\n", "quote a text that holds a colon"),
        ("run_id: a\nbeta:0.1\nx: 1\n", "write a space after the colon"),
        ("loss:\n\tbeta: 0.1\n", "indent with spaces"),
        ("a: !!python/name:os.system\n", "no !!python is read"),
        ("a: [1, 2\n", "correct it"),
    ],
)
def test_a_slip_in_yaml_is_answered_with_what_to_do(text, said):
    with pytest.raises(StudyError) as refused:
        config.parse_yaml(text, "a.yaml")
    assert said in refused.value.fix
    assert ("!!python" in refused.value.fix) == ("!!python" in text)


def test_a_folder_that_cannot_be_made_is_answered_with_one_that_is_there(tmp_path, monkeypatch):
    root = tmp_path / "a b" / "outputs" / "laptop-full"
    root.parents[1].mkdir()
    monkeypatch.setattr(type(root), "mkdir", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(MissingError) as refused, progress.lock(root):
        pass
    assert refused.value.fix.startswith(f"chmod -R u+w '{tmp_path}/a b', or --results-dir")


def test_status_shows_trials_where_there_is_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path)
    assert cli.main(["status"]) == 0
    assert "nothing has run in" in capsys.readouterr().out
    state = {"study": "td_dpo", "run_id": "dpo", "status": "succeeded", "minutes": 0.5}
    for name in ("laptop-trial", "laptop-trial,loss.beta=0.2"):
        record.write_json(tmp_path / name / "td_dpo" / "dpo" / "status.json", state)
    assert cli.main(["status"]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.endswith(":")] == [
        "laptop-trial:",
        "laptop-trial,loss.beta=0.2:",
    ]
    assert shown.count("1 succeeded") == 2
    record.write_json(tmp_path / "laptop-full" / "td_dpo" / "dpo" / "status.json", state)
    assert cli.main(["status"]) == 0
    assert "trial" not in capsys.readouterr().out
    with progress.lock(tmp_path / "laptop-try,mine-1"):
        assert cli.main(["status"]) == 0
    assert capsys.readouterr().out.startswith("laptop-try,mine-1:\na runner has just started"), "where one is at work"
