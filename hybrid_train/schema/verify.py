"""The root of a comparison of a checkpoint with a Hugging Face folder."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from hybrid_train.schema.limits import Count, FileName, Length, Seed, Share
from hybrid_train.schema.runtime import Runtime


@dataclass(kw_only=True)
class VerifyJob:
    """Names, shapes, formats and values of both sides, then logits of the same tokens."""

    checkpoint: FileName = MISSING  # a run folder or one checkpoint of it
    hf: FileName = MISSING  # Hugging Face folder
    logits: bool = True  # needs transformers, and room for both models in float32
    length: Length = 300  # tokens of each sequence
    sequences: Count = 2
    tolerance: Share = 1e-4  # of a logit, as a share of the standard deviation of all
    seed: Seed = 1234  # of the tokens
    runtime: Runtime = field(default_factory=Runtime)
