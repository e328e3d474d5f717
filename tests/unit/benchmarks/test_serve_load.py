"""The table and the picture of the load benchmark say what was measured, failures above all."""

import argparse
import time
from xml.etree import ElementTree

import pytest

from benchmarks import plot
from benchmarks.load_figures import Figures
from benchmarks.serve_load import lengths, levels, picture, remarks, render, row, settings


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
                              duration_s=4.0, clients=1)  # fmt: skip


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


def test_each_level_has_its_warm_up() -> None:
    args = argparse.Namespace(streams="1,8", duration_s=5.0, prompt_tokens=(4, 4), output_tokens=(4, 4), vocab=9)
    for text, expected in (("2", [2, 2]), ("2,7", [2, 7])):
        args.warm_up_s = text
        found = []
        for level in levels(args):
            found.append(round(level.window.begin_s - time.perf_counter()))
            assert level.window.length_s == pytest.approx(5)
        assert found == expected


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
