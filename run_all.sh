#!/usr/bin/env bash
# One way in: makes the environment on first use, then hands over to `python -m lib` (see lib/run/cli.py). Bash 3.2 is enough.
set -eu
root="$(cd "$(dirname "$0")" && pwd)"

venv="${STUDY_VENV:-$root/.venv}"
stamp="$venv/.installed"
wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"

if [ ! -x "$venv/bin/python" ] || [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  python=""
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$candidate"; break; fi
  done
  if [ -z "$python" ]; then
    echo "Python: none of version 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.11 ./run_all.sh" >&2
    exit 3
  fi
  echo "creating the environment in $venv (once; a minute or two)"
  # A venv without pip is one that was not made to its end.
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv" \
    || { echo "creating $venv failed (on Debian and Ubuntu: apt install python3-venv); rerun the same command to resume" >&2; exit 3; }
  # torch first and alone: a range in another package must not choose a different build.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" torch \
    && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root[test]" \
    || { echo "installing the packages failed (see above); rerun the same command to resume" >&2; exit 3; }
  echo "$wanted" > "$stamp"
fi

# -P: a folder named lib where you stand must not be taken for this one.
exec "$venv/bin/python" -P -m lib "$@"
