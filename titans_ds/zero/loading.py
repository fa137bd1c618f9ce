"""Loading a pretrained base under ZeRO-3, each rank keeping its share of every parameter only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from titans_ds.zero.config import zero_stage
from titans_ds.zero.engine import import_deepspeed


@contextlib.contextmanager
def partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    """Inside, `from_pretrained` partitions parameters as it makes them, if the configuration is of stage 3.

    Args:
        config: completed DeepSpeed configuration.
    """
    if zero_stage(config) != 3:
        yield
        return
    import_deepspeed()
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(config)  # transformers keeps a weak reference: without this name, nothing is partitioned
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive
