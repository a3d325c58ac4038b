#!/usr/bin/env bash
# One way in: makes the environment on first use, then hands over to `python -m lib` (see lib/run/cli.py). Bash 3.2 is enough.
set -eu
root="$(cd "$(dirname "$0")" && pwd)"

venv="${STUDY_VENV:-$root/.venv}"
extra=""; if [ "${1:-}" = test ]; then extra=test; fi  # what only tests need comes with the first `test`
stamp="$venv/.installed${extra:+-$extra}"
wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"

find_python() {  # the first of these commands that is Python 3.11 or newer
  for candidate in "$@"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$candidate"; return; fi
  done
  return 1
}

if [ ! -x "$venv/bin/python" ] || [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  # A venv without pip is one that was not made to its end, or whose Python has gone.
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if [ -n "${PYTHON:-}" ]; then python="$(find_python "$PYTHON" || true)"
    else python="$(find_python python3.13 python3.12 python3.11 python3 || true)"; fi
    if [ -z "$python" ]; then
      echo "Python: found ${PYTHON:-none on PATH}; expected version 3.11 or newer;" \
        "install one, or name it: PYTHON=/path/to/python3.11 ./run_all.sh" >&2
      exit 3
    fi
    clear=""; if [ -f "$venv/pyvenv.cfg" ] && ! "$venv/bin/python" -c "" 2>/dev/null; then clear=--clear; fi
    "$python" -m venv $clear "$venv" || {
      echo "creating $venv failed (on Debian and Ubuntu: apt install python3-venv); rerun the same command to resume" >&2
      exit 3
    }
  fi
  "$venv/bin/python" "$root/lib/run/install.py" $extra || {
    echo "installing the packages failed (see above; a wrong hash is mostly a download that was cut off);" \
      "rerun the same command to resume, or with STUDY_INSTALLER=pip" >&2
    exit 3
  }
  echo "$wanted" > "$venv/.installed"
  echo "$wanted" > "$stamp"
fi

# -P: a folder named lib where you stand must not be taken for this one. PYTHONPATH: nor may that of the checkout which
# the environment was made for, where this one was moved or copied, or has another's STUDY_VENV.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$venv/bin/python" -P -m lib "$@"
