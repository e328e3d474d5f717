"""No code of ours turns bytes into code: pickles, evaluated text, YAML with tags. Ray's own does, behind its token."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("actors", "cluster", "protos") for path in (ROOT / package).rglob("*.py"))
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle", "joblib", "code", "codeop"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    "recv_pyobj", "send_pyobj",  # ZeroMQ's
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list", "recv_serialized",  # torch.distributed's
    "allow_pickle", "unsafe_load", "full_load",
}  # fmt: skip
CALLS = {("torch", "load"), ("yaml", "load"), ("numpy", "load"), ("np", "load"), ("connection", "Listener")}


def faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[-1] in MODULES)
            case ast.ImportFrom(module=module, names=names):
                parts = [*(module or "").split("."), *(alias.name for alias in names)]
                yield from (part for part in parts if part in MODULES | ATTRIBUTES)
                yield from (f"{module}.{a.name}" for a in names if ((module or "").split(".")[-1], a.name) in CALLS)
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                yield name
            case ast.Attribute(value=ast.Name(id=of) | ast.Attribute(attr=of), attr=name) if (of, name) in CALLS:
                yield f"{of}.{name}"
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)) if name in ATTRIBUTES:
                yield name


def test_all_of_our_code_is_free_of_it() -> None:
    assert len(SOURCES) > 60
    found = {str(path.relative_to(ROOT)): list(faults(path.read_text())) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from ray import cloudpickle",
        "import ray.cloudpickle as p",
        "from torch import load",
        "torch.load(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "numpy.load(path, allow_pickle=True)",
        "socket.recv_pyobj()",
        "torch.distributed.broadcast_object_list(x)",
        "eval(text)",
        "multiprocessing.connection.Listener(address)",
        "from torch.distributed import all_gather_object",
    ],
)
def test_each_is_recognized(line: str) -> None:
    assert list(faults(line))
