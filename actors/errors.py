"""The one exception tree.

Owns what can go wrong in words a caller can act on. Knows nothing of HTTP or gRPC: `actors/ingress/status.py` holds
the one table that maps these to status codes. All take positional arguments, so that their type survives a trip
between actors.
"""


class CorralError(Exception):
    """Whatever Corral raises on purpose."""


class RequestError(CorralError):
    """A client's request is wrong. `field` names the offending field as the client spelt it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class ContextLengthError(RequestError):
    """A prompt leaves no room in the model's context."""


class BodyTooLargeError(RequestError):
    """A request's body is larger than the front reads."""


class UnauthenticatedError(CorralError):
    """The client did not show a key that is known here."""


class ModelNotFoundError(CorralError):
    """The client asked for a model that is not served here."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model

    def __str__(self) -> str:
        return f"model {self.model!r} is not served here"


class OverloadedError(CorralError):
    """A bounded queue is full. Nothing was lost; trying again after `retry_after_s` seconds is right."""

    def __init__(self, problem: str, retry_after_s: float) -> None:
        super().__init__(problem, retry_after_s)
        self.problem = problem
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.problem


class DeadlineError(CorralError):
    """The request's own deadline passed before it ended."""


class RequestCancelledError(CorralError):
    """The client cancelled, or went away."""


class UnavailableError(CorralError):
    """The pipeline cannot serve now: starting, or a rank was lost. Safe to try again after `retry_after_s`."""

    def __init__(self, problem: str, retry_after_s: float = 1.0) -> None:
        super().__init__(problem, retry_after_s)
        self.problem = problem
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.problem


class GivenUpError(CorralError):
    """One epoch after another ended while the request was computed: it may be the reason, and is not tried again."""


class CheckpointError(CorralError):
    """A checkpoint cannot be served. Names the file and, where there is one, the tensor."""

    def __init__(self, file: str, tensor: str | None, problem: str) -> None:
        super().__init__(file, tensor, problem)
        self.file = file
        self.tensor = tensor
        self.problem = problem

    def __str__(self) -> str:
        where = f"{self.file}: {self.tensor}" if self.tensor else self.file
        return f"{where}: {self.problem}"


class ConfigError(CorralError):
    """A configuration key is unknown or its value cannot be used."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}"


class LayoutError(CorralError):
    """The model does not fit the machines in the layout that was asked for."""


class RankError(CorralError):
    """A rank failed, died or did not answer in time; its epoch is over."""

    def __init__(self, rank: int, problem: str) -> None:
        super().__init__(rank, problem)
        self.rank = rank
        self.problem = problem

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.problem}"


class UnreachableError(RankError):
    """A rank cannot reach some of its peers, though others may."""

    def __init__(self, rank: int, peers: tuple[int, ...]) -> None:
        super().__init__(rank, f"cannot reach rank {', '.join(map(str, peers))}")
        self.args = (rank, peers)
        self.peers = peers
