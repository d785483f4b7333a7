"""
extras/gym.py: questions of reasoning-gym are the same each time and held apart, its own scores are the
rewards, the files go through preparation and training, and mistakes are told in one line.
"""
import json
import re
import sys

import pytest
from conftest import ROOT, run

from common.errors import UserError
from extras import gym

SPLITS = ("train", "val", "test")
SMALL = ("--train=60", "--val=10", "--test=10")
CHAIN_SUM = ("--task=chain_sum", '--params={"max_terms": 2, "max_digits": 2}', *SMALL)


@pytest.fixture(scope="module")
def reasoning_gym():
    return pytest.importorskip("reasoning_gym", reason=f"needs {gym.PACKAGE}, the extra gym")


@pytest.fixture(scope="module")
def made(reasoning_gym, tmp_path_factory):
    """The folder of a small task's files."""
    folder = tmp_path_factory.mktemp("gym") / "out"
    run("extras/gym.py", *CHAIN_SUM, f"--out_dir={folder}")
    return folder


def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def splits_of(**options):
    return gym.build(gym.Config(**{**dict(train=60, val=10, test=10), **options}))


def test_the_version_is_the_same_everywhere():
    assert f'gym = ["{gym.PACKAGE}"]' in (ROOT / "pyproject.toml").read_text()
    assert gym.PACKAGE in (ROOT / "requirements-dev.txt").read_text().splitlines()


def test_files_hold_each_splits_questions_with_answers_that_score_in_full(made):
    assert sorted(path.name for path in made.iterdir()) == sorted(
        f"{split}{ending}.jsonl" for split in SPLITS for ending in ("", "_prompts"))
    for split, size in zip(SPLITS, (60, 10, 10)):
        chats, prompts = rows_of(made / f"{split}.jsonl"), rows_of(made / f"{split}_prompts.jsonl")
        assert len(chats) == len(prompts) == size
        assert [chat[0] for chat in chats] == [dict(role="user", content=row["prompt"]) for row in prompts]
        texts = [f"<answer>{chat[1]['content']}</answer>" for chat in chats]
        assert gym.reward(None, texts, [row["answer"] for row in prompts]) == [1] * size


def test_questions_follow_from_task_parameters_and_seed(made, tmp_path):
    run("extras/gym.py", *CHAIN_SUM, f"--out_dir={tmp_path}/out")
    for path in made.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert splits_of() == splits_of() != splits_of(seed=7)


@pytest.mark.parametrize("options", [
    dict(task="spell_backward"), dict(task="letter_counting"),
    dict(task="spell_backward", params='{"max_word_len": 3}', train=1000, val=100, test=100)], ids=str)
def test_no_question_occurs_twice_in_whatever_case(reasoning_gym, options):
    splits = splits_of(**options)
    questions = [question.lower() for rows in splits.values() for question, _, _ in rows]
    sizes = [options.get(split, size) for split, size in zip(SPLITS, (60, 10, 10))]
    assert len(set(questions)) == len(questions) == sum(sizes)


def test_what_is_held_out_does_not_depend_on_the_number_of_training_questions(reasoning_gym):
    few, many = splits_of(train=5), splits_of(train=200)
    assert few["test"] == many["test"] and few["val"] == many["val"] and few["train"] == many["train"][:5]


@pytest.mark.parametrize("task, params, answers", [
    ("chain_sum", {}, ["{}", "{}.0", "1{}", "", "x", "{} apples", "<answer>", "-", "1e5"]),
    ("spell_backward", {}, ["{}", "{}s", "a", "", "é" * 9]),
    ("letter_counting", {}, ["{}", "no {}", "", "7777"]),
    ("decimal_arithmetic", dict(min_num_decimal_places=1, max_num_decimal_places=2), ["{}", "1{}", ""])])
def test_rewards_are_reasoning_gyms_scores(reasoning_gym, task, params, answers):
    items = reasoning_gym.create_dataset(task, seed=3, size=4, **params)
    for i in range(4):
        row = json.dumps(dict(task=task, params=params, entry=items[i]))
        texts = [text.replace("{}", items[i]["answer"]) for text in answers]
        expected = [items.score_answer(text, items[i]) for text in texts]
        tagged = [f"<answer>{text}</answer>" for text in texts]
        assert gym.reward(None, tagged, [row] * len(texts)) == expected
        assert expected[0] == 1 and min(expected) < 0.5
        assert gym.reward(None, [f"<think>so</think> {texts[0]}\n"], [row]) == [1]


