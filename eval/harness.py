"""The command line of lm-evaluation-harness with the model `titans` known to it.

python -m eval.harness run --model titans --model_args pretrained=BASE,adapter=DIR --tasks TASKS
"""

from __future__ import annotations

import sys
from importlib import import_module

from titans_ds.program import program

from .harness_model import titans_lm


@program("run the same command again")
def main(arguments: list[str]) -> None:
    """Register the model, then hand over to the harness, which reads the command line itself."""
    titans_lm()
    sys.argv[1:] = arguments
    import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
