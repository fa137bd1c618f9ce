"""DeepSpeed behind the training loop's Engine protocol (titans_ds.training.engine), and the start of its ranks.

deepspeed is imported when it is first used.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from titans_ds.zero import slurm
from titans_ds.zero.adamw import SkippableAdamW
from titans_ds.zero.gathering import mark_whole, prefetch_whole
from titans_ds.zero.heartbeat import start_heartbeat
from titans_ds.zero.launcher import watch_launcher
from titans_ds.zero.ports import free_port
from titans_ds.zero.start_errors import check_mpi, explain

Module = TypeVar("Module", bound=nn.Module)
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
_TIMEOUT = timedelta(hours=2)  # rank 0 may pack a corpus while the others wait


def start_ranks(timeout: timedelta = _TIMEOUT) -> None:
    """Start torch.distributed through DeepSpeed: for this process alone, or under a launcher, with which the rank ends.

    Args:
        timeout: of the start, and of every collective.

    Raises:
        ConfigError: the port is in use; or mpirun started the process, and there is no MPI for Python; or not all ranks
            came in time.
    """
    deepspeed = import_deepspeed()
    if slurm.under_srun():
        os.environ.update(slurm.place())
    if any(name in os.environ for name in _LOCAL_SIZES):
        watch_launcher()
    if "RANK" not in os.environ and _under_mpi():
        check_mpi()
    elif "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone)
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    _share_cores()
    port = int(os.environ.get("MASTER_PORT", "29500"))
    try:
        deepspeed.init_distributed(timeout=timeout, verbose=False, distributed_port=port)
    except Exception as error:
        raise explain(error) from error
    local_device()  # collectives of objects go through the current GPU, which is the first one on every rank until now
    start_heartbeat()


def _share_cores() -> None:
    """Ranks of one host share its cores; each taking all of them slows every one down many times over."""
    ranks_here = next((int(os.environ[n]) for n in _LOCAL_SIZES if n in os.environ), 1)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // ranks_here, 1))


def local_device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator.set_device(index)
    return torch.device(accelerator.device_name(index))


def import_deepspeed() -> Any:
    """The deepspeed module, quiet, and without the op that its CPU backend would compile for minutes at first use."""
    logger = logging.getLogger("DeepSpeed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logger.setLevel(logging.ERROR)  # it warns about a missing GPU, and about every optimizer that is not its own
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # A killed build leaves a lock that every later run waits for; gloo does without the op.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer without torch.compile.

    DeepSpeed imports it at every start, to compare its type with the optimizer's. Preparing its kernels for
    torch.compile takes seconds of every rank, and no run here has that optimizer.
    """
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    before, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = before


class DeepSpeedEngine(Generic[Module]):
    """Runs a module under ZeRO 0 to 3.

    Args:
        module: to train; at stage 3 its parameters are partitioned from here on.
        optimizer: over the module's trainable parameters.
        config: completed DeepSpeed configuration, see titans_ds.zero.config.
        device: of this rank.
    """

    def __init__(self, module: Module, optimizer: SkippableAdamW, config: dict[str, Any], device: torch.device) -> None:
        self._module, self._device, self.optimizer = module, device, optimizer
        optimizer.agree = lambda flag: _any_rank(flag, device)
        zero = config.get("zero_optimization", {})
        if zero.get("stage") == 3:
            config = {**config, "zero_optimization": prefetch_whole(zero, mark_whole(module))}
        deepspeed = import_deepspeed()
        _import_muon()
        self._engine = deepspeed.initialize(model=module, optimizer=cast(Any, optimizer), config=config)[0]

    @property
    def module(self) -> Module:
        """The module that DeepSpeed's engine wraps."""
        return self._module

    @property
    def device(self) -> torch.device:
        """The device that batches have to be on."""
        return self._device

    def set_training(self, training: bool) -> None:
        """Training mode or evaluation mode."""
        self._engine.train(training)

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a loss; see `backward`."""
        backward(self._engine, loss, last)

    def gradients(self, names: list[str]) -> dict[str, Tensor | None]:
        """Whole gradients by parameter name, fp32, gathered from all ranks."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(self.module.get_parameter(name)) for name in names}

    def step(self, lr: float, skip: bool) -> tuple[float, bool]:
        """Clip, update and clear the gradients; returns their global norm, and whether parameters changed."""
        self.optimizer.prepare(lr, skip)
        before = self._plain_norm()
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if before is None else before
        return float(norm), self.optimizer.applied

    def _plain_norm(self) -> float | None:
        """The gradient's norm where DeepSpeed knows none: at ZeRO-0 in fp32, with whole gradients on every rank."""
        if hasattr(self._engine.optimizer, "_global_grad_norm"):
            return None
        gradients = [p.grad for p in self.module.parameters() if p.requires_grad and p.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def parameters(self, names: list[str]) -> dict[str, Tensor]:
        """Whole parameters on the CPU, on rank 0, in the precision of the optimizer."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole = {}
        for name in names:
            parameter = self.module.get_parameter(name)
            value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if value is None:
                with gathered([parameter]):
                    value = parameter.detach().clone()
            if self._engine.global_rank == 0:
                whole[name] = value.detach().cpu().clone()
        return whole

    def close(self) -> None:
        """Free what DeepSpeed holds; the engine runs no more, nor does a module that ZeRO-3 has partitioned."""
        self._engine.destroy()
        restore_linear()
        for parameter in self.module.parameters():  # which DeepSpeed goes on holding
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)

    def optimizer_state_bytes(self) -> int:
        """Bytes of optimizer state on this rank."""
        return self.optimizer.state_bytes()

    def save(self, folder: Path) -> None:
        """Write trained parameters and optimizer; see titans_ds.zero.checkpoint."""
        from titans_ds.zero import checkpoint

        checkpoint.save(self._engine, folder)

    def load(self, folder: Path, universal: bool) -> None:
        """The inverse of `save`, on an engine that was just made. Files are pickles.

        Args:
            folder: of the checkpoint's engine part.
            universal: it is in the universal format; the engine's configuration must have said so, too.
        """
        from titans_ds.zero import checkpoint

        checkpoint.load(self._engine, folder, universal)


def backward(engine: Any, loss: Tensor, last: bool) -> None:
    """Add the gradients of a loss in DeepSpeed's engine, which averages over ranks, and must not divide by the passes.

    Args:
        engine: of deepspeed.initialize.
        loss: a scalar.
        last: before the step of the optimizer, which the caller takes.
    """
    # At stage 0 it does divide where the loss is itself an output of the module; a product is none.
    engine.backward(loss * 1, scale_wrt_gas=False)
    offloaded = engine.zero_offload_optimizer()
    if not last:
        engine.step()  # counts the pass; parameters change at the last one only
    elif offloaded is not None and offloaded.device != "none":
        # It has handed over only those parameters whose gradient came with the last pass.
        engine.optimizer.finalize_gradient_accumulation_boundary()


def restore_linear() -> None:
    """Undo ZeRO-3's exchange of torch.nn.functional.linear, which outlives its engine."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Init

    nn.functional.linear = getattr(Init, "linear_bk", nn.functional.linear)


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters are whole, for reading; nothing to do where ZeRO-3 has not partitioned them."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    with import_deepspeed().zero.GatheredParameters(partitioned):
        yield


def _any_rank(flag: Tensor, device: torch.device) -> Tensor:
    """Through the ranks' own devices: an offloaded optimizer's flag is on the CPU, where NCCL sends nothing."""
    flag = flag.float().to(device)
    torch.distributed.all_reduce(flag)
    return flag > 0


def _under_mpi() -> bool:
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"))
