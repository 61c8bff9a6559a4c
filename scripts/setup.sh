#!/usr/bin/env bash
# Makes .venv beside the code and installs kvstream into it; returns at once when that is already done.
#
#   KVSTREAM_PYTHON           the Python to build .venv with (default: the first 3.11 or newer found)
#   KVSTREAM_TORCH_INDEX_URL  a package index to take torch from, such as PyTorch's CPU index
#   KVSTREAM_EXTRAS           extras to install (default: dev; on a GPU machine: dev,gpu)
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
VENV="$ROOT/.venv"
STAMP="$VENV/.kvstream-installed"
EXTRAS="${KVSTREAM_EXTRAS:-dev}"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 2; }

usable_python() {   # 3.11 or newer, 64 bit, with the parts that make a virtual environment
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (sys.version_info >= (3, 11) and sys.maxsize > 2**32))' \
    >/dev/null 2>&1
}

find_python() {
  if [ -n "${KVSTREAM_PYTHON:-}" ]; then
    usable_python "$KVSTREAM_PYTHON" || die "KVSTREAM_PYTHON=$KVSTREAM_PYTHON is not a working Python 3.11 or newer with venv"
    echo "$KVSTREAM_PYTHON"; return
  fi
  local candidate
  for candidate in python3 python3.12 python3.13 python3.11 python3.14 python; do
    if command -v "$candidate" >/dev/null 2>&1 && usable_python "$candidate"; then
      command -v "$candidate"; return
    fi
  done
  die "no Python 3.11 or newer with the venv module was found. Install one (Debian and Ubuntu: apt install python3 python3-venv) or set KVSTREAM_PYTHON to its path"
}

pip_install() {     # what is large or final is shown, the rest goes to the log
  local log="$VENV/.kvstream-pip.log"
  "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" 2>&1 \
    | tee "$log" \
    | awk '/^ *Downloading .*\([0-9.]+ MB\)/ { size = $NF=="MB)" ? $(NF-1) : ""; gsub(/\(/, "", size);
             if (size + 0 >= 20) { n = split($2, p, "/"); print "setup:   downloading " p[n] " (" size " MB)"; fflush() } }
           /^Installing collected packages/ { print "setup:   unpacking " NF - 3 " packages"; fflush() }
           /^(ERROR|error|WARNING: Retrying)/ { print "setup:   " $0; fflush() }' >&2 \
    || die "pip failed. Its last lines: $(printf '\n'; tail -n 12 "$log")
  Check the network and the free disk space, then run the same command again."
}

fingerprint() {
  { cat pyproject.toml; echo "$EXTRAS $ROOT"; "$VENV/bin/python" -VV; } | sha256sum | cut -d' ' -f1
}

[ "$(uname -s)" = Linux ] || die "kvstream runs on Linux; this is $(uname -s)"
if [ -x "$VENV/bin/python" ] && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; then
  exit 0
fi

# One set-up at a time; a second one waits and then finds the work done.
if command -v flock >/dev/null 2>&1; then
  exec 9>"$ROOT/.venv.lock"
  flock 9
  if [ -x "$VENV/bin/python" ] && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; then
    exit 0
  fi
fi

if [ ! -x "$VENV/bin/python" ] || ! usable_python "$VENV/bin/python"; then
  PYTHON="$(find_python)"
  say "making .venv with $("$PYTHON" -V)"
  if [ -e "$VENV" ]; then
    [ -f "$VENV/pyvenv.cfg" ] || die "$VENV exists and is no virtual environment; move it away"
    rm -rf "$VENV"      # broken, or of an older Python
  fi
  "$PYTHON" -m venv "$VENV" || die "could not make a virtual environment in $VENV (Debian and Ubuntu: apt install python3-venv)"
fi

# torch by itself, before the rest: the build that suits the machine (CPU or CUDA) is then settled,
# and the resolver below only sees a requirement that is already met.
TORCH="$(sed -n 's/^ *"\(torch>=[^"]*\)".*/\1/p' pyproject.toml | head -n 1)"
[ -n "$TORCH" ] || die "pyproject.toml names no torch version"
say "installing $TORCH"
if [ -n "${KVSTREAM_TORCH_INDEX_URL:-}" ]; then
  pip_install --index-url "$KVSTREAM_TORCH_INDEX_URL" "$TORCH"
else
  pip_install "$TORCH"
fi
say "installing kvstream and its dependencies"
pip_install -e ".[$EXTRAS]"

fingerprint > "$STAMP"
say "done"
