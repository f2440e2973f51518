"""What is started on which machine; a pure function, so every machine can be tried."""

from itertools import pairwise

import pytest

from kfood_dist.cluster import Cluster
from kfood_dist.errors import LaunchError
from kfood_dist.launch import CONFIGS, Machine, accelerate_command, choose, main

DESK = Machine(num_gpus=1, num_cores=16, has_deepspeed=True)
NODE = Machine(num_gpus=4, num_cores=64, has_deepspeed=True)
LAPTOP = Machine(num_gpus=0, num_cores=8, has_deepspeed=True)


@pytest.mark.parametrize(
    ("machine", "zero_stage", "processes", "configuration", "count"),
    [
        (NODE, 2, None, "deepspeed", 4),
        (NODE, 2, 2, "deepspeed", 2),
        (NODE, 0, None, "ddp", 4),
        (DESK, 2, None, "deepspeed", 1),
        (DESK, 0, None, "single", 1),
        (LAPTOP, 2, None, "deepspeed", 2),
        (LAPTOP, 0, None, "ddp", 2),
        (LAPTOP, 0, 1, "single", 1),
        (Machine(0, 1, True), 2, None, "deepspeed", 1),
        (Machine(1, 8, has_deepspeed=False), 2, None, "single", 1),
    ],
)
def test_choice(machine: Machine, zero_stage: int, processes: int | None, configuration: str, count: int) -> None:
    launch = choose(machine, zero_stage, processes)
    assert (launch.configuration, launch.processes) == (configuration, count)
    assert (CONFIGS / f"{configuration}.yaml").is_file()
    command = accelerate_command(launch, ["train", "--config", "r.yaml"])
    assert command[command.index("--num_processes") + 1] == str(count)
    assert command[-4:] == ["kfood_dist", "train", "--config", "r.yaml"]


def test_it_says_what_was_picked_and_why() -> None:
    assert choose(NODE, 2, None).why == "4 GPUs: 4 processes (one per GPU), DeepSpeed ZeRO-2"
    assert choose(LAPTOP, 0, 1).why == "no GPU, 8 cores: 1 process (as asked), without DeepSpeed"
    without = choose(Machine(1, 8, has_deepspeed=False), 2, None)
    assert without.zero_stage == 0
    assert "deepspeed is not installed, and one process does without" in without.why


@pytest.mark.parametrize(
    ("machine", "processes", "complaint"),
    [
        (NODE, 5, "--processes 5 on 4 GPUs"),
        (NODE, 0, "--processes 0"),
        (Machine(2, 8, has_deepspeed=False), None, "deepspeed is not installed"),
    ],
)
def test_what_cannot_be_started_is_refused(machine: Machine, processes: int | None, complaint: str) -> None:
    with pytest.raises(LaunchError, match=complaint):
        choose(machine, 2, processes)


def test_several_nodes_count_processes_each() -> None:
    launch = choose(NODE, 2, None, num_machines=2)
    assert launch.why == "4 GPUs: 4 processes (one per GPU) on each of 2 nodes, DeepSpeed ZeRO-2"
    cluster = Cluster(2, 1, "gpu07", 12345)
    command = accelerate_command(launch, ["train"], cluster)
    words = dict(pairwise(command))
    assert (words["--num_processes"], words["--num_machines"], words["--machine_rank"]) == ("8", "2", "1")
    assert (words["--main_process_ip"], words["--main_process_port"]) == ("gpu07", "12345")
    assert words["--deepspeed_multinode_launcher"] == "standard"
    assert choose(DESK, 0, None, num_machines=2).configuration == "ddp"


def test_an_evaluation_on_several_nodes_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert main(["eval", "--shards", "shards", "--split", "test", "--model", "base", "--out", "out"]) == 2
    assert "an evaluation was started on 2 nodes, and takes one → ask for --nodes=1" in capsys.readouterr().err
