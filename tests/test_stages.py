"""
Every stage through its real command line: it learns, it does not depend on ranks, micro-batches or ZeRO-1, a
killed run resumes bit for bit, and mistakes are answered by one line (PITFALLS 1, 7, 8, 10, 19, 20).
"""
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from launch import start

TIMINGS = {"ms", "tok_per_s", "mfu", "rollout_s", "reward_s", "update_s"}
TINY = ["--model.n_layer=2", "--model.n_head=2", "--model.n_kv_head=1", "--model.n_embd=16", "--seq_len=32",
        "--batch_size=8", "--warmup_steps=5", "--lr=1e-2", "--eval_seqs=20", "--log_every=1", "--device=cpu"]
# stage -> how to run it on a small set: the fixture that makes the set, options
STAGES = {"train_pretrain.py": ("token_set", TINY),
          "train_sft.py": ("chat_set", [*TINY, "--seq_len=150"]),  # longer than what a dense mask is used for
          "train_dpo.py": ("pair_set", [*TINY, "--beta=0.5"]),
          "train_grpo.py": ("prompt_set", [*TINY, "--num_samples=4", "--max_new_tokens=8",
                                           "--reward=tests/some_rewards.py:letters"]),
          "train_kd.py": ("chat_set", [*TINY, "--seq_len=150", "--max_new_tokens=8"])}
slow = pytest.mark.slow
MOE = ["--model.n_expert=4", "--model.n_expert_active=2", "--model.n_shared_expert=1",
       "--model.n_dense_layer=1", "--model.balance_coef=0.1"]
SEES = ["--data_dir=image_set", "--vision.n_layer=1", "--vision.n_head=2", "--vision.n_embd=16"]
# options that change what a step computes: of every stage once, and of one stage; `make test` has QUICK alone
VARIANTS = [("train_pretrain.py", ["--doc_mask=true"]), ("train_pretrain.py", ["--optimizer=muon"]),
            ("train_pretrain.py", ["--optimizer=lion", "--lr=5e-3"]),
            ("train_pretrain.py", ["--dtype=float16"]), ("train_pretrain.py", ["--param_dtype=bfloat16"]),
            ("train_sft.py", ["--mask_prompt=false"]), ("train_sft.py", SEES),
            ("train_sft.py", [*SEES, "--freeze_llm=true", "--micro_batch_size=1", "--lr=3e-2"]),
            ("train_sft.py", [*SEES, "--freeze_tower=true", "--activation_checkpointing=true"]),
            ("train_dpo.py", ["--loss=ipo", "--lr=3e-3"]), ("train_dpo.py", ["--loss=simpo", "--beta=2"]),
            ("train_dpo.py", ["--loss=orpo", "--beta=1"]),
            ("train_dpo.py", ["--ref_online=true", "--label_smoothing=0.1"]),
            ("train_grpo.py", ["--beta=0.01", "--ref_mix=0.5", "--ref_every=5",
                               "--activation_checkpointing=true"]),
            ("train_grpo.py", ["--updates_per_rollout=2", "--aggregate=dapo", "--eval_every=10"]),
            ("train_grpo.py", ["--level=sequence", "--scale_rewards=batch", "--temperature=0.7"]),
            ("train_grpo.py", ["--loss=cispo", "--aggregate=dr_grpo", "--scale_rewards=none", "--delta=2"]),
            ("train_grpo.py", ["--reward=tests/some_rewards.py:letters,tests/some_rewards.py:short",
                               "--reward_weights=1,0.1", "--missing_end_penalty=0.1",
                               "--drop_flat_groups=true", "--suppress=98,99"]),
            ("train_grpo.py", ["--top_k=200", "--top_p=0.95", "--updates_per_rollout=2", "--eval_every=10"]),
            ("train_grpo.py", ["--env=tests/some_rewards.py:twice", "--packed=true",
                               "--reward=tests/some_rewards.py:one_a_token", "--reward_weights=0.2"]),
            ("train_kd.py", ["--divergence=reverse", "--kd_frac=0.9", "--mask_prompt=false"]),
            ("train_kd.py", ["--data_dir=token_set", "--doc_mask=true", "--divergence=jsd",
                             "--temperature=2"]),
            ("train_kd.py", ["--on_policy_frac=0.5", "--micro_batch_size=4"]),
            ("train_kd.py", ["--on_policy_frac=0.5", "--data_dir=token_set"]),
            ("train_kd.py", ["--cache_top_k=20"]),
            ("train_kd.py", ["--cache_top_k=20", "--data_dir=token_set", "--temperature=0.7"]),
            ("train_pretrain.py", MOE), ("train_pretrain.py", [*MOE, "--optimizer=muon"]),
            ("train_pretrain.py", ["--activation_checkpointing=true", "--model.attn_dropout=0.1"]),
            ("train_pretrain.py", ["--critical_ids=97,49", "--critical_alpha=3"])]
# what pretraining shows, in the other stages
VARIANTS += [(script, options) for script in STAGES if script != "train_pretrain.py"
             for options in (MOE, ["--activation_checkpointing=true", "--model.attn_dropout=0.1"],
                             ["--critical_ids=97,49", "--critical_alpha=3",
                              *(["--nll_coef=1"] if script == "train_dpo.py" else [])])
             if script != "train_grpo.py" or options is MOE]
QUICK = [["--optimizer=muon"], ["--dtype=float16"], MOE, ["--mask_prompt=false"], ["--cache_top_k=20"],
         ["--loss=simpo", "--beta=2"],
         ["--updates_per_rollout=2", "--aggregate=dapo", "--eval_every=10"]]
VARIANTS = [pytest.param(script, options, marks=(
    () if options in QUICK and (options is not MOE or script == "train_pretrain.py") else slow))
            for script, options in VARIANTS]


def make_stage(script, request, folder):
    """start(out, *options, ranks=1) -> the finished process; the run directory is tmp_path / out"""
    fixture, tiny = STAGES[script]
    data = request.getfixturevalue(fixture)

    if script == "train_kd.py":
        tiny = [*tiny, f"--teacher={request.getfixturevalue('teacher_run')}"]

    def start(out, *options, ranks=1, check=True, **kwargs):
        options = [f"--data_dir={request.getfixturevalue(option[11:])}"
                   if option in ("--data_dir=token_set", "--data_dir=image_set") else option
                   for option in options]
        return run(script, *tiny, f"--data_dir={data}", f"--out_dir={folder / out}", *options, ranks=ranks,
                   check=check, **kwargs)
    start.script, start.folder, start.data, start.options = script, folder, data, tiny
    # GRPO has no dropout: sampler and update must be one policy
    start.dropout = [] if script == "train_grpo.py" else ["--model.attn_dropout=0.1"]
    return start


@pytest.fixture(params=STAGES)
def stage(request, tmp_path):
    return make_stage(request.param, request, tmp_path)


def once_in_make_test(name, values, whole="train_pretrain.py"):
    """(stage, value) of all; but the first, a value of a stage other than `whole` is slow"""
    def is_slow(script, value):
        return value != values[0] and script != whole
    return pytest.mark.parametrize(f"stage, {name}", [
        pytest.param(script, value, marks=slow if is_slow(script, value) else ())
        for script in STAGES for value in values], indirect=["stage"], ids=lambda x: str(x)[:20])


@pytest.fixture
def one_stage(request, tmp_path):
    """For what rests on the blocks that test_layout.py finds equal in every stage."""
    return make_stage("train_pretrain.py", request, tmp_path)


def records(folder):
    """metrics.jsonl without its timings"""
    with open(folder / "metrics.jsonl") as file:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in file]


def losses(folder):
    return [r["loss"] for r in records(folder) if "loss" in r]


