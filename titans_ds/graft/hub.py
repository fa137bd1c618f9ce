"""Adapters on the Hugging Face hub, or another that HF_ENDPOINT names: up and down, and the card that tells of one."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from titans_ds.errors import AdapterError, reason_of
from titans_ds.reading import strict_record
from titans_ds.zero.gathering import whole_numel

if TYPE_CHECKING:
    from titans_ds.graft.titans_model import TitansModel

_FILES = ["titans_config.json", "titans_memory.safetensors", "README.md", "lora/*"]
_FETCHED = [*_FILES, "adapter_config.json"]  # the last one shows what it is where it is no adapter of this version

_CARD_MARK = "<!-- save_pretrained writes this file anew unless you take this line out -->"
MODE_NAMES = {  # of held-out losses, by mode of the memory
    "memory": "own memory",
    "wrong": "another repository's memory",
    "empty": "empty memory",
    "ablated": "memory ablated",
    "before": "before training",
}


@strict_record
class Mean(TypedDict):
    """Over repositories; null where it was no finite number."""

    mean: float | None
    standard_error: float | None


@strict_record
class Provenance(TypedDict, total=False):
    """What an adapter was trained on, and the last losses measured on held-out repositories, by mode of the memory."""

    data: str
    split: str
    steps: int
    repositories: int
    losses: dict[str, Mean]
    minus_memory: dict[str, Mean]


def is_repository(name: str) -> bool:
    """Whether a name reads as OWNER/NAME."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter: the one of this name, or a copy of the hub's repository OWNER/NAME.

    Args:
        name: path, or repository.
        revision: branch, tag or commit of the repository.

    Raises:
        AdapterError: there is no such folder, and the hub does not give such a repository.
    """
    folder = Path(name)
    if folder.exists() or not is_repository(str(name)):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=_FETCHED))
    except Exception as error:  # of the network, the hub and the cache
        reason = reason_of(error)[:300]
        raise AdapterError(
            f"{name} is no folder here, and the hub gives no repository of that name ({reason}); expected a folder "
            "that save_pretrained wrote, or OWNER/NAME of one that push_to_hub made"
        ) from error


def push(model: TitansModel, repository: str, private: bool | None, revision: str | None, message: str) -> str:
    """Upload the adapter, LoRA and model card as one commit; returns its address. See TitansModel.push_to_hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repository, folder_path=folder, revision=revision, commit_message=message, allow_patterns=_FILES
            )
        except Exception as error:
            reason = reason_of(error)[:300]
            raise AdapterError(
                f"the hub did not take {repository} ({reason}); expected OWNER/NAME that your token may write: "
                "`hf auth login`, or HF_TOKEN"
            ) from error
    return str(getattr(done, "commit_url", done))


def is_our_card(path: Path) -> bool:
    """Whether a model card was made here, and not changed by somebody who took its last line out."""
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace").rstrip().endswith(_CARD_MARK)


def card(model: TitansModel, base: dict[str, Any]) -> str:
    """The README.md of an adapter: base, licences, memory, data, measured losses, and how to use it.

    Args:
        model: the grafted model.
        base: its base, as titans_config.json describes it.
    """
    graft = model.graft
    learned = sum(whole_numel(p) for _, p in model.titans_parameters())
    name = base["name_or_path"] or "PATH_OF_THE_BASE_MODEL"  # quoted below: the card's lines are there to be run
    stored = base.get("quantization") or {}
    bits = f"It was trained on a base quantised by {stored.get('quant_method', 'another package')}. " if stored else ""
    return f"""---
library_name: titans-ds
tags: [titans, test-time-training, memory]
{"base_model: " + name if is_repository(name) else "# base_model: OWNER/NAME"}
# license: SPDX identifier; this adapter holds no weights of the base model, whose licence holds for that
---
# Test-time memory for {base["name_or_path"] or "a " + str(base["model_type"]) + " model"}

A memory that is written at test time, grafted onto layers {model.layer_indices} of a {base["model_type"]} model with
{base["num_hidden_layers"]} layers of width {base["hidden_size"]}. {model.memory_summary()}.
Injection: {graft.injection}; gate floor {graft.gate_floor} ({graft.gate_floor_mode}). Learned parameters: {learned:,}.
{bits}The base model's licence: {_license_of(name) or "see its own card"}.

{_training(model.provenance)}

```python
import titans_ds

model = titans_ds.TitansModel.from_pretrained({json.dumps(name)}, "PATH_OF_THIS_FOLDER")
with model.memory_session(batch_size=1) as memory:
    model.prime(snippet_ids, memory)
    model.generate(prompt_ids, memory=memory)
```

Compare every result with `model.disable_memory()` and with a memory primed on another repository before you believe it.

{_CARD_MARK}
"""


def _license_of(base: str) -> str | None:
    """What the card in a base model's folder gives as its licence."""
    try:
        text = (Path(base) / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    front = text.split("\n---", 1)[0] if text.startswith("---\n") else ""
    found = re.search(r"^license: *([\w.+-]+) *$", front, re.MULTILINE)
    return found[1] if found else None


def _training(told: Provenance) -> str:
    """What it was trained on, and a table of the losses; says so where nothing is known."""
    if not told:
        return "Training data and measured losses: not recorded."
    steps = f" in {told['steps']:,} steps" if "steps" in told else ""
    lines = [
        f"Trained on {json.dumps(told.get('data', 'unknown data'))} (split {json.dumps(told.get('split'))}){steps}."
    ]
    losses = told.get("losses", {})
    if not losses:
        return f"{lines[0]} Measured losses: not recorded."
    lines += ["", f"Held-out loss in nats a token, mean over {told.get('repositories', 'some')} repositories:", ""]
    lines += ["| memory | loss ± standard error | minus own memory |", "|---|---|---|"]
    for mode in (mode for mode in MODE_NAMES if mode in losses):
        difference = told.get("minus_memory", {}).get(mode)
        lines.append(f"| {MODE_NAMES[mode]} | {_number(losses[mode])} | {_number(difference) if difference else ''} |")
    return "\n".join(lines)


def _number(value: Mean) -> str:
    mean, error = ("not finite" if part is None else f"{part:.4f}" for part in (value["mean"], value["standard_error"]))
    return f"{mean} ± {error}"
