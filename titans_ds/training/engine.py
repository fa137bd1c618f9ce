"""Engine: what the training loop asks of plain torch and of DeepSpeed alike, and the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titans_ds.training.checkpoints import torch_file as torch_checkpoint
from titans_ds.training.module import TrainingModule
from titans_ds.zero.adamw import SkippableAdamW


class Engine(Protocol):
    """Runs a TrainingModule. All methods are collectives: every rank calls them in the same order."""

    @property
    def module(self) -> TrainingModule:
        """The module whose forward pass is the loss: the grafted model with its training step."""

    @property
    def device(self) -> torch.device:
        """The device that batches have to be on."""

    def set_training(self, training: bool) -> None:
        """Training mode or evaluation mode."""

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward; see titans_ds.training.module.run_segment."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a loss, scaled so that the mean over ranks is the gradient; `last` in a step."""

    def gradients(self, names: list[str]) -> dict[str, Tensor | None]:
        """Whole gradients, averaged over ranks, after the last backward and before the step."""

    def step(self, lr: float, skip: bool) -> tuple[float, bool]:
        """Clip, update (unless `skip`, or a gradient is not finite on any rank) and clear the gradients.

        Returns:
            the gradient's global norm before clipping; whether parameters changed.
        """

    def parameters(self, names: list[str]) -> dict[str, Tensor]:
        """Whole parameters on the CPU, on rank 0; empty on the others."""

    def optimizer_state_bytes(self) -> int:
        """Bytes of optimizer state on this rank."""

    def save(self, folder: Path) -> None:
        """Write trained parameters and optimizer into a folder that exists.

        Raises:
            CheckpointError, or any error of writing: on the ranks that can't; the others are not held up.
        """

    def load(self, folder: Path, universal: bool) -> None:
        """The inverse of `save`, on an engine that was just made; `universal`: in DeepSpeed's universal format."""


class TorchEngine:
    """Plain torch in one process: the reference of the arithmetic, and what single-device programs use.

    Parameters that are not fp32 get fp32 copies for the optimizer, as under DeepSpeed.

    Args:
        module: to train.
        optimizer: over the module's trainable parameters.
        clip: greatest gradient norm; 0 for none.
        device: where the module is.
    """

    def __init__(self, module: TrainingModule, optimizer: SkippableAdamW, clip: float, device: torch.device) -> None:
        self.optimizer, self.clip = optimizer, clip
        self._module, self._device = module, device
        self._masters: list[tuple[nn.Parameter, nn.Parameter]] = []
        for group in optimizer.param_groups:
            group["params"] = [self._master(p) for p in group["params"]]

    @property
    def module(self) -> TrainingModule:
        """The module whose forward pass is the loss: the grafted model with its training step."""
        return self._module

    @property
    def device(self) -> torch.device:
        """The device that batches have to be on."""
        return self._device

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype not in (torch.bfloat16, torch.float16):
            return parameter
        master = nn.Parameter(parameter.detach().float())
        self._masters.append((parameter, master))
        return master

    def set_training(self, training: bool) -> None:
        """Training mode or evaluation mode."""
        self.module.train(training)

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward."""
        return self.module(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def gradients(self, names: list[str]) -> dict[str, Tensor | None]:
        """Gradients by parameter name."""
        return {name: self.module.get_parameter(name).grad for name in names}

    def step(self, lr: float, skip: bool) -> tuple[float, bool]:
        """Clip, update and clear the gradients."""
        for parameter, master in self._masters:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.clip or float("inf")))
        self.optimizer.prepare(lr, skip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for parameter, _ in self._masters:  # a walk over all modules takes milliseconds, and the device waits
            parameter.grad = None
        self._copy_masters()
        return norm, self.optimizer.applied

    def parameters(self, names: list[str]) -> dict[str, Tensor]:
        """Parameters on the CPU, in the precision of the optimizer."""
        masters = {id(p): m for p, m in self._masters}
        found = {name: self.module.get_parameter(name) for name in names}
        return {name: masters.get(id(p), p).detach().cpu().clone() for name, p in found.items()}

    def optimizer_state_bytes(self) -> int:
        """Bytes of optimizer state that this process holds."""
        return self.optimizer.state_bytes()

    def named_masters(self) -> dict[str, nn.Parameter]:
        """What the optimizer updates, by the parameter's name in the module."""
        masters = {id(p): m for p, m in self._masters}
        return {n: masters.get(id(p), p) for n, p in self.module.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Write trained parameters and optimizer state into a folder of a checkpoint."""
        torch_checkpoint.save(folder, self.named_masters(), self.optimizer)

    def load(self, folder: Path, universal: bool) -> None:
        """The inverse of `save`; there is nothing universal about it."""
        torch_checkpoint.load(folder, self.named_masters(), self.optimizer)
        self._copy_masters()

    def _copy_masters(self) -> None:
        if self._masters:
            narrow, wide = ([p.data for p in side] for side in zip(*self._masters, strict=True))
            torch._foreach_copy_(narrow, wide)
