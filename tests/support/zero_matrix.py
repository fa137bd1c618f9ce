"""Every ZeRO stage against plain torch, in one launch.

    deepspeed --num_accelerators 2 tests/support/zero_matrix.py [--short] OUT.json

Each rank computes the reference itself, in its own process, on all lanes; then the ranks together compute the same with
DeepSpeed, each on its own lanes. What differs is written to OUT.json, which tests/zero/test_zero_matrix.py reads.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import titans_ds
from tests.support.eager_capture import StaticCallables, graphed
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.tiny_models import tiny_base
from titans_ds import preset
from titans_ds.config import GraftConfig, LoraSettings
from titans_ds.memory.graphs import MemoryGraphs
from titans_ds.memory.mlp import MLPConfig
from titans_ds.memory.registry import MemoryConfig
from titans_ds.training.build import enable_checkpointing, load_base
from titans_ds.training.data.lanes import Lanes
from titans_ds.training.data.packed import open_corpus
from titans_ds.training.data.segments import RepositoryReader
from titans_ds.training.engine import Engine, TorchEngine
from titans_ds.training.module import TrainingModule
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.ranks import gather, on_rank_zero, sum_over
from titans_ds.training.settings import ModelSettings, OptimizerSettings, TrainingSettings
from titans_ds.training.speed.layer_graphs import graph_layers
from titans_ds.training.step import Carried, commit, run_passes
from titans_ds.zero.adamw import SkippableAdamW
from titans_ds.zero.config import complete_config
from titans_ds.zero.engine import DeepSpeedEngine, local_device, restore_linear, start_ranks
from titans_ds.zero.leaving import leave, stop_ranks
from titans_ds.zero.loading import partitioned_loading

LANES, SEGMENT, STEPS, SGD_LR = 4, 16, 20, 0.1
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
OPTIMIZER = OptimizerSettings(lr=2e-3, eps=1e-6, clip=1.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of the matrix."""

    stage: int
    order: str = "first"
    checkpointing: bool = False
    trainable: str = "memory"
    accumulation: int = 1
    dtype: str = "float32"
    injection: str = "additive"
    memory: str = "mlp"
    lora: bool = False
    second_order: str = "auto"
    offload: bool = False
    sgd: bool = False
    offload_optimizer: bool = False
    graphs: bool = False
    layer_graphs: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        return "-".join(f"{k}={v}" for k, v in dataclasses.asdict(self).items())

    @property
    def steps(self) -> int:
        """The path of losses is followed where nothing but the stage and the order differ."""
        plain = Case(self.stage, self.order, memory="delta" if self.memory == "delta" else "mlp")
        return STEPS if dataclasses.replace(self, second_order="auto") == plain else 2

    @property
    def settings(self) -> TrainingSettings:
        """Windows of 3 files."""
        return TrainingSettings(
            order=self.order,  # type: ignore[arg-type]
            second_order=self.second_order,  # type: ignore[arg-type]
            window=3,
            accumulation=self.accumulation,
            checkpointing=self.checkpointing,
            offload_activations=self.offload,
            loss_chunk_tokens=24,
        )


def cases() -> list[Case]:
    """The matrix, and beside it accumulation, everything trainable, bfloat16, injections, LoRA, other memories, and the
    ways of second order. Plain SGD, since the first steps of Adam are the same for a gradient of any scale."""
    product = itertools.product(("mlp", "delta"), range(4), ("first", "second"), (False, True))
    matrix = [Case(stage, order, checkpointing, memory=memory) for memory, stage, order, checkpointing in product]
    for stage in range(4):
        matrix.append(Case(stage, "second", accumulation=2))
        matrix.append(Case(stage, "first", True, trainable="all"))
        matrix.append(Case(stage, "second", dtype="bfloat16"))
        matrix.append(Case(stage, "second", True, injection="mac"))
        matrix.append(Case(stage, "second", second_order="window"))
        matrix.append(Case(stage, "second", offload=True, sgd=True))
        matrix.append(Case(stage, "second", True, offload=True, sgd=True, accumulation=2))
        matrix.append(Case(stage, "second", second_order="through_base", trainable="all"))
        matrix.append(Case(stage, "second", True, second_order="through_base", offload=True, sgd=True))
        matrix.append(Case(stage, "second", memory="delta", offload=True, sgd=True))
        matrix.append(Case(stage, "second", True, memory="gated_delta", offload=True, sgd=True, accumulation=2))
        matrix.append(Case(stage, "first", memory="gated_delta"))
        matrix.append(Case(stage, "second", memory="gated_delta", dtype="bfloat16"))
    for stage in (0, 1, 2):
        matrix.append(Case(stage, "second", sgd=True, layer_graphs=True))
    for stage in (2, 3):
        matrix.append(Case(stage, "second", True, memory="titans"))
        matrix.append(Case(stage, "second", True, sgd=True, offload_optimizer=True))
        matrix.append(Case(stage, "second", trainable="all", sgd=True))
        matrix.append(Case(stage, "second", True, lora=True, sgd=True))
        matrix.append(Case(stage, "second", injection="mag"))
        matrix.append(Case(stage, "second", True, sgd=True, graphs=True))
        matrix.append(Case(stage, "first", True, injection="mal", lora=True))
    return matrix


