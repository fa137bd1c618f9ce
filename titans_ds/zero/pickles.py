"""What a file of torch.save would import when it is loaded, found out without loading it.

DeepSpeed loads its checkpoints with torch.load(weights_only=False): a pickle in them can name any function there is,
and have it called. Those that DeepSpeed writes name a few classes of tensors and of its own; a file that names more
was made by something else.
"""

from __future__ import annotations

import pickletools
import re
from pathlib import Path

import torch

_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_ALLOWED = frozenset(
    {
        "collections OrderedDict",
        "torch Size",
        "torch Tensor",
        "torch device",
        "torch.storage UntypedStorage",
        "torch._tensor _rebuild_from_type_v2",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "deepspeed.runtime.fp16.loss_scaler LossScaler",
        "deepspeed.runtime.zero.config ZeroStageEnum",
        "deepspeed.utils.tensor_fragment fragment_address",
        *(f"torch {name}Storage" for name in _STORAGES),
        *(f"torch {name}" for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")),
    }
)
# Ways to import that torch.save does not use; what they import stands on the stack, or in a table elsewhere.
_INDIRECT = frozenset({"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "PERSID"})
# Other records, such as constants.pkl, make torch.load take the file for a program of TorchScript.
_RECORD = re.compile(
    r"data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)
_ZIP = b"PK\x03\x04"


def problem_of_pickle(path: Path) -> str | None:
    """What speaks against loading a file, as a sentence whose subject is the file; None where nothing does.

    Args:
        path: of a file that torch.load is going to be given.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP)) != _ZIP:  # torch.load would run it as a bare pickle
                return "is no file of torch.save"
        # The reader that torch.load uses: another one could be shown another data.pkl.
        reader = torch._C.PyTorchFileReader(str(path))
        records = reader.get_all_records()
        unknown = [name for name in records if not _RECORD.fullmatch(name)]
        if unknown or len(set(records)) < len(records):
            return f"holds {unknown[0] if unknown else 'a record twice'}, which no checkpoint does"
        for operation, argument, _ in pickletools.genops(reader.get_record("data.pkl")):
            if operation.name in _INDIRECT or (operation.name == "GLOBAL" and argument not in _ALLOWED):
                named = str(argument).replace(" ", ".") if operation.name == "GLOBAL" else "something by name"
                return f"imports {named}, which no checkpoint of this project needs"
    except Exception as error:  # whatever the two parsers say of a damaged file
        return f"can't be read ({type(error).__name__}: {error})"
    return None
