"""Trials side by side with Ray, on clusters of this machine's own; CI runs this file by itself."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import PROJECT, Folder, one_line, wait_until
from test_table import PRINTED, SCRIPT, SMALL, TRIALS_FILE, assert_same_files, trained

ray = pytest.importorskip("ray")
import psutil  # noqa: E402  Ray's own
from ray.cluster_utils import Cluster  # noqa: E402


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """That of a cluster of one node of two cores."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(autouse=True)
def leave() -> Iterator[None]:
    """The driver is this process: it leaves the cluster after each test."""
    yield
    ray.shutdown()


def test_side_by_side_equals_one_after_the_other(address, folder):
    flags = (*SMALL, "--trials", 2, "--epochs", 3)
    folder.succeed(SCRIPT, *flags, "--output-dir", "one")
    folder.succeed(SCRIPT, *flags, "--output-dir", "ray", "--ray", address)
    one, side_by_side = Folder(folder.path / "one"), Folder(folder.path / "ray")
    assert_same_files(one, side_by_side, [TRIALS_FILE, *PRINTED])
    parents = folder.parents("flooding-table")  # each folder is a table of its own
    assert [len(folder.children(parent)) for parent in parents] == [4, 4]


def test_a_divergence_in_a_worker_is_one_line(address, folder):
    flags = ("--optimizer", "sgd", "--learning-rate", 1e30, "--epochs", 2)
    result = folder.run(SCRIPT, *SMALL, *flags, "--ray", address)
    line = one_line(result.errors)
    assert line.startswith("run_table_synth.py: error: ") and "in epoch 1" in line
    assert [run.info.status for run in folder.parents("flooding-table")] == ["FAILED"]
    assert result.status == 1 and not trained(folder)


def test_sigterm_ends_the_driver_and_its_workers(folder):
    command = [PROJECT / SCRIPT, *SMALL, "--epochs", 300, "--ray", "local"]
    driver = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder.path,
        env={**os.environ, "MLFLOW_TRACKING_URI": folder.uri},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    started = []
    try:
        wait_until(lambda: trained(folder) >= 1, 200)
        started = psutil.Process(driver.pid).children(recursive=True)
        assert len(started) > 2  # Ray's, too
        driver.send_signal(signal.SIGTERM)
        _, errors = driver.communicate(timeout=30)
        assert (driver.returncode, errors) == (128 + signal.SIGTERM, "\nstopped by SIGTERM\n")
        _, alive = psutil.wait_procs(started, timeout=60)
        assert not alive
    finally:
        for process in (driver, *(one for one in started if one.is_running())):
            process.kill()


def test_no_ray_there(folder, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for wrong in (address, "nonsense"):
        line = folder.refuse(SCRIPT, *SMALL, "--ray", wrong)
        assert line.startswith(f"--ray {wrong}: local, or a running cluster's (")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = folder.refuse(SCRIPT, *SMALL, "--ray", "local")
    assert line == "--ray local: only with Ray: pip install ray"
