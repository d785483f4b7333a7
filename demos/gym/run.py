"""
GRPO on a task of reasoning-gym: a small model is warmed up on some answers, then rewarded for good ones.

    python demos/gym/run.py           # or `make gym`, which makes an environment first

Everything goes to out/gym_demo. A stage whose result is there is not run again; remove the folder to start
over. Prints what reasoning-gym's scorer gives to answers to the test questions, which no stage has seen.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import dist  # noqa: E402  (the root must be on the path first)
from common.chat import encode_chat  # noqa: E402
from common.errors import show_user_errors  # noqa: E402
from common.sampling import SamplingConfig, complete, for_vocabulary  # noqa: E402
from extras import gym  # noqa: E402
from sample import load  # noqa: E402

OUT = "out/gym_demo"
TASK = ["--task=spell_backward", '--params={"min_word_len": 3, "max_word_len": 5}']


def run(*command):
    """Run a script of the repository; what it prints goes to the terminal. The demo ends where one fails."""
    print("\n$ python " + " ".join(command), flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def prepare():
    if not (ROOT / OUT / "task").exists():
        run("extras/gym.py", *TASK, f"--out_dir={OUT}/task")
    for kind, ending in (("chat", ""), ("prompts", "_prompts")):
        if not (ROOT / OUT / kind).exists():
            run("data/prepare.py", kind, f"--input={OUT}/task/train{ending}.jsonl",
                f"--val_input={OUT}/task/val{ending}.jsonl", f"--out_dir={OUT}/{kind}")


def held_out_scores(stage, temperature, num_samples):
    """-> mean score of a run's answers to the test questions, and the share of them with the whole score"""
    model, tokenizer = load(str(ROOT / OUT / stage), "cpu")
    with open(ROOT / OUT / "task/test_prompts.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chats = [[dict(role="user", content=row["prompt"])] for row in rows]
    cfg = SamplingConfig(max_new_tokens=16, temperature=temperature)
    replies, *_ = complete(model, [ids for ids, _ in encode_chat(tokenizer, chats, reply=True)],
                           for_vocabulary(cfg, model, tokenizer), tokenizer.end, num_samples)
    texts = [tokenizer.decode([i for i in ids if i != tokenizer.end], show_special=True) for ids in replies]
    scores = gym.reward(None, texts, [row["answer"] for row in rows for _ in range(num_samples)])
    return sum(scores) / len(scores), sum(score >= 1 for score in scores) / len(scores)


def once(stage):
    """Train a stage -> its test scores and seconds, kept in OUT/STAGE.json for a second run"""
    path = ROOT / OUT / f"{stage}.json"
    if not path.exists():
        start = time.time()
        run(f"train_{stage}.py", f"demos/gym/{stage}.py", "--resume=true")
        seconds = round(time.time() - start)
        path.write_text(json.dumps(dict(seconds=seconds, greedy=held_out_scores(stage, 0.0, 1),
                                        sampled=held_out_scores(stage, 1.0, 4))))
    return json.loads(path.read_text())


if __name__ == "__main__":
    show_user_errors()
    dist.tune_malloc()
    gym.tasks()                                               # says so where reasoning-gym is missing
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    prepare()
    before, after = once("sft"), once("grpo")
    print(f"\n{'test questions (' + ' '.join(TASK)[7:] + ')':<80}{'SFT':>8}{'+ GRPO':>8}")
    for how, what in (("greedy", "greedy"), ("sampled", "temperature 1, 4 answers each")):
        for i, measure in enumerate(("mean score", "all right")):
            print(f"{f'{measure}, {what}':<80}{before[how][i]:>8.3f}{after[how][i]:>8.3f}")
    print(f"{'seconds':<80}{before['seconds']:>8}{after['seconds']:>8}")
