"""Settings, the flags made from them, and how a script starts and ends, wherever it is run."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import PROJECT, one_line

from datasets import Data
from settings import SettingError, Training


def python(*command: object, **options: object) -> subprocess.CompletedProcess:
    """Run Python in a process of its own, as a user does."""
    options = {"cwd": PROJECT, "text": True, "timeout": 60, **options}
    return subprocess.run([sys.executable, *map(str, command)], **options)


def test_what_a_flag_cannot_say_is_refused_too():
    data, training = {"label_noise": 0.1}, {"optimizer": "adam", "batch_size": 20, "epochs": 5}
    for part, given, name, value in (
        (Data, data, "dataset", "moons"),
        (Training, training, "optimizer", "lion"),
        (Training, training, "flood_on", "run"),
    ):
        with pytest.raises(SettingError, match=rf"^{name} '{value}': .*[a-z]"):
            part(**{**given, name: value})


@pytest.mark.parametrize("script", ["run_demo_synth.py", "run_table_synth.py"])
def test_help_and_wrong_flags_need_no_heavy_import(script, tmp_path):
    """Nor docstrings, nor a wide terminal: tyro does not end in one column."""
    (tmp_path / "run.py").write_text(
        "import runpy, sys\nclass Blocked:\n def find_spec(name, *more):\n"
        "  if name in ('torch', 'mlflow', 'matplotlib', 'pandas'): raise RuntimeError(name)\n"
        f"sys.meta_path.insert(0, Blocked); sys.path.insert(0, {str(PROJECT)!r})\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    (folder := tmp_path / "empty").mkdir()

    def run(*command: object, columns: int = 80) -> subprocess.CompletedProcess:
        environment = {**os.environ, "COLUMNS": str(columns)}
        return python(*command, cwd=folder, env=environment, capture_output=True)

    shown = run(tmp_path / "run.py", PROJECT / script, "--help")
    usage, *lines = shown.stdout.splitlines()
    assert usage.startswith("usage: ") and max(map(len, lines)) <= 80
    narrow = run("-OO", tmp_path / "run.py", PROJECT / script, "--help", columns=1)
    for done in (shown, narrow):
        assert (done.returncode, done.stderr) == (0, "") and "None" not in done.stdout
        assert "0.01 for sgd, 0.001 for adam" in re.sub(r"[\s│]+", " ", done.stdout)
        for name in ("dataset", "hidden-layers", "optimizer", "seed", "output-dir"):
            assert re.search(rf"--{name}\b(?!-)", done.stdout), name
    refused = run(tmp_path / "run.py", PROJECT / script, "--label-noise", 2)
    assert refused.returncode == 2 and "--label-noise 2.0: " in one_line(refused.stderr)
    assert not list(folder.iterdir())


def test_what_nobody_reads_costs_nothing():
    """As in `script --help | head -1` and `script 2>&1 | head -1`."""
    code = "import settings\nbar = settings.ProgressBar(10, 'epoch')\n"
    code += "bar.delay = bar.mininterval = 0\nbar.update(5)\nbar.close()"
    reading, writing = os.pipe()
    os.close(reading)
    python("-c", code, stderr=writing, check=True)
    streams = {"stdout": writing, "stderr": subprocess.PIPE}
    assert not python("run_demo_synth.py", "--help", **streams, check=True).stderr


@pytest.mark.parametrize(("rows", "columns", "redirected"), [(0, 0, False), (24, 40, True)])
def test_the_progress_bar_fits_the_terminal_and_says_the_time_left(rows, columns, redirected):
    """Containers and CI have terminals of 0 rows and 0 columns."""
    code = "import settings, time\nbar = settings.ProgressBar(2000, 'epoch')\n"
    code += "bar.set_postfix_str('sinusoid2d, label noise 0.1', refresh=False)\n"
    code += "time.sleep(0.2)\nbar.update(100)"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    output = subprocess.DEVNULL if redirected else theirs
    python("-c", code, env=environment, stdout=output, stderr=theirs, check=True)
    os.close(theirs)  # or a bar that is not there would be waited for
    lines = re.split(r"[\r\n]+", os.read(ours, 10_000).decode())
    [line] = [line for line in lines if "100 of 2000 epochs" in line]
    assert re.search(r"<\d\d:\d\d", line) and len(line) <= (columns or 80)
