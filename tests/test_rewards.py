"""common/rewards.py: shipped rewards on tables, rewards from files, scores that are refused, statistics."""
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from common.errors import UserError
from common.rewards import answer_format, answer_of, exact_match, load_function, score, summarize

PROMPTS = [[{"role": "user", "content": "1 + 1?"}], [{"role": "user", "content": "2 + 2?"}]]
TEXTS, ANSWERS = ["<answer>2</answer>", "<answer>5</answer>"], ["2", "4"]
PIECES = [["<answer>", "2", "</answer>", "<end>"], ["<answer>", "5", "</answer>"]]          # tokens of TEXTS


@pytest.fixture(autouse=True)
def root(monkeypatch):
    """Where a run is started: --reward names files from there."""
    monkeypatch.chdir(ROOT)


def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -----------------------------------------------------------------------------
# shipped rewards

@pytest.mark.parametrize("text, answer, in_format", [
    ("<answer>4</answer>", "4", 1), ("<answer> 4\n</answer>", "4", 1), ("<answer></answer>", "", 1),
    ("<think>2 + 2</think><answer>4</answer>", "4", 1), ("<think></think><answer>a\nb</answer>", "a\nb", 1),
    ("<think>one\ntwo</think><answer>4</answer>", "4", 1),
    # not in the format, yet the answer is there
    ("4", "4", 0), (" 4\n", "4", 0), ("", "", 0), ("<think>2 + 2</think> 4", "4", 0),
    ("So: <answer>4</answer>", "4", 0), ("<answer>4</answer>.", "4", 0), ("<answer>4</answer>\n", "4", 0),
    ("<think>a</think>\n<answer>4</answer>", "4", 0), ("<answer>4</answer><think>a</think>", "4", 0),
    ("<answer>4</answer><answer>5</answer>", "4", 0), ("<think>a</think>b<think>c</think>", "b", 0),
    ("<think>a<think>b</think></think><answer>4</answer>", "4", 0)])
def test_answers_and_their_format_are_those_of_the_table(text, answer, in_format):
    assert answer_of(text) == answer and answer_format([[]], [text], [""]) == [in_format]
    assert exact_match([[]] * 3, [text] * 3, [answer, f"  {answer}\n", answer + "0"]) == [1, 1, 0]


@pytest.mark.parametrize("text", [
    "<answer>4", "4</answer>", "<think>4", "<answer>4<answer>", "</answer>4<answer>",
    "<think>a<answer>4</answer>", "<answer>a<answer>4</answer></answer>"])
def test_tags_that_do_not_pair_are_not_in_the_format(text):
    assert answer_format([[]], [text], [""]) == [0]


def test_shipped_rewards_are_floats_one_for_each_completion():
    for function in (exact_match, answer_format):
        values = function(PROMPTS, TEXTS, ANSWERS)
        assert [type(value) for value in values] == [float, float] and function([], [], []) == []
    assert exact_match(PROMPTS, TEXTS, ANSWERS) == [1, 0]


# -----------------------------------------------------------------------------
# rewards from files

def test_a_reward_is_read_from_a_file(tmp_path):
    path = tmp_path / "mine:own.py"                                     # the last colon divides
    path.write_text("import re\nLEAST = 2\n\ndef long(prompts, completions, answers):\n"
                    "    return [len(re.findall('.', text)) - LEAST for text in completions]\n")
    assert load_function("reward", f"{path}:long")([], ["abc", ""], []) == [1, -2]
    assert load_function("reward", "common/rewards.py:exact_match")(PROMPTS, TEXTS, ANSWERS) == [1, 0]


@pytest.mark.parametrize("name, message", [
    ("no/such.py:good", "no file no/such.py; expected path/to/file.py:function"),
    ("common:good", "no file common; expected path/to/file.py:function"),
    ("exact_match", "no file exact_match; expected path/to/file.py:function"),
    ("common/rewards.py", "which function of it? common/rewards.py:FUNCTION"),
    ("", "no file ; expected path/to/file.py:function"),
    ("common/rewards.py:none", "common/rewards.py has no function none"),
    ("common/rewards.py:", "common/rewards.py has no function "),
    ("common/rewards.py:__doc__", "common/rewards.py has no function __doc__")])
def test_a_reward_that_is_not_there_is_named(name, message):
    assert refusal(load_function, "reward", name) == f"--reward={name}: {message}"


@pytest.mark.parametrize("content, error", [
    ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("1 / 0", "ZeroDivisionError: division by zero"), ("def good(:", "SyntaxError: ")])
def test_a_file_that_cannot_be_imported_says_why(tmp_path, content, error):
    (tmp_path / "mine.py").write_text(content)
    name = f"{tmp_path}/mine.py:good"
    assert refusal(load_function, "reward", name).startswith(f"--reward={name}: importing it raised {error}")


# -----------------------------------------------------------------------------
# scores

def scored(*functions, weights=None):
    rewards = {f"f.py:{chr(97 + i)}": function for i, function in enumerate(functions)}
    total, to_go = score(rewards, weights or [1.0] * len(functions), PROMPTS, TEXTS, ANSWERS, PIECES, 4)
    torch.testing.assert_close(to_go, total[:, None].expand(-1, 4))
    return total.tolist()


