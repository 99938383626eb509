# Sourced by launch/quickstart.sh and tests/run.sh: makes the environment once, then only looks.
#
#   prepare_environment ROOT "$@"
#
# Takes --python=PYTHON out of the arguments (default: python3). Sets PYTHON to the interpreter of the
# environment (ROOT/.venv, or ROOT/.venv-3.12 for --python=python3.12) and ARGUMENTS to the rest.
# Installs only when pyproject.toml, constraints.txt or the Python version changed.

_usable_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints the first of: the command itself; a pyenv version of that number; any Python >= 3.11.
_find_python() {
  local asked=$1 candidate
  for candidate in "$asked" "${PYENV_ROOT:-$HOME/.pyenv}/versions/${asked#python}"*/bin/python3; do
    if _usable_python "$candidate"; then echo "$candidate"; return; fi
  done
  if [ "$asked" = python3 ]; then
    for candidate in python3.13 python3.12 python3.11; do
      if _usable_python "$candidate"; then echo "$candidate"; return; fi
    done
  fi
  echo "$asked is not a Python 3.11 or newer" >&2
  echo "  fix: install one (Debian: apt install python3 python3-venv) or give --python=PATH" >&2
  return 2
}

prepare_environment() {
  local root=$1 base=python3 name=.venv argument wanted
  shift
  ARGUMENTS=()
  for argument in "$@"; do
    case $argument in
      --python=*) base=${argument#--python=} ;;
      *) ARGUMENTS+=("$argument") ;;
    esac
  done
  base=$(_find_python "$base") || return
  case "$*" in
    *--python=*) name=.venv-$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ;;
  esac
  local venv=$root/$name
  PYTHON=$venv/bin/python
  wanted=$("$base" - "$root" <<'HASH'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
files = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print("%d.%d.%d" % sys.version_info[:3], root, hashlib.sha256(b"".join(files)).hexdigest())
HASH
  ) || return
  if [ "$(cat "$venv/installed" 2>/dev/null)" = "$wanted" ] && [ -x "$PYTHON" ]; then
    return
  fi
  echo "preparing $venv (a few minutes and about 3 GB, once)"
  # Another Python version: what is in the environment is of no use to it.
  case "$(cat "$venv/installed" 2>/dev/null)" in
    "${wanted% *}"*) ;;
    *) if ! "$base" -m venv --clear "$venv"; then
         echo "  fix: on Debian, apt install python3-venv" >&2
         return 1
       fi ;;
  esac
  rm -f "$venv/installed"
  (cd "$root" && "$PYTHON" -m pip install --quiet --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".[seqio,dev]") || return
  echo "$wanted" > "$venv/installed"
}
