"""The generated stubs are those that the proto makes."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

import protos
from protos import inference_pb2, inference_pb2_grpc

ROOT = Path(protos.__file__).parent.parent
GENERATOR = "1.76.0"  # old on purpose: stubs load with this grpcio and later
STUBS = ("inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py")


def protoc(*options: str) -> None:
    pytest.importorskip("grpc_tools")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *options, "protos/inference.proto"]
    subprocess.run(command, check=True, cwd=ROOT)


def test_stubs_describe_the_proto(tmp_path: Path) -> None:
    """With any generator: the descriptor in the stubs is the proto's, and the services are all there."""
    protoc(f"--descriptor_set_out={tmp_path / 'set'}")
    (stated,) = FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    kept = FileDescriptorProto()
    inference_pb2.DESCRIPTOR.CopyToProto(kept)
    stated.ClearField("source_code_info")
    for file in (stated, kept):  # protoc fills these in, the runtime leaves them out
        for message in file.message_type:
            for field in (*message.field, *(f for nested in message.nested_type for f in nested.field)):
                field.ClearField("json_name")
    assert kept == stated, "protos/ is stale: run `make protos`"
    for method in stated.service[0].method:
        assert hasattr(inference_pb2_grpc.InferenceServicer, method.name)


def test_stubs_are_letter_for_letter_what_their_generator_makes(tmp_path: Path) -> None:
    try:
        version = importlib.metadata.version("grpcio-tools")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version != GENERATOR:
        pytest.skip(f"needs grpcio-tools {GENERATOR}, here is {version}")
    protoc(*(f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")))
    for stub in STUBS:
        made, kept = (tmp_path / "protos" / stub).read_text(), (ROOT / "protos" / stub).read_text()
        assert made == kept, f"protos/{stub} is stale: run `make protos`"
