"""MemoryTrainer on this process, or on the ranks of a launcher: every case trained, evaluated and saved.

    accelerate launch --multi_gpu --num_processes 2 tests/support/trainer_ranks.py OUT
    python tests/support/trainer_ranks.py OUT

OUT gets a folder a case, and losses.json. All cases see the same examples in a step on any number of ranks.
tests/training/test_trainer_ranks.py compares the two.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import titans_ds
from tests.support.tiny_models import tiny_base, token_ids
from titans_ds import DeltaConfig, GraftConfig, LoraSettings, TitansModel, preset
from titans_ds.training import MemoryTrainer, RepositoryCollator
from titans_ds.zero.engine import import_deepspeed, restore_linear

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
ROWS, SEGMENTS, SEGMENT, STEPS = 4, 3, 16, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One training: None as the stage is DDP."""

    stage: int | None
    order: str = "second"
    second_order: str = "auto"
    memory: str = "delta"
    accumulation: int = 1
    checkpointing: bool = False
    lora: bool = False
    resumed: bool = False
    offload: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(str(value).lower() for value in dataclasses.astuple(self))


CASES = [
    Case(None),
    Case(None, order="first"),
    Case(None, second_order="window", accumulation=2, lora=True),
    Case(None, memory="titans", accumulation=2, checkpointing=True),
    Case(None, memory="gradmem"),
    Case(1),
    Case(1, order="first", accumulation=2),
    Case(2, accumulation=2, checkpointing=True, lora=True),
    Case(2, order="first"),
    Case(2, memory="titans", resumed=True),
    Case(2, accumulation=2, offload=True),
    Case(3, order="first"),
    Case(3, lora=True),
    Case(3, memory="titans", accumulation=2, checkpointing=True, resumed=True),
]


def make_model(case: Case) -> TitansModel:
    """The same on every rank."""
    memory: Any = DeltaConfig(dim=16)
    if case.memory != "delta":
        memory = preset(case.memory, **({} if case.memory == "gradmem" else {"dim": 16, "rule": {"chunk_size": 8}}))
    torch.manual_seed(1)
    lora = LoraSettings(rank=2, targets=["q_proj"]) if case.lora else None
    return titans_ds.attach(
        tiny_base("llama"), GraftConfig(layers=[1, 2], segment_tokens=SEGMENT, memory=memory), lora=lora
    )


def make_arguments(case: Case, folder: Path) -> TrainingArguments:
    """Of four repositories a step and accumulation, on any number of ranks."""
    zero = {
        "zero_optimization": {
            "stage": case.stage,
            **({"offload_optimizer": {"device": "cpu"}} if case.offload else {}),
        },
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    rows = ROWS // WORLD
    return TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=rows, per_device_eval_batch_size=rows,
        gradient_accumulation_steps=case.accumulation, learning_rate=1e-2, adam_epsilon=1e-6, weight_decay=0.1,
        logging_steps=1, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        activation_checkpointing=case.checkpointing,
        deepspeed=zero if WORLD > 1 and case.stage else None,
    )  # fmt: skip


def make_trainer(case: Case, folder: Path) -> MemoryTrainer:
    """Repositories of one to five segments: rows, and ranks, have different numbers of them."""
    repositories = [
        [token_ids(20 + 9 * (i % 5), seed=i).tolist(), token_ids(9, seed=50 + i).tolist()] for i in range(16)
    ]
    return MemoryTrainer(
        make_model(case), make_arguments(case, folder), RepositoryCollator(segment_tokens=SEGMENT, segments=SEGMENTS),
        train_dataset=repositories, eval_dataset=repositories[:5], order=case.order, second_order=case.second_order,
    )  # fmt: skip


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Train, once more from the middle where that is asked, evaluate and save."""
    trainer = make_trainer(case, folder)
    trainer.train()
    if case.resumed:
        reset()
        trainer = make_trainer(case, folder)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    evaluation = trainer.evaluate()
    trainer.save_model(str(folder / "adapter"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"losses": losses, "norms": norms, "evaluation": [evaluation["eval_loss"], evaluation["eval_loss_off"]]}


def reset() -> None:
    """Another plugin of accelerate's can be chosen in the same process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    unset_hf_deepspeed_config()  # at stage 3 it would partition the next case's base as it is made
    restore_linear()


def main() -> None:
    """All cases; what is refused is written down, too."""
    import_deepspeed()
    out = Path(sys.argv[1])
    results: dict[str, Any] = {"world": WORLD}
    for case in CASES:
        reset()
        results[case.name] = run(case, out / case.name)
    if int(os.environ.get("RANK", "0")) == 0:
        (out / "losses.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
