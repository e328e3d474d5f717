"""Where a pipeline's model lies: a directory, `demo` for the one that comes with Corral, or `shape:NAME` for random
weights that are made on first use.

Owns the cache of made models and the lock around it. Knows nothing of how they are written, and imports torch only to
write one, so that a process that merely asks for the directory stays small.
"""

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.checkpoint.expected import num_checkpoint_bytes
from actors.checkpoint.shapes import LAYOUTS, ModelShape, StoredExperts, named_shape, shape_config
from actors.errors import ConfigError

MAKER_VERSION = 1  # raise it when the same shape and seed would give another model
DEMO = "demo"
# In an installed package, and in a checkout.
_DEMO_PLACES = (Path(__file__).parents[1] / "demo_model", Path(__file__).parents[2] / "deploy" / "demo-model")
MAX_SHAPE_BYTES = 8 * 1024**3  # shape:NAME never fills a disk unasked

_Progress = Callable[[int, int], None]  # (done_bytes, total_bytes)


def resolve_model_directory(model: str, cache_dir: Path | None = None, *, with_weights: bool = True) -> Path:
    """The directory that PipelineConfig.model names; makes it where it is a `shape:NAME` that is not made yet.

    `demo` is found wherever Corral is installed, whatever the working directory; a directory of that name is `./demo`.
    `cache_dir` None is ~/.cache/corral/models. `with_weights` False is for `load: dummy`. Raises ConfigError.
    """
    if model == DEMO:
        return _demo_directory()
    if not model.startswith("shape:"):
        return Path(model).expanduser()
    cache_dir = Path.home() / ".cache" / "corral" / "models" if cache_dir is None else cache_dir
    return ensure_shape_model(model.removeprefix("shape:"), cache_dir, with_weights=with_weights)


def _demo_directory() -> Path:
    for directory in _DEMO_PLACES:
        if (directory / "config.json").exists():
            return directory
    raise ConfigError("model", f"the demonstration model is in neither of {', '.join(map(str, _DEMO_PLACES))}")


def ensure_shape_model(
    name: str, cache_dir: Path, *, with_weights: bool = True, progress: _Progress | None = None
) -> Path:
    """The checkpoint that `shape:NAME` stands for, made on first use (see `shapes.named_shape`).

    Safe with concurrent callers: one makes it, the others wait. A directory that exists is complete. Changing a shape
    or MAKER_VERSION makes a new one. `with_weights` False is for `load: dummy`, at any size.
    Raises ConfigError for an unknown name, or for one whose weights would take more than MAX_SHAPE_BYTES.
    """
    shape, experts = named_shape(name)
    key = hashlib.blake2b(f"{MAKER_VERSION} {shape} {experts} {with_weights}".encode(), digest_size=6).hexdigest()
    final = cache_dir / key / name
    if final.is_dir():
        return final
    if with_weights:
        _check_size(name, shape, experts)
    final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(final.parent / ".lock"):
        if not final.is_dir():
            making = _empty_directory(final.parent)
            _make(making, shape, experts, with_weights, progress)
            making.rename(final)
    return final


def _empty_directory(parent: Path) -> Path:
    for leftover in parent.glob(".making-*"):  # of a maker that was killed: whoever calls this holds the lock
        shutil.rmtree(leftover)
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=parent))
    making.chmod(0o755)
    return making


def _make(
    directory: Path, shape: ModelShape, experts: StoredExperts, with_weights: bool, progress: _Progress | None
) -> None:
    from actors.checkpoint.make_model import make_model, write_description  # imports torch

    if with_weights:
        make_model(directory, shape, experts=experts, progress=progress)
    else:
        write_description(directory, shape, experts=experts)


def _check_size(name: str, shape: ModelShape, experts: StoredExperts) -> None:
    num_bytes = num_checkpoint_bytes(shape_config(shape, experts=experts), LAYOUTS[experts])
    if num_bytes > MAX_SHAPE_BYTES:
        problem = f"shape:{name} would take {num_bytes / 1e9:.0f} GB of disk; use load: dummy, or make a slice of it"
        raise ConfigError("model", problem)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`, which the operating system drops if this process dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
