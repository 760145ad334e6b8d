"""The benchmark runs, at a tiny size: its figures are nobody's."""

from __future__ import annotations

import functools

from conftest import PROJECT


def test_the_benchmark_prints_a_row_a_case(monkeypatch, capsys):
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import bench_train

    monkeypatch.setattr(bench_train, "MODELS_AT_ONCE", (2,))
    monkeypatch.setattr(bench_train, "LIMIT_SECONDS", 0.001)
    for name, sizes in (("DemoSettings", {"test_samples": 100}), ("TableSettings", {})):
        small = functools.partial(getattr(bench_train, name), hidden_units=8, **sizes)
        monkeypatch.setattr(bench_train, name, small)
    bench_train.main(bench_train.BenchmarkSettings(rounds=1))
    output = capsys.readouterr().out
    assert output.count("(a) ") == 6 and "(c) training step, K = 2" in output
    assert "times as fast as (d)" in output and "s for the whole demo, 200 times (b)" in output
