"""The model section of a recipe: what fixes the function that is learned.

Standard library only, so that a configuration can be read and counted without torch. Every field that the
paper (arXiv 2512.23852) leaves open is marked "our choice"; docs/math.md gives the reasons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from trellis_dist.models.baseline_config import MINI_BATCH_KINDS, BaselineConfig
from trellis_dist.validation import STRICT, require

Phi = Literal["silu", "tanh", "identity", "ln_silu", "softmax"]
Readout = Literal["ln_silu", "l2_silu", "softmax", "silu", "silu_rms"]
Update = Literal["stale", "corrected"]
Gate = Literal["learned", "fixed", "off"]
LayerKind = Literal[
    "trellis",
    "attention",
    "sliding_window",
    "linear_attention",
    "abc",
    "gsa",
    "deltanet",
    "gated_deltanet",
    "mamba2",
    "ttt_linear",
    "rwkv7",
    "titans",
]
# Layers whose state grows with the tokens, at most to their window.
ATTENTION_KINDS = ("attention", "sliding_window")

__all__ = [
    "ATTENTION_KINDS",
    "AttentionConfig",
    "Gate",
    "LayerKind",
    "ModelConfig",
    "Phi",
    "Readout",
    "TrellisConfig",
    "Update",
]


@dataclass(frozen=True, kw_only=True)
class TrellisConfig:
    """The Trellis mixer (docs/math.md); one head compresses keys and values into ``slots`` rows.

    Attributes:
        slots: M, memory rows per head (paper: 64).
        chunk_size: C, tokens per stale-gradient chunk. Part of the model: changing it changes the function.
        phi: inner nonlinearity of the objective ||phi(M k) - alpha||^2 (our choice: silu).
        update: "stale" takes a chunk's gradients at its start (the paper); "corrected" adds what the chunk
            has written since (our option). It corrects errors, so each step stays below 2: along a unit key
            a step of 1 removes the error, one above 1 overshoots, and from 2 on no error shrinks. Its
            intended form is gamma = sigmoid(.): ``step_bound`` "token" and ``step_size_max`` 1.
        readout: f, the activation between the two passes (paper's best: ln_silu; silu and silu_rms are ours).
        readout_affine: learn a weight and a bias per head and slot after f. silu and silu_rms always have
            them, inside their SiLU, and then this stays false.
        step_size_max: gamma_max. The chunk's steps sum to at most this when ``step_bound`` is "chunk".
        step_size_bias: b of gamma = scale * sigmoid(w.x + b).
        step_bound: "chunk" divides gamma_max by C (our choice, stable at every C); "token" does not.
        targets: "own" projects the latent target alpha from the layer's input (the paper); "values" takes
            v for it, before its norm, where M is the head's width (our option): what a delta rule stores. It
            saves a projection, and ``conv_values`` then convolves both.
        alpha_norm: "rms" normalises the latent target over the M slots (our choice), "l2" to unit norm;
            "none" leaves it raw.
        value_norm: "l2" gives v unit norm inside the memory update (our choice); "none" leaves it raw.
        gate_bias: b of beta = sigmoid(w.x + b); the paper biases the forget gate towards one.
        gate_form: "sigmoid" makes beta = floor + (1 - floor) sigmoid(w.x + b); "rate" makes log beta =
            -exp(A) softplus(w.x + b), A and b drawn per head as in Mamba2 and Gated DeltaNet, so that heads
            begin with memories of one to 1,000 tokens (our option).
        gate_floor: lower bound of a learned sigmoid gate (our option): no token can wipe the memory.
        gates: forget gate per layer, cycled: "learned", "fixed" (at sigmoid(gate_bias)) or "off".
        value_gates: "shared" gives the value pass the key pass's gates (the paper); "own" learns a step size
            of its own for it and, where ``gates`` is "learned", a forget gate (our option).
        value_step_size_bias: b of the value pass's own step size; ``step_size_bias`` unless given.
        value_gate_bias: b of the value pass's own forget gate, which is then sigmoid(w.x + b) whatever
            ``gate_form`` is; unless given it is formed and begins as the key pass's.
        conv_kernel: taps of the causal depthwise convolution on q and k; 0 removes it.
        conv_values: convolve v as well (our option; the DeltaNet family does).
        conv_targets: convolve alpha as well (our option): to the key pass alpha is what v is to a delta rule.
        conv_activation: "silu" after that convolution (our choice, as in its usual form) or "none".
        head_norm_eps: added to the mean square of a head's output where it is normalised; ``norm_eps`` unless
            given. Outputs that are small beside its root stay small: a head that found little says little.
        skip_values: add d v to what a head reads, d learned per head and 1 at first (our option, Mamba2's
            skip): a token's own value, past the memory. v is as the value pass takes it.
        learned_initial_memory: start both memories from learned [H, M, .] tensors instead of zero.
        initial_value_memory: what the learned value memory begins training as: "normal" draws, or "identity",
            R = I, with which y = f(S q) until the value pass writes (our option).
    """

    __pydantic_config__ = STRICT

    slots: int = 64
    chunk_size: int = 64
    phi: Phi = "silu"
    update: Update = "stale"
    readout: Readout = "ln_silu"
    readout_affine: bool = False
    step_size_max: float = 2.0
    step_size_bias: float = 0.0
    step_bound: Literal["chunk", "token"] = "chunk"
    targets: Literal["own", "values"] = "own"
    alpha_norm: Literal["rms", "l2", "none"] = "rms"
    value_norm: Literal["l2", "none"] = "l2"
    gate_bias: float = 4.0
    gate_form: Literal["sigmoid", "rate"] = "sigmoid"
    gate_floor: float = 0.0
    gates: tuple[Gate, ...] = ("learned",)
    value_gates: Literal["shared", "own"] = "shared"
    value_gate_bias: float | None = None
    value_step_size_bias: float | None = None
    conv_kernel: int = 4
    conv_values: bool = False
    conv_targets: bool = False
    conv_activation: Literal["silu", "none"] = "silu"
    head_norm_eps: float | None = None
    skip_values: bool = False
    learned_initial_memory: bool = False
    initial_value_memory: Literal["normal", "identity"] = "normal"

    def __post_init__(self) -> None:
        require(1 <= self.slots <= 1024, f"model.trellis.slots = {self.slots}: use 1 to 1024 memory slots")
        require(self.chunk_size >= 1, f"model.trellis.chunk_size = {self.chunk_size}: use 1 or more tokens")
        require(
            self.step_size_max > 0, f"model.trellis.step_size_max = {self.step_size_max}: must be positive"
        )
        require(len(self.gates) > 0, "model.trellis.gates is empty: name at least one of learned, fixed, off")
        for gate in self.gates:
            require(
                gate in get_args(Gate), f"model.trellis.gates names {gate!r}: use {', '.join(get_args(Gate))}"
            )
        require(
            self.conv_kernel >= 0,
            f"model.trellis.conv_kernel = {self.conv_kernel}: use 0 (none) or more taps",
        )
        for name in ("conv_values", "conv_targets"):
            require(
                self.conv_kernel > 0 or not getattr(self, name),
                f"model.trellis.{name} = true with conv_kernel = 0, no convolution: use 1 or more taps",
            )
        require(
            self.targets == "own" or not self.conv_targets,
            'model.trellis.conv_targets = true with targets = "values", which are convolved by conv_values: '
            "leave conv_targets out",
        )
        self._check_value_pass()
        require(0 <= self.gate_floor < 1, f"model.trellis.gate_floor = {self.gate_floor}: use [0, 1)")
        require(
            self.gate_form == "sigmoid" or (self.gate_floor == 0 and "fixed" not in self.gates),
            'model.trellis.gate_form = "rate" has no floor and no fixed gate: set gate_floor = 0 and use '
            "gates learned or off",
        )
        require(
            not (self.readout_affine and self.readout in ("silu", "silu_rms")),
            f"model.trellis.readout_affine = true with readout = {self.readout!r}, which always learns its "
            "weight and bias: leave readout_affine out",
        )
        require(
            self.update == "stale" or self.largest_step < 2,
            f"model.trellis.step_size_max = {self.step_size_max:g} allows steps of {self.largest_step:g} and "
            "update = 'corrected' corrects errors with steps below 2 only: set step_size_max = 1 and "
            "step_bound = 'token', or use a smaller step_size_max",
        )
        eps = self.head_norm_eps
        require(eps is None or eps > 0, f"model.trellis.head_norm_eps = {eps}: must be positive")

    def _check_value_pass(self) -> None:
        """Options that only change something beside others."""
        for name in ("value_gate_bias", "value_step_size_bias"):
            require(
                getattr(self, name) is None or self.value_gates == "own",
                f"model.trellis.{name} is given and the value pass has the key pass's gates: set value_gates "
                f'= "own" or leave {name} out',
            )
        require(
            self.value_gate_bias is None or "learned" in self.gates,
            "model.trellis.value_gate_bias is given and no layer has a learned gate: name one in gates or "
            "leave value_gate_bias out",
        )
        require(
            self.initial_value_memory == "normal" or self.learned_initial_memory,
            'model.trellis.initial_value_memory = "identity" with memories that begin at zero: set '
            "learned_initial_memory = true",
        )

    def convolved_width(self, dim: int, heads: int) -> int:
        """Features that the convolution reads: those of q and k and, where asked for, of v and alpha."""
        return (2 + self.conv_values) * dim + self.conv_targets * heads * self.slots

    @property
    def projected_slots(self) -> int:
        """Features per head of the projection that alpha has of its own."""
        return self.slots if self.targets == "own" else 0

    @property
    def largest_step(self) -> float:
        """The bound on gamma of one token."""
        return self.step_size_max / (self.chunk_size if self.step_bound == "chunk" else 1)

    @property
    def learns_affine(self) -> bool:
        """Whether the readout has a weight and a bias."""
        return self.readout_affine or self.readout in ("silu", "silu_rms")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal softmax attention with rotary positions: the layer Trellis is measured against.

    Attributes:
        rope_theta: base of the rotary frequencies.
        window: layers of kind "attention" attend to the last ``window`` tokens only; None attends to all.
        sliding_window: the window of layers of kind "sliding_window", which a pattern can mix with others.
    """

    __pydantic_config__ = STRICT

    rope_theta: float = 10_000.0
    window: int | None = None
    sliding_window: int = 256

    def __post_init__(self) -> None:
        require(
            self.window is None or self.window >= 1, f"model.attention.window = {self.window}: use 1 or more"
        )
        require(
            self.sliding_window >= 1,
            f"model.attention.sliding_window = {self.sliding_window}: use 1 or more tokens",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model of pre-norm blocks (mixer + SwiGLU).

    Attributes:
        vocab_size: rows of the embedding; must be at least the tokenizer's size.
        num_layers, dim, num_heads: depth, model width, heads; dim must divide by num_heads.
        mlp_hidden: SwiGLU width; None gives 8/3 dim rounded up to a multiple of 64.
        pattern: layer kinds, cycled over the layers.
        tie_embeddings: share the embedding with the output projection.
        norm_eps: epsilon of every RMSNorm; heads may have another (``head_norm_eps``, docs/baselines.md).
        init_std: standard deviation of the initial weights; output projections are divided by sqrt(2 layers).
        mixer_out_init: the mixers' output projections begin "scaled" like that, or at "zero": a mixer, whose
            heads are normalised, then adds no noise to a stream that is small yet (docs/study.md).
    """

    __pydantic_config__ = STRICT

    vocab_size: int
    num_layers: int
    dim: int
    num_heads: int
    mlp_hidden: int | None = None
    pattern: tuple[LayerKind, ...] = ("trellis",)
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    init_std: float = 0.02
    mixer_out_init: Literal["scaled", "zero"] = "scaled"
    trellis: TrellisConfig = field(default_factory=TrellisConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "dim", "num_heads"):
            require(getattr(self, name) >= 1, f"model.{name} = {getattr(self, name)}: must be at least 1")
        require(
            self.dim % self.num_heads == 0,
            f"model.dim = {self.dim} is no multiple of model.num_heads = {self.num_heads}: change one",
        )
        for name in ("init_std", "norm_eps"):
            require(getattr(self, name) > 0, f"model.{name} = {getattr(self, name)}: must be positive")
        require(self.mlp_width >= 1, f"model.mlp_hidden = {self.mlp_hidden}: use 1 or more, or leave it out")
        kinds = get_args(LayerKind)
        require(len(self.pattern) > 0, f"model.pattern is empty: name at least one of {', '.join(kinds)}")
        for kind in self.pattern:
            require(kind in kinds, f"model.pattern names {kind!r}: use {', '.join(kinds)}")
        if "trellis" in self.pattern and self.trellis.targets == "values":
            require(
                self.trellis.slots == self.head_dim,
                f'model.trellis.targets = "values" with slots = {self.trellis.slots} and heads of width '
                f"{self.head_dim}: a value is a target where they are equal, change one",
            )
        if set(self.pattern) & set(ATTENTION_KINDS):
            require(
                self.head_dim % 2 == 0,
                f"model.dim / model.num_heads = {self.head_dim}: rotary needs an even head",
            )

    @property
    def head_dim(self) -> int:
        """D = V = dim / num_heads."""
        return self.dim // self.num_heads

    @property
    def mixer_out_std(self) -> float:
        """Standard deviation of the mixers' initial output projections."""
        return 0.0 if self.mixer_out_init == "zero" else self.residual_std

    @property
    def residual_std(self) -> float:
        """init_std / sqrt(2 layers), of what is added to the residual stream 2 layers times."""
        return self.init_std / math.sqrt(2 * self.num_layers)

    @property
    def mlp_width(self) -> int:
        """Hidden width of the SwiGLU."""
        return self.mlp_hidden if self.mlp_hidden is not None else -(-(8 * self.dim) // (3 * 64)) * 64

    def layer_kind(self, layer: int) -> LayerKind:
        """Mixer of layer ``layer`` (0-based)."""
        return self.pattern[layer % len(self.pattern)]

    def chunk_size(self, kind: LayerKind) -> int:
        """Tokens of a chunk of a layer of ``kind``: segments of a sequence are cut at multiples of it."""
        if kind in ATTENTION_KINDS:
            return 1
        if kind == "trellis":
            return self.trellis.chunk_size
        return self.baselines.mini_batch if self.has_mini_batches(kind) else self.baselines.chunk_size

    @staticmethod
    def has_mini_batches(kind: LayerKind) -> bool:
        """Whether a layer of ``kind`` is entered at an offset inside its chunks, where it was left."""
        return kind in MINI_BATCH_KINDS

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Those of all recurrent layers, ascending, each once."""
        recurrent = set(self.pattern) - set(ATTENTION_KINDS)
        return tuple(sorted({self.chunk_size(kind) for kind in recurrent}))

    @property
    def grain(self) -> int:
        """Tokens that every layer's chunks divide: segments of a sequence are multiples of it."""
        return math.lcm(*self.chunk_sizes)

    @property
    def conv_kernel(self) -> int:
        """Taps of the longest short convolution of any layer; 0 without one."""
        taps = {"trellis": self.trellis.conv_kernel, **dict.fromkeys(ATTENTION_KINDS, 0)}
        return max(taps.get(kind, self.baselines.conv_kernel) for kind in self.pattern)

    def gate(self, layer: int) -> Gate:
        """Forget gate of layer ``layer`` (0-based)."""
        return self.trellis.gates[layer % len(self.trellis.gates)]
