"""Behind claims.py: what claims may say, the scores they compare, each comparison measured, and its power."""