def test_a_score_is_the_weighted_sum_of_what_the_functions_return():
    calls = []

    def spy(*args):
        calls.append(args)
        return 3, -1
    assert scored(exact_match, answer_format, spy, weights=[2.0, 0.5, -0.25]) == [2 + 0.5 - 0.75, 0.5 + 0.25]
    assert calls == [(PROMPTS, TEXTS, ANSWERS)]


@pytest.mark.parametrize("values", [[1, 0], [True, False], (1.0, 0.0), torch.tensor([1.0, 0.0]).tolist(),
                                    torch.tensor([1.0, 0.0], dtype=torch.float64).numpy()], ids=repr)
def test_python_numbers_and_bools_are_scores(values):
    assert scored(lambda *args: values) == [1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None, "1", [1.0], 1j], ids=repr)
def test_a_score_that_is_no_finite_number_is_shown_with_its_prompt_and_completion(value):
    assert refusal(scored, exact_match, lambda *args: [1.0, value]) == (
        f"--reward=f.py:b: returned {value!r} for the prompt {PROMPTS[1]!r} and the completion {TEXTS[1]!r}, "
        "expected a finite number")


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 3, None, 1.0, (x for x in [1.0, 2.0])],
                         ids=["empty", "one", "three", "nothing", "a number", "a generator"])
def test_another_number_of_scores_is_refused(values):
    message = refusal(scored, lambda *args: values)
    assert re.fullmatch(r"--reward=f.py:a: returned .*, expected 2 numbers", message)


def test_a_function_that_raises_is_named_with_the_error_and_a_prompt_and_completion():
    def bad(prompts, completions, answers):
        return [float(answer) / 0 for answer in answers]
    assert refusal(scored, exact_match, bad) == (
        "--reward=f.py:b: raised ZeroDivisionError: float division by zero; the first prompt was "
        f"{PROMPTS[0]!r}, its completion {TEXTS[0]!r}")
    assert "--reward=f.py:a: raised TypeError: " in refusal(scored, lambda prompts: [1.0, 0.0])


def test_numbers_for_tokens_are_to_be_got_from_their_token_on():
    def digits(prompts, completions, answers, pieces):
        return [[-1.0 * piece.isdigit() for piece in row] for row in pieces]

    def once(prompts, completions, answers, pieces=None):
        assert pieces == PIECES
        return [1.0, 2.0]
    total, to_go = score({"a": digits, "b": once, "c": exact_match}, [2.0, 1.0, 0.5], PROMPTS, TEXTS, ANSWERS,
                         PIECES, 4)
    assert total.tolist() == [-2 + 1 + 0.5, -2 + 2]
    assert to_go.tolist() == [[-0.5, -0.5, 1.5, 1.5], [0, 0, 2, 2]]      # the last one stands for no token


def test_numbers_for_tokens_must_be_as_many_and_finite():
    def of(*values):
        def by_token(prompts, completions, answers, pieces):
            return values
        return lambda: score({"f.py:a": by_token}, [1.0], PROMPTS, TEXTS, ANSWERS, PIECES, 4)
    assert "expected 4 finite numbers, one a token" in refusal(of([0.0] * 3, [0.0] * 3))
    assert "expected 3 finite numbers, one a token" in refusal(of([0.0] * 4, [0.0, float("nan"), 0.0]))
    assert "expected a finite number" in refusal(of([0.0] * 4, "1"))


# -----------------------------------------------------------------------------
# statistics

def episode(rewards, lengths, ended, valid):
    answers = [SimpleNamespace(logps=[0.0] * n, ended=end) for n, end in zip(lengths, ended)]
    return SimpleNamespace(rewards=torch.tensor(rewards), valid=torch.tensor(valid), answers=answers,
                           to_go=torch.tensor(rewards)[..., None])


def test_the_statistics_of_rollouts_are_those_of_a_table_by_hand():
    episodes = [
        episode([[1.0, 0.0], [0.5, 0.5]], [3, 1, 4, 2], [True, True, False, True], [True, True]),
        # of this one only the first prompt counts
        episode([[2.0, -1.0], [9.0, 9.0]], [5, 5, 90, 90], [False, True, False, False], [True, False]),
        episode([[9.0, 9.0]], [90, 90], [False, False], [False])]
    # rewards 1, 0, .5, .5, 2, -1: mean 1/2, squares 6.5 / 6
    assert summarize(episodes) == pytest.approx(dict(
        reward=1 / 2, reward_std=(6.5 / 6 - 1 / 4)**0.5, **{"pass": 2 / 6}, length=20 / 6, truncated=2 / 6,
        flat_groups=1 / 3))


def test_the_statistics_of_one_answer_to_each_prompt():
    result = summarize([episode([[1.0], [0.0], [1.0]], [1, 2, 3], [True, True, False], [True, True, True])])
    assert result == pytest.approx(dict(reward=2 / 3, reward_std=2**0.5 / 3, **{"pass": 2 / 3}, length=2,
                                        truncated=1 / 3, flat_groups=1))


def test_large_rewards_of_one_size_have_no_deviation():
    for value in (0.1, 1 / 3, 1e4 / 3):
        result = summarize([episode([[value] * 7] * 5, [1] * 35, [True] * 35, [True] * 5)])
        assert result["reward_std"] < 1e-6 * value + 1e-7 and result["flat_groups"] == 1
