"""Launch environment from the variables of torchrun, srun, both, or none."""

from __future__ import annotations

import pytest

from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.launch import LOOPBACK, Launch, first_host, launched_rank, read_launch

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29501"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_JOB_NODELIST": "login,node[01-02]",
}
PORT = 10_000 + 77 * 257 + 2
SINGLE = Launch("none")


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, SINGLE),
        (TORCHRUN, Launch("torchrun", 3, 4, 1, "head", 29501)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch("torchrun")),
        ({"WORLD_SIZE": "1"}, SINGLE),
        ({"WORLD_SIZE": "", "RANK": " ", "SLURM_NTASKS": "", "SLURM_PROCID": ""}, SINGLE),
        (SRUN, Launch("srun", 3, 4, 1, "node01", PORT)),
        ({**SRUN, "MASTER_ADDR": "head"}, Launch("srun", 3, 4, 1, "head", PORT)),
        ({**SRUN, "MASTER_PORT": "5000", "WORLD_SIZE": "4"}, Launch("srun", 3, 4, 1, "node01", 5000)),
        ({**SRUN, "SLURM_NNODES": "1"}, Launch("srun", 3, 4, 1, LOOPBACK, PORT)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "8"}, Launch("srun", 3, 8, 1, "node01", PORT)),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_NNODES"), Launch("srun", 3, 4, 1, "login", PORT)),
        (without(SRUN, "SLURM_STEP_ID"), Launch("srun", 3, 4, 1, "node01", PORT - 2)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NODELIST": "n1"}, Launch("srun", 1, 2, 1, LOOPBACK, 10_000)),
        ({**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Launch("srun", 0, 1, 1)),
        # Not started by srun: an salloc shell, an interactive step, a batch script, a script without --ntasks.
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, SINGLE),
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"}, SINGLE),
        ({**without(SRUN, "SLURM_STEP_ID"), "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}, SINGLE),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": ""}, SINGLE),
        # One torchrun per srun task, and a script that sets RANK from srun's variables.
        (
            {**SRUN, **TORCHRUN, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "GROUP_WORLD_SIZE": "2"},
            Launch("torchrun", 3, 4, 1, "head", 29501),
        ),
        ({**SRUN, "RANK": "3"}, Launch("torchrun", 3, 4, 1, "node01", PORT)),
        ({**SRUN, "RANK": "3", "WORLD_SIZE": "4"}, Launch("torchrun", 3, 4, 1, "node01", PORT)),
    ],
)
def test_launch_environment_is_read(variables: dict[str, str], expected: Launch) -> None:
    assert read_launch(variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', and must be an integer of 1 or more"),
        ({**TORCHRUN, "WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1', and must be an integer of 0 or more"),
        ({**TORCHRUN, "RANK": "1.0"}, "RANK is '1.0'"),
        ({**TORCHRUN, "RANK": "4"}, "RANK is 4, and must be below WORLD_SIZE 4"),
        ({**TORCHRUN, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 2"),
        ({**TORCHRUN, "LOCAL_RANK": "gpu"}, "LOCAL_RANK is 'gpu'"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000, and must be at most 65535"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, and RANK is not set"),
        ({"RANK": "0"}, "RANK is 0, and WORLD_SIZE is not set"),
        ({**SRUN, "WORLD_SIZE": "8"}, "WORLD_SIZE is 8, and srun started 4 tasks"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE is 1, and srun started 4 tasks"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "4"}, "RANK is 0, and srun started this process as task 3"),
        ({**SRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "torchrun has --nnodes 1"),
        ({**SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID is 4, and must be below SLURM_NTASKS 4"),
        ({**SRUN, "SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
        ({**SRUN, "SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many'"),
        ({**SRUN, "SLURM_NTASKS": ""}, "SLURM_PROCID is 3, and SLURM_NTASKS is not set"),
        ({**SRUN, "SLURM_STEP_NODELIST": "node[01-02"}, "cannot be parsed. Set MASTER_ADDR"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "neither MASTER_ADDR nor SLURM_JOB_NODELIST is set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "started by mpirun"),
    ],
)
def test_contradictory_variables_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_launch(variables)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node[01-03,7],gpu5", "node01"),
        ("gpu5,node[01-03]", "gpu5"),
        ("rack[1-2]n[01-16]", "rack1n01"),
        ("cn-[009,011-013]-ib,x", "cn-009-ib"),
        ("node01.cluster.local", "node01.cluster.local"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",a", "node[01-03", "node[]", "node[a-b]", "node]1", "a b"])
def test_malformed_node_list_is_refused(nodes: str) -> None:
    with pytest.raises(ConfigError, match="cannot be parsed"):
        first_host(nodes)


def test_ports_of_jobs_and_steps_on_one_node_differ() -> None:
    ports = [
        read_launch({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
        for job in range(123_456, 123_476)
        for step in range(10)
    ]
    assert len(set(ports)) == len(ports)
    assert all(1024 < (port or 0) < 32_768 for port in ports), "a privileged or an ephemeral port"


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        (SRUN, 3),
        (TORCHRUN, 3),
        ({"SLURM_NTASKS": "4"}, 0),
        ({**TORCHRUN, "WORLD_SIZE": "abc"}, 3),
        ({**SRUN, "SLURM_NTASKS": "x"}, 3),
        ({"RANK": "first"}, 0),
    ],
)
def test_rank_for_messages_is_known_even_if_variables_are_malformed(variables: dict[str, str], rank: int) -> None:
    assert launched_rank(variables) == rank
