"""The machines of one Slurm job step: which of them this is, and at which address the first one listens.

    environment of one srun task per node ──► Cluster.from_environment ──► machines, rank, address, port

No other module of the package reads Slurm's variables.
"""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kfood_dist.errors import LaunchError
from kfood_dist.system.words import plural

# By default, a Linux NFSv4 server drops a lost client after 90 s, and a Lustre server after about 100 s. torchrun on
# the job's other nodes waits ten minutes for this node.
RESTART_PATIENCE_S = 300
_AGAIN_S = 10
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000  # below Linux's ephemeral ports, which start at 32768


@dataclass(frozen=True)
class Cluster:
    """The machines of a run. `address` and `port` are None for a single machine, which finds a free port itself."""

    num_machines: int = 1
    machine_rank: int = 0
    address: str | None = None
    port: int | None = None
    why: str = ""

    @property
    def is_head(self) -> bool:
        return self.machine_rank == 0

    @classmethod
    def from_environment(
        cls,
        environment: Mapping[str, str],
        first_host: "Callable[[str], str | None]",
        resolves: "Callable[[str], bool]",
    ) -> "Cluster":
        """Read the job step's variables. A process outside Slurm, or on the only node, is a cluster of one machine.

        `first_host` expands a node list into its first name. `resolves` says whether a name has an address. Raises
        LaunchError unless every node of the job runs exactly one task, and if the first node has no usable address.
        """
        if "SLURM_JOB_ID" not in environment:
            return cls()
        if "SLURM_STEP_ID" not in environment:
            nodes = _number(environment, "SLURM_JOB_NUM_NODES", 1)
            if nodes > 1:
                raise LaunchError(
                    f"this job has {nodes} nodes, but was started only on this node",
                    "start it with `sbatch slurm/train.sbatch`, or put `srun --ntasks-per-node=1` in front",
                )
            return cls()
        nodes = _number(environment, "SLURM_STEP_NUM_NODES", 1)
        tasks = _number(environment, "SLURM_STEP_NUM_TASKS", nodes)
        if tasks != nodes:
            raise LaunchError(
                f"srun started {plural(tasks, 'task')} on {plural(nodes, 'node')}",
                "use --ntasks-per-node=1: the launcher starts a process for each GPU itself",
            )
        if nodes == 1:
            return cls()
        node_list = environment.get("SLURM_STEP_NODELIST", "")
        name = first_host(node_list)
        unusable = f"{name} does not resolve" if name else f"scontrol cannot expand {node_list!r}"
        if name and resolves(name):
            address, why = name, "the job's first node"
        elif "SLURM_LAUNCH_NODE_IPADDR" in environment:
            address, why = environment["SLURM_LAUNCH_NODE_IPADDR"], f"srun's node, because {unusable}"
        else:
            raise LaunchError(
                f"the job's first node has no known address: {unusable}, and srun did not give its own address",
                "make the node names resolve on all nodes, or start with `sbatch slurm/train.sbatch`",
            )
        port = _FIRST_PORT + _number(environment, "SLURM_JOB_ID", 0) % _NUM_PORTS
        return cls(nodes, _number(environment, "SLURM_NODEID", 0), address, port, why)

    @classmethod
    def here(cls) -> "Cluster":
        """Return the cluster that this process is part of. Raises LaunchError as `from_environment` does."""
        return cls.from_environment(os.environ, expand_first, can_resolve)


def require_one_node(what: str) -> None:
    """Raise LaunchError in a job step of several nodes, because each of them would do all of `what`."""
    nodes = _number(os.environ, "SLURM_STEP_NUM_NODES", 1)
    if nodes > 1:
        raise LaunchError(f"{what} was started on {nodes} nodes, but runs on one", "ask for --nodes=1")


def take_with_patience(take: Callable[[], bool], what: str) -> bool:
    """Return whether `take` got a lock. Tries once, or for RESTART_PATIENCE_S in a job that Slurm restarted.

    A restarted job can be blocked by its own previous start: if that ran on a node that was lost, the file server keeps
    its locks until it drops the node. Prints `what` before each new try.
    """
    patience_s = RESTART_PATIENCE_S if _number(os.environ, "SLURM_RESTART_COUNT", 0) else 0
    until = time.monotonic() + patience_s
    while not take():
        if time.monotonic() >= until:
            return False
        print(f"{what}; waiting", flush=True)
        time.sleep(_AGAIN_S)
    return True


def expand_first(node_list: str) -> str | None:
    """Return the first name of a Slurm node list such as `node[1-4]`, or None if `scontrol` cannot expand it."""
    try:
        command = ["scontrol", "show", "hostnames", node_list]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    names = done.stdout.split()
    return names[0] if names else None


def can_resolve(name: str) -> bool:
    """Return whether this machine finds an address for `name`."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise LaunchError(f"{name} is {text!r}, not a number", "start with `sbatch slurm/train.sbatch`")
    return int(text)
