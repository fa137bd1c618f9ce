"""The model under evaluation: loading, forward passes on one of three paths, and priming.

Paths: `graft` (memory read), `ablation` (memory skipped, LoRA kept), `vanilla` (the base model, neither graft nor
LoRA).
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import titans_ds
from titans_ds.errors import UnsupportedModelError
from titans_ds.graft.placement import device_of
from titans_ds.memory import MemoryState
from titans_ds.training.speed.compiled import TRIED, compile_parts, works

from ..devices import device_named
from ..errors import EvalError
from .packed_attention import LIBRARY_PACKS, packed_queries
from .token_bytes import TokenBytes

PATHS = ("graft", "ablation", "vanilla")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_STORED_STATES = 64
_BOOL_MASK = ("sdpa", "titans_sdpa")  # attention implementations, by the mask of theirs that fixed shapes need
_ADDITIVE_MASK = ("eager", "titans_eager")
_READ = ("w", "tail_", "matrices", "prefix")  # what the names of a memory's tensors begin with that reads look at


@dataclass(frozen=True)
class ModelSettings:
    """What to load and where. `device` and `dtype` may be auto: the GPU in bfloat16, else the CPU in float32.

    `compile`: none; mlp fuses norms and MLPs of the base model (and DeltaNet's convolution); auto does on a GPU, if it
    knows the model's layers.
    """

    base: str
    adapter: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    compile: str = "none"

    def resolved_device(self) -> torch.device:
        """Return the device that is meant; EvalError where there is none such."""
        return device_named(self.device)

    def resolved_dtype(self) -> torch.dtype:
        """Return the type of the base model's weights; EvalError for an unknown name."""
        if self.dtype == "auto":
            return torch.bfloat16 if self.resolved_device().type == "cuda" else torch.float32
        if self.dtype not in _DTYPES:
            raise EvalError(f"Unknown dtype {self.dtype!r}. Expected auto or one of {', '.join(_DTYPES)}.")
        return _DTYPES[self.dtype]

    def resolved_compile(self) -> str:
        """Return mlp or none: mlp on a GPU, where torch.compile works, for models whose layers are known."""
        if self.compile != "auto":
            return self.compile
        device = self.resolved_device()
        known = device.type == "cuda" and _model_type(self.base, self.trust_remote_code) in TRIED
        return "mlp" if known and works(device) else "none"


def _model_type(base: str, trust_remote_code: bool) -> str | None:
    from transformers import AutoConfig

    try:
        return str(AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).model_type)
    except Exception:  # of many kinds for a damaged configuration; said when the model is loaded
        return None


