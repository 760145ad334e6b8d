"""The benchmark runs, at a tiny size: its figures are nobody's."""

from __future__ import annotations

from dataclasses import replace

from conftest import PROJECT


def test_the_benchmark_prints_a_row_a_case(monkeypatch, capsys):
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import bench_train

    monkeypatch.setattr(bench_train, "MODELS_AT_ONCE", (2,))
    monkeypatch.setattr(bench_train, "LIMIT_SECONDS", 0.001)
    demo, table = bench_train.Demo(), bench_train.Table()
    small = replace(demo.model, hidden_units=8)
    data = replace(demo.data, test_samples=100)
    monkeypatch.setattr(bench_train, "Demo", lambda: replace(demo, model=small, data=data))
    monkeypatch.setattr(bench_train, "Table", lambda: replace(table, model=small))
    bench_train.main(bench_train.Benchmark(rounds=1))
    output = capsys.readouterr().out
    for library in ("mm", "bmm", "oneDNN", "NumPy"):
        assert f"(a) {library}, " in output
    assert "(c) training step, K = 2" in output and "the limit is " in output
    assert "times as long as at the limit" in output and "times as fast as (d)" in output