def test_an_answer_that_a_scorer_cannot_read_gets_nothing(reasoning_gym):
    items = reasoning_gym.create_dataset("prime_factorization", seed=3, size=1)
    row = json.dumps(dict(task="prime_factorization", params={}, entry=items[0]))
    with pytest.raises(ValueError):
        items.score_answer("two", items[0])
    assert gym.reward(None, ["two", items[0]["answer"]], [row] * 2) == [0, 1]


def test_a_task_without_answers_gives_prompts_alone(reasoning_gym, tmp_path):
    result = run("extras/gym.py", "--task=graph_color", f"--out_dir={tmp_path}/out", *SMALL)
    assert "prompts only, as graph_color has no answers to learn from" in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{split}_prompts.jsonl" for split in SPLITS)


def test_preparation_and_training_take_the_files(made, tmp_path):
    for kind, ending in (("chat", ""), ("prompts", "_prompts")):
        run("data/prepare.py", kind, f"--input={made}/train{ending}.jsonl",
            f"--val_input={made}/val{ending}.jsonl", f"--out_dir={tmp_path}/{kind}")
    small = ("--batch_size=2", "--num_steps=2", "--eval_seqs=4", "--log_every=1")
    run("train_sft.py", f"--data_dir={tmp_path}/chat", f"--out_dir={tmp_path}/sft", "--seq_len=128", *small,
        "--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16")
    run("train_grpo.py", f"--data_dir={tmp_path}/prompts", f"--init_from={tmp_path}/sft",
        f"--out_dir={tmp_path}/grpo", "--reward=extras/gym.py:reward", "--seq_len=128", "--max_new_tokens=8",
        "--num_samples=2", *small)
    rows = rows_of(tmp_path / "grpo/metrics.jsonl")
    assert [0 <= row["reward"] <= 1 for row in rows if "reward" in row] == [True] * 2


@pytest.mark.parametrize("options, message", [
    (["--task=chainsum"], "--task=chainsum: reasoning-gym has none such; did you mean chain_sum?"),
    (["--task=qqqqqq"], "--task=qqqqqq: reasoning-gym has none such; expected one of ab, acre, "),
    (["--params={min: 1}"], "--params={min: 1}: not JSON "),
    (["--params=[1]"], "--params=[1]: expected a JSON object"),
    (['--params={"max_len": 4}'], "--params: spell_backward has no max_len, only data_file, max_word_len, "),
    (['--params={"seed": 4}'], "--params: spell_backward has no seed, only "),
    (['--params={"min_word_len": 0}'], "AssertionError: min_word_len must be positive"),
    (['--params={"min_word_len": "a"}'], "raised TypeError: "),
    (["--task=chain_sum", '--params={"max_terms": 2.5}'],
     "--task=chain_sum --params='{\"max_terms\": 2.5}': reasoning-gym raised "),
    ([*CHAIN_SUM, '--params={"max_terms": 2, "max_digits": 1}', "--train=300"],
     "--train=300 --val=10 --test=10: only 200 different questions in 6,400 draws; ask for fewer, "
     "or other --params"),
    (["--task=arc_agi"], "--task=arc_agi: its entries cannot be kept as JSON: "),
    (["--val=0"], "expected at least 1 each")], ids=str)
def test_a_mistake_is_one_line_and_nothing_is_written(reasoning_gym, tmp_path, options, message):
    result = run("extras/gym.py", f"--out_dir={tmp_path}/out", *SMALL, *options, check=False)
    assert result.returncode == 2 and re.fullmatch(r"error: .*\n", result.stderr) and message in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(tmp_path):
    result = run("extras/gym.py", f"--out_dir={tmp_path}", check=False)
    assert result.returncode == 2 and re.fullmatch(r"error: .* already there.*\n", result.stderr)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for name in ("reasoning_gym", "reasoning_gym.factory"):
        monkeypatch.setitem(sys.modules, name, None)
    gym.scorer.cache_clear()
    for call in (lambda: splits_of(), lambda: gym.reward(
            None, ["1"], [json.dumps(dict(task="chain_sum", params={}, entry={}))])):
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value).startswith(f"pip install {gym.PACKAGE} (the extra gym)")
        assert "\n" not in str(caught.value)
