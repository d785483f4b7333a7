"""
Questions about pictures: a small language model and a small vision tower learn together from random
weights, then the same on grey pictures, which shows how much the questions alone tell.

    python demos/vlm/run.py           # or `make demo-vlm`, which makes an environment first

Everything goes to out/vlm_demo. What is there is not made again; remove the folder to start over.
Prints how many questions about the 1,000 test pictures, which training has not seen, are answered
right by greedy generation, a question at a time.
"""

import functools
import sys
import time
from pathlib import Path

# the repository's root must be on the path first
sys.path.insert(0, str(Path(__file__).absolute().parents[2]))

from common.chat import encode_chat
from common.rewards import answer_of
from common.sampling import SamplingConfig, complete, for_vocabulary
from demos.shared import (
    begin,
    kept,
    make,
    prepare,
    print_row,
    read_rows,
    run,
    train_tokenizer,
)
from extras.images import as_ids, load_image
from sample import load

OUT = "out/vlm_demo"
# questions that are answered at once
BATCH = 200


def test(folder):
    """-> share of the test questions that a run answers right; of those without yes or no"""
    model, tokenizer = load(f"{folder}/run", "cpu")
    vision = model.vision
    cfg = for_vocabulary(SamplingConfig(max_new_tokens=12, temperature=0.0), model, tokenizer)

    @functools.cache
    def picture(path):
        return load_image(Path(folder, "rows", path), vision.images)

    chats, right, open_ended = read_rows(f"{folder}/rows/test.jsonl"), [], []
    for start in range(0, len(chats), BATCH):
        batch = chats[start : start + BATCH]
        questions = [as_ids(tokenizer, chat[:1], vision.tokens_per_image) for chat in batch]
        prompts = [ids for ids, _ in encode_chat(tokenizer, questions, reply=True)]
        pictures = [[picture(user["content"][0]["path"])] for user, _ in batch]
        inputs = model.inputs_of(prompts, pictures)
        replies, *_ = complete(model, prompts, cfg, tokenizer.ends, inputs=inputs)
        for ids, (_, answer) in zip(replies, batch):
            right.append(answer_of(tokenizer.decode(ids)) == answer["content"])
            if answer["content"] not in ("yes", "no"):
                open_ended.append(right[-1])
    return sum(right) / len(right), sum(open_ended) / len(open_ended)


def train_and_test(name, *options):
    """-> seconds to prepare and train, to test, shares right"""
    start, folder, vocabulary = time.time(), f"{OUT}/{name}", f"{OUT}/words.model"
    rows, data, run_dir = f"{folder}/rows", f"{folder}/set", f"{folder}/run"
    make(run, rows, "data/vqa.py", f"--out_dir={rows}", "--shuffles=4", *options)
    # both runs have the vocabulary of the first
    train_tokenizer(run, f"{rows}/train.jsonl", 384, vocabulary)
    options = f"--tokenizer={vocabulary}", "--answer_tags=false"
    prepare(run, "images", f"{rows}/*.jsonl", data, *options)
    options = f"--data_dir={data}", f"--out_dir={run_dir}", "--resume=true"
    run("train_sft.py", "demos/vlm/sft.py", *options)
    trained = time.time()
    return dict(
        right=test(folder),
        seconds=round(trained - start),
        test_seconds=round(time.time() - trained),
    )


if __name__ == "__main__":
    begin(OUT)
    sees = kept(f"{OUT}/sees/result.json", train_and_test, "sees")
    blind = kept(f"{OUT}/blind/result.json", train_and_test, "blind", "--blank=true")
    print()
    print_row("questions about 1,000 test pictures, greedy", "sees", "grey")
    for i, what in enumerate(("right", "right, where the answer is not yes or no")):
        print_row(what, sees["right"][i], blind["right"][i])
    print_row("seconds to prepare and train", sees["seconds"], blind["seconds"])
    print_row("seconds to test", sees["test_seconds"], blind["test_seconds"])
