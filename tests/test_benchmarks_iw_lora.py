"""The benchmark runs, at its smallest: what it measures is for the README, not for a test."""

from benchmarks import iw_lora


def test_the_benchmark_prints_every_row(capsys):
    iw_lora.main(["--small", "--rounds", "2", "--batch", "2", "--tokens", "16", "--delta-t", "1"])
    said = capsys.readouterr().out
    for row in (
        "| LoRA |",
        "| IW-LoRA |",
        "| AdaLoRA |",
        "| penalty alone |",
        "| calibration pass |",
        "| proposed-mnli_iw_lora | 150 |",
    ):
        assert row in said
