"""Turn a checkpoint into an adapter folder, and into a model folder where the base model was trained, too.

    python launch/export_adapter.py RUN --out FOLDER [--base PATH_OR_HUB_ID]

RUN is a run folder, or one of its checkpoints. The result loads with titans_ds.TitansModel.from_pretrained, without
DeepSpeed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only its own folder is on the path

import torch
import transformers
from torch import Tensor

from launch.arguments import parse
from titans_ds.errors import CheckpointError, TitansError
from titans_ds.training import build, torch_checkpoint
from titans_ds.training import checkpoint_files as files
from titans_ds.training.checkpoint import Found
from titans_ds.training.engine import TorchEngine
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.resume import has_pickles, open_checkpoint, warn_of_pickles
from titans_ds.training.settings import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code, 2 for an error that the user can mend."""
    transformers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(prog="launch/export_adapter.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="run folder, or a checkpoint in it")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write adapter/ (and model/) into; must be new"
    )
    parser.add_argument("--base", help="the base model, where it has moved since")
    options = parser.parse_args(argv)
    try:
        for folder in export(open_checkpoint(options.checkpoint), options.out, options.base):
            print(f"wrote {folder}")
    except TitansError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(found: Found, out: Path, base: str | None = None) -> list[Path]:
    """Write adapter/ and model/, as a run does at its end.

    Args:
        found: the checkpoint.
        out: must not exist, or be empty.
        base: in place of the base model that the checkpoint names.

    Returns:
        the folders written.

    Raises:
        CheckpointError: `out` is not empty, or the checkpoint does not fit its own configuration.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is not empty; choose a new folder")
    config = _config(found, base)
    model = build.load_base(config.model, config.training.seed, _vocabulary(found))
    module = build.make_module(model, config)
    engine = TorchEngine(module, make_optimizer(module, config.optimizer), 0.0, torch.device("cpu"))
    _fill(engine, trained_parameters(found), found)
    out.mkdir(parents=True, exist_ok=True)
    build.save_trained(engine, out, config, build.load_tokenizer(config.model), writes=True)
    return sorted(out.iterdir())


def trained_parameters(found: Found) -> dict[str, Tensor]:
    """Whole trained parameters of a checkpoint by name in the training module, fp32."""
    folder = found.path / files.ENGINE
    if not has_pickles(found):
        return torch_checkpoint.trained_parameters(folder)
    from titans_ds.zero import checkpoint

    warn_of_pickles(found)
    return checkpoint.trained_parameters(folder, found.universal)


def _config(found: Found, base: str | None) -> TrainConfig:
    """Of the run, but for what an export without a GPU can't have, and another base."""
    config, _ = parse(["--config", str(found.path / files.CONFIG)])
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, layer_graphs=False))
    return config if base is None else dataclasses.replace(config, model=dataclasses.replace(config.model, base=base))


def _vocabulary(found: Found) -> int:
    return int(found.marker["vocab_size"])


def _fill(engine: TorchEngine, values: dict[str, Tensor], found: Found) -> None:
    masters = engine.named_masters()
    missing = sorted(set(masters) - set(values))
    if missing:
        raise CheckpointError(
            f"{found.path} lacks {len(missing)} parameters, such as {missing[0]}; it is of another model"
        )
    with torch.no_grad():
        for name, master in masters.items():
            # ZeRO-3's universal form is flat, and padded to the ranks that wrote it.
            master.copy_(values[name].flatten()[: master.numel()].view_as(master))


if __name__ == "__main__":
    sys.exit(main())
