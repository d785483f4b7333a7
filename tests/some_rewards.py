"""Reward functions for test_stages.py."""


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
