"""
Reward functions. Each takes lists of the same length and returns a number for each completion:

    prompts        messages, [{"role": ..., "content": ...}, ...]
    completions    what the model wrote, with <think>, <answer> and other tags, without the end
                   token
    answers        the "answer" of the prompt's row, text
    pieces         only if the function has a parameter of that name: the texts of each completion's
                   tokens, the end token's too; it may then return a list of numbers for a
                   completion, one for each

Write your own in any file and name it with --reward=path/to/file.py:function. In a conversation
with an environment (--env) a completion is all that follows the prompt, with the tags of the turns
between.
"""

import importlib.util
import inspect
import math
import os
import re
import sys

import torch

from common import dist
from common.errors import UserError


def answer_of(completion):
    """
    What stands between <answer> and </answer>, or all where there are no such tags; thoughts aside;
    only of the last turn
    """
    completion = completion.rsplit("<assistant>", 1)[-1]
    text = re.sub(r"<think>.*?</think>", "", completion, flags=re.DOTALL)
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return (found[1] if found else text).strip()


def exact_match(prompts, completions, answers):
    """1 where the answer is the one that was asked for"""
    return [float(answer_of(text) == answer.strip()) for text, answer in zip(completions, answers)]


def answer_format(prompts, completions, answers):
    """
    1 where the whole completion is <answer>...</answer>, with <think>...</think> before it or not
    """
    form = re.compile(
        r"(<think>((?!</?think>).)*</think>)?<answer>((?!</?answer>).)*</answer>", re.DOTALL
    )
    return [float(form.fullmatch(text) is not None) for text in completions]


def load_function(option, name):
    """
    name: path/to/file.py:function, as in --option=name -> the function; UserError where there is
    none
    """
    path, _, function = name.rpartition(":")
    if os.path.isfile(name):
        raise UserError(f"--{option}={name}: which function of it? {name}:FUNCTION")
    if not os.path.isfile(path):
        raise UserError(
            f"--{option}={name}: no file {path or name}; expected path/to/file.py:function"
        )
    spec = importlib.util.spec_from_file_location(os.path.basename(path).removesuffix(".py"), path)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up there
    sys.modules.setdefault(spec.name, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise UserError(
            f"--{option}={name}: importing it raised {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"--{option}={name}: {path} has no function {function}")
    return getattr(module, function)


def score(rewards, weights, prompts, completions, answers, pieces, T):
    """
    Weighted sum of reward functions. rewards: dict of name to function; weights: one each; the rest
    as above
    -> (B,) float32 rewards; (B, T) float32, what of it is still to be got from each token on: all
    of a number that is for the whole completion, of numbers for tokens the token's own and those
    after it. T: at least the longest completion's tokens

    UserError shows the prompt and the completion where a function raises or returns what is no
    number.
    """
    total, to_go = [0.0] * len(completions), torch.zeros(len(completions), T)
    for (name, function), weight in zip(rewards.items(), weights):
        try:
            with_pieces = (
                dict(pieces=pieces) if "pieces" in inspect.signature(function).parameters else {}
            )
            values = function(prompts, completions, answers, **with_pieces)
        except Exception as error:
            raise UserError(
                f"--reward={name}: raised {type(error).__name__}: {one_line(error)}; the first "
                f"prompt was {prompts[0]!r}, its completion {completions[0]!r}"
            ) from error
        if torch.is_tensor(values) or hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, (list, tuple)) or len(values) != len(completions):
            raise UserError(
                f"--reward={name}: returned {one_line(values)}, expected {len(completions)} numbers"
            )
        for i, value in enumerate(values):
            by_token = bool(with_pieces) and isinstance(value, (list, tuple))
            numbers = [as_number(x) for x in (value if by_token else [value])]
            if not all(map(math.isfinite, numbers)) or by_token and len(numbers) != len(pieces[i]):
                wanted = (
                    f"{len(pieces[i])} finite numbers, one a token"
                    if by_token
                    else "a finite number"
                )
                raise UserError(
                    f"--reward={name}: returned {one_line(repr(value))} for the prompt "
                    f"{prompts[i]!r} and the completion {completions[i]!r}, expected {wanted}"
                )
            total[i] += weight * sum(numbers)
            if by_token:
                to_go[i, : len(numbers)] += weight * torch.tensor(numbers).flip(0).cumsum(0).flip(0)
            else:
                to_go[i] += weight * numbers[0]
    return torch.tensor(total), to_go


def one_line(value):
    return " ".join(str(value).split())[:80]


def as_number(value):
    """-> float, nan for what is none"""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def summarize(rollouts):
    """
    What rollouts were like, over all ranks. rollouts: list of values with .rewards (P, G), .to_go
    (P, G, T), .valid (P,) bool, which prompts count (the first ones), and .answers, P G of them
    with .logps, .ended
    -> dict of means over answers; pass: reward 1 or more; flat_groups: all rewards of the group are
    the same
    """
    total = torch.zeros(7, dtype=torch.float64)
    for r in rollouts:
        rewards, to_go = r.rewards[r.valid].double(), r.to_go[r.valid]  # (P, G), (P, G, T)
        answers = r.answers[: rewards.numel()]
        flat = (to_go == to_go[:, :1]).flatten(1).all(dim=1)  # (P,)
        total += torch.stack(
            [
                torch.tensor(rewards.numel()),
                rewards.sum(),
                (rewards**2).sum(),
                (rewards >= 1 - 1e-6).sum(),
                torch.tensor(sum(len(answer.logps) for answer in answers)),
                torch.tensor(sum(not answer.ended for answer in answers)),
                flat.sum() * rewards.shape[1],
            ]
        )
    n, *sums = dist.all_sum(total).tolist()
    reward, square, passed, length, truncated, flat_groups = (x / n for x in sums)
    return {
        "reward": reward,
        "reward_std": max(0.0, square - reward**2) ** 0.5,
        "pass": passed,
        "length": length,
        "truncated": truncated,
        "flat_groups": flat_groups,
    }