def load_tokenizer(base: str, trust_remote_code: bool = False) -> Any:
    """Return the base model's tokenizer; EvalError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged folder raises any kind
        raise EvalError(
            f"No tokenizer in {base!r}: {_first_line(error)}. Give a Hugging Face folder or hub id."
        ) from error


def load_base(settings: ModelSettings) -> Any:
    """Return the base model on its device, in evaluation mode; EvalError where it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            settings.base,
            dtype=settings.resolved_dtype(),
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as error:  # cut or garbled weights, sizes below 0: any kind
        raise EvalError(
            f"Cannot load {settings.base!r}: {_first_line(error)}. Give a causal LM's folder or id."
        ) from error
    return model.to(settings.resolved_device()).eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Subject:
    """A loaded model with its tokenizer. Make one with `load` or, for a model at hand, `of`."""

    def __init__(self, base_model: Any, titans_model: titans_ds.TitansModel | None, tokenizer: Any) -> None:
        self.base_model = base_model
        self.titans_model = titans_model
        self.tokenizer = tokenizer
        self.vocabulary = TokenBytes(tokenizer)
        self.device = device_of(base_model)
        self._accepted = set(inspect.signature(base_model.forward).parameters)
        self._states: OrderedDict[tuple[str, ...], MemoryState] = OrderedDict()
        self._path = "vanilla"
        self.num_tokens_primed = 0

    @classmethod
    def load(cls, settings: ModelSettings, vanilla: bool) -> Subject:
        """Load the base model, and the adapter unless `vanilla`."""
        tokenizer = load_tokenizer(settings.base, settings.trust_remote_code)
        base_model = load_base(settings)
        if vanilla or settings.adapter is None:
            subject = cls(base_model, None, tokenizer)
        else:
            if not Path(settings.adapter).is_dir():
                raise EvalError(f"The adapter {settings.adapter!r} is no folder; expected what save_pretrained wrote.")
            grafted = titans_ds.TitansModel.from_pretrained(base_model, settings.adapter).eval()
            subject = cls(grafted.base_model, grafted.to(base_model.device), tokenizer)
        if settings.resolved_compile() == "mlp":
            subject.compile()
        return subject

    def compile(self) -> None:
        """Fuse what stands between the base model's products, for batches of any shape; EvalError where its layers are
        not known.
        """
        try:
            compile_parts(self.base_model, "mlp", shapes_vary=True)
        except UnsupportedModelError as error:
            raise EvalError(f"--compile mlp: {error}. Or give --compile none.") from error

    @property
    def max_positions(self) -> int | None:
        """The longest input that the model's configuration allows, where it says."""
        config = self.base_model.config
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(text_config, "max_position_embeddings", None)

    @property
    def eos_tokens(self) -> frozenset[int]:
        """Tokens that end a text."""
        stated = getattr(self.base_model.generation_config, "eos_token_id", None)
        found = stated if isinstance(stated, list) else [stated]
        return frozenset(token for token in [*found, self.tokenizer.eos_token_id] if token is not None)

    @contextlib.contextmanager
    def on_path(self, path: str, **controls: Any) -> Iterator[None]:
        """Inside, forward passes and priming take this path, under these controls (`TitansModel.controls`)."""
        if path not in PATHS:
            raise EvalError(f"Unknown path {path!r}. Expected one of {', '.join(PATHS)}.")
        if path != "vanilla" and self.titans_model is None:
            raise EvalError("This mode needs a grafted model. Give one with --adapter, or run vanilla, vanilla_concat.")
        if path == "vanilla" and self.titans_model is not None:
            raise EvalError("Vanilla modes need the base model by itself; load it without the adapter.")
        before, self._path = self._path, path
        self._states.clear()
        with contextlib.ExitStack() as stack:
            if path == "ablation":
                stack.enter_context(self.grafted.disable_memory())
            if controls:
                stack.enter_context(self.grafted.controls(**controls))
            try:
                yield
            finally:
                self._path = before
                self._states.clear()

    @property
    def grafted(self) -> titans_ds.TitansModel:
        """The grafted model; EvalError where there is none."""
        if self.titans_model is None:
            raise EvalError("This needs a grafted model. Give one with --adapter.")
        return self.titans_model

    # --- forward -----------------------------------------------------------------------------------------------------

    def __call__(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, memory: Any, last_only: bool
    ) -> tuple[Tensor, Any, Any]:
        """One forward pass; see `jobs.Forward`."""
        extra: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if "position_ids" in self._accepted or "kwargs" in self._accepted:
            extra["position_ids"] = positions
        if last_only and "logits_to_keep" in self._accepted:
            extra["logits_to_keep"] = 1
        with contextlib.nullcontext() if LIBRARY_PACKS or mask.dim() == 2 else packed_queries():
            if self._path == "vanilla":
                output = self.base_model(input_ids=ids, attention_mask=mask, **extra)
            else:
                output, memory = self.grafted.read(ids, attention_mask=mask, memory=memory, **extra)
        logits = output.logits[:, -1:] if last_only else output.logits
        return logits, output.past_key_values, memory

    def join_memory(self, first: MemoryState, second: MemoryState) -> MemoryState:
        """Return one batch of memory states out of two."""
        return MemoryState.concatenate([first, second])

    # --- steps of fixed shapes ---------------------------------------------------------------------------------------

    def fixed_shape_obstacle(self) -> str | None:
        """Why this model cannot decode in steps of fixed shapes; None where it can (as far as its cache goes along)."""
        implementation = self._attention
        if implementation not in _BOOL_MASK + _ADDITIVE_MASK:
            return f"its attention implementation is {implementation!r}, not sdpa or eager"
        if "position_ids" not in self._accepted:
            return "its forward pass takes no position_ids"
        if self._path == "graft" and self.grafted.prefix is not None:
            return "its memory is a prefix, which goes through the decoder at every step"
        if getattr(self.base_model.config, "alibi", False):
            return "its attention counts positions by the padding mask (ALiBi)"
        if not getattr(self.base_model, "_can_compile_fullgraph", False):
            return "transformers does not say that its forward pass is one graph"
        return None

    def attention_mask(self, seen: Tensor) -> Tensor:
        """Return `seen`, bool [B, 1, T', T], as the model's attention takes it."""
        if self._attention in _BOOL_MASK:
            return seen
        dtype = self.base_model.dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    def reading_copy(self, memory: MemoryState) -> MemoryState:
        """Return of a memory what reads need, fast weights in the type that every read casts them to."""
        dtype = self.base_model.dtype
        layers = {
            index: {name: t.to(dtype) if name[0] == "w" else t for name, t in layer.items() if name.startswith(_READ)}
            for index, layer in memory.layers.items()
        }
        return MemoryState(layers)

    @property
    def _attention(self) -> str:
        return str(self.base_model.config._attn_implementation)

    # --- priming -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def memory_for(self, primings: Sequence[tuple[str, ...]]) -> MemoryState | None:
        """Return one memory for each sequence of texts, each text read by a forward pass of its own (or more), in
        order.

        An empty sequence gives the unwritten memory. Equal sequences are read once (samples that are given the same
        snippets share them); the last 64 memories are kept. None outside the path `graft`.
        """
        if self._path != "graft":
            return None
        found = {key: self._states[key] for key in primings if key in self._states}
        wanted = [key for key in dict.fromkeys(primings) if key not in found]
        if wanted:
            found |= zip(wanted, self._prime_batch(wanted), strict=True)
        self._remember(found)
        return MemoryState.concatenate([found[key] for key in primings])

    def forget(self) -> None:
        """Drop the memories kept for reuse."""
        self._states.clear()

    def _prime_batch(self, texts: Sequence[tuple[str, ...]]) -> list[MemoryState]:
        with self.grafted.memory_session(len(texts)) as memory:
            for turn in range(max(map(len, texts), default=0)):
                ids = [self._encode(row[turn]) if turn < len(row) else [] for row in texts]
                if any(ids):
                    self.num_tokens_primed += sum(map(len, ids))
                    self.grafted.prime(ids, memory)
            rows = torch.arange(len(texts), device=self.device)
            return [memory.state.select(rows[i : i + 1]) for i in range(len(texts))]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _remember(self, states: dict[tuple[str, ...], MemoryState]) -> None:
        for key, state in states.items():
            self._states[key] = state
            self._states.move_to_end(key)
        while len(self._states) > _MAX_STORED_STATES:
            self._states.popitem(last=False)
