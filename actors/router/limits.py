"""The bounds that the scheduler keeps.

Owns their derivation from configuration and model. Knows nothing of how they are kept.
"""

from dataclasses import dataclass

from actors.checkpoint.config import ModelConfig
from actors.config import PipelineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds that the scheduler keeps, named as in PipelineConfig, and the model's page groups."""

    max_model_len: int  # tokens of prompt + output
    max_num_batched_tokens: int  # of one step, over all ranks
    max_num_seqs: int  # requests that run at once, per rank
    max_queued_requests: int  # waiting beyond what the free seats can take
    page_tokens: int
    chunk_tokens: int = 0  # 0: no layer is chunked
    has_global_layers: bool = True
    max_steps_in_flight: int = 2
    watermark_fraction: float = 0.01  # of a rank's pages, kept free at admissions beside running requests

    @staticmethod
    def of(pipeline: PipelineConfig, model: ModelConfig) -> "SchedulerLimits":
        """The limits of a pipeline; `max_model_len` 0 is the model's own (the pages may say less, see Scheduler)."""
        return SchedulerLimits(
            max_model_len=pipeline.max_model_len if pipeline.max_model_len > 0 else model.max_position_embeddings,
            max_num_batched_tokens=pipeline.max_num_batched_tokens,
            max_num_seqs=pipeline.max_num_seqs,
            max_queued_requests=pipeline.max_queued_requests,
            page_tokens=pipeline.page_tokens,
            chunk_tokens=model.chunk_tokens if model.chunked_layers else 0,
            has_global_layers=bool(model.global_layers),
        )
