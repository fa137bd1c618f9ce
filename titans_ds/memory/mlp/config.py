"""Settings of one neural memory, in three groups: the memory itself, the features it is written and read through
(`features`), and the rule that writes it (`rule`).

The defaults are the rule of "Parametric Memory Cannot Replace Retrieval". `PRESETS` has the rules of other papers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from titans_ds.validation import check_choices, require

Projection = Literal["orthogonal", "learned"]
QueryProjection = Literal["orthogonal", "learned", "tied"]


@dataclass(frozen=True)
class FeatureConfig:
    """How hidden states become keys, values and queries, and a read becomes hidden states again.

    Order: RMSNorm, projection, convolution, SiLU, L2 norm (Titans, arXiv 2501.00663, section 4.4).

    Args:
        pre_norm: RMSNorm with a learned scale before the projections (one for keys, values, queries and gates).
        convolution: causal depthwise convolution over the tokens written, on keys, values and queries. Starts as the
            identity.
        convolution_kernel: tokens that it sees, the present one included.
        convolve_queries: false leaves queries out of the convolution: then reading a token needs no other token, and
            reads alone change no state.
        activation: on keys, values and queries.
        normalize_keys: L2-normalise keys and queries, head by head.
        read_norm: RMSNorm with a learned scale on what f_W returns, head by head, before the output projection.
    """

    pre_norm: bool = False
    convolution: bool = False
    convolution_kernel: int = 4
    convolve_queries: bool = True
    activation: Literal["none", "silu"] = "none"
    normalize_keys: bool = False
    read_norm: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        require(
            self.convolution_kernel >= 2,
            f"features.convolution_kernel is {self.convolution_kernel}; it must be 2 or more (or unset convolution)",
        )


@dataclass(frozen=True)
class RuleConfig:
    """The write rule: which gradient, what optimizer, how often.

    S <- eta S - theta grad l(W), W <- (1 - alpha) W + S, with alpha = 0 and no S by default.

    Args:
        chunk_size: tokens a write; a chunk may span calls. None: one write at the end of each call.
        reduction: a chunk's loss is the mean, or the sum, of its tokens' losses.
        optimizer: what turns gradients into a change of W. `momentum` is Titans' rule. `adamw` and `muon` take
            theta's mean over the chunk as their step size.
        momentum: eta; the first beta of adamw; the momentum of muon.
        forget_gate: alpha, the share of W forgotten in a write (once, however many inner steps it has).
        token_step_size: theta_t = 2 theta sigmoid(w h_t + b), starting at theta.
        token_momentum: eta_t = sigmoid(w h_t + b), starting at `momentum`.
        token_forget_gate: alpha_t = sigmoid(w h_t + b), starting at `forget_gate`.
        gate_scope: eta and alpha act at every token (`token`: Titans' recurrence, exactly, with the chunk's gradients),
            or once a chunk, from the chunk's mean token (`chunk`).
        step_sizes: theta of each matrix, in place of memory.step_size.
        schedule: theta over the inner steps: constant, or cosine from theta towards zero.
        gradient: `exact`, in closed form; or `fan`, predicted from forward activations by a network that was trained
            for it (titans_ds.memory.mlp.fan, launch/train_fan.py), which the adapter then holds.
        fan_width: units of that network's hidden layer.
        max_gradient_norm: limit on the norm of a chunk's gradient, over all matrices of a head, before theta.
    """

    chunk_size: int | None = None
    reduction: Literal["mean", "sum"] = "mean"
    optimizer: Literal["sgd", "momentum", "adamw", "muon"] = "sgd"
    momentum: float = 0.9
    forget_gate: float = 0.0
    token_step_size: bool = False
    token_momentum: bool = False
    token_forget_gate: bool = False
    gate_scope: Literal["token", "chunk"] = "token"
    step_sizes: list[float] | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    gradient: Literal["exact", "fan"] = "exact"
    fan_width: int = 64
    max_gradient_norm: float | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("chunk_size", "fan_width"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"rule.{name} is {value}; it must be 1 or more")
        limit = self.max_gradient_norm
        require(limit is None or limit > 0, f"rule.max_gradient_norm is {limit}; it must be above 0")
        require(0 < self.momentum < 1, f"rule.momentum is {self.momentum}; it must be between 0 and 1")
        require(0 <= self.forget_gate < 1, f"rule.forget_gate is {self.forget_gate}; it must be in [0, 1)")
        self._check_gates()

    def _check_gates(self) -> None:
        require(
            not self.token_forget_gate or self.forget_gate > 0,
            "rule.token_forget_gate needs a value to start from: set rule.forget_gate above 0, such as 0.001",
        )
        require(
            not self.token_momentum or self.has_momentum,
            "rule.token_momentum is true, but rule.optimizer 'sgd' has none. Set rule.optimizer to 'momentum'",
        )
        averaged = self.optimizer in ("adamw", "muon")
        gated = self.token_momentum or self.forget_gate > 0
        require(
            not (averaged and gated and self.gate_scope == "token"),
            f"rule.optimizer {self.optimizer!r} makes one change a chunk: with rule.token_momentum or rule.forget_gate "
            "set rule.gate_scope to 'chunk'",
        )
        require(
            self.optimizer != "adamw" or not self.token_momentum,
            "rule.optimizer 'adamw' corrects its bias for a constant momentum; set rule.token_momentum to false",
        )

    @property
    def has_momentum(self) -> bool:
        """Whether the rule carries a momentum S."""
        return self.optimizer != "sgd"

    @property
    def token_gates(self) -> tuple[str, ...]:
        """The gates that are projections of the token, in the order in which they are stored."""
        names = ("step_size", "momentum", "forget_gate")
        return tuple(name for name in names if getattr(self, f"token_{name}"))

    @property
    def acts_per_token(self) -> bool:
        """Whether momentum or forget gate act inside a chunk, token by token."""
        gated = self.optimizer == "momentum" or (self.optimizer == "sgd" and self.forget_gate > 0)
        return gated and self.gate_scope == "token"


@dataclass(frozen=True)
class MLPConfig:
    """One neural memory: the network f_W, its projections, and how it is written.

    Args:
        dim: width d of keys, values and queries, over all heads.
        heads: memories side by side, each with dim / heads coordinates of keys, values and queries.
        depth: number of weight matrices of f_W. Depth 1 is the linear memory of the delta rule.
        hidden_dim: width of the hidden layers of f_W (of each head); dim / heads where not given.
        activation: between the matrices of f_W.
        hidden_scale: factor on each hidden layer after its activation; `unit` makes its norm about 1 where what enters
            the activation is a standard normal.
        residual_norm: f_W(x) = x + LayerNorm(mlp_W(x)), with learned scale and bias (TTT).
        write: `pooled` writes the mean key and mean value of a segment or chunk (a gradient of rank 1 per matrix);
            `token` writes all of its tokens (a gradient of rank up to min(tokens, dim)).
        token_shift: pair the key of token t - 1 with the value of token t, so that a key can ask for what follows it.
        inner_steps: gradient steps K on each segment or chunk.
        step_size: theta, the inner learning rate.
        learn_step_size: one learned step size per matrix and layer (kept positive), starting from step_size.
        key_projection: frozen with orthonormal rows, or learned.
        value_projection: frozen with orthonormal rows (a seed of its own), or learned.
        query_projection: frozen orthonormal (another seed), learned, or the key projection itself (`tied`).
        tie_query_at_inference: in evaluation mode read with the key projection, whatever was trained ("projection
            unification").
        output_projection: transpose of the key projection as it was initialised (frozen), or learned.
        learn_initial_weights: train W_0, the fast weights that a new repository starts from.
        initial_scale: standard deviation of W_0, times 1 / sqrt(fan in).
        initial_stds: standard deviation of each matrix of W_0, as it is, in place of initial_scale.
        seed: of the projections and of W_0; each layer draws its own from it.
        features: norms, convolution and activation around the projections.
        rule: the write rule.
    """

    dim: int = 512
    heads: int = 1
    depth: int = 2
    hidden_dim: int | None = None
    activation: Literal["silu", "linear"] = "silu"
    hidden_scale: float | Literal["unit"] = 1.0
    residual_norm: bool = False
    write: Literal["pooled", "token"] = "pooled"
    token_shift: bool = False
    inner_steps: int = 1
    step_size: float = 0.01
    learn_step_size: bool = False
    key_projection: Projection = "orthogonal"
    value_projection: Projection = "orthogonal"
    query_projection: QueryProjection = "learned"
    tie_query_at_inference: bool = False
    output_projection: Projection = "orthogonal"
    learn_initial_weights: bool = False
    initial_scale: float = 1.0
    initial_stds: list[float] | None = None
    seed: int = 0
    features: FeatureConfig = field(default_factory=FeatureConfig)
    rule: RuleConfig = field(default_factory=RuleConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("dim", "heads", "depth", "hidden_dim", "inner_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"memory.{name} is {value}; it must be 1 or more")
        require(self.dim % self.heads == 0, f"memory.dim {self.dim} is not divisible by memory.heads {self.heads}")
        require(self.step_size > 0, f"memory.step_size is {self.step_size}; it must be above 0")
        require(self.hidden_scale == "unit" or self.hidden_scale > 0, "memory.hidden_scale must be above 0, or 'unit'")
        self._check_per_matrix()
        self._check_initial_weights()
        self._check_rule()

    def _check_per_matrix(self) -> None:
        for name, values in (("initial_stds", self.initial_stds), ("rule.step_sizes", self.rule.step_sizes)):
            if values is not None:
                require(
                    len(values) == self.depth and min(values) >= 0,
                    f"memory.{name} is {values}; expected {self.depth} numbers, one per matrix of f_W, none negative",
                )
        require(
            not self.learn_step_size or min(self.step_sizes) > 0,
            f"memory.learn_step_size starts from rule.step_sizes {self.step_sizes}; they must be above 0",
        )

    def _check_initial_weights(self) -> None:
        require(self.initial_scale >= 0, f"memory.initial_scale is {self.initial_scale}; it must not be negative")
        dead = self.initial_scale == 0 if self.initial_stds is None else max(self.initial_stds) == 0
        require(
            not dead or self.depth == 1,
            f"memory.initial_scale is 0 at depth {self.depth}: every inner gradient would be 0. Use a scale above 0",
        )

    def _check_rule(self) -> None:
        require(
            not (self.inner_steps > 1 and self.rule.acts_per_token),
            f"memory.inner_steps is {self.inner_steps}, but rule.gate_scope 'token' passes over a chunk's tokens once. "
            "Set rule.gate_scope to 'chunk'",
        )
        require(
            self.rule.gradient == "exact" or (self.depth >= 2 and not self.residual_norm),
            "rule.gradient 'fan' predicts what goes back through the matrices of f_W, and a linear memory has one; it "
            "needs memory.depth 2 or more, and memory.residual_norm false. Set rule.gradient to 'exact'",
        )

    def write_only(self) -> dict[str, str]:
        """Parameters, by what their names begin with, that act through writes alone, each with the reason.

        First-order training gives them no gradient.
        """
        # A tied query projection is read with, so the key projection gets its gradient from there.
        learned_key = self.key_projection == "learned" and self.query_projection != "tied"
        convolution = (self.features.convolution, "that of keys and values acts only through the write")
        found = {
            "log_step_sizes": (self.learn_step_size, "the step size acts only through later reads"),
            "value_projection": (
                self.value_projection == "learned",
                "the value projection acts only through the write",
            ),
            "key_projection": (learned_key, "the key projection acts only through the write"),
            "key_convolution": convolution,
            "value_convolution": convolution,
            "gates": (bool(self.rule.token_gates), "the gates act only through later reads"),
        }
        return {name: reason for name, (wanted, reason) in found.items() if wanted}

    @property
    def head_dim(self) -> int:
        """Width of one head's keys, values and queries."""
        return self.dim // self.heads

    @property
    def widths(self) -> tuple[int, ...]:
        """Layer widths of one head's f_W from input to output: `depth` + 1 numbers."""
        d = self.head_dim
        return (d, *([self.hidden_dim or d] * (self.depth - 1)), d)

    @property
    def step_sizes(self) -> list[float]:
        """The inner step size theta of each matrix of f_W, in order of depth."""
        return self.rule.step_sizes or [self.step_size] * self.depth


_LEARNED: dict[str, Any] = {
    "write": "token",
    "key_projection": "learned",
    "value_projection": "learned",
    "output_projection": "learned",
    "learn_initial_weights": True,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # Titans (arXiv 2501.00663), equations 8-15.
    "titans": _LEARNED
    | {
        "step_size": 0.1,
        "features": FeatureConfig(
            pre_norm=True, convolution=True, activation="silu", normalize_keys=True, read_norm=True
        ),
        "rule": RuleConfig(
            chunk_size=64,
            optimizer="momentum",
            momentum=0.9,
            forget_gate=0.001,
            token_step_size=True,
            token_momentum=True,
            token_forget_gate=True,
            max_gradient_norm=1.0,
        ),
    },
    # TTT-Linear (arXiv 2407.04620): mini-batches of 16 tokens, gradients at their start, theta_t from the token.
    "ttt_linear": _LEARNED
    | {
        "depth": 1,
        "residual_norm": True,
        "step_size": 0.5,
        "initial_stds": [0.02],
        "features": FeatureConfig(read_norm=True),
        "rule": RuleConfig(chunk_size=16, token_step_size=True),
    },
}
