"""Behind runner.py: what is to be done and why (plan, keys), whether it can be (ready, preflight), what it takes
(forecast)."""
