"""What `corral status` makes of the router's figures."""

from typing import Any

from rich.table import Table

from cluster.commands.status import changes_table, experts_table, headline, last_phases, rank_loads, ranks_table

SNAPSHOT: dict[str, Any] = {
    "serving": True,
    "detail": "serving",
    "changing": "",
    "goal": {"attention_ranks": 1, "expert_ranks": 2, "why": "as configured"},
    "epoch": 12,
    "ranks": [
        {"rank": 0, "roles": ("attention",), "endpoint": "tcp://10.0.0.1:7", "slots": {}},
        {"rank": 3, "roles": ("expert",), "endpoint": "tcp://10.0.0.2:7", "slots": {1: (0, 1, -1)}},
        {"rank": 4, "roles": ("expert",), "endpoint": "tcp://10.0.0.3:7", "slots": {1: (0, -1, -1)}},
    ],
    "expert_tokens": {1: (60.0, 40.0)},
    "load": {"num_running": 5, "num_queued": 2, "kv_used_fraction": 0.25},
    "changes": [
        {"epoch": 11, "why": "first start", "began_s": 0.0, "took_s": 3.0, "pause_s": 0.0, "problem": ""},
        {"epoch": 12, "why": "rank 2 was lost", "began_s": 9.0, "took_s": 0.04, "pause_s": 0.043, "problem": ""},
    ],
}


def text(table: Table) -> list[list[str]]:
    """The cells by column."""
    return [[str(cell) for cell in column.cells] for column in table.columns]


def test_an_experts_tokens_are_spread_over_its_replicas() -> None:
    assert rank_loads(SNAPSHOT) == {0: 0.0, 3: 30.0 + 40.0, 4: 30.0}


def test_a_rank_shows_its_slots_and_its_share() -> None:
    columns = text(ranks_table(SNAPSHOT))
    assert columns[0] == ["0", "3", "4"]
    assert columns[2] == ["10.0.0.1:7", "10.0.0.2:7", "10.0.0.3:7"]
    assert columns[4:] == [["", "2 of 3", "1 of 3"], ["", "70.0%", "30.0%"]]


def test_a_layer_shows_its_hottest_experts_with_their_replicas() -> None:
    assert text(experts_table(SNAPSHOT)) == [["1"], ["0: 60% (2)  1: 40% (1)"]]


def test_changes_come_newest_first_with_their_outcome() -> None:
    failed = {**SNAPSHOT["changes"][0], "problem": "no room"}
    columns = text(changes_table({"changes": [failed, SNAPSHOT["changes"][1]]}))
    assert columns[1] == ["12", "11"] and columns[3] == ["43", "0"] and columns[5] == ["done", "no room"]


def test_the_last_change_is_shown_by_phase() -> None:
    phases_s = {"starting ranks": 2.75, "loading weights": 0.25}
    last = {**SNAPSHOT["changes"][1], "phases_s": phases_s}
    shown = last_phases({"changes": [SNAPSHOT["changes"][0], last]})
    assert shown == "last change: starting ranks 2.75 s, loading weights 0.25 s"
    assert last_phases(SNAPSHOT) == last_phases({}) == ""


def test_the_head_says_what_serves_and_what_is_wanted() -> None:
    lines = headline({**SNAPSHOT, "changing": "grow"}).splitlines()
    assert lines == [
        "epoch 12: serving",
        "5 requests run, 2 wait; 25% of the fuller page group used",
        "wanted: 1 attention and 2 expert ranks (as configured); changing: grow",
    ]
    assert "just started" in headline({})
