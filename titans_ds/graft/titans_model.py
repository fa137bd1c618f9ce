"""TitansModel: a pretrained causal LM with a memory in some of its layers.

model = titans_ds.attach(base_model, GraftConfig())
with model.memory_session(batch_size=1) as memory:
    model.prime(snippet_ids, memory)                      # writes
    model.generate(prompt_ids, memory=memory)             # reads
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from titans_ds.config import GraftConfig, LoraSettings
from titans_ds.errors import ConfigError, StateError
from titans_ds.graft import adapter, families, injection, mac, prefix
from titans_ds.graft import lora as lora_adapters
from titans_ds.graft.call import KEYWORD, Call, MemoryOutput, active, bind
from titans_ds.graft.generation import check_options, num_hypotheses
from titans_ds.graft.injection import CHILD, GraftedMemory
from titans_ds.graft.padding import as_right_padded
from titans_ds.graft.replay import replay
from titans_ds.graft.session import MemorySession
from titans_ds.memory import Access, Controls, LayerState, MemoryState, Tape
from titans_ds.memory.graphed import Choice, MemoryGraphs
from titans_ds.zero.gathering import whole_numel


class TitansModel(nn.Module):
    """A base model with grafted memories. Make one with `attach` or `from_pretrained`.

    Args:
        base_model: causal LM of a supported family; keeps every parameter name it has.
        config: of the graft.
        freeze_base: leave only the graft (and LoRA) trainable.
        lora: low-rank adapters to put into the base model as well.

    Raises:
        UnsupportedModelError, ConfigError: see families.select_mixers.
    """

    def __init__(
        self, base_model: nn.Module, config: GraftConfig, freeze_base: bool = True, lora: LoraSettings | None = None
    ) -> None:
        super().__init__()
        mixers = families.select_mixers(base_model, config.layers)
        if any(hasattr(m.module, CHILD) for m in families.find_mixers(base_model)):
            raise ConfigError("this model has a memory already; call detach() on its TitansModel first")
        self.base_model = base_model
        self.config = config
        self.layer_indices = [m.index for m in mixers]
        self._controls = Controls()
        self.prefix: prefix.PrefixMemory | None = None
        self._disabled = False
        self._trainable_before = [p for p in base_model.parameters() if p.requires_grad]
        if freeze_base:
            base_model.requires_grad_(False)
        self.lora = lora
        if lora is not None:
            lora_adapters.inject(base_model, lora)
        self._graft(mixers)

    def _graft(self, mixers: list[families.Mixer]) -> None:
        if self.config.extends_attention:
            self._attention_before = mac.install(self.base_model, mixers)
        self._handles = [self.base_model.register_forward_pre_hook(bind, with_kwargs=True)]
        if self.config.injection == "prefix":
            self.prefix, handles = prefix.install(self.base_model, self.config.prefix, self.layer_indices)
            self._handles += handles
            return
        width = families.text_width(self.base_model)
        for mixer in mixers:
            memory = GraftedMemory(width, self.config, mixer.index)
            device = next(mixer.module.parameters()).device
            mixer.module.add_module(CHILD, memory if device.type == "meta" else memory.to(device))
        for mixer in families.find_mixers(self.base_model):
            self._handles += injection.hook(mixer.module, mixer.index in self.layer_indices)

    def detach(self) -> nn.Module:
        """Take the memories out again; returns the base model as it was given to `attach` (LoRA stays in it)."""
        for handle in self._handles:
            handle.remove()
        if self.config.extends_attention:
            mac.uninstall(self.base_model, self._attention_before)
        for mixer in families.select_mixers(self.base_model, self.layer_indices if self.prefix is None else []):
            delattr(mixer.module, CHILD)
        for parameter in self._trainable_before:
            parameter.requires_grad_(True)
        return self.base_model

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def memories(self) -> dict[int, GraftedMemory]:
        """The grafted modules by layer index; none for a prefix, which belongs to no layer."""
        mixers = families.select_mixers(self.base_model, self.layer_indices if self.prefix is None else [])
        return {m.index: cast(GraftedMemory, getattr(m.module, CHILD)) for m in mixers}

    @property
    def decoder(self) -> nn.Module:
        """The base model without its language-modelling head."""
        return cast(nn.Module, getattr(self.base_model, str(self.base_model.base_model_prefix)))

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.base_model.parameters()).device

    def grafted_modules(self) -> dict[str, nn.Module]:
        """The graft's own modules, by what their tensors' names start with in the adapter file."""
        if self.prefix is not None:
            return {"prefix": self.prefix}
        return {f"layers.{index}": memory for index, memory in self.memories.items()}

    def titans_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The graft's own parameters, named as in the adapter file."""
        for start, module in self.grafted_modules().items():
            for name, parameter in module.named_parameters():
                yield f"{start}.{name}", parameter

    def gate_parameters(self) -> dict[int, nn.Parameter]:
        """g by layer, [1]."""
        return {index: memory.gate for index, memory in self.memories.items()}

    def gates(self) -> dict[int, Tensor]:
        """s = floor(sigmoid(g)) by layer, [1]. (Not under ZeRO-3, where g is elsewhere: read stats["gate"] there.)"""
        return {index: memory.gate_value().detach() for index, memory in self.memories.items()}

    def num_parameters(self) -> tuple[int, int]:
        """Trainable and all parameters (whole ones, also where ZeRO-3 has partitioned them)."""
        counts = [(whole_numel(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, as PEFT does."""
        trainable, total = self.num_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, memory: MemoryState | None = None, **kwargs: Any
    ) -> Any:
        """The base model's forward, every grafted layer reading from `memory` (unwritten memory where None).

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], as the base model takes it.
            memory: fast weights of B samples; nothing is written.
            kwargs: handed to the base model.
        """
        return self.read(input_ids, attention_mask, memory, **kwargs)[0]

    def read(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, memory: MemoryState | None = None, **kwargs: Any
    ) -> tuple[Any, MemoryState | None]:
        """As `forward`, and the memory to go on with from a cache: where queries are convolved with the tokens before
        them, it has moved on by these tokens; else it is the one given.
        """
        call = self._reading(memory, input_ids.shape[0])
        with active(call):
            output = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return output, memory if call is None else call.moved(memory)

    def read_write(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        state: dict[int, LayerState] | None = None,
        reset: Tensor | None = None,
        write_mask: Tensor | None = None,
        write: bool = True,
        graph: bool = False,
        collect_stats: bool = False,
        through_base: bool = False,
        derived: bool = True,
        tape: Tape | None = None,
    ) -> MemoryOutput:
        """One segment through the decoder: every grafted layer reads with the given state and computes the next.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], as the base model takes it; not needed for right padding.
            state: by layer; None starts every sample from W_0. Not changed.
            reset: [B], true where a sample starts from W_0 whatever the state says.
            write_mask: [B, T], true where a token may be written; attention_mask where None.
            write: compute the state after the segment.
            graph: keep the autograd graph of the write (second order).
            collect_stats: gate, inner losses and write norm by layer.
            through_base: with `graph`, writes see attached hidden states.
            derived: with `graph`, take the hand-derived backward of the write, where there is one.
            tape: an empty one, for `replay` once the loss has gone back; reads are cut off from the writes then.
        """
        access = Access(write, graph, collect_stats, self._controls, through_base, derived)
        mask = attention_mask if write_mask is None else write_mask
        if self.prefix is not None and not self._disabled:
            given = prefix.Segment(input_ids, attention_mask, mask, state, reset)
            return MemoryOutput(*prefix.read_write(self, self.prefix, given, access))
        if tape is not None:
            tape.mask, tape.reset = mask, reset
        call = None if self._disabled else Call(given=state, reset=reset, mask=mask, access=access, tape=tape)
        extra = {} if call is None else {KEYWORD: call}
        output = self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra)
        if call is None:
            return MemoryOutput(output.last_hidden_state, {} if state is None else state, {})
        return MemoryOutput(output.last_hidden_state, call.new, call.stats)

    def replay(
        self,
        tapes: Sequence[Tape],
        state: dict[int, LayerState] | None,
        checkpointing: bool = False,
        derived: bool = True,
    ) -> Tensor:
        """The second phase of a window of segments: sum <f_W(q), g>, a scalar (titans_ds.memory.replay).

        Args:
            tapes: of the segments, after their losses went back.
            state: by layer, before the first of them; None for W_0.
            checkpointing: keep the graph of one layer's segment at a time.
            derived: as in `read_write`.

        Raises:
            ConfigError: no layer has a memory of its own.
        """
        layers = self.memories.items()
        if not layers:
            raise ConfigError(
                "second order in two phases needs memories in the layers; set training.second_order to 'window'"
            )
        access = Access(graph=True, controls=self._controls, derived=derived)
        return torch.cat([replay(m, i, tapes, state, access, checkpointing) for i, m in layers]).sum()

    def logits(self, last_hidden: Tensor) -> Tensor:
        """The language-modelling head: [..., H] -> [..., vocabulary]."""
        return cast(Tensor, self.base_model.get_output_embeddings()(last_hidden))  # type: ignore[operator]

    @contextlib.contextmanager
    def disable_memory(self) -> Iterator[None]:
        """Inside, every memory is skipped (ablation): the base model bit for bit, LoRA kept."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    @contextlib.contextmanager
    def disable_lora(self) -> Iterator[None]:
        """Inside, LoRA is skipped; with `disable_memory` this is the model before any training."""
        with lora_adapters.disabled(self.base_model) if self.lora else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def controls(
        self, sign: float = 1.0, inner_steps: int | None = None, query: Literal["trained", "key"] = "trained"
    ) -> Iterator[None]:
        """Inside, memories follow a changed rule: see titans_ds.memory.Controls."""
        before, self._controls = self._controls, Controls(sign, inner_steps, query)
        try:
            yield
        finally:
            self._controls = before

    def use_memory_graphs(self, choice: Choice) -> None:
        """Replay memories that write as CUDA graphs: `auto`, `on` or `off`, as a new model has it (docs/kernels.md)."""
        for grafted in self.memories.values():
            grafted.memory.graphs = MemoryGraphs(choice)

    # --- sessions ----------------------------------------------------------------------------------------------------

    def init_state(self, batch_size: int) -> MemoryState:
        """Unwritten memory for `batch_size` samples. (Not under ZeRO-3: give `read_write` no state there.)"""
        if self.prefix is not None:
            return MemoryState(prefix.initial_state(self.prefix()[0].detach(), batch_size))
        width = families.text_width(self.base_model)
        dtype = next(self.base_model.parameters()).dtype
        layers = {}
        for index, grafted in self.memories.items():
            like = torch.empty(1, 1, width, device=grafted.gate.device, dtype=dtype)
            layers[index] = {n: t.detach() for n, t in grafted.memory.initial_state(batch_size, like).items()}
        return MemoryState(layers)

    @contextlib.contextmanager
    def memory_session(self, batch_size: int) -> Iterator[MemorySession]:
        """A memory for `batch_size` texts, unwritten at the start."""
        yield MemorySession(self.init_state(batch_size), functools.partial(adapter.fingerprint, self))

    @torch.no_grad()
    def prime(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        memory: MemorySession,
        attention_mask: Tensor | None = None,
    ) -> None:
        """Read one text per sample and write it into the session, in segments of config.segment_tokens.

        Each segment goes through the model by itself (positions from 0, no cache from the one before), as in training;
        what is handed on is the memory. A sample without tokens keeps its state.

        Args:
            input_ids: [B, T], or one list of token ids per sample.
            memory: the session; its state is replaced.
            attention_mask: [B, T], true at tokens; padding may stand on either side.

        Raises:
            StateError: the session has another batch size.
        """
        ids, mask = as_right_padded(input_ids, attention_mask, self.device)
        self._check_batch(memory.state, ids.shape[0])
        if self._disabled:
            return
        size = self.config.segment_tokens
        for start in range(0, ids.shape[1], size):
            piece, piece_mask = ids[:, start : start + size], mask[:, start : start + size]
            state = memory.state.layers
            if self.prefix is None:
                state = self.read_write(piece, state=state, write_mask=piece_mask).state
            else:  # its writes need no pass that reads
                state = prefix.prime(self, piece, piece_mask, state, self._controls)
            memory.state = MemoryState(state)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, *, memory: MemorySession | None = None, write_prompt: bool = False, **kwargs: Any
    ) -> Any:
        """The base model's `generate`, every step reading from the session (unwritten memory where None).

        Neither prefill nor decoding writes. Greedy search, sampling and beam search work: all hypotheses of a sample
        share its memory.

        Args:
            input_ids: [B, T], left padded where lengths differ.
            memory: the session, B samples.
            write_prompt: prime the prompt first, in segments from its start, however the prefill is split.
            kwargs: of transformers' generate.

        Raises:
            StateError: the session has another batch size.
            ConfigError: see titans_ds.graft.generation.
        """
        check_options(self.base_model, kwargs, self._follows)
        if write_prompt:
            if memory is None:
                raise ConfigError("generate: write_prompt needs a session to write into; pass memory=")
            self.prime(input_ids, memory, kwargs.get("attention_mask"))
        state, times = None if memory is None else memory.state, num_hypotheses(self.base_model, kwargs)
        with active(self._reading(state, input_ids.shape[0], times)):
            return self.base_model.generate(input_ids, **kwargs)  # type: ignore[operator]

    def _reading(self, state: MemoryState | None, batch_size: int, times: int = 1) -> Call | None:
        if self._disabled:
            return None
        if state is not None:
            self._check_batch(state, batch_size)
            state = state.repeat(times) if times > 1 else state
        if self.prefix is not None:
            return prefix.reading(self, state or self.init_state(batch_size * times))
        layers = None if state is None else state.layers
        return Call(given=layers, access=Access(controls=self._controls), follows=self._follows)

    @property
    def _follows(self) -> bool:
        """Whether a token's query sees the tokens before it, beside the memory."""
        features = self.config.memory.features
        return features.convolution and features.convolve_queries and self.config.injection != "mac"

    def _check_batch(self, state: MemoryState, batch_size: int) -> None:
        if state.batch_size != batch_size:
            raise StateError(
                f"the memory holds {state.batch_size} samples, but the input has {batch_size}; "
                f"open a session with memory_session({batch_size}), or select() the samples you want"
            )

    # --- adapters ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write adapter_config.json, adapter_model.safetensors, a model card, and LoRA in PEFT's format under lora/.

        Args:
            directory: made where it is missing.
            state_dict: whole tensors gathered from the ranks, by adapter name, or by name in the base model for LoRA.
        """
        adapter.save(self, directory, state_dict)

    @classmethod
    def from_pretrained(cls, base: nn.Module | str | Path, directory: str | Path, **kwargs: Any) -> TitansModel:
        """Graft a saved adapter onto its base model: one given, or loaded from a path or hub id with `kwargs`."""
        return adapter.load(base, directory, **kwargs)


def attach(
    base_model: nn.Module,
    config: GraftConfig | None = None,
    freeze_base: bool = True,
    lora: LoraSettings | None = None,
) -> TitansModel:
    """Graft memories onto a causal LM: see TitansModel."""
    return TitansModel(base_model, config or GraftConfig(), freeze_base, lora)
