"""Graft a memory onto a base and train it with transformers' Trainer, the base frozen.

    python examples/train_memory.py OUT [STEPS]

OUT is a new folder for checkpoints and the adapter. The corpus is made up: each repository has names of its own.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from titans_ds import GraftConfig, assets, attach
from titans_ds.training import MemoryTrainer, RepositoryCollator


def repository(number: int) -> list[str]:
    """One file that defines a function, and one that calls it."""
    name = f"measure_{number:x}{number * 7919 % 251:x}"
    return [f"def {name}(width, height):\n    return width * height\n", f"print({name}(2, 3))\n" * 6]


def main(out: Path, steps: int = 20) -> None:
    """Train, print the loss with the memory and without, and save the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(assets.base())
    model = attach(AutoModelForCausalLM.from_pretrained(assets.base()), GraftConfig(segment_tokens=48))
    print(model.memory_summary())

    collator = RepositoryCollator(tokenizer, segment_tokens=48, segments=3)
    arguments = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=5e-3, report_to="none", seed=0
    )
    train, held_out = [repository(n) for n in range(64)], [repository(n) for n in range(100, 104)]
    trainer = MemoryTrainer(model, arguments, collator, train_dataset=collator.windows(train), eval_dataset=held_out)
    trainer.train()
    found = trainer.evaluate()
    print(f"held out: {found['eval_loss']:.3f} with the memory, {found['eval_loss_off']:.3f} without")
    trainer.save_model(str(out / "adapter"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(steps) for steps in sys.argv[2:]))
