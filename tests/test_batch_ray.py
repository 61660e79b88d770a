"""Ray actors as workers: the same pictures as without them, and lost ones are replaced."""

import os
import signal
import threading
from functools import partial

import pytest

from multilora.lab.evaluate.batch import run_batch
from multilora.lab.evaluate.items import BatchError, items_of
from multilora.lab.evaluate.journal import read_rows
from multilora.lab.evaluate.ray_workers import RayWorkers
from tests.batch_kills import check, kill_in_turn
from tests.batch_standin import Blind, Broken, Real, StandIn, lines

ROOM = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
TWO = partial(RayWorkers, workers=2)


def pictures(folder):
    return {p.name: p.read_bytes() for p in (folder / "pictures").iterdir()}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    import ray

    ray.init(
        num_cpus=2, _node_ip_address="127.0.0.1", log_to_driver=False, logging_level="error", namespace="test", **ROOM
    )
    yield ray
    ray.shutdown()


def test_actors_draw_the_same_pictures(cluster, tmp_path):
    """Also where items fail or crash their actor: they are left alone after three times, the others are drawn."""
    log = tmp_path / "log"
    given = [*lines(6), {**lines(1)[0], "prompt": "raises"}, {**lines(1)[0], "prompt": "crashes"}]
    summary = run_batch(items_of(given), tmp_path / "out", partial(StandIn, str(log)), workers=TWO)
    assert (summary.done, summary.failed, summary.stopped) == (6, 2, False)
    errors = [row["error"] for row in summary.rows[6:]]
    assert errors[0] == "ArithmeticError: this one always fails"
    assert errors[1].startswith("its process crashed: Fatal Python error: Segmentation fault")
    assert [row["tries"] for row in summary.rows[6:]] == [3, 3]
    begun = log.read_text().splitlines()
    assert len(begun) == 6 + 3 + 3
    assert len({line.split()[0] for line in begun if "crashes" in line}) == 3  # each took an actor with it
    assert str(os.getpid()) not in {line.split()[0] for line in begun}
    run_batch(items_of(given[:6]), tmp_path / "alone", StandIn)
    assert pictures(tmp_path / "out") == pictures(tmp_path / "alone")
    assert not list((tmp_path / "out").glob(".crash*"))


def test_a_killed_actor_is_replaced_and_its_item_not_blamed(cluster, tmp_path):
    killed = []

    def kill(now):
        """Who began the last picture is killed with it in hand."""
        if now.done == 1 and not killed:
            pids = [int(line.split()[0]) for line in (tmp_path / "log").read_text().splitlines()]
            killed.append(pids[-1])
            os.kill(killed[0], signal.SIGKILL)

    make = partial(StandIn, str(tmp_path / "log"), 0.3)
    summary = run_batch(items_of(lines(6)), tmp_path / "out", make, workers=TWO, progress=kill)
    assert killed
    assert (summary.done, summary.failed) == (6, 0)
    assert sum(row["tries"] for row in summary.rows) == 0
    assert len((tmp_path / "log").read_text().splitlines()) <= 7


def test_a_stop_gives_back_what_actors_hold(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("multilora.lab.evaluate.batch.GRACE", 0.2)
    stop = threading.Event()

    def press():
        while not (tmp_path / "log").exists():
            stop.wait(0.01)
        stop.set()

    threading.Thread(target=press).start()
    make = partial(StandIn, str(tmp_path / "log"), 60.0)
    summary = run_batch(items_of(lines(4)), tmp_path / "out", make, workers=TWO, stop=stop)
    assert (summary.done, summary.stopped) == (0, True)
    assert summary.seconds < 50
    assert {(row["status"], row["tries"], row["kills"]) for row in summary.rows} == {("waiting", 0, 0)}


def test_actors_that_can_draw_nothing(cluster, tmp_path):
    with pytest.raises(BatchError, match="nothing can be drawn: no such base"):
        run_batch(items_of(lines(2)), tmp_path / "blind", Blind, workers=TWO)
    assert {row["tries"] for row in read_rows(tmp_path / "blind")} == {0}
    with pytest.raises(BatchError, match=r"(?s)no worker can be started; the last one said: .*has no disk"):
        run_batch(items_of(lines(2)), tmp_path / "broken", Broken, workers=TWO)


@pytest.mark.long
def test_a_node_that_is_lost_in_the_middle(tmp_path):
    """Two nodes with an actor each; one is killed: all items once, and the pictures are those without Ray."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    health = {"health_check_period_ms": 300, "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 0}
    room = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": health, **ROOM})
    try:
        other = room.add_node(num_cpus=2, object_store_memory=ROOM["object_store_memory"])
        room.wait_for_nodes()
        lost = []

        def lose(now):
            if now.done >= 6 and not lost:
                lost.append(now.done)
                room.remove_node(other, allow_graceful=False)

        items = items_of(lines(30))
        make = partial(StandIn, str(tmp_path / "log"), 0.2)
        team = partial(RayWorkers, workers=2, address=room.address)
        summary = run_batch(items, tmp_path / "out", make, workers=team, progress=lose)
        assert lost
        assert (summary.done, summary.failed) == (30, 0)
        assert len((tmp_path / "log").read_text().splitlines()) <= 30 + 2
        workers = {row["worker"] for row in summary.rows}
        assert len(workers) >= 2
    finally:
        ray.shutdown()
        room.shutdown()
    run_batch(items, tmp_path / "alone", StandIn)
    assert pictures(tmp_path / "out") == pictures(tmp_path / "alone")


@pytest.mark.long
@pytest.mark.parametrize("teams", [(0,), (0, 2, 1)], ids=["alone", "actors"])
def test_driver_and_workers_killed_in_turn(tmp_path, teams):
    """A sample of benchmarks/batch.py kills."""
    run_batch(items_of(lines(60)), tmp_path / "reference", StandIn)
    import ray

    address = ""
    if any(teams):
        ray.shutdown()
        address = ray.init(num_cpus=2, log_to_driver=False, logging_level="error", **ROOM).address_info["address"]
    try:
        found = kill_in_turn(tmp_path, lines(60), 10, teams, address, seed=len(teams))
    finally:
        ray.shutdown()
    check(tmp_path, pictures(tmp_path / "reference"), found)
    assert found.kills == 10
    assert (found.workers > 0) == (len(teams) > 1)


@pytest.mark.long
def test_the_embedded_base_alone_and_by_actors(tmp_path):
    """The same bytes, by every kind of method, whoever draws."""
    both = {"korv": 0.8, "dotta": "0@0,1@0.5"}
    given = [
        {"prompt": "a korv in a dotta", "loras": both, "steps": 2, "method": method}
        for method in ("merge", "switch", "composite")
    ]
    run_batch(items_of(given), tmp_path / "alone", Real)
    run_batch(items_of(given[::-1]), tmp_path / "out", Real, workers=TWO)
    assert pictures(tmp_path / "out") == pictures(tmp_path / "alone")
    assert len(pictures(tmp_path / "out")) == 3
