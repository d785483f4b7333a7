"""Pictures of runs: which panels, which points, what a mistake is answered by."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from common.errors import UserError
from extras import plot


def write(folder, records):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


RECORDS = [dict(step=0, val_loss=5.0), dict(step=0, loss=4.0, lr=1e-3, grad_norm=None),
           dict(step=1, loss=2.0, lr=2e-3, grad_norm=1.5), dict(step=2, val_loss=1.0)]


def test_a_training_step_is_drawn_where_it_has_been_done_and_nan_is_left_out():
    assert plot.curve(RECORDS, "loss") == ([1, 2], [4.0, 2.0])            # after updates 1 and 2
    assert plot.curve(RECORDS, "val_loss") == ([0, 2], [5.0, 1.0])
    assert plot.curve(RECORDS, "grad_norm") == ([2], [1.5])
    assert plot.curve(RECORDS, "reward") == ([], [])


def test_smoothing_is_the_mean_of_a_window_before_each_value():
    values = [3.0, 1.0, 5.0, 7.0, 2.0]
    for window in (1, 2, 3, 9):
        expected = [sum(values[max(0, i + 1 - window):i + 1]) / min(i + 1, window) for i in range(5)]
        assert plot.smoothed(values, window) == pytest.approx(expected)


def test_a_last_line_cut_short_is_left_out_and_another_one_named(tmp_path):
    folder = write(tmp_path / "run", RECORDS)
    with open(f"{folder}/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert plot.read_metrics(folder) == RECORDS
    with open(f"{folder}/metrics.jsonl", "a") as file:
        file.write('\n{"step": 4}\n')
    with pytest.raises(UserError, match="metrics.jsonl:5: not a line of JSON"):
        plot.read_metrics(folder)


def command(*options):
    return subprocess.run([sys.executable, "-m", "extras.plot", *map(str, options)], cwd=ROOT, text=True,
                          capture_output=True, timeout=100)


def test_runs_are_drawn_from_the_command_line(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot")
    one, two = write(tmp_path / "one", RECORDS), write(tmp_path / "two", [dict(step=0, reward=0.5, loss=1.0)])
    result = command(one, two, "--smooth=2")
    assert result.returncode == 0, result.stderr
    assert "curves.png: loss, reward, learning rate, gradient norm\n" in result.stdout
    assert (tmp_path / "one/curves.png").read_bytes().startswith(b"\x89PNG")
    result = command(one, f"--out={tmp_path}/x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert result.returncode == 0 and text.startswith("<?xml") and "<svg" in text


def test_mistakes_are_answered_by_a_line(tmp_path, monkeypatch):
    one = write(tmp_path / "one", RECORDS)
    for options, message in ((["--smooth=2"], "expected: python -m extras.plot RUN"),
                             ([tmp_path / "none"], "metrics.jsonl: No such file"),
                             ([write(tmp_path / "empty", [])], "nothing to draw yet"),
                             ([one, f"--out={tmp_path}/x.doc"], "Format 'doc' is not supported"),
                             ([one, f"--out={tmp_path}/no/x.png"], "No such file"),
                             ([one, "--smooth=0"], "expected"), ([one, "--smoth=2"], "--smooth")):
        result = command(*options)
        assert result.returncode == 2 and message in result.stderr, (options, result.stderr)
        assert result.stderr.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match='extra "plot"'):
        plot.draw({"one": RECORDS}, str(tmp_path / "x.png"))
