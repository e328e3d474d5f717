"""The dtype that a pipeline computes in.

Owns the one translation of the names in config.json and PipelineConfig to torch's. fp8 is a way to store experts, not
to compute; it is none of this module's business.
"""

import torch

from actors.checkpoint.config import ModelConfig
from actors.config import PipelineConfig
from actors.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(config: ModelConfig, pipeline: PipelineConfig) -> torch.dtype:
    """The pipeline's dtype, or the checkpoint's where that says auto. Raises ConfigError for one that is not known."""
    name = config.dtype if pipeline.dtype == "auto" else pipeline.dtype
    if name not in _DTYPES:
        raise ConfigError("dtype", f"{name!r} is not known; known are {', '.join(_DTYPES)}")
    return _DTYPES[name]
