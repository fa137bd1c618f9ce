"""What benchmarks/memory_layer.py compares this project with: installed by the user, or pointed to; never copied."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory_layer_cases import Shape, leaf, stepper


class SiluMlp(nn.Module):
    """f_W of this project as a memory model of titans-pytorch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w0, self.w1 = (nn.Parameter(torch.randn(dim, dim) / dim**0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.silu(x @ self.w0.mT) @ self.w1.mT


def titans_pytorch(shape: Shape, dtype: torch.dtype, compiled: bool) -> Callable[[torch.device], object]:
    """Its NeuralMemory with the same MLP, activation, gates and momentum."""

    def make(device: torch.device) -> Callable[[bool], None]:
        from titans_pytorch import NeuralMemory

        memory = NeuralMemory(
            shape.dim,
            chunk_size=shape.chunk,
            heads=shape.heads,
            dim_head=shape.head_dim,
            model=SiluMlp(shape.head_dim),
            pre_rmsnorm=False,
            qk_rmsnorm=True,
            activation=nn.SiLU(),
            mem_model_norm_add_residual=False,
            default_step_transform_max_lr=0.1,
        ).to(device, dtype)
        run = torch.compile(memory) if compiled else memory
        x = leaf(shape.batch, shape.tokens, shape.dim, device=device, dtype=dtype)
        return stepper(lambda: run(x)[0], lambda: [x, *memory.parameters()])

    return make


@dataclass(frozen=True)
class Files:
    """Where the user's copies of peers' code lie; None: rows of that peer are left out.

    Args:
        lact: LaCT's lact_llm/lact_model/ttt_operation.py.
        ttt_lm: ttt-lm-pytorch's ttt.py.
    """

    lact: Path | None = None
    ttt_lm: Path | None = None


def _load(path: Path, name: str) -> ModuleType:
    """A user's copy of a file, as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile, and dataclasses, look there
    spec.loader.exec_module(module)
    return module


def lact(path: Path, shape: Shape, hidden: int, use_muon: bool) -> Callable[[torch.device], object]:
    """`block_causal_lact_swiglu` of a user's copy of LaCT's ttt_operation.py."""

    def make(device: torch.device) -> Callable[[bool], None]:
        module = _load(path, "lact_ttt_operation")
        rows, d = shape.batch * shape.heads, shape.head_dim
        q, k, v = (leaf(rows, shape.tokens, d, device=device, scale=d**-0.5) for _ in range(3))
        w = [leaf(rows, *s, device=device, scale=s[1] ** -0.5) for s in ((hidden, d), (d, hidden), (hidden, d))]
        rates = [leaf(rows, shape.tokens, 1, device=device, dtype=torch.float32, scale=0.01) for _ in range(3)]

        def forward() -> Tensor:
            return module.block_causal_lact_swiglu(*w, q, k, v, *rates, chunk_size=shape.chunk, use_muon=use_muon)

        return stepper(forward, lambda: [q, k, v, *w, *rates])

    return make


def ttt_lm(path: Path, shape: Shape) -> Callable[[torch.device], object]:
    """`TTTLinear` of a user's copy of ttt-lm-pytorch's ttt.py: the layer, projections to output."""

    def make(device: torch.device) -> Callable[[bool], None]:
        module = _load(path, "ttt_lm_pytorch")
        config = module.TTTConfig(
            hidden_size=shape.dim,
            num_attention_heads=shape.heads,
            mini_batch_size=shape.chunk,
            intermediate_size=2 * shape.dim,
            num_hidden_layers=1,
        )
        layer = module.TTTLinear(config, layer_idx=0).to(device, torch.bfloat16)
        x = leaf(shape.batch, shape.tokens, shape.dim, device=device)
        places = torch.arange(shape.tokens, device=device).expand(shape.batch, -1)
        return stepper(lambda: layer(x, position_ids=places), lambda: [x, *layer.parameters()])

    return make


def ttt_linear(shape: Shape) -> Callable[[torch.device], object]:
    """fla's TTT-Linear, chunk by chunk of 16 tokens; its backward stops at its own step sizes."""

    def make(device: torch.device) -> Callable[[bool], None]:
        chunk_ttt_linear = importlib.import_module("fla.ops.ttt").chunk_ttt_linear
        split = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
        q, k, v = (leaf(*split, device=device, scale=shape.head_dim**-0.5) for _ in range(3))
        scale, bias = (leaf(shape.heads, shape.head_dim, device=device) for _ in range(2))
        eta = leaf(*split[:3], 1, device=device, scale=0.01)

        def forward() -> Tensor:
            return chunk_ttt_linear(q, k, v, scale, bias, eta, chunk_size=shape.chunk)[0]

        return stepper(forward, lambda: [q, k, v, scale, bias, eta])

    return make
