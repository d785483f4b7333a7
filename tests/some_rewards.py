"""Reward functions and environments for the tests of rollouts."""
import re


def letters(prompts, completions, answers):
    """The share of a completion that is letters a to z"""
    return [sum("a" <= c <= "z" for c in text) / max(1, len(text)) for text in completions]


def short(prompts, completions, answers):
    return [1.0 / (1 + len(text)) for text in completions]


def broken(prompts, completions, answers):
    raise RuntimeError("no reward today")


def nan(prompts, completions, answers):
    return [float("nan")] * len(prompts)


def too_few(prompts, completions, answers):
    return [1.0]


def one_a_token(prompts, completions, answers, pieces):
    """1 for each token that is a letter a to z, nothing for others"""
    return [[1.0 * (len(piece) == 1 and "a" <= piece <= "z") for piece in row] for row in pieces]


def calculator(text):
    """An environment: a turn "=12+30" is answered by the sum, anything else ends the conversation."""
    turn = text.rsplit("<assistant>", 1)[1].removesuffix("<end>")
    if not (found := re.fullmatch(r"=(\d+)\+(\d+)", turn)):
        return True, ""
    return False, str(int(found[1]) + int(found[2]))


def twice(text):
    """An environment: go on once, then it is over."""
    return text.count("<assistant>") > 1, "c"
