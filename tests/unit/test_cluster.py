"""The machines of a Slurm job, read from its variables. The function is pure, so every layout can be tested."""

from collections.abc import Callable

import pytest

from kfood_dist.errors import LaunchError
from kfood_dist.system import cluster
from kfood_dist.system.cluster import RESTART_PATIENCE_S, Cluster, take_with_patience

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


def test_two_nodes_meet_at_the_name_of_the_first() -> None:
    cluster = read()
    assert (cluster.num_machines, cluster.machine_rank, cluster.address) == (2, 1, "gpu07")
    assert cluster.port == 10_000 + 1234567 % 20_000
    assert not cluster.is_head and read(SLURM_NODEID="0").is_head


def test_the_nodes_of_a_job_pick_the_same_port_and_another_job_a_different_one() -> None:
    assert read(SLURM_NODEID="0").port == read(SLURM_NODEID="1").port != read(SLURM_JOB_ID="1234568").port


@pytest.mark.parametrize(
    ("first", "why"), [("gpu07", "gpu07 does not resolve"), (None, r"scontrol cannot expand 'gpu\[07-08\]'")]
)
def test_the_address_is_used_if_the_name_does_not_resolve(first: str | None, why: str) -> None:
    assert read(resolves=False, first=first).address == "10.0.0.7"
    with pytest.raises(LaunchError, match=f"the job's first node has no known address: {why}, and srun"):
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
        ({"SLURM_STEP_ID": None}, "has 2 nodes, but was started only on this node"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "8 tasks on 2 nodes"),
        ({"SLURM_NODEID": "x"}, "SLURM_NODEID is 'x', not a number"),
    ],
)
def test_a_wrong_layout_is_refused(changed: dict[str, str | None], complaint: str) -> None:
    with pytest.raises(LaunchError, match=complaint):
        read(**changed)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock. Returns the list of seconds slept so far, without real waiting."""
    slept: list[float] = []
    clock = type("Clock", (), {"sleep": slept.append, "monotonic": lambda: sum(slept)})
    monkeypatch.setattr(cluster, "time", clock)
    return slept


def succeeds_at(turn: int) -> Callable[[], bool]:
    turns = iter(range(1, turn + 1))
    return lambda: next(turns) == turn


def test_a_job_that_was_not_restarted_tries_a_lock_once(waited: list[float]) -> None:
    assert take_with_patience(succeeds_at(1), "held") and not take_with_patience(succeeds_at(2), "held")
    assert waited == []


def test_a_restarted_job_waits_for_the_lock_of_a_lost_node(
    waited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert take_with_patience(succeeds_at(4), "it is held")
    assert waited == [10, 10, 10]
    assert capsys.readouterr().out == "it is held; waiting\n" * 3
    assert not take_with_patience(lambda: False, "it is held")
    assert sum(waited) - 30 == RESTART_PATIENCE_S == 300
