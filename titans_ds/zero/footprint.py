"""What a run takes on every rank, from formulas: bytes of memory by ZeRO stage, bytes on the network, time of a step.

Symbols: P parameters, T trained ones, L those before the first trained one, N ranks, b bytes of a value (2 in
bfloat16), B backward passes in a step.

    stage   parameters   gradients   optimizer          collectives of a step
    0       b P          b T         8 T (fp32), 12 T   all-reduce b T
    1       b P          b T         12 T / N           all-reduce b T, all-gather b T
    2       b P          b T / N     12 T / N           B times all-reduce b T, all-gather b T
    3       b P / N      b T / N     12 T / N           B times (all-gather b (2 P - L), reduce-scatter b T)

The optimizer holds two fp32 moments, and an fp32 copy of what it trains: at stage 0 only where that is not fp32
already. At stage 1 gradients are whole while they accumulate, and partitioned from the last backward on. Stage 2 of
DeepSpeed 0.19 reduces every bucket by an all-reduce, not a reduce-scatter, and does so in every backward pass: with
many segments in a step it sends more than stage 1; and of a tensor that the border between two ranks cuts, each keeps
the whole gradient. Before the first trained parameter there is no backward pass, so stage 3 does not gather there
again. The language-model head is gathered twice more at stage 3 for every further chunk of the loss. Tests hold memory
and collectives against engines that ran.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from titans_ds.errors import ConfigError

GIB = 1 << 30
FOUR_BITS = 4 / 8 + 4 / 64  # bytes of a value, with an fp32 scale for every 64
_ACTIVATIONS = 34  # values of hidden size that a transformer layer keeps for its backward, a token
_CONTEXT = GIB  # of the accelerator's runtime, and of NCCL
_GATHERED = 10**9  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class Model:
    """Sizes of a base model with its memories.

    Args:
        parameters: P, of all.
        trained: T, of these.
        small: of these, in tensors below stage3_param_persistence_threshold, which stay whole at stage 3.
        layers: of the base.
        hidden: its width.
        vocab: its vocabulary.
        state_bytes: of the fast weights, momentum and so on of one lane, over all layers (fp32).
        below: L, of the parameters those that no backward pass goes through: embedding and layers under the lowest
            memory of a frozen base. 0 gives an upper bound.
        cut: values of a tensor that lie beyond the border of a rank's share of T.
        linear: of the frozen parameters, those in linear maps, the language-modelling head aside.
    """

    parameters: int
    trained: int
    small: int
    layers: int
    hidden: int
    vocab: int
    state_bytes: int = 0
    below: int = 0
    cut: int = 0
    linear: int = 0


@dataclass(frozen=True)
class Setup:
    """How it is trained.

    Args:
        stage: of ZeRO.
        ranks: N.
        value_bytes: b.
        lanes: of one rank.
        segment_tokens: of every lane.
        backwards: B, segments or windows in an optimizer step.
        checkpointing: activations are recomputed in the backward pass.
        bucket: elements of a buffer for reduction (DeepSpeed's reduce_bucket_size).
        loss_chunk_tokens: tokens whose logits exist at a time.
        segments_in_graph: segments whose activations live at once: the window, where it is one graph.
        layer_graphs: inputs, outputs and their gradients of frozen layers have places of their own.
        offload_activations: they wait in host memory, but for the layer at work.
        offload_optimizer, offload_parameters: they are in host memory, or on disk.
        linear_bytes: of a value of the frozen linear maps, where they are quantised; 0: as of every other value.
    """

    stage: int
    ranks: int
    value_bytes: int = 2
    lanes: int = 1
    segment_tokens: int = 2048
    backwards: int = 1
    checkpointing: bool = True
    bucket: int = 500_000_000
    loss_chunk_tokens: int = 1024
    segments_in_graph: int = 1
    layer_graphs: bool = False
    offload_activations: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    linear_bytes: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of one segment on one rank, all its lanes together."""
        return self.lanes * self.segment_tokens


@dataclass(frozen=True)
class Machine:
    """What the estimate of time rests on.

    Args:
        flops: that a rank reaches in training, a second.
        inside: bytes a second that a rank sends to others of its node.
        between: to other nodes.
        ranks_per_node: of a node.
    """

    flops: float = 360e12
    inside: float = 370e9
    between: float = 45e9
    ranks_per_node: int = 8

    def bandwidth(self, ranks: int) -> float:
        """Of a ring over so many ranks: that of its slowest link."""
        return self.inside if ranks <= self.ranks_per_node else self.between


def parameter_bytes(model: Model, setup: Setup) -> float:
    """Of the parameters held between passes on one rank, on the accelerator."""
    if setup.offload_parameters:
        return 0
    if setup.stage < 3:
        saved = model.linear * (setup.value_bytes - setup.linear_bytes) if setup.linear_bytes else 0
        return model.parameters * setup.value_bytes - saved
    small = model.small if setup.ranks > 1 else 0
    return (model.parameters / setup.ranks + small) * setup.value_bytes


def gradient_bytes(model: Model, setup: Setup) -> float:
    """Of the gradients on one rank while they accumulate."""
    share = model.trained / (setup.ranks if setup.stage >= 2 else 1)
    cut = model.cut if setup.stage == 2 and setup.ranks > 1 else 0
    return (share + cut) * setup.value_bytes


def optimizer_bytes(model: Model, setup: Setup) -> float:
    """Of moments and fp32 copies on one rank, on the accelerator."""
    if setup.offload_optimizer:
        return 0
    own_copy = setup.stage > 0 or setup.value_bytes < 4
    return model.trained * (12 if own_copy else 8) / (setup.ranks if setup.stage >= 1 else 1)


def working_bytes(model: Model, setup: Setup) -> float:
    """Of buffers for reduction, and at stage 3 of the parameters gathered for the layers at work."""
    if setup.ranks == 1 or setup.stage == 0:
        return 0
    bucket = min(setup.bucket, model.trained) if setup.stage < 3 else setup.bucket  # stage 3 sets it up whole
    gathered = min(_GATHERED, model.parameters) if setup.stage == 3 else 0
    return (bucket + gathered) * setup.value_bytes


def activation_bytes(model: Model, setup: Setup) -> float:
    """Of the activations and logits that live at once. Rough: within a factor, not a percentage."""
    tokens, of_a_layer = setup.tokens * setup.segments_in_graph, _ACTIVATIONS + 4 * setup.layer_graphs
    kept = model.layers + _ACTIVATIONS if setup.checkpointing else model.layers * of_a_layer
    if setup.offload_activations:  # what one layer works on stays
        tokens, kept = setup.tokens, _ACTIVATIONS
    logits = 3 * min(setup.loss_chunk_tokens, tokens) * model.vocab * 4  # fp32: logits, their softmax, their gradient
    return tokens * model.hidden * kept * setup.value_bytes + logits


def state_bytes(model: Model, setup: Setup) -> float:
    """Of the memory states of this rank's lanes: before a segment, after it, and a gradient of it.

    No stage shares them out: a lane is on one rank anyway.
    """
    return 3 * model.state_bytes * setup.lanes


def total_bytes(model: Model, setup: Setup) -> float:
    """Bytes at the peak of one rank, all parts together."""
    parts = (parameter_bytes, gradient_bytes, optimizer_bytes, working_bytes, activation_bytes, state_bytes)
    return sum(part(model, setup) for part in parts) + _CONTEXT


def check_fits(model: Model, setup: Setup, available: int) -> None:
    """Raise ConfigError, naming what would fit, where the estimate is above `available` bytes of an accelerator."""
    needed = total_bytes(model, setup)
    if needed <= available:
        return
    # Changes to the settings, the mildest first. Recomputing and offloading don't go with graphs of layers.
    without_graphs = replace(setup, layer_graphs=False)
    off = "training.layer_graphs false and " * setup.layer_graphs
    small = replace(without_graphs, checkpointing=True, lanes=1)
    changes = {
        f"{off}training.checkpointing true": replace(without_graphs, checkpointing=True),
        f"{off}training.offload_activations true": replace(without_graphs, offload_activations=True),
        f"data.num_lanes {setup.ranks}": replace(setup, lanes=1),
        f"{off}training.checkpointing true and data.num_lanes {setup.ranks}": small,
    }
    if not setup.linear_bytes:  # what is quantised is not partitioned
        offloaded = replace(small, stage=3, offload_optimizer=True, offload_parameters=True)
        changes["ds_configs/zero3.json with that"] = replace(small, stage=3)
        changes["ds_configs/zero3_offload_cpu.json with that"] = offloaded
    if model.linear and setup.stage < 3:
        changes["model.quantization bnb-4bit with that"] = replace(small, linear_bytes=FOUR_BITS)
    sizes = {name: total_bytes(model, changed) for name, changed in changes.items() if changed != setup}
    ways = [f"{name} (about {size / GIB:.1f} GiB)" for name, size in sizes.items() if size <= available]
    advice = f"What would fit: {'; '.join(ways)}" if ways else "Nothing that was tried fits; take a larger accelerator"
    raise ConfigError(
        f"the run needs about {needed / GIB:.1f} GiB on each accelerator, and {available / GIB:.1f} GiB are there. "
        f"{advice}. To run it all the same, set run.check_memory to false"
    )


def collective_bytes(model: Model, setup: Setup) -> dict[str, float]:
    """Bytes of the tensors, taken whole, that go through each kind of collective in an optimizer step."""
    if setup.ranks == 1:
        return {}
    whole, trained, passes = model.parameters * setup.value_bytes, model.trained * setup.value_bytes, setup.backwards
    below = model.below * setup.value_bytes
    head = (math.ceil(setup.tokens / setup.loss_chunk_tokens) - 1) * model.vocab * model.hidden * setup.value_bytes
    by_stage: dict[int, dict[str, float]] = {
        0: {"all_reduce": trained},
        1: {"all_reduce": trained, "all_gather": trained},
        2: {"all_reduce": passes * trained, "all_gather": trained},
        3: {"all_gather": passes * (2 * whole - below + 2 * head), "reduce_scatter": passes * trained},
    }
    return by_stage[setup.stage]


def sent_bytes(model: Model, setup: Setup) -> float:
    """Bytes that a rank sends in an optimizer step, in rings: an all-reduce sends its tensor nearly twice."""
    ring = (setup.ranks - 1) / setup.ranks
    times = {"all_reduce": 2 * ring, "all_gather": ring, "reduce_scatter": ring}
    return sum(times[kind] * size for kind, size in collective_bytes(model, setup).items())


def compute_seconds(model: Model, setup: Setup, machine: Machine) -> float:
    """Of an optimizer step.

    2 FLOPs a parameter and token forward, 2 backward to the activations, 2 more for gradients of what is trained, and
    the forward again where activations are recomputed. Attention over long segments comes on top.
    """
    a_token = (6 if setup.checkpointing else 4) * model.parameters + 2 * model.trained
    return a_token * setup.tokens * setup.backwards / machine.flops


def step_seconds(model: Model, setup: Setup, machine: Machine) -> tuple[float, float]:
    """Least and most of an optimizer step: the network wholly hidden behind the compute, and not at all."""
    compute = compute_seconds(model, setup, machine)
    network = sent_bytes(model, setup) / machine.bandwidth(setup.ranks)
    return max(compute, network), compute + network