def short_cases() -> list[Case]:
    """The default memory and its gated sister, at the stages that part gradients and parameters."""
    return [Case(2, "second", memory="delta"), Case(3, "second", True, memory="gated_delta", offload=True, sgd=True)]


def make_memory(case: Case) -> MemoryConfig:
    """Everything learned."""
    if case.memory == "titans":
        return preset("titans", dim=8, heads=2, token_shift=True, rule={"chunk_size": 4})
    if case.memory != "mlp":
        return preset(case.memory, dim=8, heads=2)
    return MLPConfig(
        dim=8,
        write="token",
        token_shift=True,
        step_size=0.5,
        learn_step_size=True,
        key_projection="learned",
        value_projection="learned",
        query_projection="tied" if case.injection == "mac" else "learned",
        output_projection="learned",
        learn_initial_weights=True,
    )


class PlainSGD(SkippableAdamW):
    """p <- p - lr g, where AdamW is expected."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad
        self.applied = True


def make_case_optimizer(module: TrainingModule, case: Case) -> SkippableAdamW:
    """Training's own, or SGD."""
    optimizer = make_optimizer(module, OPTIMIZER)
    return PlainSGD(optimizer.param_groups) if case.sgd else optimizer


def make_module(case: Case) -> TrainingModule:
    """The same grafted model every time."""
    layers = ["linear_attention", "full_attention"]
    if case.layer_graphs:
        layers.reverse()  # gradients go back through the layer without memory
    base = tiny_base("qwen3_5", num_hidden_layers=2, layer_types=layers)
    torch.manual_seed(1)
    graft = GraftConfig(
        layers="attention",
        gate_init=0.0,
        injection=case.injection,  # type: ignore[arg-type]
        persistent_tokens=2 if case.injection == "mac" else 0,
        segment_tokens=SEGMENT,
        memory=make_memory(case),
    )
    lora = LoraSettings(rank=2, targets=["q_proj", "v_proj"]) if case.lora else None
    model = titans_ds.attach(base, graft, case.trainable == "memory", lora)
    if case.order == "first":  # as titans_ds.training.build does
        for _, parameter in model.write_only_parameters():
            parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # starts at 0, where A gets no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    if case.checkpointing:
        enable_checkpointing(base)
    return TrainingModule(model.to(getattr(torch, case.dtype)), case.settings.loss_chunk_tokens).train()


def make_lanes(corpus: Path, rank: int, world_size: int) -> Lanes:
    """Lanes of files that fit a segment, so that a window of 3 segments is one of 3 files."""
    reader = RepositoryReader(open_corpus(corpus).split("train"), SEGMENT)
    return Lanes(reader, LANES, rank, world_size, seed=5)


def run(engine: Engine, lanes: Lanes, case: Case, world_size: int) -> dict[str, Any]:
    """First step's loss and gradients, and the loss of every step."""
    names = [n for n, p in engine.module.named_parameters() if p.requires_grad]
    carried, losses, gradients = Carried(), [], {}
    before = engine.parameters(names)
    for step in range(case.steps):
        passes = run_passes(engine, lanes, carried, case.settings, world_size)
        loss = passes.loss_sum if world_size == 1 else sum_over(passes.loss_sum)
        losses.append(float(loss) / passes.targets)
        if step == 0:
            gradients = {
                n: None if g is None else g.detach().float().clone() for n, g in engine.gradients(names).items()
            }
        engine.step(SGD_LR if case.sgd else OPTIMIZER.lr, skip=False)
        commit(passes, carried)
    after = engine.parameters(names)
    moved = {name: after[name].float() - before[name].float() for name in before}
    state_bytes = engine.optimizer_state_bytes()
    return {"losses": losses, "gradients": gradients, "moved": moved, "state_bytes": state_bytes}


