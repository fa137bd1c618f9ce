"""What engines of every ZeRO stage hold and send, beside the formulas, on as many ranks as the launch has.

    deepspeed --num_accelerators 2 tests/support/footprints.py OUT.json

The table of docs/scaling.md comes from this, on 1 and on 2 ranks.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.support.measured import Watched, collectives
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.zero_matrix import LANES, OPTIMIZER, SEGMENT, Case, make_lanes, make_module
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.step import Carried, commit, run_passes
from titans_ds.zero import footprint
from titans_ds.zero.config import complete_config
from titans_ds.zero.engine import local_device, start_ranks
from titans_ds.zero.leaving import leave, stop_ranks

BACKWARDS = 3
BUCKET = 20_000  # DeepSpeed's default would be larger than the model


def cases() -> list[Case]:
    """Stages, precisions, and a frozen base or not."""
    return [
        Case(stage, dtype=dtype, trainable=trainable)
        for stage in range(4)
        for dtype in ("float32", "bfloat16")
        for trainable in ("memory", "all")
    ]


def compare(case: Case, corpus: Path, device: torch.device) -> dict[str, Any]:
    """One engine over two steps: formula and count, of memory at its peak and of the second step's collectives."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    module = make_module(case)
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    below = no_backward(module)
    zero = {
        "stage": case.stage,
        "reduce_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,  # else parameters for the next pass are there early,
        "stage3_max_live_parameters": 0,  # and those of a small model stay from one pass to the next
        "stage3_max_reuse_distance": 0,
    }
    config = complete_config(
        {"zero_optimization": zero},
        rows=LANES // ranks,
        backwards_per_step=BACKWARDS,
        world_size=ranks,
        clip=OPTIMIZER.clip,
        bf16=case.dtype == "bfloat16",
    )
    optimizer = make_optimizer(module, OPTIMIZER)
    cut = sum(beyond_border([p.numel() for p in group["params"]], ranks) for group in optimizer.param_groups)
    engine = Watched(module, optimizer, config, device)
    lanes, carried = make_lanes(corpus, rank, ranks), Carried()
    commit(run_passes(engine, lanes, carried, case.settings, ranks), carried)
    engine.step(OPTIMIZER.lr, skip=False)
    with collectives() as sent:
        commit(run_passes(engine, lanes, carried, case.settings, ranks), carried)
        engine.step(OPTIMIZER.lr, skip=False)
    state = sum(t.numel() * t.element_size() for layer in (carried.state or {}).values() for t in layer.values())
    trained = sum(n for n, learns in sizes if learns)
    model = footprint.Model(sum(n for n, _ in sizes), trained, 0, 2, 32, 128, below=below, cut=cut)
    setup = footprint.Setup(
        case.stage,
        ranks,
        4 if case.dtype == "float32" else 2,
        lanes=LANES // ranks,
        segment_tokens=SEGMENT,
        backwards=BACKWARDS,
        loss_chunk_tokens=case.settings.loss_chunk_tokens,
    )
    return {
        "case": dataclasses.asdict(case),
        "ranks": ranks,
        "formula": {
            "parameters": footprint.parameter_bytes(model, setup),
            "gradients": footprint.gradient_bytes(model, setup),
            "optimizer": footprint.optimizer_bytes(model, setup),
            **footprint.collective_bytes(model, setup),
        },
        "counted": {**dataclasses.asdict(engine.peak), **sent},
        "state_bytes_of_a_lane": state / (LANES // ranks),
    }


def beyond_border(sizes: list[int], ranks: int) -> int:
    """Values of the tensor that the end of rank 0's share cuts, beyond that end."""
    border, end = sum(sizes) / ranks, 0
    for size in sizes:
        end += size
        if end >= border:
            return int(end - border)
    return 0


def no_backward(module: torch.nn.Module) -> int:
    """Parameters of the base that come before the first trained one, in the order of the forward pass."""
    found = 0
    for parameter in module.parameters():
        if parameter.requires_grad:
            return found
        found += parameter.numel()
    return found


def main() -> None:
    """Run the cases; rank 0 writes the results."""
    torch.set_num_threads(1)
    start_ranks()
    device = local_device()
    corpus = write_packed(Path(tempfile.mkdtemp()), {"train": random_repos(12, seed=3, files=4, most=SEGMENT + 1)})
    results = [compare(case, corpus, device) for case in cases()]
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(results, indent=1))
    stop_ranks()


if __name__ == "__main__":
    main()
    leave(0)
