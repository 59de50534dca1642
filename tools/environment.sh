# Sourced by tools/demo and tools/test: goes to the project's root and makes .venv with fly-trt and the extra $1.
# Set PYTHON to use another interpreter than python3.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "$("$python" --version 2>&1): fly-trt needs Python 3.11 or newer: set PYTHON=/path/to/python3" >&2
  exit 2
fi
if [ ! -x .venv/bin/python ]; then
  echo "Making .venv"
  "$python" -m venv .venv
fi
# torch first and pinned: what depends on it must not pull another build of it.
echo "Installing fly-trt[$1] (a few minutes the first time)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
