"""The models of a control: a small random causal LM with a memory, and the same without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import titans_ds
from titans_ds.graft.titans_model import TitansModel
from titans_ds.training.engine import TorchEngine
from titans_ds.training.module import PlainModel, TrainingModule
from titans_ds.training.optimizer import make_optimizer

from ..errors import EvalError
from .settings import ControlConfig

_LOSS_CHUNK = 1 << 20  # all logits at once: the vocabulary is small


def with_memory(config: ControlConfig, vocab_size: int, seed: int, device: torch.device) -> TorchEngine:
    """A fresh grafted model, everything in it trainable."""
    torch.manual_seed(seed)
    base = _base(config.architecture, vocab_size)
    model = titans_ds.attach(base, config.graft, freeze_base=False)
    if config.convolution_std is not None and config.graft.convolves:
        _mix_taps(model, config.convolution_std)
    if config.first_order_parts or config.order == "first":
        _freeze(model)
    return _engine(model, config, device)


def _freeze(model: TitansModel) -> None:
    """Leave what gets no gradient at first order as it is; W_0 as well, which every window starts from."""
    for _, parameter in model.write_only_parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.titans_parameters():
        if "initial_w" in name:
            parameter.requires_grad_(False)


def _mix_taps(model: TitansModel, std: float) -> None:
    for grafted in model.memories.values():
        keys, queries = grafted.memory.key_convolution, grafted.memory.query_convolution
        taps = torch.randn_like(keys.weight) * std
        keys.weight.data.copy_(taps)
        queries.weight.data.copy_(taps)


def with_full_context(config: ControlConfig, vocab_size: int, seed: int, device: torch.device) -> TorchEngine:
    """The same model without a memory, for contexts in its window."""
    torch.manual_seed(seed)
    return _engine(PlainModel(_base({**config.architecture, **config.full_context}, vocab_size)), config, device)


def _base(architecture: dict[str, Any], vocab_size: int) -> nn.Module:
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    try:
        settings = AutoConfig.for_model(**{"vocab_size": vocab_size, **special, **architecture})
        model: nn.Module = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    except (TypeError, ValueError, KeyError) as error:
        raise EvalError(f"architecture {architecture} is not one that transformers can make: {error}") from error
    return model.float()


def _engine(model: TitansModel | PlainModel, config: ControlConfig, device: torch.device) -> TorchEngine:
    module = TrainingModule(model, _LOSS_CHUNK).to(device).train()
    return TorchEngine(module, make_optimizer(module, config.optimizer), config.optimizer.clip, device)
