"""
Tasks of reasoning-gym (github.com/open-thought/reasoning-gym): a program asks, and scores the answers.

    python extras/gym.py --task=spell_backward --params='{"max_word_len": 5}' --out_dir=out/gym

Writes train_prompts.jsonl, val_prompts.jsonl and test_prompts.jsonl for `data/prepare.py prompts`, with
`reward` here, and train.jsonl, ... with reasoning-gym's own answers for `data/prepare.py chat`, where the
task has such. No question occurs twice, in whatever case of letters: what val and test ask never occurs in
train.
The "answer" of a prompt is JSON of all that the scorer needs: task, params and entry.

Some tasks' scorers hand the answer to Python's `eval` or sympy's parser (binary_matrix, countdown, n_queens,
puzzle24, spiral_matrix, string_insertion, polynomials and integrals): what a model writes is run then.
"""
import dataclasses
import difflib
import functools
import json
import os
import shutil
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.config import parse_config  # noqa: E402  (the repository's root must be on the path first)
from common.errors import UserError  # noqa: E402
from common.rewards import answer_of  # noqa: E402

PACKAGE = "reasoning-gym==0.1.25"      # the optional extra "gym" of pyproject.toml
DRAWS = 20                             # items to draw for each question that is wanted, at most


@dataclass(frozen=True)
class Config:
    task: str = "spell_backward"       # reasoning-gym's name of the task family
    params: str = "{}"                 # its parameters, JSON: {"min_word_len": 3, "max_word_len": 5}
    out_dir: str = "out/gym"           # folder to write, must not exist
    train: int = 4000                  # training questions
    val: int = 200                     # validation questions
    test: int = 200                    # test questions
    seed: int = 1337                   # which questions


def tasks():
    """-> reasoning-gym's task families: dict of name to (class of datasets, class of their parameters)"""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(f"pip install {PACKAGE} (the extra gym) is needed for this: {error}") from None
    return DATASETS


def create(task, params, seed=0, size=1):
    """-> reasoning-gym's dataset of a task, params a dict; UserError for an unknown task or parameter"""
    if task not in tasks():
        near = difflib.get_close_matches(task, tasks(), 1)
        raise UserError(f"--task={task}: reasoning-gym has none such" + (
            f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(sorted(tasks()))}"))
    known = {field.name for field in dataclasses.fields(tasks()[task][1])} - {"seed", "size"}
    if unknown := sorted(set(params) - known):
        raise UserError(f"--params: {task} has no {unknown[0]}, only {', '.join(sorted(known))}")
    import reasoning_gym
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **params)
    except Exception as error:  # an AssertionError mostly; what else wrong values lead to is up to the task
        raise refused(task, params, error) from None


def refused(task, params, error):
    """The UserError for what reasoning-gym raises while it makes questions"""
    return UserError(f"--task={task} --params='{json.dumps(params)}': reasoning-gym raised "
                     f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


@functools.cache
def scorer(task, params):
    """params: JSON -> a dataset of them, for its score_answer, which may look at them"""
    return create(task, json.loads(params))


def reward(prompts, completions, answers):
    """For train_grpo.py: reasoning-gym's own score of what stands between the answer tags, 0 to 1."""
    return [score(answer_of(text), answer) for text, answer in zip(completions, answers)]


def score(text, answer):
    """text: an answer without tags; answer: the row's JSON -> reasoning-gym's score"""
    row = json.loads(answer)
    judge = scorer(row["task"], json.dumps(row["params"]))
    try:
        return float(judge.score_answer(text, row["entry"]))
    except Exception:  # some scorers stumble over what is no answer, int("x"); `build` has tried the entry
        return 0.0


def build(cfg):
    """-> dict of split to list of (question, reasoning-gym's answer or None, "answer" for `reward`)"""
    try:
        params = json.loads(cfg.params)
    except ValueError as error:
        raise UserError(f"--params={cfg.params}: not JSON ({error})") from None
    if not isinstance(params, dict):
        raise UserError(f"--params={cfg.params}: expected a JSON object, {{\"name\": value}}")
    sizes = dict(test=cfg.test, val=cfg.val, train=cfg.train)     # a longer train keeps what is held out
    if min(sizes.values()) < 1 or cfg.seed < 0:
        raise UserError(f"--train={cfg.train} --val={cfg.val} --test={cfg.test} --seed={cfg.seed}: expected "
                        "at least 1 each, the seed at least 0")
    wanted = sum(sizes.values())
    items, rows = create(cfg.task, params, cfg.seed, DRAWS * wanted), {}
    for i in range(DRAWS * wanted):
        try:
            entry = items[i]
            said = entry["answer"] if isinstance(entry["answer"], str) else None
            answer = json.dumps(dict(task=cfg.task, params=params, entry=entry))
            own = None if said is None else items.score_answer(said.strip(), entry)
        except Exception as error:  # what wrong parameters lead to is up to the task
            raise refused(cfg.task, params, error) from None
        if said is not None and score(said.strip(), answer) != own:
            raise UserError(f"--task={cfg.task}: its entries cannot be kept as JSON: the answer to item {i} "
                            f"then scores {score(said.strip(), answer):.3g}, not {own:.3g}")
        rows.setdefault(entry["question"].casefold(), (entry["question"], said, answer))
        if len(rows) == wanted:
            break
    else:
        raise UserError(f"--train={cfg.train} --val={cfg.val} --test={cfg.test}: only {len(rows):,} "
                        f"different questions in {DRAWS * wanted:,} draws; ask for fewer, or other --params")
    rows = iter(rows.values())
    return {split: [next(rows) for _ in range(size)] for split, size in sizes.items()}


def write(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cfg = parse_config(Config)
    if os.path.exists(cfg.out_dir):
        raise UserError(f"--out_dir={cfg.out_dir}: already there; remove it or choose another")
    splits, aside = build(cfg), cfg.out_dir.rstrip("/") + ".partial"
    answered = all(said for rows in splits.values() for _, said, _ in rows)
    try:
        shutil.rmtree(aside, ignore_errors=True)              # of a run that was killed
        os.makedirs(aside)
        for split, rows in splits.items():
            write(os.path.join(aside, f"{split}_prompts.jsonl"), [
                dict(prompt=question, answer=answer) for question, _, answer in rows])
            if answered:
                write(os.path.join(aside, f"{split}.jsonl"), [
                    [dict(role="user", content=question), dict(role="assistant", content=said)]
                    for question, said, _ in rows])
        os.rename(aside, cfg.out_dir)
    except OSError as error:
        raise UserError(f"--out_dir={cfg.out_dir}: cannot write there ({error.strerror})") from None
    print(f"{cfg.out_dir}: " + ", ".join(f"{len(splits[s]):,} {s}" for s in ("train", "val", "test"))
          + ("" if answered else f"; prompts only, as {cfg.task} has no answers to learn from"))
