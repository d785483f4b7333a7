"""
GRPO on a task of reasoning-gym: a small model is warmed up on some answers, then rewarded for good
ones.

    python demos/gym/run.py           # or `make gym`, which makes an environment first

Everything goes to out/gym_demo. A stage whose result is there is not run again; remove the folder
to start over. Prints what reasoning-gym's scorer gives to answers to the test questions, which no
stage has seen.
"""

import sys
import time
from pathlib import Path

# the repository's root must be on the path first
sys.path.insert(0, str(Path(__file__).absolute().parents[2]))

from demos.shared import (
    begin,
    kept,
    make,
    prepare,
    print_row,
    read_rows,
    replies,
    run,
)
from extras import gym

OUT = "out/gym_demo"
TASK = "spell_backward"
PARAMS = '{"min_word_len": 3, "max_word_len": 5}'


def held_out_scores(stage, num_samples, temperature):
    """-> mean score of a run's answers to the test questions, share of them with the whole score"""
    rows = read_rows(f"{OUT}/task/test_prompts.jsonl")
    chats = [[dict(role="user", content=row["prompt"])] for row in rows]
    texts = replies(
        f"{OUT}/{stage}", chats, num_samples, temperature, max_new_tokens=16, show_special=True
    )
    texts = [text.removesuffix("<end>") for text in texts]
    answers = [row["answer"] for row in rows for _ in range(num_samples)]
    scores = gym.reward(None, texts, answers)
    perfect = sum(score >= 1 for score in scores)
    return sum(scores) / len(scores), perfect / len(scores)


def train_and_test(stage):
    """-> seconds of training and test scores"""
    start = time.time()
    run(f"train_{stage}.py", f"demos/gym/{stage}.py", "--resume=true")
    return dict(
        seconds=round(time.time() - start),
        greedy=held_out_scores(stage, 1, 0.0),
        sampled=held_out_scores(stage, 4, 1.0),
    )


if __name__ == "__main__":
    begin(OUT)
    # says so where reasoning-gym is missing
    gym.tasks()
    task = f"{OUT}/task"
    options = f"--task={TASK}", f"--params={PARAMS}", f"--out_dir={task}"
    make(run, task, "extras/gym.py", *options)
    prepare(run, "chat", f"{task}/*.jsonl", f"{OUT}/chat")
    prepare(run, "prompts", f"{task}/*_prompts.jsonl", f"{OUT}/prompts")
    before = kept(f"{OUT}/sft.json", train_and_test, "sft")
    after = kept(f"{OUT}/grpo.json", train_and_test, "grpo")
    print()
    print_row(f"test questions ({TASK} --params={PARAMS})", "SFT", "+ GRPO", width=80)
    for how, what in (("greedy", "greedy"), ("sampled", "temperature 1, 4 answers each")):
        for i, measure in enumerate(("mean score", "all right")):
            print_row(f"{measure}, {what}", before[how][i], after[how][i], width=80)
    print_row("seconds", before["seconds"], after["seconds"], width=80)
