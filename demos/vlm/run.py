"""
Questions about pictures: a small language model and a small vision tower learn together from random weights,
then the same on grey pictures, which shows how much the questions alone tell.

    python demos/vlm/run.py           # or `make demo-vlm`, which makes an environment first

Everything goes to out/vlm_demo. What is there is not made again; remove the folder to start over. Prints how
many questions about the 1,000 test pictures, which training has not seen, are answered right by greedy
generation, a question at a time.
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
from common.rewards import answer_of  # noqa: E402
from common.sampling import SamplingConfig, complete, for_vocabulary  # noqa: E402
from extras.images import load_image  # noqa: E402
from sample import load  # noqa: E402

OUT = "out/vlm_demo"
BATCH = 200                            # questions that are answered at once


def run(*command):
    """Run a script of the repository; what it prints goes to the terminal. The demo ends where one fails."""
    print("\n$ python " + " ".join(command), flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def prepare(name, *options):
    """Rows and the set of one of the two runs; both have the vocabulary of the first"""
    folder, vocabulary = f"{OUT}/{name}", f"{OUT}/words.model"
    if not (ROOT / folder / "rows").exists():
        run("data/vqa.py", f"--out_dir={folder}/rows", "--shuffles=4", *options)
    if not (ROOT / vocabulary).exists():
        run("data/prepare.py", "tokenizer", f"--input={folder}/rows/train.jsonl", "--vocab_size=384",
            f"--out={vocabulary}")
    if not (ROOT / folder / "set").exists():
        run("data/prepare.py", "images", f"--input={folder}/rows/train.jsonl",
            f"--val_input={folder}/rows/val.jsonl", f"--tokenizer={vocabulary}", "--answer_tags=false",
            f"--out_dir={folder}/set")


def test(name):
    """-> share of the test questions that a run answers right, of those whose answer is not yes or no"""
    model, tokenizer = load(str(ROOT / OUT / name / "run"), "cpu")
    folder = ROOT / OUT / name / "rows"
    with open(folder / "test.jsonl", encoding="utf-8") as file:
        chats = [json.loads(line) for line in file]
    cfg = for_vocabulary(SamplingConfig(max_new_tokens=12, temperature=0.0), model, tokenizer)
    pictures, right = {}, []
    for start in range(0, len(chats), BATCH):
        batch = chats[start:start + BATCH]
        paths = [chat[0]["content"][0]["path"] for chat in batch]
        for path in paths:
            if path not in pictures:
                pictures[path] = load_image(folder / path, model.vision.images)
        prompts = encode_chat(tokenizer, [chat[:1] for chat in batch], reply=True,
                              tokens_per_image=model.vision.tokens_per_image)
        prompts = [ids for ids, _ in prompts]
        inputs = model.inputs_of(prompts, [[pictures[path]] for path in paths])
        replies, *_ = complete(model, prompts, cfg, tokenizer.end, inputs=inputs)
        right += [answer_of(tokenizer.decode(ids)) == chat[1]["content"] for ids, chat in zip(replies, batch)]
    open_ended = [r for r, chat in zip(right, chats) if chat[1]["content"] not in ("yes", "no")]
    return sum(right) / len(right), sum(open_ended) / len(open_ended)


def once(name, *options):
    """Prepare, train, test -> shares right and seconds, kept in OUT/NAME/result.json for a second time"""
    path = ROOT / OUT / name / "result.json"
    if not path.exists():
        start = time.time()
        prepare(name, *options)
        run("train_sft.py", "demos/vlm/sft.py", f"--data_dir={OUT}/{name}/set",
            f"--out_dir={OUT}/{name}/run", "--resume=true")
        seconds, shares = round(time.time() - start), test(name)
        path.write_text(json.dumps(dict(seconds=seconds, test_seconds=round(time.time() - start) - seconds,
                                        right=shares)))
    return json.loads(path.read_text())


if __name__ == "__main__":
    show_user_errors()
    dist.tune_malloc()
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    sees, blind = once("sees"), once("blind", "--blank=true")
    print(f"\n{'questions about 1,000 test pictures, greedy':<60}{'sees':>8}{'grey':>8}")
    for i, what in enumerate(("right", "right, where the answer is not yes or no")):
        print(f"{what:<60}{sees['right'][i]:>8.3f}{blind['right'][i]:>8.3f}")
    for key, what in (("seconds", "seconds to prepare and train"), ("test_seconds", "seconds to test")):
        print(f"{what:<60}{sees[key]:>8}{blind[key]:>8}")
