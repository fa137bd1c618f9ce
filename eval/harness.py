"""The command line of lm-evaluation-harness with the model `titans` known to it.

python -m eval.harness run --model titans --model_args pretrained=BASE,adapter=DIR --tasks TASKS
"""

from __future__ import annotations

import sys

from titans_ds.errors import TitansError


def main() -> int:
    """Register the model, then hand over to the harness."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from . import harness_model  # noqa: F401  (registers the class)

        cli_evaluate()
    except TitansError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
