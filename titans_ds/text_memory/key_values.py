"""Keys and values of what was read, in every attention layer: the whole store, which equals the text in the context.

Read with positions as they were, after files that saw one another, this is exact: every other memory of keys and values
keeps fewer of them, moves them, or lets a file see itself alone. Hybrids hand over their recurrent states as well.

Formulas: R(p) K for a key K before rotation at position p; see titans_ds/text_memory/rotary.py.

Legend of shape suffixes: H key-value heads, N stored tokens, D width of a head, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from titans_ds.errors import DataError, UnsupportedModelError
from titans_ds.graft.head import decoder_of
from titans_ds.text_memory.attention import Attending, attending
from titans_ds.text_memory.interface import Reader, State, TextMemory
from titans_ds.text_memory.rotary import Rotary

Encoding = Literal["sequential", "independent"]
Positions = Literal["contiguous", "parallel"]


class BaseReader(Reader):
    """A base model that goes on from a cache.

    Args:
        base: a causal LM.
        cache: transformers' cache, which it fills further.
        position: of the first token that is read.
        bias: see Attending.
    """

    def __init__(self, base: nn.Module, cache: Any, position: int, bias: dict[int, Tensor] | None = None) -> None:
        self.base, self.cache, self.position, self.bias = base, cache, position, bias or {}
        self.last_hidden: Tensor | None = None  # [T, width] of the last call, as the head takes it

    def advance(self, ids_T: Tensor) -> Tensor:
        """See Reader.advance."""
        if self.bias:
            with attending(self.base, Attending(self.bias)):
                return self._advance(ids_T)
        return self._advance(ids_T)

    def _advance(self, ids_T: Tensor) -> Tensor:
        at = torch.arange(self.position, self.position + len(ids_T), device=ids_T.device)
        decoder: Any = decoder_of(self.base)
        out = decoder(input_ids=ids_T[None], position_ids=at[None], past_key_values=self.cache, use_cache=True)
        self.position += len(ids_T)
        self.last_hidden = out.last_hidden_state[0]
        head: Any = self.base.get_output_embeddings()  # type: ignore[operator]
        return torch.log_softmax(head(self.last_hidden).float(), dim=-1)


def new_cache(base: nn.Module) -> Any:
    """An empty cache of a base model."""
    from transformers import DynamicCache

    return DynamicCache(config=cast(Any, base).config.get_text_config())


def check_base(base: nn.Module) -> None:
    """Raises UnsupportedModelError where a base's attention is of a kind whose keys can't be stored and moved here."""
    config: Any = base.config.get_text_config()  # type: ignore[operator, union-attr]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "linear_attention"}
    reason = None
    if kinds or getattr(config, "use_sliding_window", False):
        reason = f"it has layers of another kind ({', '.join(sorted(kinds)) or 'sliding_attention'})"
    elif getattr(config, "attn_logit_softcapping", None):
        reason = "it caps the logits of its attention"
    elif "full_attention" not in (getattr(config, "layer_types", None) or ["full_attention"]):
        reason = "it has no attention layer"
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(base).__name__} can't carry a memory of keys and values: {reason}. Use a base whose attention is "
            "full (Llama, Qwen, SmolLM), with or without linear-attention layers"
        )


class KeyValueStore(TextMemory):
    """All keys and values of all attention layers.

    Args:
        base: a causal LM with full attention, with or without linear-attention layers; nothing of it is trained.
        encoding: `sequential`, a file attends to those before it; `independent`, to itself alone, so that files can be
            composed and deleted.
        positions: `contiguous`, one file after the other; `parallel`, each file ends where the text begins.

    A state holds, by attention layer, `keys` (before rotation) and `values` [H, N, D], `positions` [1 or H, N] and
    perhaps `bias` [H, N] (fp32); by linear-attention layer `recurrent` and `convolution`; and `end` [1], where the text
    begins. Independent files leave the recurrent states of the last one.

    Raises:
        UnsupportedModelError: another kind of attention, or of position code.
    """

    def __init__(self, base: nn.Module, encoding: Encoding = "sequential", positions: Positions = "contiguous") -> None:
        check_base(base)
        if encoding == "sequential" and positions == "parallel":
            raise DataError(
                "positions 'parallel' go with encoding 'independent': a file that saw others comes after them"
            )
        self.base, self.encoding, self.positions = base, encoding, positions
        self.rotary = Rotary(base)

    @torch.no_grad()
    def write(self, files: Sequence[Tensor], query_T: Tensor | None = None) -> State:
        """See TextMemory.write."""
        files = [file for file in files if len(file)]
        if self.encoding == "sequential":
            return self._encode(torch.cat(list(files)), 0) if files else {}
        state: State = {}
        longest = max((len(file) for file in files), default=0)
        for file in files:
            start = int(state["end"]) if state and self.positions == "contiguous" else 0
            start = longest - len(file) if self.positions == "parallel" else start
            state = compose(state, self._encode(file, start))
        return state

    def reader(self, state: State) -> Reader:
        """See TextMemory.reader."""
        cache, bias = new_cache(self.base), {}
        for index, layer in enumerate(cache.layers):
            if f"{index}.keys" in state:
                keys = self.rotary(state[f"{index}.keys"], state[f"{index}.positions"])
                layer.update(keys[None], state[f"{index}.values"][None].clone())
                if f"{index}.bias" in state:
                    bias[index] = state[f"{index}.bias"]
            elif f"{index}.recurrent" in state:
                cache.update_conv_state(state[f"{index}.convolution"].clone(), index)
                cache.update_recurrent_state(state[f"{index}.recurrent"].clone(), index)
        return BaseReader(self.base, cache, int(state["end"]) if state else 0, bias)

    def _encode(self, ids_T: Tensor, start: int) -> State:
        """One text from its own first token on, at positions from `start`."""
        reader = BaseReader(self.base, new_cache(self.base), start)
        reader.advance(ids_T)
        positions = torch.arange(start, start + len(ids_T), dtype=torch.int32, device=ids_T.device)[None]
        state: State = {"end": torch.tensor([start + len(ids_T)], dtype=torch.int32)}
        for index, layer in enumerate(reader.cache.layers):
            if hasattr(layer, "recurrent_states"):
                state[f"{index}.recurrent"] = layer.recurrent_states[0]
                state[f"{index}.convolution"] = layer.conv_states[0]
            else:
                state[f"{index}.keys"] = self.rotary(layer.keys[0], positions, back=True)
                state[f"{index}.values"] = layer.values[0]
                state[f"{index}.positions"] = positions
        return state


def layers_of(state: State) -> list[int]:
    """Indices of the layers whose keys a state holds."""
    return sorted(int(name.split(".")[0]) for name in state if name.endswith(".keys"))


def compose(first: State, second: State) -> State:
    """Keys and values of both, in this order; recurrent states of the second.

    Raises:
        DataError: they are states of different kinds, or of different bases.
    """
    if not first or not second:
        return dict(first or second)
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[0]
        raise DataError(f"these two states can't be composed: only one has {odd!r}; write both with the same memory")
    joined: State = {}
    for name, a in first.items():
        b = second[name]
        if name.endswith((".keys", ".values", ".positions", ".bias")):
            fits = a.shape[0] == b.shape[0] and a.shape[2:] == b.shape[2:]
            if not fits:
                raise DataError(
                    f"these two states can't be composed: {name} has shapes {list(a.shape)} and {list(b.shape)}; write "
                    "both on the same base"
                )
            joined[name] = torch.cat([a, b], dim=1)
        else:
            joined[name] = torch.maximum(a, b) if name == "end" else b
    return joined


def select(state: State, kept: dict[int, Tensor]) -> State:
    """The state with these tokens of every head alone, in their order.

    Args:
        state: of a KeyValueStore.
        kept: by layer, indices [H, t].
    """
    chosen = dict(state)
    for layer, index_HT in kept.items():
        ordered = index_HT.sort(dim=1).values
        for name in ("keys", "values"):
            given = state[f"{layer}.{name}"]
            chosen[f"{layer}.{name}"] = given.gather(1, ordered.unsqueeze(-1).expand(-1, -1, given.shape[-1]))
        positions = state[f"{layer}.positions"].expand(len(ordered), -1)
        chosen[f"{layer}.positions"] = positions.gather(1, ordered)
        if f"{layer}.bias" in state:
            chosen[f"{layer}.bias"] = state[f"{layer}.bias"].gather(1, ordered)
    return chosen
