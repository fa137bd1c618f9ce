#!/usr/bin/env bash
# Make or complete the virtual environment of this checkout. Called by `make setup`; safe to repeat.
#   requirements/install.sh VENV PYTHON TORCH
# VENV    folder of the environment; one that exists is completed, never made anew
# PYTHON  interpreter that makes it (3.11 or newer: the pinned versions need it)
# TORCH   auto    torch of $TORCH_VERSION: the CPU build, or the default build where there is a CUDA GPU;
#                 with a GPU and a torch already in PYTHON, that torch is kept
#         system  keep PYTHON's own torch (the environment then sees PYTHON's packages)
#         other   anything pip installs, for example torch==2.11.0 or a wheel's path
set -euo pipefail
cd "$(dirname "$0")/.."
readonly VENV=$1 PYTHON=$2
TORCH=$3
readonly TORCH_VERSION=2.13.0
readonly TRITON_VERSION=3.7.1 # beside a CPU build, for the kernels' tests; a torch for CUDA brings the Triton made for it
readonly PINS=requirements/ci.txt

say() { echo "setup: $*"; }
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }
torch_of() { "$1" -c 'import torch; print(torch.__version__)' 2>/dev/null; }
# --no-compile: bytecode is written at the first import, and only for what is imported (saves half a minute here).
pip_install() { "$VENV/bin/python" -m pip install -qq --no-compile --disable-pip-version-check "$@"; }

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup: $PYTHON is missing or older than Python 3.11, which the pinned versions need." \
        "Give another one: make setup PYTHON=python3.12" >&2
    exit 2
fi

if [ "$TORCH" = auto ] && has_gpu && torch_of "$PYTHON" >/dev/null; then
    TORCH=system
fi

if [ ! -x "$VENV/bin/python" ]; then
    say "new environment in $VENV ($("$PYTHON" --version))"
    site=()
    [ "$TORCH" = system ] && site=(--system-site-packages)
    "$PYTHON" -m venv ${site[@]+"${site[@]}"} "$VENV"
fi

install_torch() { # before all else: with no torch present, a version range elsewhere pulls gigabytes of CUDA libraries
    if [ "$TORCH" != auto ]; then
        pip_install -c "$PINS" "$TORCH"
    elif has_gpu; then
        pip_install -c "$PINS" "torch==$TORCH_VERSION"
    else # a local wheel or index first, then PyTorch's own index of CPU builds, then the default build (macOS, Arm)
        pip_install -c "$PINS" "torch==$TORCH_VERSION+cpu" 2>/dev/null ||
            pip_install -c "$PINS" "torch==$TORCH_VERSION" --extra-index-url https://download.pytorch.org/whl/cpu
    fi
}

if version=$(torch_of "$VENV/bin/python"); then
    say "keeping torch $version"
elif [ "$TORCH" = system ]; then
    echo "setup: TORCH=system, but $PYTHON has no torch to keep. Install one there, or leave TORCH out." >&2
    exit 2
else
    say "torch"
    install_torch
fi
has_cuda() { "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; }
if [ "$(uname -s)" = Linux ] && ! has_cuda; then
    say "triton, for its interpreter"
    pip_install --no-deps "triton==$TRITON_VERSION" || say "no Triton for this machine; the tests of its kernels are skipped"
fi
say "pinned packages ($PINS)"
pip_install --no-deps -r "$PINS"
say "titans-ds itself, editable"
pip_install --no-deps -e .
say "done: torch $(torch_of "$VENV/bin/python") in $VENV"
