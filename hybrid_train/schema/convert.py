"""The root of a conversion."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from omegaconf import MISSING

from hybrid_train.schema.limits import FileName, Range
from hybrid_train.schema.problems import Problem


class WeightFormat(enum.Enum):
    """Number format that weights get; `keep` leaves each as it is."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(kw_only=True)
class ConvertJob:
    """A Hugging Face folder becomes a checkpoint, or the other way round."""

    import_: FileName | None = None  # Hugging Face folder; on the command line import=FOLDER
    export: FileName | None = None  # a run folder or one checkpoint of it
    output: FileName = MISSING  # new run folder, or new Hugging Face folder
    dtype: WeightFormat = WeightFormat.keep  # expert biases stay float32
    shard_gb: Annotated[float, Range(0.001, 1000)] = 5.0  # files of an export, in 1e9 bytes

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if (self.import_ is None) == (self.export is None):
            given = "neither" if self.export is None else "both"
            yield Problem("import, export", given, "one of them names what is converted")
