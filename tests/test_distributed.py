"""How a process learns of the others: from three variables, from a cluster, or not at all."""

import pathlib

import pytest

from endistill_jax import multihost
from endistill_jax.core.errors import HostMissing, UserError
from endistill_jax.multihost import CONNECT_SECONDS, COORDINATOR, NUM_PROCESSES, PROCESS_ID

NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}


def settings(*values: str | None, **others: str):
    names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
    given = {name: value for name, value in zip(names, values, strict=False) if value is not None}
    return multihost._from_environment(NO_TPU | given | others)


def test_three_variables_say_all_and_no_cluster_is_asked():
    assert settings("tpu-0:8476", "4", "3", SLURM_STEP_NODELIST="n[1-2]", SLURM_NTASKS="2") == {
        "coordinator_address": "tpu-0:8476",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


def test_without_variables_and_cluster_a_process_is_alone():
    assert settings() is None
    assert settings("", "", "") is None


@pytest.mark.parametrize(
    ("variables", "joins"),
    [
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),  # an allocation, but no step of it: the tasks are not here
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_clusters_are_told_by_what_they_set(variables, joins):
    assert settings(**variables) == ({} if joins else None)


def test_a_host_with_a_tpu_asks_the_metadata_server_unless_told_not_to():
    assert multihost._from_environment({}) == {}
    assert multihost._from_environment({NUM_PROCESSES: "1"}) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host:1", None, None), f"{COORDINATOR} without {NUM_PROCESSES}, {PROCESS_ID}; several hosts need all three"),
        ((None, "2", None), f"{NUM_PROCESSES} without {COORDINATOR}, {PROCESS_ID}"),
        (("host", "2", "0"), f"{COORDINATOR} is 'host'; it must be host:port"),
        ((":80", "2", "0"), "must be host:port"),
        (("host:x", "2", "0"), "must be host:port"),
        (("host:80", "two", "0"), f"{PROCESS_ID} is '0' of {NUM_PROCESSES}='two'; they are numbered from 0"),
        (("host:80", "2", "-1"), f"{PROCESS_ID} is '-1' of {NUM_PROCESSES}='2'"),
        (("host:80", "2", "2"), f"{PROCESS_ID} is '2' of {NUM_PROCESSES}='2'"),
        (("host:80", "0", "0"), f"{PROCESS_ID} is '0' of {NUM_PROCESSES}='0'"),
    ],
)
def test_incomplete_or_malformed_variables_are_told(values, message):
    with pytest.raises(UserError) as error:
        settings(*values)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_cluster_that_does_not_tell_its_hosts_is_no_mistake(monkeypatch):
    def silent(**_):
        raise ValueError("coordinator_address should be defined.")

    for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setattr("jax.distributed.initialize", silent)
    with pytest.raises(HostMissing, match="could not find other hosts"):
        multihost.initialize()


@pytest.mark.parametrize(("given", "seconds"), [(None, 300), ("", 300), ("3600", 3600)])
def test_how_long_to_wait_for_others_is_a_variable(monkeypatch, given, seconds):
    monkeypatch.delenv(CONNECT_SECONDS, raising=False)
    if given is not None:
        monkeypatch.setenv(CONNECT_SECONDS, given)
    assert multihost.connect_seconds() == seconds


@pytest.mark.parametrize("given", ["soon", "0", "1.5"])
def test_a_time_to_wait_that_is_none_is_told(monkeypatch, given):
    monkeypatch.setenv(CONNECT_SECONDS, given)
    with pytest.raises(UserError, match=f"{CONNECT_SECONDS} is '{given}'"):
        multihost.connect_seconds()


def test_a_process_alone_joins_nobody_and_gathers_its_own(monkeypatch):
    monkeypatch.setenv(NUM_PROCESSES, "1")
    multihost.initialize()
    assert (multihost.process_count(), multihost.process_index()) == (1, 0)
    assert multihost.gather([2**40, 5]).tolist() == [[2**40, 5]]
    multihost.require_one_process("export")


def test_jobs_for_one_process_refuse_several(monkeypatch):
    monkeypatch.setattr(multihost, "process_count", lambda: 4)
    with pytest.raises(UserError, match=f"export is a job for one process, and there are 4; set {NUM_PROCESSES}=1"):
        multihost.require_one_process("export")


def test_what_jax_keeps_to_itself_is_used_in_one_place():
    package = pathlib.Path(multihost.__file__).parent
    users = [file for file in package.rglob("*.py") if "jax._src" in file.read_text() or "jax.lib" in file.read_text()]
    assert users == [pathlib.Path(multihost.__file__)]
    assert (multihost.client(), multihost.process_count(), multihost.process_index()) == (None, 1, 0)