def progress(folder):
    """What goes down as a stage learns, step by step: its loss, or 1 - the reward where there is one"""
    return [1 - r["reward"] if "reward" in r else r["loss"] for r in records(folder) if "loss" in r]


def final_weights(folder):
    newest = max(folder.glob("step_??????"))
    return torch.load(newest / "model.pt", weights_only=True)


def same_weights(a, b):
    a, b = final_weights(a), final_weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_curve(a, b, tolerance=1e-5):
    assert progress(a) == pytest.approx(progress(b), abs=tolerance)
    a, b = losses(a), losses(b)
    assert len(a) == len(b)
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < tolerance


class Torchrun(subprocess.Popen):
    @property
    def exitcode(self):
        """As a Process of multiprocessing has it"""
        return self.poll()


def start_and_signal(stage, out, *options, number, ranks=1, when):
    """Start a run, send it a signal once metrics.jsonl has `when` lines -> exit code, stderr"""
    command = [stage.script, *stage.options, f"--data_dir={stage.data}", f"--out_dir={stage.folder / out}",
               *options]
    printed = Path(tempfile.mkdtemp(dir=stage.folder))
    if ranks == 1 or number == signal.SIGKILL:     # all ranks, as when a machine goes down
        processes = start(command, printed, ranks)
    else:                                          # torchrun passes it on; its ranks outlive its own SIGKILL
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        processes = [Torchrun([sys.executable, *torchrun, *command], cwd=ROOT, stdout=subprocess.DEVNULL,
                              stderr=open(printed / "stderr", "w"),
                              env={**os.environ, "OMP_NUM_THREADS": "1"})]
    path = stage.folder / out / "metrics.jsonl"
    deadline = time.time() + 120
    try:
        while not path.exists() or path.read_text().count("\n") < when:
            assert processes[0].exitcode is None, (printed / "stderr").read_text()
            assert time.time() < deadline
            time.sleep(0.002)
        for process in processes:
            os.kill(process.pid, number)
        while any(process.exitcode is None for process in processes):
            assert time.time() < deadline
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
    return processes[0].exitcode, (printed / "stderr").read_text()


# -----------------------------------------------------------------------------
# learning and layouts

def test_it_overfits_one_batch(stage):
    stage("run", "--num_steps=120", "--schedule=constant", "--eval_every=0", "--num_epochs=0", "--seed=1",
          "--batch_size=2", "--seq_len=16", f"--data_dir={small_set(stage)}", "--eval_seqs=0",
          *["--kd_frac=1"] * (stage.script == "train_kd.py"))  # its targets contradict the teacher
    curve = progress(stage.folder / "run")
    if stage.script == "train_grpo.py":                        # sampled rewards: a mean, not every one
        assert curve[0] > 0.6 and sum(curve[-8:]) / 8 < 0.2
    else:
        assert curve[0] > {"train_dpo.py": 0.6, "train_kd.py": 1}.get(stage.script, 5)
        assert max(curve[-4:]) < 0.1


def small_set(stage):
    """Two rows of 16, or two pairs"""
    if stage.script == "train_pretrain.py":
        command, name, text = "text", "small.txt", "abcdefghijklmnopqrstuvwxyz012345"
    elif stage.script == "train_grpo.py":
        command, name, text = "prompts", "small.jsonl", '{"prompt": "ab", "answer": "a"}\n' * 2
    elif stage.script == "train_dpo.py":
        command, name = "pairs", "small.jsonl"
        text = "".join(json.dumps(dict(prompt=q, chosen=a, rejected=b)) + "\n"
                       for q, a, b in (("ab", "cdefg", "gfe"), ("12", "34567", "345678")))
    else:
        command, name = "chat", "small.jsonl"
        text = "".join(json.dumps([dict(role="user", content=q), dict(role="assistant", content=a)]) + "\n"
                       for q, a in (("ab", "cdefg"), ("12", "34567")))
    (stage.folder / name).write_text(text)
    run("data/prepare.py", command, f"--input={stage.folder}/{name}", f"--out_dir={stage.folder}/small")
    return stage.folder / "small"


@once_in_make_test("model", [[], MOE], whole=None)
def test_losses_and_weights_do_not_depend_on_the_layout(stage, model):
    # at TINY's learning rate DPO's margins saturate, and grow what rounding differs in beyond the tolerance
    common = ["--num_steps=20", "--eval_every=10", *model, *["--lr=3e-3"] * bool(model)]
    layouts = {"1x8": dict(options=["--micro_batch_size=8"]),
               "8x1": dict(options=["--micro_batch_size=1"]),
               "2 ranks": dict(options=["--micro_batch_size=4"], ranks=2),
               "2 ranks, zero1": dict(options=["--micro_batch_size=2", "--zero1=true"], ranks=2)}
    for name, layout in layouts.items():
        stage(name, *common, *layout["options"], ranks=layout.get("ranks", 1))
    reference = final_weights(stage.folder / "1x8")
    scored = "val_reward" if stage.script == "train_grpo.py" else "val_loss"
    val = [r[scored] for r in records(stage.folder / "1x8") if scored in r]
    norms = [r["grad_norm"] for r in records(stage.folder / "1x8") if "loss" in r]
    assert len(losses(stage.folder / "1x8")) == 20 and len(val) == 3
    for name in layouts:
        assert_same_curve(stage.folder / "1x8", stage.folder / name)
        rows = records(stage.folder / name)
        assert [r[scored] for r in rows if scored in r] == pytest.approx(val, abs=1e-5)
        assert [r["grad_norm"] for r in rows if "loss" in r] == pytest.approx(norms, rel=1e-4)
        for row, whole in zip(rows, records(stage.folder / "1x8")):
            assert ("expert_frac" in row) == ("loss" in row and bool(model))
            if "expert_frac" in row:
                assert row["dropped"] == 0 and row["balance"] == pytest.approx(whole["balance"], abs=1e-4)
                assert torch.tensor(row["expert_frac"]).allclose(torch.tensor(whole["expert_frac"]))
        weights = final_weights(stage.folder / name)
        assert max((weights[k] - reference[k]).abs().max().item() for k in reference) < 1e-4


def test_three_ranks_and_a_checkpoint_that_changes_layout(one_stage):
    """1 rank straight = 2 ranks with ZeRO-1, then 1 rank, then 3 ranks with ZeRO-1."""
    def start(out, steps, *options, **kwargs):
        one_stage(out, f"--num_steps={steps}", "--eval_every=0", "--batch_size=6", "--schedule=constant",
              *options, **kwargs)
    start("straight", 18)
    start("moving", 6, "--zero1=true", ranks=2)
    assert len(list((one_stage.folder / "moving/step_000006").glob("optimizer_*"))) == 2
    start("moving", 12, "--resume=true")
    assert len(list((one_stage.folder / "moving/step_000012").glob("optimizer_*"))) == 1
    start("moving", 18, "--resume=true", "--zero1=true", ranks=3)
    assert_same_curve(one_stage.folder / "straight", one_stage.folder / "moving")


def test_state_of_a_zero1_rank_is_one_nth(one_stage):
    def state_bytes(result):
        return int(re.search(r"([\d,]+) bytes of optimizer state", result.stdout)[1].replace(",", ""))
    whole = state_bytes(one_stage("one", "--num_steps=1"))
    shard = state_bytes(one_stage("two", "--num_steps=1", "--zero1=true", ranks=2))
    assert whole == sum(2 * 4 * w.numel() for w in final_weights(one_stage.folder / "one").values())
    assert whole / 2 <= shard < whole / 2 + 100               # padding to a multiple of the ranks


