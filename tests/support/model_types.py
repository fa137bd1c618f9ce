"""Every causal model type of the installed transformers, tiny and random, with the default memory: what works.

    python -m tests.support.model_types                  writes the table of docs/model_types.md
    python -m tests.support.model_types llama mixtral    tries these types and prints what it finds

A type that can be grafted must pass every check of `Checks`; one that can't is refused with a reason, which the table
gives. A type whose tiny configuration does not build, or whose base has no plain forward pass of token ids, is listed
as not tried.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import titans_ds
from titans_ds import GraftConfig, TitansModel
from titans_ds.errors import TitansError
from titans_ds.graft import families
from titans_ds.memory import READ

PAGE = Path(__file__).resolve().parents[2] / "docs" / "model_types.md"
START, END = "<!-- table: python -m tests.support.model_types -->", "<!-- end of the table -->"
SECONDS = 60  # of processor time; a type that takes longer is not tried
MOST_PARAMETERS = 50_000_000  # a tiny configuration that isn't: its own names for sizes are not among TINY's

# One of each structural class, which `make test` runs.
EXAMPLES = {
    "llama": "dense",
    "mixtral": "mixture of experts",
    "gemma3_text": "sliding window",
    "qwen3_next": "linear attention, mixture of experts",
    "lfm2": "short convolution",
    "falcon_h1": "attention and Mamba side by side",
    "jamba": "Mamba, mixture of experts",
}

# Sizes by every name that a configuration gives them; one that does not know a name keeps it as an attribute.
TINY: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "max_position_embeddings"), 64),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "linear_num_value_heads"), 4),
    **{"decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 2, "is_decoder": True},
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_n_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups"), 1),
    **{"num_experts_per_tok": 2, "moe_layer_start_index": 0, "sliding_window": 16},
    **{"mamba_d_conv": 4, "mamba_expand": 2, "mamba_d_ssm": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
}
# Their attention goes through latent vectors, from which each head has keys and values of its own.
LATENT = ["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear"]
LATENT += ["longcat_flash", "minicpm3", "youtu"]
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# What else a type needs to be tiny, or to hold every kind of layer that it can; None leaves a name out.
OWN: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": 4} for name in LATENT},
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 2, "num_key_value_heads": 4},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1},
    "falcon": {"head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "attention"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
}


class NotTriedError(Exception):
    """The base model itself could not be made or run: nothing is said about its graft."""


@dataclass(frozen=True)
class Finding:
    """What was found of one model type; a column is "yes", or says why not.

    Args:
        model_type: as in a configuration.
        structure: what its layers are made of.
        attach: identity, causality, and save and load included.
        train: a step changes the memory's parameters and lowers the loss's gradient to no zeros.
        generate: cached = full.
        not_tried: why the base model could not be made or run; empty where it could.
    """

    model_type: str
    structure: str = ""
    attach: str = ""
    train: str = ""
    generate: str = ""
    not_tried: str = ""

    @property
    def works(self) -> bool:
        """Everything does."""
        return (self.attach, self.train, self.generate) == ("yes", "yes", "yes")


def model_types() -> list[str]:
    """The causal types of the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(model_type: str, **settings: Any) -> nn.Module:
    """A random model of four layers of width 32, in fp32 and evaluation mode. Raises NotTriedError."""
    try:
        sizes = {**TINY, **OWN.get(model_type, {}), **settings}
        config = AutoConfig.for_model(
            model_type, **{name: v for name, v in sizes.items() if v is not None or name in TOKENS}
        )
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise NotTriedError(f"its tiny configuration makes {size // 10**6} million parameters")
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            assert torch.isfinite(model(token_ids(), use_cache=False).logits).all()
    except NotTriedError:
        raise
    except Exception as error:
        raise NotTriedError(f"no tiny base model: {_line(error)}") from error
    return model


def token_ids(seed: int = 0) -> Tensor:
    """Two texts of 12 tokens."""
    return torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(seed))


def structure_of(base_model: nn.Module) -> str:
    """What the layers hold, in words: kinds of mixers, windows, experts."""
    mixers, layers = families.find_mixers(base_model), families.layers_of(base_model)
    text = " ".join(
        f"{name} {type(child).__name__}" for layer in layers for name, child in layer.named_children()
    ).lower()
    kinds = {"deltanet": "linear attention", "lightning": "linear attention", "mamba": "Mamba"}
    kinds |= {"conv": "short convolution", "recurrent": "linear recurrence", "linearattention": "linear attention"}
    found = sorted({kind for word, kind in kinds.items() if word in text})
    if found and all(m.is_attention for m in mixers):
        found = [f"attention and {found[0]} side by side"]
    config: Any = base_model.config.get_text_config()  # type: ignore[operator, union-attr]
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        found.append("sliding window")
    inside = {type(module).__name__.lower() for layer in layers for module in layer.modules()}
    if any("expert" in name or "moe" in name or "router" in name for name in inside):
        found.append("mixture of experts")
    return ", ".join(found) or "dense"


