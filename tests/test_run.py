"""common/run.py: a script may be driven from Python, and each of its lines be replaced by one's own."""
import json
import re
import textwrap

import pytest
from conftest import ROOT, run

from common.config import asked, parse_config
from common.errors import UserError
from common.model import ModelConfig
from common.run import RunConfig, Step, check_options, count_steps
from train_pretrain import Config

TIMINGS = {"ms", "tok_per_s", "mfu"}
OPTIONS = dict(seq_len=32, batch_size=8, micro_batch_size=4, num_steps=6, warmup_steps=2, lr=1e-2,
               eval_seqs=8, eval_every=3, save_every=4, device="cpu", eval_prompts=("Doc",))
MODEL = dict(n_layer=2, n_head=2, n_embd=16, attn_dropout=0.1)


def records(folder):
    return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS}
            for name in ("metrics.jsonl", "samples.jsonl") for line in open(folder / name)]


def copy_of(script, folder, *changes):
    """The script with some of its text replaced, in a folder of somebody's own -> its path"""
    text = (ROOT / script).read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / script
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + text)
    return path


@pytest.fixture(scope="module")
def by_command_line(token_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("command_line") / "run"
    options = {**OPTIONS, "eval_prompts": "Doc"}
    run("train_pretrain.py", f"--data_dir={token_set}", f"--out_dir={out}",
        *(f"--{name}={value}" for name, value in options.items()),
        *(f"--model.{name}={value}" for name, value in MODEL.items()))
    return records(out)


def test_a_config_made_in_python_gives_the_run_of_the_command_line(by_command_line, token_set, tmp_path):
    made = f"Config(data_dir={str(token_set)!r}, out_dir={str(tmp_path / 'run')!r}, " \
           f"model=ModelConfig(**{MODEL}), **{OPTIONS})"
    path = copy_of("train_pretrain.py", tmp_path, ("cfg = parse_config(Config)", f"cfg = {made}"),
                   ("from common.model import GPT", "from common.model import GPT, ModelConfig"))
    run(path, "--what=no command line is read")
    assert records(tmp_path / "run") == by_command_line
    # the run directory's config has what differs from the defaults, and runs again
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model"] == MODEL and config["num_steps"] == 6
    run("train_pretrain.py", tmp_path / "run/config.json", f"--out_dir={tmp_path}/again")
    assert records(tmp_path / "again") == by_command_line


@pytest.mark.parametrize("old, new", [
    ("optimizer = run.optimizer(model)",
     "from common import optim\n    from common.zero1 import ShardedOptimizer\n"
     "    optimizer = ShardedOptimizer(optim.parameter_groups(model))"),
    ("        doc_mask=cfg.doc_mask,\n        critical_ids=cfg.critical_ids,\n"
     "        critical_alpha=cfg.critical_alpha,\n", ""),
    pytest.param(
        "optimizer.lr = run.learning_rate(step)",
        "from common.schedule import learning_rate\n"
        "        optimizer.lr = learning_rate('cosine', step.number, 6, 1e-2, 1e-3, 2, 0.0, 0, 1.0, 0.2)",
        marks=pytest.mark.slow),
    pytest.param("model = run.model(GPT)", "model = run.model(lambda config: GPT(config))",
                 marks=pytest.mark.slow)],
    ids=["optimizer", "data", "schedule", "model"])
def test_a_line_that_calls_run_may_be_replaced(old, new, by_command_line, token_set, tmp_path):
    path = copy_of("train_pretrain.py", tmp_path, (old, new))
    run(path, f"--data_dir={token_set}", f"--out_dir={tmp_path}/run",
        *(f"--{name}={','.join(value) if isinstance(value, tuple) else value}"
          for name, value in OPTIONS.items()),
        *(f"--model.{name}={value}" for name, value in MODEL.items()))
    assert records(tmp_path / "run") == by_command_line


@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_the_loss_of_sft_is_changed_in_the_script(smoothing, chat_set, tmp_path):
    """The example of docs/losses.md; without smoothing and z-loss it is the loss that it replaces."""
    example, = re.findall(r"```python\n(.*?)```", (ROOT / "docs/losses.md").read_text(), re.DOTALL)
    if not smoothing:
        example = example.replace("label_smoothing=0.1", "label_smoothing=0.0").replace("1e-4", "0.0")
    built_in = ("                loss_sum = losses.linear_cross_entropy(\n"
                "                    hidden, model.head, batch.targets, batch.mask, batch.weight\n"
                "                )\n")
    path = copy_of("train_sft.py", tmp_path, (built_in, textwrap.indent(example, " " * 16)),
                   ("import torch\n", "import torch\nimport torch.nn.functional as F\n"))
    options = [f"--data_dir={chat_set}", "--num_steps=4", "--seq_len=150", "--batch_size=4", "--device=cpu",
               "--micro_batch_size=2", "--eval_seqs=8", *(f"--model.{k}={v}" for k, v in MODEL.items())]
    run(path, f"--out_dir={tmp_path}/own", *options)
    run("train_sft.py", f"--out_dir={tmp_path}/built_in", *options)
    own, built_in = ([line["loss"] for line in map(json.loads, open(tmp_path / name / "metrics.jsonl"))
                      if "loss" in line] for name in ("own", "built_in"))
    close = [abs(a - b) < 1e-5 for a, b in zip(own, built_in, strict=True)]
    assert all(close) if not smoothing else not any(close)


def test_what_was_asked_is_the_command_line_or_what_differs_from_the_defaults():
    given = parse_config(Config, ["--lr=1e-3", "--model.n_layer=8"])         # both are the defaults
    assert asked(given) == {"lr": "1e-3", "model": {"n_layer": "8"}}
    assert asked(Config(lr=0.5, model=ModelConfig(n_layer=3))) == {"lr": 0.5, "model": {"n_layer": 3}}
    assert asked(Config()) == {}


def test_a_step_starts_dropout_from_its_number_alone():
    import torch
    draws = []
    for number in (3, 4, 3):
        step = Step(number, False, False, False, seed=1)
        torch.rand(number)                                    # what an evaluation may have drawn
        step.start()
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[2] != draws[1] and step.lap() >= 0


@pytest.mark.parametrize("options, message", [
    (dict(batch_size=6, micro_batch_size=4), "--batch_size=6: must be a multiple of ranks"),
    (dict(lr=-1.0), "--lr=-1.0: must be at least 0"),
    (dict(keep_last=0), "--keep_last=0: must be at least 1"),
    (dict(num_steps=0), "--num_steps=0 --num_epochs=0.0: set one of them")])
def test_options_that_do_not_fit_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        check_options(RunConfig(**options), 1)


def test_epochs_are_counted_in_updates_and_the_last_may_be_partial():
    assert count_steps(RunConfig(num_epochs=1.5, batch_size=4, warmup_steps=0), 10) == (4, 15)
    assert count_steps(RunConfig(num_steps=7, warmup_steps=0), 10) == (7, float("inf"))
    with pytest.raises(UserError, match="--num_epochs=0.01: not one of 10 sequences"):
        count_steps(RunConfig(num_epochs=0.01), 10)
