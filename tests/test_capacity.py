"""--dry_run: what it says a run takes is what the run takes, and nothing is written."""
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run

from common import optim
from common.model import GPT, ModelConfig
from common.zero1 import ShardedOptimizer
from extras.capacity import bytes_per_parameter, measure


def number(text, pattern):
    return float(re.search(pattern, text)[1].replace(",", ""))


def test_bytes_kept_for_backward_are_those_of_a_hand_count():
    B, T, C, F, V = 3, 16, 32, 64, 50
    model = GPT(ModelConfig(vocab_size=V, n_layer=1, n_head=2, n_embd=C, d_ff=F, seq_len=T))
    tokens = torch.zeros(B, T, dtype=torch.int64)
    seconds, kept = measure(model, lambda: model(tokens), torch.autocast("cpu", enabled=False))
    floats = {"embedded, attention's norm, its output": 2 * C, "q, k, v and q, k turned": 3 * C + 2 * C,
              "attention's output": C, "residual, MLP's norm, its output": 2 * C, "gate and up": 2 * F,
              "silu(gate) up": F, "residual, last norm": C}
    expected = 4 * B * T * sum(floats.values())
    assert expected < kept < 1.35 * expected                  # and what norms, attention and the turn note
    assert 0 < seconds < 1 and not any(p.grad.any() for p in model.parameters())


def test_recomputed_blocks_keep_less():
    model = GPT(ModelConfig(vocab_size=50, n_layer=4, n_head=2, n_embd=32, seq_len=64)).train()
    tokens, autocast = torch.zeros(4, 64, dtype=torch.int64), torch.autocast("cpu", enabled=False)
    _, whole = measure(model, lambda: model(tokens), autocast)
    model.activation_checkpointing = True
    assert measure(model, lambda: model(tokens), autocast)[1] < whole / 3


@pytest.mark.parametrize("script, fixture, options", [
    ("train_pretrain.py", "token_set", []), ("train_sft.py", "chat_set", ["--num_steps=0", "--num_epochs=2"]),
    ("train_dpo.py", "pair_set", []), ("train_dpo.py", "pair_set", ["--ref_online=true"]),
    ("train_grpo.py", "prompt_set", ["--beta=0.1", "--reward=tests/some_rewards.py:letters",
                                     "--max_new_tokens=8", "--num_samples=4"]),
    ("train_kd.py", "token_set", ["--teacher=teacher_run"])], ids=str)
def test_a_dry_run_says_what_the_run_then_does(script, fixture, options, request, tmp_path):
    options = [f"--teacher={request.getfixturevalue('teacher_run')}" if option == "--teacher=teacher_run"
               else option for option in options]
    command = [script, f"--data_dir={request.getfixturevalue(fixture)}", f"--out_dir={tmp_path}/run",
               "--seq_len=64", "--batch_size=4", "--num_steps=3", "--model.n_layer=2", "--model.n_head=2",
               "--model.n_embd=32", "--eval_seqs=4", *options]
    said = run(*command, "--dry_run=true").stdout
    assert not (tmp_path / "run").exists() and "Nothing was written" in said
    done = run(*command).stdout
    records = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    steps = [record for record in records if "loss" in record]
    assert number(said, r"model +([\d,]+) parameters") == number(done, r"([\d,]+) parameters")
    assert number(said, r"run +([\d,]+) steps") == len(steps)
    assert number(said, r"optimizer ([\d,]+)") == round(number(done, r"([\d,]+) bytes of opt") / 2**20)
    mean = sum(record["tokens"] for record in steps) / len(steps)
    if script == "train_grpo.py":                             # as if no answer ended before it had to
        assert mean <= number(said, r"step +([\d,]+) tokens")
    else:
        assert mean == pytest.approx(number(said, r"step +([\d,]+) tokens"), rel=0.35)
    two_models = script in ("train_grpo.py", "train_kd.py") or "--ref_online=true" in options
    assert ("other models" in said) == two_models


def test_mistakes_are_found_by_a_dry_run(token_set, tmp_path):
    data = f"--data_dir={token_set}"
    for options, message in (([f"--data_dir={tmp_path}"], "meta.json"),
                             ([data, "--init_from=nowhere"], "nowhere"),
                             ([data, "--batch_size=3", "--micro_batch_size=2"], "multiple")):
        result = run("train_pretrain.py", *options, f"--out_dir={tmp_path}/run", "--dry_run=true",
                     check=False)
        assert result.returncode == 2 and message in result.stderr


@pytest.mark.slow
def test_memory_is_within_a_third_of_a_real_run_s(token_set, tmp_path):
    """Peak resident memory of fresh processes, above that of one which has imported the same"""
    command = [sys.executable, "train_pretrain.py", f"--data_dir={token_set}", f"--out_dir={tmp_path}/run",
               "--seq_len=512", "--batch_size=16", "--num_steps=2", "--model.n_layer=6", "--model.n_head=4",
               "--model.n_embd=256", "--eval_seqs=0"]
    measured = ("import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
                "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
                "except SystemExit: pass\n"
                "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")

    def peak(*options):
        result = subprocess.run([command[0], "-c", measured, *command[1:], *options], cwd=ROOT, text=True,
                                capture_output=True, env={"OMP_NUM_THREADS": "1", "PATH": ""}, timeout=200)
        assert result.returncode == 0, result.stderr
        return number(result.stdout, r"peak (\d+)") / 2**10, result.stdout
    tiny = ["--model.n_layer=1", "--seq_len=8", "--model.n_embd=8", "--batch_size=1"]
    base, _ = peak(*tiny, f"--out_dir={tmp_path}/tiny")
    used, _ = peak()
    _, said = peak(f"--out_dir={tmp_path}/none", "--dry_run=true")
    assert number(said, r"memory +([\d,]+) MiB") == pytest.approx(used - base, rel=0.33)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer, slots", [("adamw", 2), ("lion", 1)])
def test_bytes_per_parameter_are_those_of_the_optimizer_s_buffers(dtype, optimizer, slots):
    config = ModelConfig(vocab_size=512, n_layer=2, n_head=2, n_embd=64, seq_len=8)
    model = GPT(config).to(getattr(torch, dtype))
    ours = ShardedOptimizer(optim.parameter_groups(model, optimizer))
    held = sum(flat.param.nbytes + flat.grad.nbytes for flat in ours.flats) + ours.state_bytes()
    assert held == pytest.approx(bytes_per_parameter(dtype, slots, 1) * model.num_parameters(), rel=0.01)
    state = ours.state_bytes() / model.num_parameters()       # of which N ranks keep 1/N: tests/test_zero1.py
    for shards in (2, 8):
        saved = bytes_per_parameter(dtype, slots, 1) - bytes_per_parameter(dtype, slots, shards)
        assert saved == pytest.approx(state * (1 - 1 / shards), rel=0.01)


def test_the_table_of_largest_models_is_arithmetic():
    result = run("-m", "extras.capacity", "--memory_gib=16", "--ranks=1,4", "--free_frac=0.5")
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in result.stdout.splitlines()[2:]}
    assert rows["float32", "1"] == ["16.00", "0.54"]          # 8 * 2^30 / 16 = 0.537e9
    assert rows["float32", "4"] == ["10.00", "0.86"]          # 4 + 4 + 8 / 4
    assert rows["bfloat16", "4"] == ["9.00", "0.95"]          # 2 + 4 + 12 / 4
    result = run("-m", "extras.capacity", "--ranks=0", check=False)
    assert result.returncode == 2 and "expected positive numbers" in result.stderr
