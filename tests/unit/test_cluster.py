"""What a Slurm job's variables say about its machines; a pure function, so every layout can be tried."""

from collections.abc import Callable

import pytest

from kfood_dist.errors import LaunchError
from kfood_dist.system import cluster
from kfood_dist.system.cluster import RESTART_PATIENCE_S, Cluster, outlast

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


def read(resolves: bool = True, first: str | None = "gpu07", **changed: str | None) -> Cluster:
    environment = {name: value for name, value in (STEP | changed).items() if value is not None}
    return Cluster.from_environment(environment, lambda nodes: first, lambda name: resolves)


def test_two_nodes_meet_at_the_first_ones_name() -> None:
    cluster = read()
    assert (cluster.num_machines, cluster.machine_rank, cluster.address) == (2, 1, "gpu07")
    assert cluster.port == 10_000 + 1234567 % 20_000
    assert not cluster.is_head and read(SLURM_NODEID="0").is_head


def test_every_node_of_a_job_picks_one_port_and_another_job_another() -> None:
    assert read(SLURM_NODEID="0").port == read(SLURM_NODEID="1").port != read(SLURM_JOB_ID="1234568").port


@pytest.mark.parametrize("first", ["gpu07", None])
def test_a_name_that_does_not_resolve_gives_way_to_the_address(first: str | None) -> None:
    assert read(resolves=False, first=first).address == "10.0.0.7"
    with pytest.raises(LaunchError, match="does not resolve"):
        read(resolves=False, first=first, SLURM_LAUNCH_NODE_IPADDR=None)


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_JOB_ID": None},
        {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_ID": None, "SLURM_JOB_NUM_NODES": "1"},
    ],
    ids=["no Slurm", "a step of one node", "a job of one node, without srun"],
)
def test_one_machine_is_a_cluster_of_one(changed: dict[str, str | None]) -> None:
    assert read(**changed) == Cluster()


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"SLURM_STEP_ID": None}, "has 2 nodes, but was started on this one alone"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "8 tasks on 2 nodes"),
        ({"SLURM_NODEID": "x"}, "SLURM_NODEID is 'x', no number"),
    ],
)
def test_a_wrong_layout_is_refused(changed: dict[str, str | None], complaint: str) -> None:
    with pytest.raises(LaunchError, match=complaint):
        read(**changed)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds slept so far, none of which pass."""
    slept: list[float] = []
    clock = type("Clock", (), {"sleep": slept.append, "monotonic": lambda: sum(slept)})
    monkeypatch.setattr(cluster, "time", clock)
    return slept


def succeeds_at(turn: int) -> Callable[[], bool]:
    turns = iter(range(1, turn + 1))
    return lambda: next(turns) == turn


def test_a_lock_is_tried_once(waited: list[float]) -> None:
    assert outlast(succeeds_at(1), "held") and not outlast(succeeds_at(2), "held")
    assert waited == []


def test_a_job_that_was_started_again_outlasts_the_lock_of_a_lost_node(
    waited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert outlast(succeeds_at(4), "it is held")
    assert waited == [10, 10, 10]
    assert capsys.readouterr().out == "it is held; waiting\n" * 3
    assert not outlast(lambda: False, "it is held")
    assert sum(waited) - 30 == RESTART_PATIENCE_S == 300
