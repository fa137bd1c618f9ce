"""Whether a run fits an accelerator, from its settings alone, before anything large is loaded. A rough estimate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from titans_ds.errors import ConfigError

_MASTER_AND_MOMENTS = 12  # bytes a trained parameter: fp32 copy and two fp32 moments
_ACTIVATIONS = 34  # values of hidden size that a transformer layer keeps for its backward, a token
_CUDA_CONTEXT = 1 << 30


@dataclass(frozen=True)
class Footprint:
    """What the estimate is made of.

    Args:
        parameters: of the model.
        trained: of these, the trained ones.
        layers: of the base model.
        hidden: its width.
        vocab: its vocabulary.
        rows: lanes of one rank.
        segment_tokens: T.
        segments_in_graph: segments whose activations live at once: at second order in one graph the window, else 1.
        loss_chunk_tokens: tokens whose logits exist at a time.
        bytes_per_value: 2 for bfloat16, 4 for float32.
        checkpointing: activations are recomputed.
        offload_activations: they wait in host memory.
        stage: of ZeRO; 0 for plain torch.
        ranks: number of ranks.
        offload_optimizer: the optimizer's state is elsewhere.
        offload_parameters: so are the parameters.
        layer_graphs: inputs, outputs and their gradients of frozen layers have places of their own.
    """

    parameters: int
    trained: int
    layers: int
    hidden: int
    vocab: int
    rows: int
    segment_tokens: int
    segments_in_graph: int = 1
    loss_chunk_tokens: int = 1024
    bytes_per_value: int = 2
    checkpointing: bool = False
    offload_activations: bool = False
    stage: int = 0
    ranks: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    layer_graphs: bool = False


def estimate_bytes(run: Footprint) -> int:
    """Peak bytes on one accelerator: parameters, gradients, optimizer, activations, logits, context."""
    weights = 0 if run.offload_parameters else run.parameters * run.bytes_per_value / _share(run, 3)
    gradients = run.trained * run.bytes_per_value / _share(run, 2)
    optimizer = 0 if run.offload_optimizer else run.trained * _MASTER_AND_MOMENTS / _share(run, 1)
    tokens = run.rows * run.segment_tokens * run.segments_in_graph
    kept = run.layers + _ACTIVATIONS if run.checkpointing else run.layers * (_ACTIVATIONS + 4 * run.layer_graphs)
    if run.offload_activations:  # what one layer works on stays
        tokens, kept = run.rows * run.segment_tokens, _ACTIVATIONS
    activations = tokens * run.hidden * kept * run.bytes_per_value
    logits = 3 * min(run.loss_chunk_tokens, tokens) * run.vocab * 4  # fp32: logits, their softmax, their gradient
    return int(weights + gradients + optimizer + activations + logits) + _CUDA_CONTEXT


def check_fits(run: Footprint, available: int) -> None:
    """Raise ConfigError, naming what would fit, where the estimate is above `available` bytes."""
    needed = estimate_bytes(run)
    if needed <= available:
        return
    ways = [f"{name} (about {_gib(size)})" for name, size in _ways(run) if size <= available]
    advice = f"What would fit: {'; '.join(ways)}" if ways else "Nothing that was tried fits; take a larger accelerator"
    raise ConfigError(
        f"the run needs about {_gib(needed)} on each accelerator, and {_gib(available)} are there. {advice}. "
        "To run it all the same, set run.check_memory to false"
    )


def _ways(run: Footprint) -> list[tuple[str, int]]:
    """Changes to the settings, the mildest first, and what each would need."""
    one_by_one = replace(run, layer_graphs=False)  # which neither of the two goes with
    off = "training.layer_graphs false and " * run.layer_graphs
    small = replace(one_by_one, checkpointing=True, rows=1)
    changes = [
        (f"{off}training.checkpointing true", replace(one_by_one, checkpointing=True)),
        (f"{off}training.offload_activations true", replace(one_by_one, offload_activations=True)),
        (f"data.num_lanes {run.ranks}", replace(run, rows=1)),
        (f"{off}training.checkpointing true and data.num_lanes {run.ranks}", small),
        ("ds_configs/zero3.json with that", replace(small, stage=3)),
        ("ds_configs/zero3_offload_cpu.json with that", _offloaded(small)),
    ]
    return [(name, estimate_bytes(changed)) for name, changed in changes if changed != run]


def _offloaded(run: Footprint) -> Footprint:
    return replace(run, stage=3, offload_optimizer=True, offload_parameters=True)


def _share(run: Footprint, from_stage: int) -> int:
    return run.ranks if run.stage >= from_stage else 1


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
