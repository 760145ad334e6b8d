"""The benchmark runs, at a tiny size: its figures are nobody's."""

from dataclasses import replace

from conftest import PROJECT


def test_the_benchmark_prints_a_row_a_case(monkeypatch, capsys):
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import bench_train

    demo, table = bench_train.Demo(), bench_train.Table()
    model, data = replace(demo.model, hidden_units=8), replace(demo.data, test_samples=100)
    small = {"STACKS": (2,), "SHAPES": ((1, 40), (2, 5)), "LIMIT_SECONDS": 0.001}
    small["NUMPY"] = bench_train.NUMPY.replace("4000", "40")
    small["Demo"] = lambda: replace(demo, model=model, data=data)
    small["Table"] = lambda: replace(table, model=model)
    for name, value in small.items():
        monkeypatch.setattr(bench_train, name, value)
    bench_train.main(bench_train.Benchmark(rounds=1))
    output = capsys.readouterr().out
    for said in ("(a) mm, ", "(a) bmm, ", "(a) oneDNN, ", "(a) NumPy, ", "(b) demo, one epoch",
                 "(c) training step, K = 2", "(d) the same epoch", "the limit is ",
                 "times as long as at the limit", "times as fast as (d)"):  # fmt: skip
        assert said in output
