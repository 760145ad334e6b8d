"""Settings, the flags made from them, and how a script starts and ends, wherever it is run."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import PROJECT

import settings
from run_demo_synth import Demo
from settings import Model, SettingError, Training, flat, parse_flags


def test_what_hangs_on_the_optimizer_is_filled_in_where_it_is_not_said():
    adam = Training(optimizer="adam", batch_size=20, epochs=5)
    sgd = Training(optimizer="sgd", learning_rate=0.3, batch_size=20, epochs=5)
    assert (adam.learning_rate, adam.momentum) == (None, None)
    assert (adam.filled().learning_rate, adam.filled().momentum) == (0.001, 0)
    assert (sgd.filled().learning_rate, sgd.filled().momentum) == (0.3, 0.9)
    assert adam.filled().filled() == adam.filled()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("learning_rate", value) for value in (0.0, float("nan"), float("inf"))),
        *(("momentum", value) for value in (1.0, -0.1, 0.5)),  # 0.5: only with sgd
        *(("weight_decay", -1.0), ("batch_size", 0), ("epochs", 0)),
        *(("optimizer", "lion"), ("flood_on", "run")),
        *(("hidden_layers", 0), ("hidden_units", 0)),
    ],
)
def test_a_part_refuses_what_is_out_of_range(name, value):
    with pytest.raises(SettingError, match=rf"^{name} .*{value}.*: .*[a-z]"):
        if name.startswith("hidden"):
            Model(**{name: value})
        else:
            Training(**{"optimizer": "adam", "batch_size": 20, "epochs": 5, name: value})


def test_batch_norm_needs_two_examples():
    for batch_size, samples, fits in ((3, 10, False), (1, 4, False), (4, 10, True), (9, 1, False)):
        training = Training(optimizer="sgd", batch_size=batch_size, epochs=1)
        training.check_batches(samples, batch_norm=False)
        if fits:
            training.check_batches(samples, batch_norm=True)
        else:
            with pytest.raises(
                SettingError, match=rf"batch_size {batch_size}: .* of {samples} one"
            ):
                training.check_batches(samples, batch_norm=True)


def test_flags_are_flat_and_so_are_the_parameters(monkeypatch):
    flags = ("--dataset", "spiral", "--epochs", "7", "--no-batch-norm", "--val-samples", "9")
    monkeypatch.setattr("sys.argv", ["script.py", *flags])
    demo = parse_flags(Demo, "What it does.")
    assert (demo.data.dataset, demo.data.train_samples, demo.data.val_samples) == ("spiral", 200, 9)
    assert (demo.training.epochs, demo.model) == (7, Model(batch_norm=False))
    parameters = flat(demo)
    assert (parameters["dataset"], parameters["output_dir"]) == ("spiral", ".")
    assert json.loads(json.dumps(parameters)) == parameters


@pytest.mark.parametrize("script", ["run_demo_synth.py", "run_table_synth.py"])
@pytest.mark.parametrize(("options", "columns"), [(["-OO"], "80"), ([], "1")])
def test_help_without_docstrings_and_in_the_narrowest_terminal(script, options, columns):
    """tyro does not end in one column."""
    command = [sys.executable, *options, PROJECT / script, "--help"]
    environment = {**os.environ, "COLUMNS": columns}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.01 for sgd, 0.001 for adam" in re.sub(r"[\s│]+", " ", done.stdout)


def test_a_folder_for_files_is_made_or_refused(tmp_path):
    settings.check_output_dir(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").is_dir() and not list((tmp_path / "new" / "one").iterdir())
    for folder in ("/dev/null/x", "/proc/self"):
        with pytest.raises(SettingError, match=f"^output_dir {folder}: a folder that can be writ"):
            settings.check_output_dir(Path(folder))


def test_what_fails_after_training_costs_only_itself(capsys):
    failures = []
    for error in (OSError("no\nspace"), ValueError("other"), OSError("again")):
        with settings.going_on(failures, OSError, ValueError):
            raise error
    with pytest.raises(KeyError), settings.going_on(failures, OSError):
        raise KeyError
    with pytest.raises(SystemExit, match=r"^1$"):
        settings.end_with(failures)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" error: ")[1] for line in lines] == ["no space", "other"]
    settings.end_with([])


def test_a_bar_that_nobody_reads_costs_nothing():
    """As in `script 2>&1 | head -1`."""
    code = "import settings\nbar = settings.progress_bar(10, 'epoch')\n"
    code += "bar.delay = bar.mininterval = 0\nbar.update(5)\nbar.close()"
    reading, writing = os.pipe()
    os.close(reading)
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, stderr=writing, check=True)


@pytest.mark.parametrize("redirected", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (24, 40)])
def test_the_progress_bar_fits_the_terminal_and_says_the_time_left(rows, columns, redirected):
    """Containers and CI have terminals of 0 rows and 0 columns."""
    code = "import settings, time\nbar = settings.progress_bar(2000, 'epoch')\n"
    code += "bar.set_postfix_str('sinusoid2d, label noise 0.1', refresh=False)\n"
    code += "time.sleep(0.2)\nbar.update(100)"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    output = subprocess.DEVNULL if redirected else theirs
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=PROJECT, env=environment, stdout=output, stderr=theirs, check=True)
    os.close(theirs)  # or a bar that is not there would be waited for
    lines = re.split(r"[\r\n]+", os.read(ours, 10_000).decode())
    [line] = [line for line in lines if "100 of 2000 epochs" in line]
    assert re.search(r"<\d\d:\d\d", line) and len(line) <= (columns or 80)
