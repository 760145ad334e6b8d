"""The benchmark runs, at a tiny size: its figures are nobody's."""

from __future__ import annotations

import functools
import importlib.util
import sys
from dataclasses import replace

from conftest import PROJECT


def test_the_benchmark_prints_a_row_a_case(monkeypatch, capsys):
    path = PROJECT / "benchmarks" / "bench_train.py"
    spec = importlib.util.spec_from_file_location("bench_train", path)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_train", benchmark)
    spec.loader.exec_module(benchmark)
    for name in ("DEMO_MODEL", "PAPER_MODEL"):
        small = replace(getattr(benchmark, name), hidden_units=8)
        monkeypatch.setattr(benchmark, name, small)
    monkeypatch.setattr(benchmark, "MODELS_AT_ONCE", (2,))
    monkeypatch.setattr(benchmark, "MODELS_PER_PROCESS", ())
    monkeypatch.setattr(benchmark, "DEMO_EPOCHS", 3)
    monkeypatch.setattr(benchmark, "LIMIT_SECONDS", 0.001)
    small = functools.partial(benchmark.DataSettings, test_samples=100)
    monkeypatch.setattr(benchmark, "DataSettings", small)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # restored afterwards
    monkeypatch.setattr(sys, "argv", ["bench_train.py", "--rounds", "1"])
    benchmark.main()
    output = capsys.readouterr().out
    assert output.count("(a) ") == 6 and "(c) training step, K = 2" in output
    assert "times as fast as (e)" in output and "% of 3 times (b)" in output