@pytest.mark.parametrize("script, options", VARIANTS, ids=lambda x: x if isinstance(x, str) else x[0][2:])
def test_options_learn_and_resume_bit_for_bit(script, options, request, tmp_path):
    """Stopping after 10 of 20 steps and resuming gives the same numbers as 20 steps in one go."""
    stage = make_stage(script, request, tmp_path)
    common = ["--eval_every=5", "--save_every=10", "--schedule=constant", *options]
    stage("straight", "--num_steps=20", *common)
    stage("halves", "--num_steps=10", *common)
    stage("halves", "--num_steps=20", "--resume=true", *common)
    curve = progress(stage.folder / "straight")
    if script in ("train_pretrain.py", "train_sft.py"):
        assert curve[-1] < curve[0] - ("--freeze_llm=true" not in options)  # random weights learn little then
    elif "--on_policy_frac=0.5" in options:                    # steps of two kinds
        kinds = {r["on_policy"] for r in records(stage.folder / "straight") if "loss" in r}
        val = [r["val_kd"] for r in records(stage.folder / "straight") if "val_kd" in r]
        assert kinds == {False, True} and val[-1] < 0.9 * val[0]
    else:                                                      # small batches of margins and rewards: noisier
        assert sum(curve[-5:]) / 5 < 0.9 * curve[0]
    assert records(stage.folder / "straight") == records(stage.folder / "halves")
    assert same_weights(stage.folder / "straight", stage.folder / "halves")


def test_activation_checkpointing_changes_nothing(one_stage):
    one_stage("plain", "--num_steps=4")
    one_stage("recomputed", "--num_steps=4", "--activation_checkpointing=true")
    assert losses(one_stage.folder / "plain") == losses(one_stage.folder / "recomputed")


@slow
def test_compile_changes_nothing(one_stage):
    one_stage("plain", "--num_steps=4")
    one_stage("compiled", "--num_steps=4", "--compile=true")
    assert_same_curve(one_stage.folder / "plain", one_stage.folder / "compiled")


# -----------------------------------------------------------------------------
# kill, resume, stop

@once_in_make_test("ranks", [1, 2])
def test_kill_9_and_resume_equals_the_uninterrupted_run_bit_for_bit(stage, ranks):
    # 62 windows and 8 a step: the kill falls inside an epoch, and the run crosses into the next ones
    options = ["--num_steps=40", "--save_every=5", "--eval_every=7", *stage.dropout,
               *(["--zero1=true"] if ranks > 1 else [])]
    stage("straight", *options, ranks=ranks)
    for when in (random.randint(3, 12), random.randint(20, 36)):   # any moment will do
        code, _ = start_and_signal(stage, "killed", *options, "--resume=true", number=signal.SIGKILL,
                                   when=when, ranks=ranks)
        assert code == -signal.SIGKILL
    with open(stage.folder / "killed/metrics.jsonl", "a") as file:
        file.write('{"step": 39, "lo')                         # a line that a kill has cut short
    stage("killed", *options, "--resume=true", ranks=ranks)
    assert records(stage.folder / "killed") == records(stage.folder / "straight")
    assert same_weights(stage.folder / "killed", stage.folder / "straight")


@pytest.mark.parametrize("number, ranks", [(signal.SIGTERM, 1), (signal.SIGINT, 1),
                                           pytest.param(signal.SIGTERM, 2, marks=slow)])
def test_a_signal_finishes_the_step_and_saves(one_stage, number, ranks):
    options = ["--num_steps=100000", "--save_every=0", "--eval_every=0", "--schedule=constant"]
    code, stderr = start_and_signal(one_stage, "stopped", *options, number=number, when=10, ranks=ranks)
    if ranks == 1:
        assert code == 0
    assert "finishing this step" in stderr and "Traceback" not in stderr.split("torch/distributed")[0]
    saved = max((one_stage.folder / "stopped").glob("step_*"))
    step = int(saved.name[5:])
    assert step >= 10 and len(losses(one_stage.folder / "stopped")) == step
    one_stage("stopped", *options[1:], f"--num_steps={step + 3}", "--resume=true", ranks=ranks)
    assert len(losses(one_stage.folder / "stopped")) == step + 3


@pytest.mark.parametrize("stage", [pytest.param(script, marks=slow if script != "train_pretrain.py" else ())
                                   for script in STAGES], indirect=True)
def test_evaluation_and_samples_do_not_change_training(stage):
    stage("rare", "--num_steps=12", "--eval_every=0", *stage.dropout)
    stage("often", "--num_steps=12", "--eval_every=1", *stage.dropout, "--eval_prompts=Document,word1")
    assert losses(stage.folder / "rare") == losses(stage.folder / "often")
    assert same_weights(stage.folder / "rare", stage.folder / "often")
    samples = [json.loads(line) for line in open(stage.folder / "often/samples.jsonl")]
    assert len(samples) == 2 * 13 and sum(len(s["text"]) > 0 for s in samples) > 20  # "" = end token at once


def test_a_damaged_checkpoint_is_passed_over(one_stage):
    options = ["--num_steps=20", "--save_every=5", "--eval_every=0"]
    one_stage("straight", *options)
    one_stage("damaged", *options[1:], "--num_steps=20")
    path = one_stage.folder / "damaged/step_000020/model.pt"
    path.write_bytes(path.read_bytes()[:-100])
    result = one_stage("damaged", *options, "--resume=true")
    assert "step_000020: damaged checkpoint, model.pt" in result.stderr and "from step 15" in result.stdout
    assert records(one_stage.folder / "damaged") == records(one_stage.folder / "straight")
    assert same_weights(one_stage.folder / "damaged", one_stage.folder / "straight")


def test_a_full_disk_costs_nothing_that_was_saved(one_stage):
    import resource
    options = ["--save_every=4", "--eval_every=0", "--schedule=constant"]
    one_stage("run", "--num_steps=4", *options)

    def limit():                                              # writing a larger file fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    result = one_stage("run", "--num_steps=12", "--resume=true", *options, check=False, preexec_fn=limit)
    assert result.returncode == 2
    assert result.stderr.count("earlier checkpoints are untouched") == 2  # the run went on after the first
    assert "the last checkpoint could not be saved" in result.stderr
    assert [p.name for p in (one_stage.folder / "run").glob("step_*")] == ["step_000004"]
    one_stage("run", "--num_steps=12", "--resume=true", *options)
    assert len(losses(one_stage.folder / "run")) == 12


# -----------------------------------------------------------------------------
# what the log says is true

def load_model(folder):
    from common import checkpoint
    from common.model import GPT, ModelConfig
    model = GPT(ModelConfig(**checkpoint.read_manifest(str(folder))["model"]))
    checkpoint.load_weights(str(folder), model)
    return model


@pytest.mark.parametrize("script, options", [
    ("train_pretrain.py", []), ("train_pretrain.py", ["--critical_ids=97,101", "--critical_alpha=3"]),
    ("train_sft.py", []), ("train_sft.py", ["--mask_prompt=false"]),
    ("train_sft.py", ["--critical_ids=49,50,51", "--critical_alpha=3"])])
def test_the_logged_loss_is_the_loss_of_the_saved_weights_on_that_batch(script, options, request, tmp_path):
    from common.data import ChatData, TokenData
    stage = make_stage(script, request, tmp_path)
    stage("run", "--num_steps=7", "--save_every=6", "--micro_batch_size=2", *options)
    model = load_model(stage.folder / "run/step_000006")
    kind, seq_len = (TokenData, 32) if stage.script == "train_pretrain.py" else (ChatData, 150)
    data = kind(str(stage.data), "train", seq_len, 8, seed=1337)
    if "--mask_prompt=false" in options:
        data.mask_prompt = False
    batch = data.batch(6)
    tokens, targets, mask = batch.tokens, batch.targets, batch.mask
    logits = model(tokens, batch.docs) @ model.head.T                # (8, T, V)
    nll = torch.nn.functional.cross_entropy(logits[mask], targets[mask], reduction="none")
    weight = torch.ones_like(nll)
    if any("critical" in option for option in options):
        ids = torch.tensor([97, 101] if script == "train_pretrain.py" else [49, 50, 51])
        weight[torch.isin(targets[mask], ids)] = 3.0
        assert 0 < (weight == 3).sum() < len(weight)
    row = [r for r in records(stage.folder / "run") if "loss" in r][6]
    assert row["loss"] == pytest.approx(((weight * nll).sum() / weight.sum()).item(), abs=1e-5)
    assert row["tokens"] == (tokens != 257).sum()              # 257: padding


