"""Trials side by side with Ray, on clusters of this machine's own; CI runs this file by itself."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
from pathlib import Path

import pytest
from conftest import finish, one_line, wait_until
from test_table import SCRIPT, SMALL, TRIALS_FILE, trained

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402


@pytest.fixture(autouse=True)
def leave():
    """The driver is this process: it leaves the cluster after each test."""
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def cluster():
    """One node of one core."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_side_by_side_equals_one_after_the_other(folder):
    flags = (*SMALL, "--trials", 2, "--epochs", 3)
    for name, ray_flags in (("one", ()), ("ray", ("--ray", "local"))):
        result = folder.run(SCRIPT, *flags, "--output-dir", name, *ray_flags)
        assert result.status == 0, result.errors
    for name in (TRIALS_FILE, "table_synth.md", "table_synth.png"):
        one, side_by_side = (folder.path / where / name for where in ("one", "ray"))
        assert one.read_bytes() == side_by_side.read_bytes()
    parents = folder.parents("flooding-table")  # each folder is a table of its own
    assert [len(folder.children(parent)) for parent in parents] == [4, 4]


def test_a_divergence_in_a_worker_is_one_line(cluster, folder):
    flags = ("--optimizer", "sgd", "--learning-rate", 1e30, "--epochs", 2)
    result = folder.run(SCRIPT, *SMALL, *flags, "--ray", cluster.address)
    assert result.status == 1
    line = one_line(result.errors)
    assert line.startswith("run_table_synth.py: error: ") and "in epoch 1" in line
    assert [run.info.status for run in folder.parents("flooding-table")] == ["FAILED"]
    assert not trained(folder)


def marked(mark: str) -> list[int]:
    """The processes that have the mark in their environment, as a driver's children do."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:  # it is over, or another user's
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at processes in /proc")
def test_sigterm_ends_the_driver_and_its_workers(folder):
    mark = f"flooding-test-{os.getpid()}"
    driver = folder.spawn(SCRIPT, *SMALL, "--epochs", 300, "--ray", "local", MARK=mark)
    try:
        wait_until(lambda: trained(folder) >= 1, 200)
        assert len(marked(mark)) > 2  # Ray's, too
        driver.send_signal(signal.SIGTERM)
        result = finish(driver, timeout=30)
        assert result.status == 128 + signal.SIGTERM
        assert result.errors == "\nstopped by SIGTERM\n"
        wait_until(lambda: not marked(mark))
    finally:
        for process in marked(mark):
            os.kill(process, signal.SIGKILL)


def test_no_ray_there(folder, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for wrong in (address, "nonsense"):
        result = folder.run(SCRIPT, *SMALL, "--ray", wrong)
        assert result.status == 2 and result.output == ""
        assert f"error: --ray {wrong}: local, or a running cluster's (" in one_line(result.errors)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = folder.run(SCRIPT, *SMALL, "--ray", "local")
    assert result.status == 2
    assert one_line(result.errors).endswith("--ray local: only with Ray: pip install ray")
