"""The command line of lm-evaluation-harness with the model `titans` known to it.

python -m eval.harness run --model titans --model_args pretrained=BASE,adapter=DIR --tasks TASKS
"""

from __future__ import annotations

import sys
from importlib import import_module

from titans_ds.errors import TitansError

from .harness_model import titans_lm


def main() -> int:
    """Register the model, then hand over to the harness."""
    try:
        titans_lm()
        import_module("lm_eval.__main__").cli_evaluate()
    except TitansError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
