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
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PROJECT

import settings
from datasets import Data
from settings import Model, OutputDir, SettingError, Training, flat, parse_flags

ADAM = Training(optimizer="adam", batch_size=20, epochs=5)


@dataclass(frozen=True, kw_only=True)
class Script:
    """A script's settings."""

    data: Data = Data(dataset="spiral", label_noise=0.1)
    model: Model = Model()
    training: Training = Training(optimizer="sgd", batch_size=20, epochs=5)
    levels: tuple[float, ...] = (0.0, 0.1)
    """flood levels"""
    output_dir: OutputDir = Path(".")


def parse(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["script.py", *flags])
    return parse_flags(Script, "What it does.\n\nMore.")


def python(*command, shell="exec", **environment):
    """Run Python as a user does; what it prints on both streams, and its exit status."""
    command = ["sh", "-c", f'{shell} "$@"', "sh", sys.executable, *map(str, command)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout, done.stderr, done.returncode


def test_what_hangs_on_the_optimizer_is_filled_in_where_it_is_not_said():
    sgd = Training(optimizer="sgd", learning_rate=0.3, batch_size=20, epochs=5)
    assert (ADAM.learning_rate, ADAM.momentum) == (None, None)
    assert (ADAM.filled().learning_rate, ADAM.filled().momentum) == (0.001, 0)
    assert (sgd.filled().learning_rate, sgd.filled().momentum) == (0.3, 0.9)
    assert Training(optimizer="sgd", batch_size=2, epochs=1).filled().learning_rate == 0.01
    assert ADAM.filled().filled() == ADAM.filled()


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
    made = parse(monkeypatch, "--dataset", "gaussian", "--epochs", "7", "--no-batch-norm")
    assert (made.data.dataset, made.data.label_noise) == ("gaussian", 0.1)
    assert made.training == Training(optimizer="sgd", batch_size=20, epochs=7)
    parameters = flat(made)
    assert (parameters["dataset"], parameters["batch_norm"]) == ("gaussian", False)
    assert (parameters["levels"], parameters["output_dir"]) == ([0.0, 0.1], ".")
    assert json.loads(json.dumps(parameters)) == parameters


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--label-noise 2", "--label-noise 2.0: a fraction in [0, 1)"),
        ("--optimizer adam --momentum 0.5", "--momentum 0.5: only with sgd"),
        ("--train-samples 0", "--train-samples 0: at least 1"),
        ("--epochs 1.5", None),
        ("--dataset moons", None),
        ("--nothing 1", None),
    ],
)
def test_wrong_flags_end_the_script(monkeypatch, capsys, flags, said):
    with pytest.raises(SystemExit, match=r"^2$"):
        parse(monkeypatch, *flags.split())
    output, errors = capsys.readouterr()
    if said:
        assert (output, errors) == ("", f"script.py: error: {said}\n")
    else:  # tyro's box
        assert output == "" and all(word in errors for word in flags.split())


@pytest.mark.parametrize("script", ["run_demo_synth.py", "run_table_synth.py"])
@pytest.mark.parametrize(("options", "columns"), [(["-OO"], "80"), ([], "1")])
def test_help_without_docstrings_and_in_the_narrowest_terminal(tmp_path, script, options, columns):
    """tyro does not end in one column."""
    output, errors, status = python(*options, PROJECT / script, "--help", COLUMNS=columns)
    assert status == 0 and errors == ""
    for name, text in (
        ("--learning-rate", "0.01 for sgd, 0.001 for adam"),
        ("--dataset", "data set"),
    ):
        assert name in output and text in re.sub(r"[\s│]+", " ", output)


def test_a_folder_for_files_is_made_or_refused(tmp_path):
    settings.check_output_dir(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").is_dir() and not list((tmp_path / "new" / "one").iterdir())
    for folder in ("/dev/null/x", "/proc/self"):
        with pytest.raises(SettingError, match=f"^output_dir {folder}: a folder that can be writ"):
            settings.check_output_dir(Path(folder))


def test_what_fails_after_training_costs_only_itself(capsys):
    failures = []
    for text in ("no\nspace", "second", "second"):
        with settings.going_on(failures, OSError, ValueError):
            raise OSError(text)
    with pytest.raises(KeyError), settings.going_on(failures, OSError):
        raise KeyError
    with pytest.raises(SystemExit, match=r"^1$"):
        settings.end_with(failures)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" error: ")[1] for line in lines] == ["no space", "second"]
    settings.end_with([])


@pytest.mark.parametrize("broken", ["stdout", "stderr"])
def test_a_stream_that_nobody_reads_costs_only_itself(tmp_path, broken):
    """As in `script | head -1`, also when the interpreter ends and empties its buffers."""
    code = (
        "import settings, sys\nfailures = []\nsettings.tell(failures, 'one')\n"
        "bar = settings.progress_bar(10, 'epoch')\nbar.delay = bar.mininterval = 0\n"
        "bar.update(5)\nbar.close()\nsettings.tell(failures, 'two')\n"
        f"open({str(tmp_path / 'done')!r}, 'w').close()\nsettings.end_with(failures)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, broken: writing}
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, text=True, **streams)
    assert (tmp_path / "done").exists() and done.returncode == (broken == "stdout")
    if broken == "stdout":
        assert done.stderr.splitlines()[-1].endswith("error: [Errno 32] Broken pipe")
    else:
        assert done.stdout == "one\ntwo\n"


def test_no_stream_stops_a_script(tmp_path):
    code = (
        "import settings, sys\nsettings.mend_streams()\nprint('3 × 4 ± 1', flush=True)\n"
        f"kept = open({str(tmp_path / 'kept')!r}, 'w')\n"
        "bar = settings.progress_bar(10, 'epoch')\nbar.update(10)\n"
        "with settings.ending_on(ValueError): raise ValueError('3 × 4')"
    )
    output, errors, status = python("-c", code, PYTHONIOENCODING="ascii")
    assert (output, status) == ("3 ? 4 ? 1\n", 1) and errors.endswith("error: 3 ? 4\n")
    output, errors, status = python("-c", code, shell="exec 2>&-; exec")
    assert (output, errors, status) == ("3 × 4 ± 1\n", "", 1)
    assert (tmp_path / "kept").read_text() == ""


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
