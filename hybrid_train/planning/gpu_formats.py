"""Which GPU multiplies which format, so that a machine without a GPU can be asked about one.

`SUPPORT` holds the facts of Transformer Engine's `_compute_*_support` functions (2.20.2,
pytorch/quantization.py 149-185); a test compares the two.
"""

from dataclasses import dataclass

from hybrid_train.schema.precision import GemmFormat

Version = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """A GPU, as far as formats depend on it."""

    name: str
    capability: Version  # compute capability
    cuda: Version  # version that torch was built with

    def __str__(self) -> str:
        capability, cuda = (".".join(map(str, one)) for one in (self.capability, self.cuda))
        return f"{self.name} (compute capability {capability}, CUDA {cuda})"


@dataclass(frozen=True)
class Support:
    """GPUs that compute a format: capabilities in [first, end) with a CUDA version."""

    first: Version
    end: Version | None = None  # the first that does not, if there is one
    cuda: Version = (0, 0)

    def has(self, gpu: Gpu) -> bool:
        """Tell whether a GPU is one of them."""
        below = self.end is None or gpu.capability < self.end
        return self.first <= gpu.capability and below and self.cuda <= gpu.cuda


_FP8 = (Support((8, 9), (9, 0), cuda=(12, 1)), Support((9, 0)))
SUPPORT: dict[GemmFormat, tuple[Support, ...]] = {
    GemmFormat.fp32: (Support((0, 0)),),
    GemmFormat.bf16: (Support((8, 0)),),
    GemmFormat.fp8_tensorwise: _FP8,
    GemmFormat.fp8_delayed: _FP8,
    # From 10.0 on it is a GEMM of MXFP8 operands of the same values (csrc/extensions/gemm.cpp
    # 319), which takes scales that are powers of two.
    GemmFormat.fp8_blockwise: (Support((9, 0), cuda=(12, 9)),),
    GemmFormat.mxfp8: (Support((10, 0), (12, 0)),),
    GemmFormat.nvfp4: (Support((10, 0)),),
    GemmFormat.mxfp4: (),
}
BLOCKS_TAKE_FLOAT_SCALES = Support((9, 0), (10, 0))  # fp8_blockwise
# The instructions that round FP4 at random, and the kernel that rotates, are those of 10.x; RTX
# cards of 12.0 end with an error in them and train without both (Transformer Engine's issue 2255,
# and its maintainer in pull request 3195).
NVFP4_ROTATES_AND_ROUNDS = Support((10, 0), (11, 0))
# What comes nearest to a format, best first: as many bits, then scales as fine.
_NEAREST = {
    GemmFormat.fp32: (),
    GemmFormat.bf16: (GemmFormat.fp32,),
    GemmFormat.fp8_tensorwise: (GemmFormat.bf16,),
    GemmFormat.fp8_delayed: (GemmFormat.fp8_tensorwise, GemmFormat.bf16),
    GemmFormat.fp8_blockwise: (
        GemmFormat.mxfp8,
        GemmFormat.fp8_tensorwise,
        GemmFormat.bf16,
    ),
    GemmFormat.mxfp8: (
        GemmFormat.fp8_blockwise,
        GemmFormat.fp8_tensorwise,
        GemmFormat.bf16,
    ),
    GemmFormat.nvfp4: (
        GemmFormat.mxfp8,
        GemmFormat.fp8_blockwise,
        GemmFormat.fp8_tensorwise,
        GemmFormat.bf16,
    ),
    GemmFormat.mxfp4: (
        GemmFormat.nvfp4,
        GemmFormat.mxfp8,
        GemmFormat.fp8_blockwise,
        GemmFormat.fp8_tensorwise,
        GemmFormat.bf16,
    ),
}


def is_native(format: GemmFormat, gpu: Gpu) -> bool:
    """Tell whether a GPU computes GEMMs of a format itself."""
    return any(support.has(gpu) for support in SUPPORT[format])


def nearest_native(format: GemmFormat, gpu: Gpu) -> GemmFormat:
    """Return the format itself where a GPU has it, else the nearest one that it has."""
    candidates = (format, *_NEAREST[format], GemmFormat.fp32)
    return next(one for one in candidates if is_native(one, gpu))


def native_formats(gpu: Gpu) -> list[GemmFormat]:
    """Return all formats whose GEMMs a GPU computes itself."""
    return [one for one in GemmFormat if is_native(one, gpu)]
