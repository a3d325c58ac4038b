"""What ./run_all.sh does besides running: check, compose, judge."""
