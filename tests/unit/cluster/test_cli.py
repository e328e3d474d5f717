"""The command line: what it prints, what it refuses, and with which exit code. Nothing is started."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from actors.checkpoint.index import validate_checkpoint
from actors.config import IngressConfig, PipelineConfig
from actors.errors import ConfigError, CorralError
from cluster.cli import corral
from cluster.commands import serve as serve_command
from cluster.commands.clients import Message, Options, Piece, _pieces
from cluster.commands.talk import printable, say
from cluster.private_ray import ServicePorts


def run(*arguments: str, **kwargs: object) -> Result:
    return CliRunner().invoke(corral, arguments, **kwargs)  # type: ignore[arg-type]


def test_help_names_every_command() -> None:
    text = run("--help").output
    for name in ("serve", "stop", "status", "plan", "make-model", "chat", "ask"):
        assert f"\n  {name}" in text


def test_plan_of_maverick_on_eight_h200() -> None:
    result = run("plan", "--shape", "maverick", "--gpus", "8xH200", "--precision", "fp8", env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert "colocated 8 TP8 sliced: the lowest decode floor at 128" in result.output
    assert "KV of each attention rank" in result.output
    assert "76.7 GB" in result.output
    assert result.output.count("colocated 8 TP8 sliced") == 3, (
        "as a layout, as the one that is chosen, and with its floors"
    )


@pytest.mark.parametrize("gpus", ["4xH200", "8xH200", "2x8xH200"])
def test_a_narrow_terminal_cuts_no_number_of_a_plan(gpus: str) -> None:
    result = run("plan", "--shape", "maverick", "--gpus", gpus, "--precision", "fp8", env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert "…" not in result.output


def test_plan_refuses_what_does_not_fit_with_exit_code_1() -> None:
    result = run("plan", "--shape", "maverick-fp8", "--gpus", "2xH200")
    assert result.exit_code == 1
    assert "386.8 GB, usable are 130.1 GB" in result.output
    assert "Floors" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [("--shape", "nonesuch"), ("--shape", "tiny", "--gpus", "8xA1"), (), ("--shape", "tiny", "--layout", "x")],
)
def test_plan_names_what_is_wrong(arguments: tuple[str, ...]) -> None:
    result = run("plan", *arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, CorralError | SystemExit)


def test_make_model_writes_a_checkpoint_that_plan_reads(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    made = run("make-model", str(directory), "--shape", "tiny", "--layers", "4", "--set", "num_experts=4",
               "--experts", "fp8", "--prefix", "--config-style", "old")  # fmt: skip
    assert made.exit_code == 0, made.output
    config = json.loads((directory / "config.json").read_text())["text_config"]
    assert (config["num_hidden_layers"], config["num_local_experts"]) == (4, 4)
    validate_checkpoint(directory)
    planned = run("plan", "--checkpoint", str(directory))
    assert planned.exit_code == 0 and "single: one device" in planned.output
    again = run("make-model", str(directory))
    assert again.exit_code == 1 and "is not empty" in again.output
    wrong = run("make-model", str(tmp_path / "other"), "--set", "nothing=1")
    assert isinstance(wrong.exception, ConfigError) and not (tmp_path / "other").exists()


def test_every_flag_of_serve_is_a_key_of_the_pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The flags arrive as the configuration says, with nothing lost on the way."""
    served: list[tuple[dict[str, Any], ServicePorts, str]] = []
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "keys").write_text("open sesame\n")
    monkeypatch.setattr(serve_command, "check_servable", lambda pipeline: None)
    monkeypatch.setattr(serve_command, "_serve_here", lambda state, *rest: served.append(rest))
    flags = ["--layout", "disaggregated", "--attention-ranks", "1", "--expert-ranks", "2", "--expert-replicas", "2",
             "--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--dtype", "bfloat16",
             "--served-model-name", "m", "--device", "cpu", "--kv-cache-bytes", "1000000", "--threads-per-rank", "1",
             "--gpu-memory-utilization", "0.5", "--max-queued-requests", "7", "--load", "dummy",
             "--set", "page_tokens=32", "--set", "lease_s=9.5"]  # fmt: skip
    result = run("serve", "shape:tiny-scout", *flags, "--front", "proxy", "--port", "18431",
                 "--grpc-port", "18432", "--api-keys-file", str(tmp_path / "keys"))  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    ((args, ports, front),) = served
    assert IngressConfig.parse(args["ingress"]) == IngressConfig(api_keys_file=str(tmp_path / "keys"))
    assert front == "proxy" and (ports.host, ports.http, ports.grpc) == ("127.0.0.1", 18431, 18432)
    assert PipelineConfig.parse(args["pipeline"]) == PipelineConfig(
        model="shape:tiny-scout", layout="disaggregated", attention_ranks=1, expert_ranks=2, expert_replicas=2,
        max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64, dtype="bfloat16", served_model_name="m",
        device="cpu", kv_cache_bytes=1_000_000, threads_per_rank=1, gpu_memory_utilization=0.5, max_queued_requests=7,
        load="dummy", page_tokens=32, lease_s=9.5,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [("--set", "nonesuch=1"), ("--max-num-seqs", "0"), ("--set", "layout")])
def test_serve_refuses_a_wrong_configuration_before_anything_starts(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert isinstance(run("serve", *arguments).exception, ConfigError)


def test_stop_and_status_without_a_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert run("status").output.startswith("nothing is served here")
    assert run("stop").output == "nothing is served\n"
    assert run("stop", "--port", "81").output == "nothing is served on port 81\n"


def test_server_sent_events_become_pieces() -> None:
    lines = [
        'data: {"choices": [{"delta": {"role": "assistant"}}]}', "",
        'data: {"choices": [{"delta": {"content": "He"}}]}', ": comment",
        'data: {"choices": [{"delta": {"content": "llo"}}], "usage": null}',
        'data: {"choices": [], "usage": {"completion_tokens": 7}}',
        "data: [DONE]",
    ]  # fmt: skip
    pieces = list(_pieces(iter(lines)))
    assert "".join(piece.text for piece in pieces) == "Hello"
    assert pieces[-1].num_tokens == 7


def test_ctrl_c_ends_the_answer_and_keeps_what_came() -> None:
    closed = []

    class Client:
        name = "test"

        def stream(self, messages: object, options: object) -> object:
            try:
                yield Piece(text="as far")
                raise KeyboardInterrupt
            finally:
                closed.append(True)

    console = Console(file=io.StringIO())
    text, _ = say(Client(), [Message(role="user", content="q")], Options(), console)  # type: ignore[arg-type]
    assert text == "as far" and closed == [True]


def test_a_model_cannot_steer_the_terminal() -> None:
    assert (
        printable("a\x1b[2Jb\n\tc\x07\x9b") == "a\N{REPLACEMENT CHARACTER}[2Jb\n\tc" + "\N{REPLACEMENT CHARACTER}" * 2
    )