def compare(case: Case, reference: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """What the test judges."""
    bad = [n for n, g in reference["gradients"].items() if g is None or not g.any()]
    missing = [n for n, g in ours["gradients"].items() if g is None or not g.any()]
    errors = {
        name: _error(ours["gradients"][name], g)
        for name, g in reference["gradients"].items()
        if name not in bad and name not in missing
    }
    return {
        "case": dataclasses.asdict(case),
        "name": case.name,
        "zero_in_reference": bad,
        "missing": missing,
        "worst_gradient": max(errors.items(), key=lambda item: item[1]) if errors else None,
        "num_gradients": len(errors),
        "worst_move": max(((_error(m, reference["moved"][n]), n) for n, m in ours["moved"].items()), default=None),
        "first_loss": abs(ours["losses"][0] - reference["losses"][0]),
        "loss_path": max(abs(a - b) for a, b in zip(ours["losses"], reference["losses"], strict=False)),
        "least_move": min(float(m.norm()) for m in reference["moved"].values()),
        "state_share": ours["state_bytes"] / max(reference["state_bytes"], 1),
    }


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def spoil_one_rank(engine: DeepSpeedEngine[TrainingModule], lanes: Lanes, case: Case, rank: int) -> dict[str, Any]:
    """A state that is not finite on rank 1 alone: no rank may change a parameter; the next step is as ever.

    Returns:
        of the spoilt step and the one after it, which ranks applied it, and whether parameters changed.
    """
    names = [n for n, p in engine.module.named_parameters() if p.requires_grad]
    carried, world_size, report = Carried(), torch.distributed.get_world_size(), {}
    commit(run_passes(engine, lanes, carried, case.settings, world_size), carried)
    engine.step(0.0, skip=True)
    if rank == 1:
        for layer in (carried.state or {}).values():
            next(iter(layer.values())).fill_(float("nan"))
    for name in ("spoilt", "next"):
        before = engine.parameters(names)
        passes = run_passes(engine, lanes, carried, case.settings, world_size)
        commit(passes, carried)
        applied = gather(engine.step(OPTIMIZER.lr, skip=False)[1])
        after = engine.parameters(names)
        changed = any(not torch.equal(after[n], before[n]) for n in before)
        report[name] = {"applied": applied, "changed": changed}
    return report


def partitioned_base(world_size: int) -> dict[str, Any]:
    """A pretrained base loaded under ZeRO-3: how much of it this rank holds, before any engine is made."""
    folder = on_rank_zero(lambda: Path(tempfile.mkdtemp()))
    on_rank_zero(lambda: tiny_base("qwen3_5").save_pretrained(folder))
    config = complete_config(
        {"zero_optimization": {"stage": 3}}, rows=2, backwards_per_step=1, world_size=world_size, clip=0.0, bf16=False
    )
    with partitioned_loading(config):
        base = load_base(ModelSettings(base=str(folder)), 0, 0)
    parameters: list[Any] = list(base.parameters())
    held, whole = sum(p.ds_tensor.numel() for p in parameters), sum(p.ds_numel for p in parameters)
    largest = max(p.numel() for p in parameters)
    return {
        "partitioned": all(hasattr(p, "ds_id") for p in parameters),
        "largest_whole": largest,
        "share": held / whole,
    }


def replay_memories(module: TrainingModule, partitioned: bool) -> None:
    """As on a GPU, where ZeRO-3 has none."""
    for grafted in module.model.memories.values():  # type: ignore[union-attr, operator]
        capture = graphed(grafted.memory)
        if partitioned:
            grafted.memory.graphs = MemoryGraphs("auto", lambda device, capture=capture: capture)


def main() -> None:
    """Run the matrix; rank 0 writes the results."""
    torch.set_num_threads(1)
    start_ranks()
    device, rank, world_size = local_device(), torch.distributed.get_rank(), torch.distributed.get_world_size()
    corpus = write_packed(Path(tempfile.mkdtemp()), {"train": random_repos(12, seed=3, files=4, most=SEGMENT + 1)})
    references: dict[Case, dict[str, Any]] = {}
    results, loading = [], partitioned_base(world_size)
    for case in short_cases() if "--short" in sys.argv else cases():
        one_graph = "through_base" if case.second_order == "through_base" else "window"
        plain = {"stage": 0, "checkpointing": False, "offload": False, "offload_optimizer": False, "graphs": False}
        key = dataclasses.replace(case, second_order=one_graph, **plain)
        clip = 0.0 if case.sgd else OPTIMIZER.clip
        if key not in references:
            module = make_module(key)
            alone = TorchEngine(module, make_case_optimizer(module, key), clip, device)
            references[key] = run(alone, make_lanes(corpus, 0, 1), key, 1)
        module = make_module(case)
        if case.graphs:
            replay_memories(module, partitioned=case.stage == 3)
        replayed = StaticCallables()
        if case.layer_graphs:
            graph_layers(module.model.base_model, replayed)
        config = complete_config(
            {"zero_optimization": {"stage": case.stage, **(OFFLOADED if case.offload_optimizer else {})}},
            rows=LANES // world_size,
            backwards_per_step=case.settings.backwards_per_step,
            world_size=world_size,
            clip=clip,
            bf16=case.dtype == "bfloat16",
            recomputed=case.checkpointing,
        )
        restore_linear()  # of the case before
        engine = DeepSpeedEngine(module, make_case_optimizer(module, case), config, device)
        results.append(
            compare(case, references[key], run(engine, make_lanes(corpus, rank, world_size), case, world_size))
        )
        results[-1]["replays"] = replayed.backwards
        if case in (Case(case.stage), Case(case.stage, memory="delta")):
            results[-1]["spoilt"] = spoil_one_rank(engine, make_lanes(corpus, rank, world_size), case, rank)
    if rank == 0:
        Path(sys.argv[-1]).write_text(json.dumps({"loading": loading, "cases": results}, indent=1))
    stop_ranks()


if __name__ == "__main__":
    main()
    leave(0)
