"""Behind config.py: the types of a run YAML, its values by name, its grid, its checks and their words."""