@pytest.mark.parametrize("script", STAGES)
def test_training_starts_from_the_weights_it_is_given(script, request, tmp_path):
    """At a learning rate of 0 the run ends with them; here from a run of the first stage."""
    first = make_stage("train_pretrain.py", request, tmp_path)
    result = first("first", "--num_steps=3", "--seed=5", "--model.seq_len=150")
    assert "random weights" in result.stdout
    stage = make_stage(script, request, tmp_path)
    result = stage("next", "--num_steps=1", "--lr=0", "--weight_decay=0", f"--init_from={tmp_path / 'first'}")
    assert f"weights of {tmp_path / 'first/step_000003'}" in result.stdout
    assert same_weights(tmp_path / "first", tmp_path / "next")


def test_an_eval_prompt_is_answered_as_a_users_message(request, tmp_path):
    stage = make_stage("train_sft.py", request, tmp_path)
    stage("run", "--num_steps=150", "--schedule=constant", "--eval_every=150", "--batch_size=2",
          "--seq_len=16", f"--data_dir={small_set(stage)}", "--eval_seqs=0", "--eval_prompts=ab,12")
    last = [json.loads(line) for line in open(tmp_path / "run/samples.jsonl")][-2:]
    assert [(s["prompt"], s["text"]) for s in last] == [("ab", "<answer>cdefg</answer>"),
                                                        ("12", "<answer>34567</answer>")]


# -----------------------------------------------------------------------------
# DPO's reference

def answer_logps(model, data, ids):
    """Summed log-probs of the pairs' answers, each in a row of its own -> (P, 2) float64"""
    rows = []
    for i in ids:
        start, chosen, rejected, end = data.offsets[3 * i:3 * i + 4].tolist()
        for answer in (slice(chosen, rejected), slice(rejected, end)):
            tokens = torch.tensor([*data.tokens[start:chosen].tolist(), *data.tokens[answer].tolist()])
            logps = (model(tokens[None, :-1])[0] @ model.head.T).double().log_softmax(-1)
            logps = logps.gather(1, tokens[1:, None])[chosen - start - 1:, 0]
            rows.append((logps * torch.from_numpy(data.learn[answer] != 0)).sum())
    return torch.stack(rows).view(-1, 2)


@pytest.fixture
def dpo(request, tmp_path):
    return make_stage("train_dpo.py", request, tmp_path)


def log_sigmoid(x):
    return -(1 + (-x).exp()).log()


# loss -> what a pair costs, from d (P,) and the answers' mean log-probs m (P, 2)
FORMULAS = {
    "sigmoid": lambda d, m: -0.9 * log_sigmoid(0.5 * d) - 0.1 * log_sigmoid(-0.5 * d),
    "ipo": lambda d, m: (d - 1 / (2 * 0.5))**2,
    "hinge": lambda d, m: (1 - 0.5 * d).clamp(min=0),
    "simpo": lambda d, m: -log_sigmoid(0.5 * (m[:, 0] - m[:, 1]) - 0.3),
    "orpo": lambda d, m: -m[:, 0] - 0.5 * log_sigmoid((m - (1 - m.exp()).log())[:, 0]
                                                      - (m - (1 - m.exp()).log())[:, 1])}


@pytest.mark.parametrize("loss", [pytest.param(loss, marks=() if loss in ("sigmoid", "simpo") else slow)
                                  for loss in FORMULAS])
def test_dpo_logs_what_the_saved_and_the_first_weights_give(dpo, loss):
    from common.data import PairData
    dpo("start", "--num_steps=1", "--seed=5")
    dpo("run", "--num_steps=7", "--save_every=6", "--micro_batch_size=2",
        f"--init_from={dpo.folder / 'start'}",
        f"--loss={loss}", "--nll_coef=0.7", "--gamma=0.3", *["--label_smoothing=0.1"] * (loss == "sigmoid"))
    rows = records(dpo.folder / "run")
    if loss == "sigmoid":
        assert rows[1]["loss"] - 0.7 * rows[1]["nll"] == pytest.approx(math.log(2), abs=1e-6)
    policies = [load_model(dpo.folder / folder) for folder in ("run/step_000006", "start/step_000001")]
    for split, seed, size, row in (("train", 1337, 8, [r for r in rows if "loss" in r][6]),
                                   ("val", 0, 20, next(r for r in rows[::-1] if r["step"] == 6
                                                       and "val_loss" in r))):
        data = PairData(str(dpo.data), split, 32, size, seed=seed)
        ids = data.batch(6 if split == "train" else 0).ids.tolist()
        with torch.no_grad():
            now, before = (answer_logps(policy, data, ids) for policy in policies)
        lengths = torch.tensor([[int(data.learn[data.offsets[3 * i + k]:data.offsets[3 * i + k + 1]].sum())
                                 for k in (1, 2)] for i in ids])
        d, m = (now - before)[:, 0] - (now - before)[:, 1], now / lengths
        gap = m[:, 0] - m[:, 1] if loss in ("simpo", "orpo") else d
        expected = dict(loss=FORMULAS[loss](d, m).mean() - 0.7 * m[:, 0].mean(), nll=-m[:, 0].mean(),
                        margin=0.5 * gap.mean(), accuracy=(gap > 0).double().mean(),
                        ranking=(now[:, 0] > now[:, 1]).double().mean(), logps_chosen=now[:, 0].mean(),
                        logps_rejected=now[:, 1].mean())
        if loss not in ("simpo", "orpo"):
            expected["kl"] = ((before - now) / lengths).mean()
        prefix = "val_" if split == "val" else ""
        for name, value in expected.items():
            assert row[prefix + name] == pytest.approx(value.item(), abs=1e-4), prefix + name


def test_dpo_resumes_without_its_first_weights_while_the_cache_is_whole(dpo):
    """So the cache is what is used, and it belongs to the splits and the model that it was made with."""
    dpo("start", "--num_steps=3", "--seed=5")
    options = [f"--init_from={dpo.folder / 'start'}", "--eval_every=0"]
    result = dpo("run", "--num_steps=2", *options, "--eval_seqs=0")
    assert "reference: log-probs of" in result.stdout
    result = dpo("run", "--num_steps=3", "--resume=true", "--eval_seqs=0")
    assert "reference: log-probs of" not in result.stdout
    before = (dpo.folder / "run/metrics.jsonl").read_text()
    result = dpo("run", "--num_steps=4", "--resume=true", check=False)         # now it needs val, too
    assert_one_line(result, "not the weights that this run began with")
    assert (dpo.folder / "run/metrics.jsonl").read_text() == before
    dpo("run", "--num_steps=4", "--resume=true", *options)
    assert "val_loss" in records(dpo.folder / "run")[-1]


