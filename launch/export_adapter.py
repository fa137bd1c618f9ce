"""Turn a checkpoint into an adapter folder, and into a model folder where the base model was trained, too.

    python launch/export_adapter.py RUN --out FOLDER [--base PATH_OR_HUB_ID]

RUN is a run folder, or one of its checkpoints. The result loads with titans_ds.TitansModel.from_pretrained, without
DeepSpeed. Whether code or pickles are trusted is said by the options alone, not by the checkpoint's configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only its own folder is on the path

import torch
import transformers
from torch import Tensor

from launch.arguments import parse
from titans_ds.errors import CheckpointError
from titans_ds.files import Kind, atomic_folder, check_folder
from titans_ds.graft.adapter import CONFIG_FILE
from titans_ds.program import program, some_text
from titans_ds.training import build
from titans_ds.training.checkpoints import files
from titans_ds.training.checkpoints import torch_file as torch_checkpoint
from titans_ds.training.checkpoints.checkpoint import Found
from titans_ds.training.checkpoints.resume import TRUST_HELP, check_loadable, has_pickles, open_checkpoint
from titans_ds.training.engine import TorchEngine
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.settings import TrainConfig

_EXPORT = Kind("an exported adapter", f"adapter/{CONFIG_FILE}")


@program("nothing was written; run the same command again")
def main(argv: list[str]) -> None:
    """Run the program; returns its exit code, 2 for an error that the user can mend."""
    transformers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(prog="launch/export_adapter.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="run folder, or a checkpoint in it")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write adapter/ (and model/) into; must be new"
    )
    parser.add_argument("--base", type=some_text, help="the base model, where it has moved since")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    parser.add_argument("--allow-pickle", action="store_true", help="also load base weights that are not safetensors")
    parser.add_argument("--trust-checkpoint", action="store_true", help=TRUST_HELP)
    options = parser.parse_args(argv)
    trusted = {"trust_remote_code": options.trust_remote_code, "allow_pickle": options.allow_pickle}
    found = open_checkpoint(options.checkpoint)
    for folder in export(found, options.out, options.base, options.trust_checkpoint, **trusted):
        print(f"wrote {folder}")


def export(
    found: Found, out: Path, base: str | None = None, trust_checkpoint: bool = False, **trusted: bool
) -> list[Path]:
    """Write adapter/ and model/, as a run does at its end.

    Args:
        found: the checkpoint.
        out: must not exist, or be empty.
        base: in place of the base model that the checkpoint names.
        trust_checkpoint: load its pickles whatever they import.
        trusted: model.trust_remote_code and model.allow_pickle, both off where not given.

    Returns:
        the folders written.

    Raises:
        CheckpointError: `out` is not empty, or the checkpoint does not fit its own configuration or is not to be
            trusted.
    """
    if check_folder(out, _EXPORT).is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose a new folder")
    check_loadable(found, trust_checkpoint, "give --trust-checkpoint")
    config = _config(found, base, **trusted)
    model = build.load_base(config.model, config.training.seed, _vocabulary(found))
    module = build.make_module(model, config)
    engine = TorchEngine(module, make_optimizer(module, config.optimizer), 0.0, torch.device("cpu"))
    _fill(engine, trained_parameters(found), found)
    with atomic_folder(out, _EXPORT) as folder:
        build.save_trained(engine, folder, config, build.load_tokenizer(config.model), writes=True)
    return sorted(out.iterdir())


def trained_parameters(found: Found) -> dict[str, Tensor]:
    """Whole trained parameters of a checkpoint by name in the training module, fp32."""
    folder = found.path / files.ENGINE
    if not has_pickles(found):
        return torch_checkpoint.trained_parameters(folder)
    from titans_ds.zero import checkpoint

    return checkpoint.trained_parameters(folder, found.universal)


def _config(found: Found, base: str | None, trust_remote_code: bool = False, allow_pickle: bool = False) -> TrainConfig:
    """Of the run, but for what an export without a GPU can't have, another base, and what the user trusts."""
    config, _ = parse(["--config", str(found.path / files.CONFIG)])
    model = dataclasses.replace(config.model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    if base is not None:
        model = dataclasses.replace(model, base=base, architecture=None)
    training = dataclasses.replace(config.training, layer_graphs=False)
    return dataclasses.replace(config, model=model, training=training)


def _vocabulary(found: Found) -> int:
    return int(found.marker["vocab_size"])


def _fill(engine: TorchEngine, values: dict[str, Tensor], found: Found) -> None:
    masters, ranks = engine.named_masters(), found.marker["world_size"]
    flat = found.universal and found.marker["identity"].get("engine") == "ZeRO-3"
    missing = sorted(set(masters) - set(values))
    if missing:
        raise CheckpointError(
            f"{found.path} lacks {len(missing)} parameters, such as {missing[0]}; it is of another model"
        )
    with torch.no_grad():
        for name, master in masters.items():
            value, size = values[name], master.numel()
            # ZeRO-3's universal form is flat, and padded with zeros to a multiple of the ranks that wrote it.
            padded = [-(-size // ranks) * ranks]
            if flat and list(value.shape) == padded and not value[size:].any():
                value = value[:size].view_as(master)
            if value.shape != master.shape:
                raise CheckpointError(
                    f"{name} has shape {list(value.shape)} in {found.path}, and {list(master.shape)} by its "
                    f"{files.CONFIG} and the base model; give the base model that it was trained on (--base)"
                )
            master.copy_(value)


if __name__ == "__main__":
    sys.exit(main())