class Checks:
    """The graft of one tiny base model, held against the base and against itself. Raises AssertionError."""

    def __init__(self, base_model: nn.Module) -> None:
        self.ids = token_ids()
        with torch.no_grad():
            self.plain = base_model(self.ids, use_cache=False).logits
        self.model = titans_ds.attach(base_model, GraftConfig(segment_tokens=6)).eval()
        with torch.no_grad(), self.model.memory_session(2) as session:
            self.model.prime(token_ids(1), session)
            self.primed = session.state

    def _logits(self, ids: Tensor, memory: Any) -> Tensor:
        with torch.no_grad():
            return self.model(ids, memory=memory, use_cache=False).logits  # type: ignore[no-any-return]

    def identity(self) -> None:
        """An empty memory that is read only, and one that is switched off, are the base model."""
        assert torch.equal(self._logits(self.ids, self.model.init_state(2)), self.plain), "an empty memory is seen"
        with self.model.disable_memory():
            assert torch.equal(self._logits(self.ids, self.primed), self.plain), "a disabled memory is seen"
        assert not torch.equal(self._logits(self.ids, self.primed), self.plain), "a written memory is not seen"

    def causality(self) -> None:
        """Another token changes nothing before it, neither in a read nor in a write of the same pass."""
        changed = self.ids.clone()
        changed[:, 8] = changed[:, 8] % 59 + 1
        with torch.no_grad():
            ours, theirs = (self.model.read_write(x, state=self.primed.layers) for x in (self.ids, changed))
        torch.testing.assert_close(ours.last_hidden[:, :8], theirs.last_hidden[:, :8], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours.last_hidden[:, 8:], theirs.last_hidden[:, 8:]), "a token has no effect"

    def save_and_load(self) -> None:
        """An adapter on a second base of the same weights gives the same logits."""
        expected = self._logits(self.ids, self.primed)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            base = self.model.detach()
            self.model = TitansModel.from_pretrained(base, folder).eval()
        assert torch.equal(self._logits(self.ids, self.primed), expected), "the loaded adapter differs"

    def training(self) -> None:
        """A step of first order: every learned parameter but those that write gets a gradient and moves."""
        model, unread = self.model, {name for name, _ in self.model.write_only_parameters()}
        learned = {n: p for n, p in model.titans_parameters() if n not in unread and p.requires_grad}
        before = {name: parameter.detach().clone() for name, parameter in learned.items()}
        optimizer = torch.optim.SGD(learned.values(), lr=0.1)
        with torch.no_grad(), model.disable_memory():
            logits = model.logits(model.read_write(self.ids, plan=READ).last_hidden)
        torch.testing.assert_close(logits, self.plain, atol=1e-5, rtol=1e-5)
        model.train()
        out = model.read_write(self.ids, state=self.primed.layers)
        loss = F.cross_entropy(model.logits(out.last_hidden)[:, :-1].flatten(0, 1).float(), self.ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        model.eval()
        still = [name for name, parameter in learned.items() if torch.equal(parameter, before[name])]
        assert torch.isfinite(loss), "the loss is not finite"
        assert not still, f"{still[0]} does not learn"

    def generation(self) -> None:
        """Greedy search with a cache comes to the logits, step by step, that it comes to by full forward passes."""
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with torch.no_grad(), self.model.memory_session(2) as session:
            session.state = self.primed
            full, cached = (
                torch.stack(self.model.generate(self.ids, memory=session, use_cache=use_cache, **options).logits)
                for use_cache in (False, True)
            )
        torch.testing.assert_close(cached, full, atol=1e-4, rtol=1e-4)


def examine(model_type: str) -> Finding:
    """Try one type; never raises."""
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        base_model = tiny_model(model_type)
        try:
            checks = Checks(base_model)
        except TitansError as error:
            return Finding(model_type, attach=str(error))
        attach = _outcome(checks.identity, checks.causality, checks.save_and_load)
        generate, train = _outcome(checks.generation), _outcome(checks.training)
        return Finding(model_type, structure_of(base_model), attach, train, generate)
    except (NotTriedError, TimeoutError) as error:
        return Finding(model_type, not_tried=str(error))
    except Exception as error:
        return Finding(model_type, attach=f"fails: {_line(error)}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _outcome(*checks: Callable[[], None]) -> str:
    for check in checks:
        try:
            check()
        except TimeoutError:
            raise
        except Exception as error:
            return f"no: {_line(error)}"
    return "yes"


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"it took more than {SECONDS} s")


def row(finding: Finding) -> str:
    """Its line in the table."""
    if finding.structure:
        cells = [finding.structure, finding.attach, finding.train, finding.generate]
    else:
        cells = [(finding.attach or finding.not_tried).replace("|", "/")]
    return f"| {finding.model_type} | {' | '.join(cells)} |"


def table(findings: list[Finding]) -> str:
    """The part of docs/model_types.md between its marks."""
    works = [f for f in findings if f.works]
    lines = [f"transformers {transformers.__version__}: {len(works)} of its {len(findings)} causal types.", ""]
    lines += ["| model type | layers | attach | train | cached generation |", "|---|---|---|---|---|"]
    lines += [row(f) for f in findings if f.structure]
    lines += ["", "| refused | why |", "|---|---|", *[row(f) for f in findings if f.attach and not f.structure]]
    lines += ["", "| not tried | why |", "|---|---|", *[row(f) for f in findings if f.not_tried]]
    return "\n".join(lines)


def main(names: list[str]) -> None:
    """Write the page's table, or print what is found of the named types."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    findings = []
    for name in names or model_types():
        findings.append(examine(name))
        print(findings[-1], flush=True)
    if not names:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(f"{before}{START}\n{table(findings)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(sys.argv[1:])