def test_dpos_reference_is_the_first_policy_however_it_is_kept(dpo):
    """Cached, lost and computed again on resume, and asked online: the same losses."""
    dpo("start", "--num_steps=3", "--seed=5")
    # steps small enough that a last bit, which the two ways may differ in, does not grow to what is compared
    options = ["--save_every=6", "--schedule=constant", "--lr=3e-3", f"--init_from={dpo.folder / 'start'}"]
    dpo("cached", "--num_steps=12", *options)
    dpo("lost", "--num_steps=6", *options)
    (dpo.folder / "lost/ref_logps.bin").unlink()
    dpo("lost", "--num_steps=12", "--resume=true", *options)
    dpo("online", "--num_steps=6", "--ref_online=true", *options)
    dpo("online", "--num_steps=12", "--ref_online=true", "--resume=true", *options)
    assert records(dpo.folder / "cached") == records(dpo.folder / "lost")
    assert_same_curve(dpo.folder / "cached", dpo.folder / "online", 3e-6)
    assert max(progress(dpo.folder / "cached")) - min(progress(dpo.folder / "cached")) > 0.1
    assert not (dpo.folder / "online/ref_logps.bin").exists()


def test_dpo_never_uses_a_wrong_reference(dpo):
    dpo("start", "--num_steps=3", "--seed=5")
    dpo("run", "--num_steps=2", f"--init_from={dpo.folder / 'start'}")
    cache = dpo.folder / "run/ref_logps.bin"
    dpo("other", "--num_steps=2")                             # of random weights
    cache.write_bytes((dpo.folder / "other/ref_logps.bin").read_bytes())
    result = dpo("run", "--num_steps=4", "--resume=true", check=False)
    assert_one_line(result, "not the weights that this run began with; its reference needs those again")
    dpo("run", "--num_steps=4", "--resume=true", f"--init_from={dpo.folder / 'start'}")
    dpo("straight", "--num_steps=4", f"--init_from={dpo.folder / 'start'}")
    assert losses(dpo.folder / "run")[:2] == losses(dpo.folder / "straight")[:2]


# -----------------------------------------------------------------------------
# GRPO's rollouts

@pytest.fixture
def grpo(request, tmp_path):
    return make_stage("train_grpo.py", request, tmp_path)


@pytest.mark.parametrize("cut", [[], pytest.param(["--top_k=50", "--top_p=0.9"], marks=slow)],
                         ids=["whole", "cut"])
@pytest.mark.parametrize("temperature", [0.7, pytest.param(1.0, marks=slow), pytest.param(1.3, marks=slow)])
def test_the_sampler_and_the_first_update_are_one_policy(grpo, temperature, cut):
    grpo("run", "--num_steps=8", "--updates_per_rollout=2", "--micro_batch_size=2",
         f"--temperature={temperature}", "--suppress=98", "--eval_every=0", "--save_every=0",
         "--model.vocab_size=300", *cut)
    rows = [r for r in records(grpo.folder / "run") if "loss" in r]
    assert all(r["mismatch"] < 1e-5 for r in rows)             # of log-probs, sampler's against the update's
    assert all(r["clip_frac"] == 0 for r in rows[::2])         # before the first update the ratio is 1
    assert all(abs(r["loss"]) < 1e-5 for r in rows[::2])       # advantages of a group sum to 0
    assert any(abs(r["loss"]) > 1e-4 for r in rows[1::2])      # and not once the policy has moved
    assert all(r["reward"] == s["reward"] for r, s in zip(rows[::2], rows[1::2]))   # scored once a rollout


@pytest.mark.parametrize("options", [
    pytest.param(["--top_k=50", "--top_p=0.9", "--beta=0.05", "--scale_rewards=batch",
                  "--updates_per_rollout=2"], marks=slow),
    ["--env=tests/some_rewards.py:twice", "--reward=tests/some_rewards.py:one_a_token", "--aggregate=dapo"]],
    ids=["cut", "turns"])
def test_cut_distributions_turns_and_rewards_of_tokens_do_not_depend_on_the_layout(grpo, options):
    common = ["--num_steps=10", "--eval_every=10", "--max_new_tokens=16", "--schedule=constant", *options]
    grpo("whole", *common)
    grpo("ranks", *common, "--micro_batch_size=2", "--zero1=true", ranks=2)
    assert_same_curve(grpo.folder / "whole", grpo.folder / "ranks")
    rows = [[r for r in records(grpo.folder / name) if "loss" in r] for name in ("whole", "ranks")]
    for name in ("grad_norm", "entropy", "length", "kl"):
        assert [r[name] for r in rows[0]] == pytest.approx([r[name] for r in rows[1]], rel=1e-3, abs=1e-5)
    assert len({r["length"] for r in rows[0]}) > 1


@pytest.mark.parametrize("place", ["common.sampling:sample_next",
                                   pytest.param("common.rewards:score", marks=slow),
                                   pytest.param("common.zero1:ShardedOptimizer.step", marks=slow)])
def test_kill_9_in_rollout_reward_or_update_costs_nothing_that_was_saved(grpo, place):
    options = ["--num_steps=12", "--save_every=4", "--eval_every=4", "--updates_per_rollout=2"]
    grpo("straight", *options)
    module, name = place.split(":")
    calls = {"sample_next": 60, "score": 6, "ShardedOptimizer.step": 7}[name]          # in the third rollout
    code = (f"import importlib, os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            f"owner = importlib.import_module({module!r})\n*path, name = {name!r}.split('.')\n"
            "for part in path:\n    owner = getattr(owner, part)\n"
            "real, calls = getattr(owner, name), [0]\n"
            "def killed(*args, **kwargs):\n    calls[0] += 1\n"
            f"    if calls[0] == {calls}:\n        os.kill(os.getpid(), 9)\n"
            "    return real(*args, **kwargs)\n"
            f"setattr(owner, name, killed)\nrunpy.run_path({grpo.script!r}, run_name='__main__')\n")
    (grpo.folder / "killed.py").write_text(code)
    arguments = [*grpo.options, f"--data_dir={grpo.data}", f"--out_dir={grpo.folder / 'killed'}", *options]
    assert run(grpo.folder / "killed.py", *arguments, check=False).returncode == -signal.SIGKILL
    before = losses(grpo.folder / "killed")
    assert 4 <= len(before) < 12
    grpo("killed", *options, "--resume=true")
    assert records(grpo.folder / "killed") == records(grpo.folder / "straight")
    assert same_weights(grpo.folder / "killed", grpo.folder / "straight")


def test_answers_that_were_cut_are_left_out_on_request(grpo):
    options = ["--num_steps=3", "--max_new_tokens=2", "--suppress=256", "--weight_decay=0", "--eval_seqs=0"]
    grpo("all", *options)
    grpo("none", *options, "--mask_truncated=true")
    for name, learns in (("all", True), ("none", False)):
        rows = [r for r in records(grpo.folder / name) if "loss" in r]
        assert all(r["truncated"] == 1 and r["length"] == 2 for r in rows)
        assert all((r["grad_norm"] > 0) == learns and r["loss"] == r["loss"] for r in rows)


def test_groups_of_equal_rewards_teach_nothing(grpo):
    grpo("run", "--num_steps=3", "--reward=common/rewards.py:exact_match", "--max_new_tokens=2",
         "--eval_seqs=0")
    rows = [r for r in records(grpo.folder / "run") if "loss" in r]
    assert all(r["flat_groups"] == 1 and r["loss"] == 0 and r["grad_norm"] == 0 for r in rows)


@pytest.mark.parametrize("options, message", [
    (["--reward=tests/some_rewards.py:broken"], "raised RuntimeError: no reward today"),
    (["--env=tests/some_rewards.py:nothing"], "--env=tests/some_rewards.py:nothing: "),
    (["--top_p=0"], "--top_p=0.0: expected above 0"),
    (["--reward=tests/some_rewards.py:nan"], "returned nan for the prompt"),
    (["--reward=tests/some_rewards.py:too_few"], "expected 8 numbers"),
    (["--reward=tests/some_rewards.py:absent"], "has no function absent"),
    (["--reward=nowhere.py:f"], "no file nowhere.py"),
    (["--reward_weights=1,2"], "--reward_weights: 2 for 1 functions"),
    (["--updates_per_rollout=3", "--num_steps=4"], "must be multiples of it"),
    (["--updates_per_rollout=2", "--num_steps=0", "--num_epochs=1", "--save_every=0", "--eval_every=0"],
     "--num_steps (not --num_epochs) must be multiples of it"),
    (["--suppress=9999"], "--suppress=9999: no such token, expected 0 to 265"),
    (["--max_new_tokens=32"], "--max_new_tokens=32 --temperature=1.0 --num_samples=4: expected < --seq"),
    (["--max_new_tokens=31"], " tokens, 1 fit with an answer; raise it, or lower --max_new_tokens"),
    (["--model.attn_dropout=0.1"], "--model.attn_dropout: must be 0")])
