"""What a run needs, on paper: memory of a rank, bytes on the network and time of a step, by ZeRO stage and GPUs.

    python launch/scaling.py [--model 9B 70B 400B] [--gpus 8 64 512] [--trainable memory|all] [options]

Sizes are those of real models, made without weights, with a memory of width 512 in every fourth layer. The formulas are
in titans_ds/zero/footprint.py; docs/scaling.md says how far they were measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only its own folder is on the path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import titans_ds
from launch.memory import linear_size
from titans_ds.config import GraftConfig
from titans_ds.graft.quantized import FORMS, bytes_per_weight
from titans_ds.memory.mlp import MLPConfig
from titans_ds.program import program, real_number, whole_number
from titans_ds.zero import footprint
from titans_ds.zero.footprint import GIB, Machine, Model, Setup

_LLAMA = {"num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False}
# transformers' configurations: Qwen3.5-9B by its defaults, Llama 3 70B and Llama 3.1 405B.
BASES: dict[str, dict[str, Any]] = {
    "9B": {"model_type": "qwen3_5_text"},
    "70B": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        **_LLAMA,
    },
    "400B": {
        "model_type": "llama",
        "hidden_size": 16_384,
        "intermediate_size": 53_248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        **_LLAMA,
    },
}
_PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold


@program("nothing was changed")
def main(argv: list[str]) -> None:
    """Run the program; returns its exit code, 2 for an error that the user can mend."""
    options = _options(argv)
    console = Console(width=None if sys.stdout.isatty() else 130)
    for name in options.model:
        model = sizes(name, options.trainable)
        console.print(_table(name, model, options))


def sizes(name: str, trainable: str) -> Model:
    """Sizes of a base of that name with its memories; nothing of it is stored."""
    config = transformers.AutoConfig.for_model(**BASES[name])
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layers = list(range(3, config.num_hidden_layers, 4))
    memory, base_size = MLPConfig(dim=512, depth=2), sum(p.numel() for p in base.parameters())
    graft_size, state = _one_memory(config.hidden_size, memory)
    small = sum(p.numel() for p in base.parameters() if p.numel() < _PERSISTENT)
    trained = graft_size * len(layers) + (base_size if trainable == "all" else 0)
    return Model(
        parameters=base_size + graft_size * len(layers),
        trained=trained,
        small=small,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        linear=linear_size(base) if trainable == "memory" else 0,
        state_bytes=state * len(layers),
    )


def _one_memory(hidden: int, memory: MLPConfig) -> tuple[int, int]:
    """Trained parameters, and bytes of one lane's state, of one memory: of a real one, on a base of one small layer."""
    tiny = transformers.AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=8,
        vocab_size=8,
    )
    model = titans_ds.attach(transformers.AutoModelForCausalLM.from_config(tiny), GraftConfig(memory=memory))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = model.init_state(1).layers.values()
    return trained, sum(t.numel() * t.element_size() for layer in layers for t in layer.values())


def _table(name: str, model: Model, options: argparse.Namespace) -> Table:
    billions = f"{model.parameters / 1e9:.1f} B parameters, {model.trained / 1e6:,.0f} M of them trained"
    step = f"{options.segments} segments of {options.segment_tokens} tokens, {options.lanes} lanes a GPU"
    state = f"memory state {model.state_bytes / 2**20:.0f} MiB a lane"
    columns = ("GPUs", "stage", "parameters", "gradients", "optimizer", "buffers", "activations", "states", "sum (GiB)")
    table = Table(*columns, "sent/step", "step", title=f"{name}: {billions}; a step: {step}; {state}")
    for gpus in options.gpus:
        for stage in range(3 if options.quantization else 4):  # what is quantised is not partitioned
            table.add_row(*_row(model, _setup(stage, gpus, options), options))
        table.add_section()
    return table


def _row(model: Model, setup: Setup, options: argparse.Namespace) -> list[str]:
    parts = (
        footprint.parameter_bytes,
        footprint.gradient_bytes,
        footprint.optimizer_bytes,
        footprint.working_bytes,
        footprint.activation_bytes,
        footprint.state_bytes,
    )
    total = footprint.total_bytes(model, setup)
    least, most = footprint.step_seconds(model, setup, Machine())
    fits = total <= options.gib * GIB
    times = f"{least:.2f}-{most:.2f} s" if fits else "does not fit"
    memory = [f"{part(model, setup) / GIB:.1f}" for part in parts]
    sent = f"{footprint.sent_bytes(model, setup) / 1e9:,.2f} GB"
    return [str(setup.ranks), f"ZeRO-{setup.stage}", *memory, f"{total / GIB:.1f}", sent, times]


def _setup(stage: int, gpus: int, options: argparse.Namespace) -> Setup:
    return Setup(
        stage,
        gpus,
        lanes=options.lanes,
        segment_tokens=options.segment_tokens,
        backwards=options.segments,
        loss_chunk_tokens=options.segment_tokens * options.lanes,
        offload_optimizer=options.offload,
        linear_bytes=bytes_per_weight(FORMS[options.quantization][2]) if options.quantization else 0.0,
    )


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/scaling.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=list(BASES), default=list(BASES))
    many = whole_number(1, 10**7)
    parser.add_argument("--gpus", nargs="+", type=many, default=[8, 64, 512])
    parser.add_argument("--trainable", choices=["memory", "all"], default="memory", help="(%(default)s)")
    parser.add_argument("--quantization", choices=list(FORMS), help="of a frozen base: bits of its linear maps")
    parser.add_argument("--lanes", type=many, default=1, help="of one GPU (%(default)s)")
    parser.add_argument("--segment_tokens", type=many, default=2048, help="of every lane (%(default)s)")
    parser.add_argument("--segments", type=many, default=1, help="in an optimizer step (%(default)s)")
    parser.add_argument("--offload", action="store_true", help="the optimizer is in host memory")
    parser.add_argument(
        "--gib", type=real_number(0, 10**6, above=True), default=79.0, help="memory of a GPU (%(default)s)"
    )
    options = parser.parse_args(argv)
    if options.quantization and options.trainable == "all":
        parser.error("--quantization goes with --trainable memory: weights of few bits don't learn")
    return options


if __name__ == "__main__":
    sys.exit(main())
