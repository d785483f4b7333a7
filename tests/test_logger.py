"""The run directory: what is kept on a resume, what JSON cannot hold, the console line."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from common.dist import short_time
from common.errors import UserError
from common.logger import Logger


def new(folder, **kwargs):
    return Logger(str(folder / "run"), {"lr": 0.1}, __file__, num_steps=4, log_every=2, **kwargs)


def rows(folder):
    return [json.loads(line) for line in open(folder / "run/metrics.jsonl")]


def test_a_resume_drops_the_records_that_will_be_written_again(tmp_path):
    log = new(tmp_path)
    for step in range(4):
        log.metrics(step, loss=float(step))
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')                          # cut short by a kill
    new(tmp_path, resume=True, start_step=2).metrics(2, loss=9.0)
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(0, 0.0), (1, 1.0), (2, 9.0)]


def test_a_directory_in_use_is_refused_and_left_alone(tmp_path):
    new(tmp_path).metrics(0, loss=1.0)
    with pytest.raises(UserError, match="not empty.*--resume=true"):
        new(tmp_path)
    assert len(rows(tmp_path)) == 1


def test_numbers_that_json_lacks_become_null(tmp_path):
    new(tmp_path).metrics(0, loss=float("nan"), grad_norm=float("inf"), lr=0.5)
    line = (tmp_path / "run/metrics.jsonl").read_text()
    assert line == '{"step": 0, "loss": null, "grad_norm": null, "lr": 0.5}\n'


def test_the_console_line_shows_the_speed_of_its_interval(tmp_path, capsys):
    log = new(tmp_path)
    for step, seconds in enumerate((0.5, 1.5, 1.0, 1.0)):
        log.train_step(step, tokens=1000, seconds=seconds, token_flops=3e6, peak_flops=1e10, loss=2.5,
                       lr=1e-3, grad_norm=1.5)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 2/4 | loss 2.5000 | lr 1.0e-03 | norm 1.5 | 1.0k tok/s | mfu 30% | eta 2s"
    assert second.startswith("step 4/4") and second.endswith("eta 0s")
    assert [r["tok_per_s"] for r in rows(tmp_path)] == pytest.approx([2000, 2000 / 3, 1000, 1000])
    assert [r["mfu"] for r in rows(tmp_path)] == pytest.approx([0.6, 0.2, 0.3, 0.3])


@pytest.mark.parametrize("seconds, text", [(0, "0s"), (59.9, "59s"), (75, "1m15s"), (3599, "59m59s"),
                                           (7325, "2h02m")])
def test_times_are_short(seconds, text):
    assert short_time(seconds) == text


def test_control_characters_are_kept_in_the_file_and_off_the_terminal(tmp_path, capsys):
    log = new(tmp_path)
    log.sample(3, "a\tb", "\x1b[31mred\x07\n\r\x00end")
    assert capsys.readouterr().out == "sample at step 3: a\tb\ufffd[31mred\ufffd\n\ufffd\ufffdend\n"
    assert json.loads((tmp_path / "run/samples.jsonl").read_text())["text"] == "\x1b[31mred\x07\n\r\x00end"


# -----------------------------------------------------------------------------
# elsewhere too

def test_tensorboard_gets_every_number_and_a_resumed_run_goes_on(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = new(tmp_path, tensorboard=True)
    for step in range(4):
        log.metrics(step, loss=float(step), expert_frac=[[0.5, 0.5]], dropped=0)
    log = new(tmp_path, tensorboard=True, resume=True, start_step=2)
    log.metrics(2, loss=9.0, val_loss=float("nan"))
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), purge_orphaned_data=True).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.0), (1, 1.0), (2, 9.0)]
    assert set(events.Tags()["scalars"]) == {"loss", "dropped", "val_loss"}


def test_wandb_gets_every_number_under_an_id_of_the_run_directory(tmp_path, monkeypatch):
    sent, started = [], []

    class Run:
        def log(self, numbers, step):
            sent.append((step, numbers))

    class Wandb:
        @staticmethod
        def init(**options):
            started.append(options)
            return Run()
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    new(tmp_path, wandb="mine").metrics(0, loss=1.0, expert_frac=[[1.0]])
    new(tmp_path, wandb="mine", resume=True, start_step=1).metrics(1, loss=2.0)
    assert sent == [(0, {"loss": 1.0}), (1, {"loss": 2.0})]
    assert started[0]["project"] == "mine" and started[0]["config"] == {"lr": 0.1}
    assert started[0]["id"] == started[1]["id"] and started[0]["resume"] == "allow"


def test_wandb_runs_offline(tmp_path):
    pytest.importorskip("wandb", reason="the extra wandb")
    code = ("from common.logger import Logger; log = Logger(%r, {'lr': 0.1}, 'sample.py', wandb='mine')\n"
            "for step in range(3): log.metrics(step, loss=1.0)" % str(tmp_path / "run"))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120, capture_output=True,
                   env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    files = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1 and b"loss" in files[0].read_bytes()


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_package_that_is_missing_is_named_and_nothing_is_written(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f'--{package}: it is not installed.*extra "{package}"'):
        new(tmp_path, **{package: "mine" if package == "wandb" else True})
    assert not (tmp_path / "run").exists()
