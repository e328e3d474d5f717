"""What the fault benchmark asks for is what its judge of close calls assumes."""

from benchmarks.faults import request_of
from benchmarks.workload import Item


def test_requests_leave_no_sampling_parameter_to_the_checkpoint() -> None:
    """A top_p of generation_config.json moves the boundaries between tokens, and the judge would look at others."""
    for number in (4, 7):
        sampling = request_of(number, Item([1, 2, 3], 5)).sampling
        assert sampling.HasField("temperature") and sampling.temperature == number % 2
        assert sampling.HasField("top_p") and sampling.top_p == 1.0
        assert not sampling.top_k and not sampling.min_p and sampling.seed == number