def test_mistakes_of_rollouts_are_answered_by_one_line(grpo, options, message):
    result = grpo("run", "--num_steps=2", *options, check=False)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


# -----------------------------------------------------------------------------
# the teacher of a distillation

@pytest.fixture
def kd(request, tmp_path):
    return make_stage("train_kd.py", request, tmp_path)


def test_without_a_teachers_share_it_is_pretraining_or_sft(request, tmp_path):
    for script, data in (("train_pretrain.py", ["--data_dir=token_set"]), ("train_sft.py", [])):
        options = ["--num_steps=5", "--seq_len=150", *data]
        make_stage(script, request, tmp_path)(script, *options)
        make_stage("train_kd.py", request, tmp_path)(f"kd of {script}", *options, "--kd_frac=0")
        assert_same_curve(tmp_path / script, tmp_path / f"kd of {script}")
        assert [r["val_loss"] for r in records(tmp_path / script) if "val_loss" in r] == pytest.approx(
            [r["val_loss"] for r in records(tmp_path / f"kd of {script}") if "val_loss" in r], abs=1e-5)


@pytest.mark.parametrize("options", [[], ["--on_policy_frac=1"]])
def test_a_student_that_starts_as_its_teacher_has_nothing_to_learn(kd, teacher_run, options):
    kd("run", "--num_steps=3", "--kd_frac=1", "--weight_decay=0", f"--init_from={teacher_run}",
       "--model.n_kv_head=2", "--model.n_embd=32", *options)
    rows = [r for r in records(kd.folder / "run") if "loss" in r]
    assert abs(rows[0]["loss"]) < 1e-6 and rows[0]["grad_norm"] < 1e-5
    assert records(kd.folder / "run")[0]["val_kd"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("options", [[], ["--critical_ids=49,50,51", "--critical_alpha=3", "--temperature=2"],
                                     ["--data_dir=token_set", "--doc_mask=true", "--divergence=jsd"]])
def test_kd_logs_what_the_saved_student_and_the_teacher_give(kd, teacher_run, token_set, options):
    from common.data import ChatData, TokenData
    from common.losses import kd_loss
    kd("run", "--num_steps=7", "--save_every=6", "--micro_batch_size=2", "--kd_frac=0.3", *options)
    student, teacher = load_model(kd.folder / "run/step_000006"), load_model(max(teacher_run.glob("step_*")))
    text = "--doc_mask=true" in options
    kind = (TokenData, token_set) if text else (ChatData, kd.data)
    temperature = 2.0 if "--temperature=2" in options else 1.0
    for split, seed, size in (("train", 1337, 8), ("val", 0, 20)):
        data = kind[0](str(kind[1]), split, 150, size, seed=seed, **dict(doc_mask=True) if text else {})
        data.limit(8 * 7 if split == "train" else min(20, data.num_rows))
        batch = data.batch(6 if split == "train" else 0)
        tokens, targets, mask, docs = batch.tokens, batch.targets, batch.mask, batch.docs
        with torch.no_grad():
            z, t = (model(tokens, docs) @ model.head.T for model in (student, teacher))
        nll = torch.nn.functional.cross_entropy(z[mask], targets[mask], reduction="none")
        divergence = kd_loss(z.double(), t.double(), temperature, "jsd" if text else "forward")[mask]
        weight = torch.ones_like(nll)
        if split == "train" and any("critical" in option for option in options):
            weight[torch.isin(targets[mask], torch.tensor([49, 50, 51]))] = 3.0
        ce, kl = ((weight * x).sum().item() / weight.sum().item() for x in (nll, divergence))
        rows = [r for r in records(kd.folder / "run") if ("loss" in r) == (split == "train")]
        if split == "train":
            expected, row = dict(ce=ce, kd=kl, loss=0.7 * ce + 0.3 * kl), rows[6]
        else:
            expected, row = dict(val_loss=ce, val_kd=kl), next(r for r in rows if r["step"] == 6)
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("data", [[], pytest.param(["--data_dir=token_set"], marks=slow),
                                  pytest.param(["--data_dir=token_set", "--doc_mask=true"], marks=slow)])
def test_what_a_student_says_does_not_depend_on_the_layout(kd, data):
    common = ["--num_steps=8", "--on_policy_frac=0.7", "--eval_every=4", *data]
    kd("1x8", *common)
    kd("4x2", *common, "--micro_batch_size=2")
    kd("2 ranks", *common, "--micro_batch_size=2", "--zero1=true", ranks=2)
    for name in ("4x2", "2 ranks"):
        assert_same_curve(kd.folder / "1x8", kd.folder / name)


@pytest.mark.parametrize("data", [[], pytest.param(["--data_dir=token_set"], marks=slow)])
def test_a_cache_serves_the_next_run_without_its_teacher(kd, data, teacher_run):
    cache = kd.folder / "cache"
    options = [*data, "--num_steps=6", "--eval_every=3", f"--cache_dir={cache}"]
    kd("asked", *data, "--num_steps=6", "--eval_every=3")
    kd("made", *options, "--cache_top_k=100", "--micro_batch_size=2", ranks=2)
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    result = kd("used", *options, "--cache_top_k=100")
    mass, kl = re.search(r"have ([\d.]+)% of its probability; KL ([\d.]+)", result.stdout).groups()
    assert before == {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    used, asked = (records(kd.folder / name) for name in ("used", "asked"))
    assert_same_curve(kd.folder / "made", kd.folder / "used")
    assert 70 < float(mass) < 100 and 0 < float(kl) < 0.1
    losses_of = [[r["loss"] for r in rows if "loss" in r] for rows in (used, asked)]
    assert losses_of[0] == pytest.approx(losses_of[1], abs=0.05) and losses_of[0] != losses_of[1]
    result = kd("other", *options, "--cache_top_k=50", check=False)
    assert_one_line(result, f"--cache_dir={cache}: is of another teacher, other data or other options")
    (cache / "train_ids.npy").write_bytes((cache / "train_ids.npy").read_bytes()[:-100])
    assert_one_line(kd("damaged", *options, "--cache_top_k=100", check=False), "damaged")


def test_a_teacher_can_be_a_function_of_yours(kd, teacher_run):
    """Here one that asks the same teacher; a resume with another function is refused."""
    text = (ROOT / "train_kd.py").read_text()
    stock = re.search(r"    raise UserError\(\"--teacher: name a run.*?\n", text)[0]
    folder = max(teacher_run.glob("step_*"))
    mine = text.replace(stock, f"    source = checkpoint.source({str(folder)!r})\n"
                               "    model = GPT(ModelConfig(**source.manifest['model'])).eval()\n"
                               "    source.load(model)\n"
                               "    return model(tokens, docs) @ model.head.T\n")
    path, here = kd.folder / "mine.py", f"import hashlib, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    path.write_text(mine.replace("import hashlib\n", here))
    options = [*kd.options, f"--data_dir={kd.data}", f"--out_dir={kd.folder / 'mine'}", "--teacher="]
    run(path, *options, "--num_steps=4")
    kd("run", "--num_steps=4")
    assert_same_curve(kd.folder / "mine", kd.folder / "run")
    path.write_text(path.read_text().replace("model.head.T\n", "model.head.T * 2\n"))
    result = run(path, *options, "--num_steps=6", "--resume=true", check=False)
    assert_one_line(result, "give it the same options and data")


def test_a_teacher_can_be_a_folder_of_transformers(kd, teacher_run):
    """The same teacher, exported: the same losses."""
    pytest.importorskip("safetensors", reason="the extra hf")
    run("-m", "extras.hf", "export", f"--init_from={teacher_run}", f"--hf_dir={kd.folder / 'hf'}")
    kd("run", "--num_steps=4", "--schedule=constant")
    for steps in (2, 4):
        kd("exported", f"--num_steps={steps}", "--schedule=constant", f"--teacher={kd.folder / 'hf'}",
           "--resume=true")
    assert_same_curve(kd.folder / "run", kd.folder / "exported")


def test_a_resume_with_another_teacher_is_refused(kd, request):
    kd("run", "--num_steps=2")
    other = make_stage("train_pretrain.py", request, kd.folder)
    other("other", "--num_steps=1", "--seq_len=150")
    result = kd("run", "--num_steps=4", "--resume=true", f"--teacher={kd.folder / 'other'}", check=False)
    assert_one_line(result, "give it the same options and data")


def test_another_vocabulary_is_refused_or_cut_when_asked(kd, request, corpus):
    padded = make_stage("train_pretrain.py", request, kd.folder)
    padded("padded", "--num_steps=2", "--seq_len=150", "--model.vocab_size=300")
    teacher = [f"--teacher={kd.folder / 'padded'}", "--num_steps=2"]
    assert_one_line(kd("run", *teacher, check=False), "vocabulary of 300, the student's has 266; set --model")
    kd("cut", *teacher, "--cut_vocab=true")
    kd("whole", *teacher, "--model.vocab_size=300")
    assert_one_line(kd("run", "--num_steps=2", "--model.vocab_size=300", "--cut_vocab=true", check=False),
                    "vocabulary of 266, the student's has 300")
    run("data/prepare.py", "tokenizer", f"--input={corpus}/corpus.jsonl", "--vocab_size=320",
        f"--out={kd.folder}/t.model")
    run("data/prepare.py", "text", f"--input={corpus}/corpus.jsonl", "--val_frac=0.2",
        f"--out_dir={kd.folder}/set", f"--tokenizer={kd.folder}/t.model")
    result = kd("run", "--num_steps=2", f"--data_dir={kd.folder}/set", check=False)
    assert_one_line(result, "has another tokenizer than")


@pytest.mark.parametrize("options, message", [
    (["--teacher="], "--teacher: name a run to learn from, or write teacher_logits() in train_kd.py"),
    (["--teacher=nowhere"], "nowhere: no such run or checkpoint"),
    (["--seq_len=151"], "--seq_len=151: longer than the teacher's 150"),
    (["--kd_frac=1.5"], "--kd_frac=1.5: expected 0 to 1"),
    (["--on_policy_frac=-1"], "--on_policy_frac=-1.0: expected 0 to 1"),
    (["--jsd_beta=1"], "--jsd_beta=1.0: expected above 0 and below 1"),
    (["--temperature=0"], "--temperature=0.0: expected above 0"),
    (["--on_policy_frac=1", "--max_new_tokens=200"], "--max_new_tokens=200: expected 1 to --seq_len=150"),
    (["--on_policy_frac=1", "--cache_top_k=5"], "with it --on_policy_frac must be 0"),
    (["--cache_dir=x"], "--cache_top_k: --cache_dir needs it"),
    (["--cache_top_k=266"], "--cache_top_k=266: expected 0 to 265"),
    (["--cache_top_k=5", "--cache_dir=tests"], "--cache_dir=tests: no cache of a teacher"),
    (["--doc_mask=true"], "a set of kind chat, expected text (only this has --doc_mask)"),
    (["--data_dir=token_set", "--mask_prompt=false"], "or chat (only this has --mask_prompt)"),
    (["--divergence=js"], "--divergence=js: expected forward or reverse or jsd"),
    (["--model.rope_scaling=dynamic"], "--model.rope_scaling=dynamic")])
def test_mistakes_with_a_teacher_are_answered_by_one_line(kd, options, message):
    assert_one_line(kd("run", "--num_steps=2", *options, check=False), message)
    assert not (kd.folder / "run").exists()


def test_tokens_per_second_are_tokens_over_wall_time(one_stage):
    start = time.time()
    one_stage("run", "--num_steps=150", "--micro_batch_size=2", "--eval_every=0", "--eval_seqs=0",
          "--save_every=0")
    whole = time.time() - start
    rows = [json.loads(line) for line in open(one_stage.folder / "run/metrics.jsonl")]
    seconds = sum(r["ms"] for r in rows) / 1000
    assert all(r["tokens"] == 8 * 32 for r in rows)
    assert all(r["tok_per_s"] == pytest.approx(r["tokens"] / (r["ms"] / 1000)) for r in rows)
    created = (one_stage.folder / "run/config.json").stat().st_mtime     # from here to the last record
    wall = (one_stage.folder / "run/metrics.jsonl").stat().st_mtime - created
    assert seconds < whole and seconds == pytest.approx(wall, rel=0.05, abs=0.1)


def test_the_learning_rate_is_a_function_of_the_step(one_stage):
    one_stage("run", "--num_steps=20", "--save_every=10", "--initial_lr=1e-3", "--min_lr_frac=0.1")
    lr = [r["lr"] for r in records(one_stage.folder / "run") if "lr" in r]
    assert lr[0] == pytest.approx(1e-3 + 9e-3 / 5)
    assert lr[4] == pytest.approx(1e-2) and lr[19] == pytest.approx(1e-3)


def test_epochs_end_with_a_partial_step(one_stage):
    """31 windows and a batch of 8: two epochs are 7 whole steps and one of 6 sequences."""
    from common.data import TokenData
    n = TokenData(str(one_stage.data), "train", 32, 8).num_rows
    one_stage("run", "--num_epochs=2", "--lr=0", "--weight_decay=0", "--eval_every=0",
          "--batch_size=24")
    curve = losses(one_stage.folder / "run")
    assert 2 * n % 24 and len(curve) == -(-2 * n // 24)
    # at lr 0 the weights stay, so the mean over both epochs weighs every window twice
    sizes = [24] * (len(curve) - 1) + [2 * n - 24 * (len(curve) - 1)]
    one_stage("all", "--num_steps=1", "--lr=0", "--weight_decay=0", "--eval_every=0", f"--batch_size={n}")
    mean = sum(loss * size for loss, size in zip(curve, sizes, strict=True)) / (2 * n)
    assert mean == pytest.approx(losses(one_stage.folder / "all")[0], abs=1e-5)


def test_the_run_directory_can_run_again(one_stage):
    one_stage("first", "--num_steps=3", "--lr=3e-3")
    run(one_stage.script, one_stage.folder / "first/config.json", f"--out_dir={one_stage.folder / 'again'}")
    result = run(one_stage.script, one_stage.folder / "first/config.json", "--resume=true", "--num_steps=4")
    assert "changed since the checkpoint: --num_steps=4 (was 3)" in result.stdout
    assert [r for r in records(one_stage.folder / "first") if r["step"] < 3 and "loss" in r] == \
        [r for r in records(one_stage.folder / "again") if "loss" in r]
    kept = one_stage.folder / "first/code" / one_stage.script
    assert kept.read_text() == (ROOT / one_stage.script).read_text()
    assert (one_stage.folder / "first/code/common/zero1.py").exists()


def test_a_longer_context_is_one_flag(one_stage):
    one_stage("short", "--num_steps=10")
    one_stage("long", "--num_steps=2", f"--init_from={one_stage.folder / 'short'}", "--seq_len=128",
          "--model.rope_scaling=yarn", "--batch_size=2")
    config = json.loads((one_stage.folder / "long/step_000002/checkpoint.json").read_text())["model"]
    assert (config["seq_len"], config["rope_original_len"], config["rope_factor"]) == (128, 32, 4.0)
    result = one_stage("no", "--num_steps=2", f"--init_from={one_stage.folder / 'short'}", "--seq_len=128",
                   check=False)
    assert_one_line(result, "--seq_len=128: the checkpoint was trained at 32; lower it, or add --model.rope")


# -----------------------------------------------------------------------------
# mistakes

def assert_one_line(result, text):
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and text in lines[0], result.stderr


@pytest.mark.parametrize("options, message", [
    (["--data_dir=nowhere"], "--data_dir=nowhere: no meta.json there; make the set with data/prepare.py"),
    (["--batch_size=9", "--micro_batch_size=2"],
     "--batch_size=9: must be a multiple of ranks x micro_batch_size = 1 x 2"),
    (["--seq_len=100000"], "fewer than --seq_len=100000"),
    (["--num_steps=0"], "set one of them"), (["--num_epochs=-1"], "set one of them"),
    (["--init_from=nowhere"], "nowhere: no such run or checkpoint"),
    (["--model.n_head=3"], "--model.n_head=3: must divide n_embd=16"),
    (["--model.vocab_size=100"], "--model.vocab_size=100"),
    (["--log_every=0"], "--log_every=0: must be at least 1"),
    (["--device=tpu"], "--device=tpu: expected auto, cpu, cuda or mps"),
    (["--learning_rate=1"], "unknown option --learning_rate; its name here is --lr"),
    (["--lr", "0.1"], "--lr: expected --lr=value, so --lr=0.1"),
    (["--resume"], "--resume: expected --resume=value, so --resume=true to switch it on"),
    (["--lr=fast"], "--lr=fast: expected float"),
    (["--out_dir=/proc/nothing/here"], "--out_dir=/proc/nothing/here: cannot write there")])
def test_mistakes_are_answered_by_one_line(one_stage, options, message):
    assert_one_line(one_stage("run", "--num_steps=2", *options, check=False), message)
    assert not (one_stage.folder / "run").exists()


def test_a_run_that_failed_before_its_first_step_may_be_started_again(request, tmp_path):
    stage = make_stage("train_grpo.py", request, tmp_path)
    assert stage("run", "--num_steps=2", "--reward=tests/some_rewards.py:nan", check=False).returncode == 2
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["code", "config.json"]
    stage("run", "--num_steps=2")
    (tmp_path / "mine/code").mkdir(parents=True)              # somebody's own folder of that name
    (tmp_path / "mine/config.json").write_text("{}")
    assert_one_line(stage("mine", "--num_steps=2", check=False), "not empty")


def test_what_is_likely_a_slip_is_noted(one_stage):
    result = one_stage("run", "--num_steps=3", "--warmup_steps=100", "--resume=true")
    assert "note: --warmup_steps=100 in a run of 3 steps: lr never gets to" in result.stdout
    assert "has no checkpoint to go on from; this run starts anew" in result.stdout
    result = one_stage("run", "--num_steps=3", "--warmup_steps=1", "--resume=true")
    assert "note: --warmup" not in result.stdout and "has made its 3 steps" in result.stdout


@pytest.mark.parametrize("ids", ["5,99999", "-1"])
def test_critical_ids_are_ids(one_stage, ids):
    result = one_stage("run", "--num_steps=2", f"--critical_ids={ids}", check=False)
    assert_one_line(result, f"--critical_ids={ids.split(',')[-1]}: no such token, expected 0 to 265")


def test_a_conversation_of_validation_is_shown_with_all_its_turns(request, tmp_path):
    stage = make_stage("train_grpo.py", request, tmp_path)
    result = stage("run", "--num_steps=2", "--env=tests/some_rewards.py:twice", "--max_new_tokens=20")
    shown = [json.loads(line)["text"] for line in open(tmp_path / "run/samples.jsonl", encoding="utf-8")]
    assert shown and all(text.startswith("<user>") and "<assistant>" in text for text in shown)
    assert f"sample at step 0: {shown[0][:6]}" in result.stdout


def test_a_dry_run_of_grpo_tries_a_rollout_and_its_reward(request, tmp_path):
    stage = make_stage("train_grpo.py", request, tmp_path)
    assert re.search(r"time .* of updates, (\dm)?\d+s of rollouts;", stage("run", "--dry_run=true").stdout)
    assert_one_line(stage("run", "--dry_run=true", "--reward=tests/some_rewards.py:nan", check=False),
                    "returned nan for the prompt")


def test_a_run_directory_in_use_is_left_alone(one_stage):
    (one_stage.folder / "run").mkdir()
    (one_stage.folder / "run/thesis.txt").write_text("mine")
    result = one_stage("run", "--num_steps=2", check=False)
    assert_one_line(result, "not empty; choose another, or continue that run")
    assert [p.name for p in (one_stage.folder / "run").iterdir()] == ["thesis.txt"]


def test_resuming_with_other_data_or_order_is_refused(one_stage):
    one_stage("run", "--num_steps=2")
    assert_one_line(one_stage("run", "--num_steps=4", "--resume=true", "--batch_size=4", check=False),
                    "--resume: the run has batch_size=8; give it the same options and data")
    assert_one_line(one_stage("run", "--num_steps=4", "--resume=true", "--model.n_layer=3", check=False),
                    "--model.n_layer=3: the checkpoint has 2, which cannot change")
    assert_one_line(one_stage("run", "--num_steps=4", "--resume=true", "--optimizer=lion", check=False),
                    "optimizer state")


def test_a_set_of_another_tokenizer_is_refused(one_stage, corpus):
    one_stage("run", "--num_steps=2")
    run("data/prepare.py", "tokenizer", f"--input={corpus}/corpus.jsonl", "--vocab_size=320",
        f"--out={one_stage.folder}/t.model")
    run("data/prepare.py", "text", f"--input={corpus}/corpus.jsonl", "--val_frac=0.2",
        f"--out_dir={one_stage.folder}/other", f"--tokenizer={one_stage.folder}/t.model")
    result = one_stage("no", "--num_steps=2", f"--init_from={one_stage.folder / 'run'}",
                   f"--data_dir={one_stage.folder}/other", check=False)
    assert_one_line(result, "was trained with another tokenizer")


def test_an_exploding_run_stops_and_says_so(one_stage):
    result = one_stage("run", "--num_steps=100", "--lr=1e30", "--warmup_steps=0", "--max_bad_steps=3",
                   "--save_every=1", check=False)
    assert result.returncode == 2 and "not finite in 3 steps in a row; lower --lr" in result.stderr
    rows = [r for r in records(one_stage.folder / "run") if "loss" in r]
    assert [None in r.values() for r in rows[-4:]] == [False, True, True, True]
    assert all(torch.isfinite(w).all() for w in final_weights(one_stage.folder / "run").values())


def test_ranks_that_disagree_on_the_config_are_refused(one_stage):
    code = ("import os, runpy, sys; lr = '1e-3' if os.environ['RANK'] == '0' else '1e-4'; "
            "sys.argv = ['train', *sys.argv[1:], f'--lr={lr}']; "
            f"runpy.run_path({str(ROOT / one_stage.script)!r}, run_name='__main__')")
    (one_stage.folder / "differ.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code)
    result = run(one_stage.folder / "differ.py", *one_stage.options, f"--data_dir={one_stage.data}",
                 f"--out_dir={one_stage.folder / 'run'}", ranks=2, check=False)
    assert result.returncode != 0
    assert "error: config differs between ranks: lr is 0.001 on rank 0 and 0.0001 on rank 1" in result.stderr
