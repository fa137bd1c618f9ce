"""TitansModel: a pretrained causal LM with a memory in some of its layers.

model = titans_ds.attach(base_model, GraftConfig())
with model.memory_session(batch_size=1) as memory:
    model.prime(snippet_ids, memory)                      # writes
    model.generate(prompt_ids, memory=memory)             # reads
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from titans_ds.config import GraftConfig, LoraSettings
from titans_ds.errors import ConfigError, DataError, StateError, TrainingError, UnsupportedModelError
from titans_ds.graft import adapter, families, head, hub, injection, mac, prefix, quantized
from titans_ds.graft import lora as lora_adapters
from titans_ds.graft.call import KEYWORD, Call, MemoryOutput, active, bind, current
from titans_ds.graft.generation import check_options, check_padding, looking_up, prompt_mask
from titans_ds.graft.injection import CHILD, GraftedMemory
from titans_ds.graft.padding import as_right_padded
from titans_ds.graft.placement import device_of, dtype_of
from titans_ds.graft.session import MemorySession
from titans_ds.graft.surrogate import layer_surrogate
from titans_ds.memory import READ, WRITE, Controls, LayerState, MemoryState, Pass, SegmentTrace, registry
from titans_ds.memory.graphs import Choice, MemoryGraphs
from titans_ds.memory.interface import UNCHANGED
from titans_ds.memory.prefix import PrefixConfig
from titans_ds.zero.gathering import whole_numel

# Of the base model these would do something else than of a grafted one.
_NOT_THE_BASES = ("base_model", "prefix")


class TitansModel(nn.Module):
    """A base model with grafted memories. Make one with `attach` or `from_pretrained`.

    It behaves like its base model: attributes that it doesn't have itself are the base's (`config`, `dtype`,
    `gradient_checkpointing_enable`, …), so that transformers' pipelines and trainers take it. The graft's settings are
    `graft`.

    Args:
        base_model: causal LM of a supported family; keeps every parameter name it has.
            One that has LoRA already, through PEFT, keeps it, and it is saved with the memory.
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
        base_model, adopted = lora_adapters.adopt(base_model)
        if adopted is not None and lora is not None:
            raise ConfigError("the base model has LoRA of its own already; leave `lora` out, or merge it into the base")
        layers = "attention" if config.is_prefix and config.layers == "auto" else config.layers
        mixers = families.select_mixers(base_model, layers)
        if any(hasattr(m.module, CHILD) for m in families.find_mixers(base_model)):
            raise ConfigError("this model has a memory already; call detach() on its TitansModel first")
        quantized.keep_gradients(base_model)
        self.base_model = base_model
        self._decoder = (head.decoder_of(base_model),)  # in a tuple: it is a part of the base model, not of this one
        self.graft = config.resolved([m.index for m in mixers], families.text_width(base_model))
        self.layer_indices = [m.index for m in mixers]
        self._controls = Controls()
        self.prefix: prefix.PrefixMemory | None = None
        self._grafted: list[families.Mixer] = []
        self.memory_disabled = False
        self.provenance: hub.Provenance = {}  # goes with the adapter, and into its model card
        self._warned = False
        self._trainable_before = [p for p in base_model.parameters() if p.requires_grad]
        if freeze_base:
            for name, parameter in base_model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and lora_adapters.MARK in name)
        self.lora = adopted if lora is None else lora_adapters.inject(base_model, lora)
        self._graft(mixers)

    def _graft(self, mixers: list[families.Mixer]) -> None:
        if self.graft.extends_attention:
            self._attention_before = mac.install(self.base_model, mixers)
        self._handles = [
            module.register_forward_pre_hook(self._bind, with_kwargs=True) for module in (self.base_model, self.decoder)
        ]
        if isinstance(self.graft.memory, PrefixConfig):
            self.prefix, handles = prefix.install(self.base_model, self.graft.memory, self.layer_indices)
            self._handles += handles
            return
        width = families.text_width(self.base_model)
        for mixer in mixers:
            memory = GraftedMemory(width, self.graft, mixer.index)
            device = device_of(mixer.module, self.base_model)
            mixer.module.add_module(CHILD, memory if device.type == "meta" else memory.to(device))
        self._grafted = mixers
        for mixer in families.find_mixers(self.base_model):
            self._handles += injection.hook(mixer.module, mixer.index in self.layer_indices)

    def _bind(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of the base model and its decoder: where no call is named, the active one."""
        return (args, kwargs) if KEYWORD in kwargs or self.memory_disabled else bind(self, args, kwargs)

    def detach(self) -> nn.Module:
        """Take the memories out again; returns the base model as it was given to `attach` (LoRA stays in it)."""
        for handle in self._handles:
            handle.remove()
        if self.graft.extends_attention:
            mac.uninstall(self.base_model, self._attention_before)
        for mixer in self._grafted:
            delattr(mixer.module, CHILD)
        for parameter in self._trainable_before:
            parameter.requires_grad_(True)
        return self.base_model

    def __getattr__(self, name: str) -> Any:
        """What this class doesn't have is the base model's: `config`, `dtype`, `can_generate`, and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _NOT_THE_BASES:
                raise
            return getattr(super().__getattr__("base_model"), name)

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def memories(self) -> dict[int, GraftedMemory]:
        """The grafted modules by layer index; none for a prefix, which belongs to no layer."""
        return {m.index: cast(GraftedMemory, getattr(m.module, CHILD)) for m in self._grafted}

    @property
    def decoder(self) -> nn.Module:
        """The base model without its language-modelling head."""
        return self._decoder[0]

    @property
    def device(self) -> torch.device:
        """The device that token ids have to be on."""
        return device_of(self.base_model)

    @property
    def generation_config(self) -> Any:
        """The base model's, which its `generate` uses; may be set."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.base_model.generation_config = value

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
        """The logit g of every layer's gate, [1] each, as it is trained."""
        return {index: memory.gate for index, memory in self.memories.items()}

    def gates(self) -> dict[int, Tensor]:
        """s = floor(sigmoid(g)) by layer, [1]. (Not under ZeRO-3, where g is elsewhere: read stats["gate"] there.)"""
        return {index: memory.gate_value().detach() for index, memory in self.memories.items()}

    def write_only_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Learned parameters that act through writes alone, named as in the adapter file.

        First-order training, which cuts states off between segments, gives them no gradient.
        """
        if self.prefix is not None:
            if self.prefix.config.learn_step_size:
                yield "prefix.log_step_sizes", cast(nn.Parameter, self.prefix.log_step_sizes)
            return
        # MAC reads with queries of its own: then a tied projection makes keys alone.
        tied = ("key_projection",) if self.graft.injection == "mac" else ()
        for index, grafted in self.memories.items():
            starts = (*grafted.memory.config.write_only(), *tied)
            for name, parameter in grafted.memory.named_parameters():
                if name.startswith(starts) and starts:
                    yield f"layers.{index}.memory.{name}", parameter

    def memory_summary(self) -> str:
        """In one line: which memory, on which layers, how large its state is for one text."""
        kind = registry.kind_of(self.graft.memory)
        if self.prefix is not None:
            size, what = self.prefix.config.tokens, "vectors in front of the text"
            return f"{kind} memory: {size} {what}, seen by the attention of layers {self.layer_indices}"
        first = next(iter(self.memories.values())).memory
        heads = f"{first.heads} head{'s' if first.heads > 1 else ''} of {first.width // first.heads}"
        num_bytes = sum(memory.memory.num_bytes() for memory in self.memories.values())
        return f"{kind} memory on layers {self.layer_indices}: {heads}, {num_bytes / 2**20:.1f} MiB of state a text"

    def parameter_counts(self) -> tuple[int, int]:
        """Trainable and all parameters (whole ones, also where ZeRO-3 has partitioned them)."""
        counts = [(whole_numel(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, as PEFT does."""
        trainable, total = self.parameter_counts()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        memory: MemoryState | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward, every grafted layer reading from `memory`.

        Without one: from that of `reading`, and outside of it from an unwritten memory, with a warning.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], as the base model takes it.
            memory: fast weights of B samples; nothing is written.
            labels: [B, T], for the base model's own loss. (Trainers look for this name.)
            kwargs: handed to the base model.
        """
        given = kwargs if labels is None else {**kwargs, "labels": labels}
        with self._reads(memory, input_ids):
            return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **given)

    def read(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, memory: MemoryState | None = None, **kwargs: Any
    ) -> tuple[Any, MemoryState | None]:
        """As `forward`, and the memory to go on with from a cache: where queries are convolved with the tokens before
        them, it has moved on by these tokens; else it is the one given.
        """
        with self._reads(memory, input_ids, continues=True) as call:
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
        plan: Pass = WRITE,
        trace: SegmentTrace | None = None,
    ) -> MemoryOutput:
        """One segment through the decoder: every grafted layer reads with the given state and computes the next.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], as the base model takes it; not needed for right padding.
            state: by layer; None starts every sample from W_0. Not changed.
            reset: [B], true where a sample starts from W_0 whatever the state says.
            write_mask: [B, T], true where a token may be written; attention_mask where None.
            plan: whether to write, with which graph, and what to report; see Pass. Inside `controls` theirs hold.
            trace: an empty one, for `surrogate_loss` once the loss has gone back; cuts reads off from the writes.
        """
        plan = self._controlled(plan)
        mask = attention_mask if write_mask is None else write_mask
        if self.prefix is not None and not self.memory_disabled:
            given = prefix.Segment(input_ids, attention_mask, mask, state, reset)
            return MemoryOutput(*prefix.read_write(self, self.prefix, given, plan))
        if trace is not None:
            trace.mask, trace.reset = mask, reset
        call = None if self.memory_disabled else Call(given=state, reset=reset, mask=mask, plan=plan, trace=trace)
        extra = {} if call is None else {KEYWORD: call}
        output = self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra)
        if call is None:
            return MemoryOutput(output.last_hidden_state, {} if state is None else state, {})
        self._check_reached(call)
        return MemoryOutput(output.last_hidden_state, call.new, call.stats)

    def surrogate_loss(
        self,
        traces: Sequence[SegmentTrace],
        state: dict[int, LayerState] | None,
        plan: Pass = WRITE,
        checkpointing: bool = False,
    ) -> Tensor:
        """The second phase of a window of segments: sum <f_W(q), g>, a scalar (titans_ds.memory.interface).

        Args:
            traces: of the segments, after their losses went back.
            state: by layer, before the first of them; None for W_0.
            plan: of the first phase.
            checkpointing: keep the graph of one layer's segment at a time.

        Raises:
            ConfigError: no layer has a memory of its own.
        """
        layers = self.memories.items()
        if not layers:
            raise ConfigError(
                "second order in two phases needs memories in the layers; set training.second_order to 'window'"
            )
        plan = self._controlled(replace(plan, graph=True, stats=False))
        return torch.cat([layer_surrogate(m, i, traces, state, plan, checkpointing) for i, m in layers]).sum()

    def logits(self, last_hidden: Tensor) -> Tensor:
        """The language-modelling head: [..., H] -> [..., vocabulary], with the base model's own caps and scales."""
        return head.logits(self.base_model, last_hidden)

    @contextlib.contextmanager
    def disable_memory(self) -> Iterator[None]:
        """Inside, every memory is skipped (ablation): the base model bit for bit, LoRA kept."""
        before, self.memory_disabled = self.memory_disabled, True
        try:
            yield
        finally:
            self.memory_disabled = before

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
        """Replay memories that write as CUDA graphs: `auto`, `on`, or `off` as in a new model (docs/cuda_graphs.md)."""
        for grafted in self.memories.values():
            grafted.memory.graphs = MemoryGraphs(choice)

    # --- sessions ----------------------------------------------------------------------------------------------------

    def init_state(self, batch_size: int) -> MemoryState:
        """Unwritten memory for `batch_size` samples. (Not under ZeRO-3: give `read_write` no state there.)"""
        if self.prefix is not None:
            return MemoryState(prefix.initial_state(self.prefix()[0].detach(), batch_size))
        width = families.text_width(self.base_model)
        dtype, layers = dtype_of(self.base_model), {}
        for index, grafted in self.memories.items():
            like = torch.empty(1, 1, width, device=device_of(grafted, self.base_model), dtype=dtype)
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
        what is handed on is the memory. A sample without tokens keeps its state. A memory that writes chunk after chunk
        writes its last one at the end, however short it is.

        Args:
            input_ids: [B, T], or one list of token ids per sample.
            memory: the session; its state is replaced.
            attention_mask: [B, T], true at tokens; padding may stand on either side.

        Raises:
            StateError: the session has another batch size.
            DataError: a token id that the model does not have.
        """
        ids, mask = as_right_padded(input_ids, attention_mask, self.device)
        self.check_ids(ids)
        self._check_batch(memory.state, ids.shape[0])
        if self.memory_disabled:
            return
        if memory.batch_size == 1:
            memory.primed[0] += ids[mask.bool()].tolist()
        size = self.graft.segment_tokens
        for start in range(0, ids.shape[1], size):
            piece, piece_mask = ids[:, start : start + size], mask[:, start : start + size]
            state = memory.state.layers
            if self.prefix is None:
                state = self.read_write(piece, state=state, write_mask=piece_mask).state
            else:  # its writes need no pass that reads
                state = prefix.prime(self, piece, piece_mask, state, self._controls)
            memory.state = MemoryState(state)
        # What an unfinished chunk holds is written, too: the end of the text is there to be read.
        memory.state = MemoryState(
            {
                index: self.memories[index].memory.close(layer, self._controls) if self.prefix is None else layer
                for index, layer in memory.state.layers.items()
            }
        )

    def prime_text(self, tokenizer: Any, files: Sequence[str | Path], memory: MemorySession) -> None:
        """Read texts into a session of one sample, in this order, each from its own first token.

        Args:
            tokenizer: the base model's.
            files: texts, or paths of UTF-8 files.
            memory: the session; its state is replaced.

        Raises:
            DataError: a file can't be read, or one text was given in place of a list.
            StateError: the session has more than one sample.
        """
        if isinstance(files, (str, Path)):
            raise DataError("prime_text: files is one text; expected a list of texts or paths: put it into a list")
        for file in files:
            try:
                text = file.read_text(encoding="utf-8") if isinstance(file, Path) else file
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"prime_text: {file} can't be read as UTF-8 text ({error})") from error
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids:
                self.prime([ids], memory)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        memory: MemorySession | None = None,
        write_prompt: bool = False,
        lookup_primed: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The base model's `generate`, every step reading from the session.

        Without one: from that of `reading`, and outside of it from an unwritten memory, with a warning. Neither prefill
        nor decoding writes, and all hypotheses of a sample share its memory. So every option works, but those that
        convolved queries can't follow: these are refused by name.

        Args:
            input_ids: [B, T], left padded where lengths differ.
            inputs: the same, under transformers' name.
            memory: the session, B samples.
            write_prompt: prime the prompt first, in segments from its start, however the prefill is split.
            lookup_primed: with prompt_lookup_num_tokens, look for what may come next in the files that this session has
                primed, too: the same text in fewer passes, where it copies from them.
            kwargs: of transformers' generate.

        Raises:
            StateError: the session has another batch size, or has primed nothing to look up.
            DataError: a token id that the model does not have, or a prompt padded on the right.
            ConfigError: see titans_ds.graft.generation.
        """
        ids = inputs if input_ids is None else input_ids
        check_options(self.base_model, kwargs, self.graft.queries_see_past and not self.memory_disabled, write_prompt)
        primed = self._to_look_up(memory, kwargs) if lookup_primed else None  # before the prompt is among them
        if ids is not None:
            self.check_ids(ids)
            mask = prompt_mask(self.base_model, ids, kwargs)
            if not self.memory_disabled:
                check_padding(mask)
        if write_prompt:
            if memory is None or ids is None:
                raise ConfigError("generate: write_prompt needs a session and token ids; pass memory= and input_ids")
            self.prime(ids, memory, mask)
        lookup = contextlib.nullcontext() if primed is None else looking_up(self.base_model, primed)
        with self._reads(None if memory is None else memory.state, ids), lookup:
            return self.base_model.generate(ids, **kwargs)  # type: ignore[operator]

    def _to_look_up(self, memory: MemorySession | None, kwargs: dict[str, Any]) -> Tensor:
        """Token ids of what a session of one sample has primed, [1, F]."""
        config = kwargs.get("generation_config") or self.base_model.generation_config
        if kwargs.get("prompt_lookup_num_tokens", getattr(config, "prompt_lookup_num_tokens", None)) is None:
            raise ConfigError(
                "generate: lookup_primed needs prompt_lookup_num_tokens; pass how many to propose, say 10"
            )
        if memory is None or memory.batch_size != 1 or not memory.primed[0]:
            raise StateError(
                "generate: lookup_primed needs a session of one sample that has primed text in this process (a loaded "
                "state does not say of what it was made); prime first, or leave lookup_primed out"
            )
        return torch.tensor([memory.primed[0]])

    @contextlib.contextmanager
    def reading(self, memory: MemorySession | MemoryState) -> Iterator[None]:
        """Inside, every forward pass of the base model reads from the memory, whoever asks for it.

        So for a pipeline, an evaluation, or any code that calls `generate` or the base model itself. A session is read
        as it stands at each pass. Rows are samples; where there are more of them, each sample's stand next to one
        another.

        Args:
            memory: of B samples; nothing is written.

        Raises:
            StateError: on a pass, its number of rows is no multiple of B.
        """
        made: list[tuple[MemoryState, Call]] = []

        def call() -> Call:
            state = memory.state if isinstance(memory, MemorySession) else memory
            if not made or made[-1][0] is not state:
                made[:] = [(state, self._reading(state))]
            return made[-1][1]

        with active(self.base_model, call):
            yield
        for _, used in made:
            if used.bound:
                self._check_reached(used)

    @contextlib.contextmanager
    def _reads(self, memory: MemoryState | None, ids: Tensor | None, continues: bool = False) -> Iterator[Call | None]:
        """Inside, passes read from `memory`; gives their call, None where the memory is disabled.

        Args:
            memory: as many samples as `ids`; None for that of `reading`, or an unwritten one.
            ids: [B, T], or None where the input is embeddings.
            continues: see Call.
        """
        outer = None if self.memory_disabled or memory is not None else current(self.base_model)
        if self.memory_disabled or outer is not None:
            yield outer
            return
        if memory is None:
            self.warn_of_no_memory()
        elif ids is not None:
            self._check_batch(memory, len(ids))
        call = self._reading(memory, continues)
        with active(self.base_model, lambda: call):
            yield call
        self._check_reached(call)

    def warn_of_no_memory(self) -> None:
        """Once for a model: nobody said which memory a pass reads from.

        Raises:
            TrainingError: the pass would train a memory that has read nothing, as other trainers do.
        """
        if self.base_model.training and torch.is_grad_enabled() and self._memory_trains():
            raise TrainingError(
                "a grafted model was called for training without a memory: nothing is written between its segments, so "
                "that what its memories learn here would be learned from an unwritten one. Train it with "
                "titans_ds.training.MemoryTrainer in place of Trainer or SFTTrainer (docs/trainers.md), or with "
                "launch/train.py; a loop of your own calls model.read_write, or passes memory=. Inside `with "
                "model.disable_memory():` LoRA trains alone"
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a grafted model was called without a memory, so that it answers as one that has read nothing (for the "
                "default memory: as the base model). Pass memory=, or call it inside `with model.reading(memory):`; "
                "inside `with model.disable_memory():` this is what is asked for",
                stacklevel=2,
            )

    def _memory_trains(self) -> bool:
        return any(parameter.requires_grad for _, parameter in self.titans_parameters())

    def _check_reached(self, call: Call) -> None:
        """A model whose layers keep keyword arguments to themselves would skip its memories without a word."""
        if self.prefix is None and not call.stats:
            raise UnsupportedModelError(
                f"the memories of layers {self.layer_indices} were never called: {type(self.base_model).__name__} does "
                "not hand keyword arguments from its layers to their mixers, by which a memory's call travels. It "
                "can't be grafted with this version of transformers"
            )

    def _reading(self, state: MemoryState | None, continues: bool = False) -> Call:
        """The call of passes that read. (A prefix that nobody wrote is that of one sample, which serves every row.)"""
        if self.prefix is not None:
            return prefix.reading(self, state or self.init_state(1))
        layers = None if state is None else state.layers
        follows = self.graft.queries_see_past
        return Call(given=layers, plan=self._controlled(READ), follows=follows, continues=continues)

    def _controlled(self, plan: Pass) -> Pass:
        """The plan, with the rule of `controls` inside of it."""
        return plan if self._controls == UNCHANGED else replace(plan, controls=self._controls)

    def check_ids(self, ids: Tensor) -> None:
        """Raise DataError for an id outside the embedding: an IndexError on a CPU, the end of the process on a GPU."""
        rows = int(cast(Any, self.base_model).get_input_embeddings().num_embeddings)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
            raise DataError(
                f"token ids go from {int(ids.min())} to {int(ids.max())}, and this model knows 0 to {rows - 1}; encode "
                "the text with the model's own tokenizer"
            )

    def _check_batch(self, state: MemoryState, batch_size: int) -> None:
        if state.batch_size != batch_size:
            raise StateError(
                f"the memory holds {state.batch_size} samples, but the input has {batch_size}; "
                f"open a session with memory_session({batch_size}), or select() the samples you want"
            )

    # --- adapters ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write titans_config.json, titans_memory.safetensors, a model card, and LoRA in PEFT's format under lora/.

        Whole or not at all: whatever goes wrong, an adapter that was there before is still there, and whole.

        Args:
            directory: absent, empty, or an adapter's, whose files are replaced; others in it stay.
            state_dict: whole tensors gathered from the ranks, by adapter name, or by name in the base model for LoRA.

        Raises:
            OutputError: the directory holds something else, or can't be written.
        """
        adapter.save(self, directory, state_dict)

    @classmethod
    def from_pretrained(
        cls, base: nn.Module | str | Path, directory: str | Path, adapter_revision: str | None = None, **kwargs: Any
    ) -> TitansModel:
        """Graft a saved adapter, of a folder or a repository OWNER/NAME of the hub, onto its base model.

        Args:
            base: the model; or its path or hub id, from which it is loaded with `kwargs`.
            directory: of the adapter.
            adapter_revision: branch, tag or commit of the adapter's repository.
            kwargs: for AutoModelForCausalLM.from_pretrained.

        Raises:
            AdapterError: there is no such adapter, it is damaged, or it was made for another base model.
        """
        return adapter.load(base, hub.local_folder(directory, adapter_revision), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Memory adapter",
    ) -> str:
        """Upload adapter, LoRA and model card, not the base model, as one commit; returns its address.

        Args:
            repo_id: OWNER/NAME; made where it is missing.
            private: of a repository that is made here.
            revision: branch to commit to.
            commit_message: of the commit.

        Raises:
            AdapterError: the hub did not take it; says why.
        """
        return hub.push(self, repo_id, private, revision, commit_message)


def attach(
    base_model: nn.Module,
    config: GraftConfig | None = None,
    freeze_base: bool = True,
    lora: LoraSettings | None = None,
) -> TitansModel:
    """Graft memories onto a causal LM: see TitansModel. Without `config`, the delta memory in a size that suits it."""
    return TitansModel(base_model, config or GraftConfig(), freeze_base, lora)
