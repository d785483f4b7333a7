"""
Tasks of reasoning-gym (github.com/open-thought/reasoning-gym): a program asks, and scores answers.

    python extras/gym.py --task=spell_backward --params='{"max_word_len": 5}' --out_dir=out/gym

Writes train_prompts.jsonl, val_prompts.jsonl and test_prompts.jsonl for `data/prepare.py prompts`,
with `reward` here, and train.jsonl, ... with reasoning-gym's own answers for
`data/prepare.py chat`, where the task has such. No question occurs twice, in whatever case of
letters: what val and test ask never occurs in train.
The "answer" of a prompt is JSON of all that the scorer needs: task, params and entry.

Some tasks' scorers hand the answer to Python's `eval` or sympy's parser (binary_matrix, countdown,
n_queens, puzzle24, spiral_matrix, string_insertion, polynomials and integrals): what a model writes
is run then.
"""

import dataclasses
import difflib
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

# the repository's root must be on the path first
sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from common.config import parse_config
from common.errors import UserError
from common.rewards import answer_of
from data.prepare import chat_row, whole_or_nothing, write_rows

# the optional extra "gym" of pyproject.toml
PACKAGE = "reasoning-gym==0.1.25"
# items to draw for each question that is wanted, at most
DRAWS = 20


@dataclass(frozen=True)
class Config:
    # fmt: off
    task: str = "spell_backward"       # reasoning-gym's name of the task family
    params: str = "{}"                 # its parameters, JSON: {"max_word_len": 5, ...}
    out_dir: str = "out/gym"           # folder to write, must not exist
    train: int = 4000                  # training questions
    val: int = 200                     # validation questions
    test: int = 200                    # test questions
    seed: int = 1337                   # which questions
    # fmt: on


def tasks():
    """-> reasoning-gym's task families: dict of name to (class of datasets, class of parameters)"""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(
            f"pip install {PACKAGE} (the extra gym) is needed for this: {error}"
        ) from None
    return DATASETS


def create(task, params, seed, size):
    """-> reasoning-gym's dataset of a task, params a dict; UserError where one is unknown"""
    known = tasks()
    if task not in known:
        near = difflib.get_close_matches(task, known, 1)
        mend = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(known))}"
        raise UserError(f"--task={task}: reasoning-gym has none such; {mend}")
    names = {field.name for field in dataclasses.fields(known[task][1])} - {"seed", "size"}
    if unknown := sorted(set(params) - names):
        raise UserError(f"--params: {task} has no {unknown[0]}, only {', '.join(sorted(names))}")
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **params)
    # an AssertionError mostly; what else wrong values lead to is up to the task
    except Exception as error:
        raise refused(task, params, error) from None


def refused(task, params, error):
    """The UserError for what reasoning-gym raises while it makes questions"""
    return UserError(
        f"--task={task} --params='{json.dumps(params)}': reasoning-gym raised "
        f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    )


@functools.cache
def scorer(task, params):
    """params: JSON -> a dataset of them, for its score_answer, which may look at them"""
    return create(task, json.loads(params), seed=0, size=1)


def reward(prompts, completions, answers):
    """For train_grpo.py: reasoning-gym's own score of what is between the answer tags, 0 to 1."""
    return [score(answer_of(text), answer) for text, answer in zip(completions, answers)]


def score(text, answer):
    """text: an answer without tags; answer: the row's JSON -> reasoning-gym's score"""
    row = json.loads(answer)
    judge = scorer(row["task"], json.dumps(row["params"]))
    try:
        return float(judge.score_answer(text, row["entry"]))
    # some scorers stumble over what is no answer, int("x"); `build` has tried the entry
    except Exception:
        return 0.0


def build(cfg):
    """
    -> dict of split to list of (question, reasoning-gym's answer or None, "answer" for `reward`)
    """
    try:
        params = json.loads(cfg.params)
    except ValueError as error:
        raise UserError(f"--params={cfg.params}: not JSON ({error})") from None
    if not isinstance(params, dict):
        raise UserError(f'--params={cfg.params}: expected a JSON object, {{"name": value}}')
    # a longer train keeps what is held out
    sizes = dict(test=cfg.test, val=cfg.val, train=cfg.train)
    asked = f"--train={cfg.train} --val={cfg.val} --test={cfg.test}"
    if min(sizes.values()) < 1 or cfg.seed < 0:
        raise UserError(f"{asked} --seed={cfg.seed}: expected at least 1 each, the seed at least 0")
    wanted = sum(sizes.values())
    draws = DRAWS * wanted
    items, rows = create(cfg.task, params, cfg.seed, draws), {}
    for i in range(draws):
        said = None
        try:
            entry = items[i]
            answer = json.dumps(dict(task=cfg.task, params=params, entry=entry))
            if isinstance(entry["answer"], str):
                said = entry["answer"]
                own = items.score_answer(said.strip(), entry)
        # what wrong parameters lead to is up to the task
        except Exception as error:
            raise refused(cfg.task, params, error) from None
        if said is not None and (kept := score(said.strip(), answer)) != own:
            raise UserError(
                f"--task={cfg.task}: its entries cannot be kept as JSON: the answer to "
                f"item {i} then scores {kept:.3g}, not {own:.3g}"
            )
        question = entry["question"]
        rows.setdefault(question.casefold(), (question, said, answer))
        if len(rows) == wanted:
            break
    else:
        raise UserError(
            f"{asked}: only {len(rows):,} different questions in {draws:,} draws; "
            "ask for fewer, or other --params"
        )
    rows = iter(rows.values())
    return {split: [next(rows) for _ in range(size)] for split, size in sizes.items()}


if __name__ == "__main__":
    cfg = parse_config(Config)
    with whole_or_nothing(cfg.out_dir) as folder:
        splits = build(cfg)
        answered = all(said for rows in splits.values() for _, said, _ in rows)
        for split, rows in splits.items():
            prompts = [dict(prompt=question, answer=answer) for question, _, answer in rows]
            write_rows(folder, f"{split}_prompts", prompts)
            if answered:
                write_rows(folder, split, [chat_row(question, said) for question, said, _ in rows])
    note = "" if answered else f"; prompts only, as {cfg.task} has no answers to learn from"
    print(f"{cfg.out_dir}: {cfg.train:,} train, {cfg.val:,} val, {cfg.test:,} test{note}")
