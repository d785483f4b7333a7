"""The demo's progress line, page and comparison of samples; the stages themselves are tested elsewhere."""
import html.parser
import json
import os
import re

import pytest

from demos.demo import report
from demos.demo import run as demo


def test_a_log_file_gets_lines_without_carriage_returns(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(demo.time, "time", lambda: now[0])
    monkeypatch.setattr(demo, "SECONDS", dict(sft=100, kd=50))
    progress = demo.Progress(["sft", "kd"])
    progress.begin("sft")
    for step in range(0, 101, 5):                             # 200 seconds for what usually takes 100
        progress.watch(f"step {step:>3}/100 | loss 2.0 | lr 1e-3\n")
        now[0] += 10.0
    progress.watch("sample at step 3/5: no step\n")
    progress.end([dict(measure="right", before=0.0, after=0.5)])
    out = capsys.readouterr().out
    assert "\r" not in out and 9 <= out.count("[1/2] sft") <= 12
    last = re.findall(r"\[1/2\] sft +\| step 100/100 +\| +3m20s \| whole demo: 3m20s done, eta (.*)", out)
    assert last == ["1m40s"]                                  # the rest: 50, as slow
    assert out.endswith("sft: 3m30s; right 0.000 -> 0.500\n")


def test_the_second_run_of_a_stage_counts_on(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(demo.time, "time", lambda: now[0])
    monkeypatch.setattr(demo, "SECONDS", dict(kd=100))
    progress = demo.Progress(["kd"])
    progress.begin("kd")
    for line in ("step 0/10 |", "step 10/10 |", "step 0/10 |", "step 5/10 |"):
        now[0] += 25.0
        progress.watch(line)
    assert "100" not in capsys.readouterr().out.splitlines()[-1]
    now[0] += 25.0
    progress.watch("step 6/10 |")
    assert "eta 31s" in capsys.readouterr().out                # 80 % in 125 s


def test_a_failing_script_ends_the_demo_with_its_last_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / demo.OUT).mkdir(parents=True)
    (tmp_path / "bad.py").write_text("print('first')\nraise SystemExit('error: it is broken')")
    seen = []
    with pytest.raises(SystemExit) as leaving:
        demo.run_script(seen.append, "bad.py", "--x=1")
    assert leaving.value.code == 1 and seen == ["first\n", "error: it is broken\n"]
    out = capsys.readouterr().out
    assert "error: it is broken\nbad.py failed; all it has printed is in out/demo/log.txt" in out
    log = (tmp_path / demo.OUT / "log.txt").read_text()
    assert "$ python bad.py --x=1\nfirst\nerror: it is broken\n" in log


def write_run(folder, name, texts):
    """A run that was evaluated at steps 0, 1, ...; texts: at each, of the prompts a and b"""
    (folder / name).mkdir(parents=True)
    with open(folder / name / "samples.jsonl", "w") as file:
        for step, pair in enumerate(texts):
            file.writelines(json.dumps(dict(step=step, prompt=prompt, text=text)) + "\n"
                            for prompt, text in zip("ab", pair))
    with open(folder / name / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps(dict(step=step, loss=1.0 / (step + 1))) + "\n" for step in range(5))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / demo.OUT
    for name in ("pretrain", "kd_alone", "kd"):
        write_run(folder, name, [(f"{name} 0a", f"{name} 0b"), (f"{name} 1a", f"{name} <i>&1b")])
    return folder


def test_samples_are_first_against_last_and_for_the_student_last_against_last(folder):
    assert demo.samples("pretrain") == [("a", "pretrain 0a", "pretrain 1a"),
                                        ("b", "pretrain 0b", "pretrain <i>&1b")]
    assert demo.samples("kd") == [("a", "kd_alone 1a", "kd 1a"), ("b", "kd_alone <i>&1b", "kd <i>&1b")]


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.sources, self.cells = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["td"], ["th"]):
            self.cells.append(data)


@pytest.mark.parametrize("matplotlib", [True, False])
def test_the_page_has_table_curves_and_samples_and_needs_no_other_file(folder, matplotlib, monkeypatch):
    if matplotlib:
        pytest.importorskip("matplotlib", reason="the extra plot")
    else:
        monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    summary = {"pretrain": dict(measure="bits & bytes", before=4.25, after=2.125, seconds=61.4,
                                also=[dict(measure="more", before=1.0, after=0.5)])}
    runs = {stage: demo.RUNS[stage] for stage in ("pretrain", "kd")}
    report.write(folder, summary, {stage: demo.samples(stage) for stage in runs}, runs)
    page = Page((folder / "report.html").read_text())
    assert not page.open                                      # every tag is closed
    rows = " ".join(page.cells)
    assert "pretrain bits & bytes 4.250 2.125 61 more 1.000 0.500" in re.sub(" +", " ", rows)
    assert "before after a pretrain 0a pretrain 1a b pretrain 0b pretrain <i>&1b" in rows
    assert "alone taught a kd_alone 1a kd 1a" in rows and "i" not in page.tags
    assert len(page.sources) == 2 * matplotlib
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)


def test_texts_stand_side_by_side(capsys, monkeypatch):
    monkeypatch.setattr(demo.shutil, "get_terminal_size", lambda _: os.terminal_size((43, 24)))
    demo.print_side_by_side("To", "one two three four five six", "seven\neight")
    assert capsys.readouterr().out.splitlines() == [
        "", "  'To'", "one two three four   | seven", "five six             | eight"]
