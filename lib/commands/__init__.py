"""What ./run_all.sh does besides running: show, check, compose, judge, sync and pull, lab."""
