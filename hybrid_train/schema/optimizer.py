"""The optimizer, and its learning rate over the run; lengths of a schedule are in tokens."""

import enum
from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from hybrid_train.schema.limits import Factor, Range, Rate, Share, TokenCountOrNone

Beta = Annotated[float, Range(0, 0.999999)]  # 1 remembers all, and its correction divides by 0
Epsilon = Annotated[float, Range(1e-30, 1)]  # 0 divides by 0 where there is no gradient
Norm = Annotated[float, Range(0, 10**9)]


class ParameterKind(enum.Enum):
    """Parameters that a rule can name; anatomy/kinds.py says which tensor is of which."""

    norms = "norms"
    biases = "biases"
    A_log = "A_log"  # decay rates of the Mamba heads
    D = "D"  # direct path of the Mamba heads
    dt_bias = "dt_bias"  # step sizes of the Mamba heads
    convolutions = "convolutions"  # taps of the Mamba convolution
    routers = "routers"
    embeddings = "embeddings"  # with the head where both are one
    heads = "heads"


class MomentFormat(enum.Enum):
    """In which a moment is kept between steps; steps are taken in float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"  # with a scale for each tensor
    float8 = "float8"  # E4M3 with a scale for each tensor


class GradientFormat(enum.Enum):
    """In which the optimizer takes the gradients."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class MasterFormat(enum.Enum):
    """In which weights that are not float32 are updated."""

    float32 = "float32"
    float16 = "float16"  # with a scale for each tensor


@dataclass(kw_only=True)
class AdamW:
    """AdamW with decoupled weight decay, on all parameters but those of `no_decay`.

    As soon as one of the formats is not float32 (reduced-precision optimizer state), float32 master
    weights take two bytes: they are kept as what they differ by from the bfloat16 weights.
    """

    kind: str = "adamw"
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Epsilon = 1e-8
    weight_decay: Factor = 0.1
    no_decay: list[ParameterKind] = field(
        default_factory=lambda: [
            ParameterKind.norms,
            ParameterKind.biases,
            ParameterKind.A_log,
            ParameterKind.D,
            ParameterKind.dt_bias,
        ]
    )
    clip_grad_norm: Norm = 1.0  # 0: no clipping
    first_moment: MomentFormat = MomentFormat.float32
    # float8 makes 0 of what is less than 2^-19 of the largest of its tensor; steps are large there.
    second_moment: MomentFormat = MomentFormat.float32
    main_gradients: GradientFormat = GradientFormat.float32  # bfloat16: as they were reduced
    master_weights: MasterFormat = MasterFormat.float32
    offload_share: Share = 0  # of the parameters whose state is kept and updated in host memory

    @property
    def reduced_state(self) -> dict[str, str]:
        """Fields whose format is not float32, and what they say."""
        names = ("first_moment", "second_moment", "main_gradients", "master_weights")
        formats = {name: str(getattr(self, name).value) for name in names}
        return {name: value for name, value in formats.items() if value != "float32"}


class DecayShape(enum.Enum):
    """How the rate falls during decay."""

    linear = "linear"
    cosine = "cosine"
    exponential = "exponential"
    minus_sqrt = "minus_sqrt"


@dataclass(kw_only=True)
class Schedule:
    """Constant rate after a linear warm-up; the base of the others."""

    kind: str = "constant"
    peak_lr: Rate = MISSING
    warmup_tokens: TokenCountOrNone = "0"


@dataclass(kw_only=True)
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to the final rate at the end of training."""

    kind: str = "cosine"
    final_lr_ratio: Share = 0.01  # final rate / peak rate


@dataclass(kw_only=True)
class Wsd(Cosine):
    """Warm up, stay, decay over the last `decay_tokens` of training."""

    kind: str = "wsd"
    decay_tokens: TokenCountOrNone = MISSING
    decay_shape: DecayShape = DecayShape.minus_sqrt
