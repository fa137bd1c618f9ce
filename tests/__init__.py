"""Tests of titans-ds."""

import os
from pathlib import Path

# Triton's kernels run in its interpreter where there is no GPU. It has to be known before Triton is imported.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
