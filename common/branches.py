"""
Answers to prompts, next to each other in one row without padding: a prompt is computed once for all
its answers (`GPT.forward`, docs and branch). For pairs (DPO) and for samples (GRPO).
"""

from dataclasses import dataclass

import numpy as np
import torch


def to_device(device, *arrays):
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


@dataclass
class Branches:
    """
    Answers to prompts in one row without padding, T positions: prompt, answer, ..., prompt, answer,
    ...

    A prompt, but for its last token, is a trunk that is computed once; each answer is a branch that
    starts with the prompt's last token, so that a position's target is the next token of its
    answer.
    """

    tokens: torch.Tensor  # (1, T) int64
    targets: torch.Tensor  # (1, T) int64
    # (1, T) bool, True: the target is a learned token of an answer
    mask: torch.Tensor
    docs: torch.Tensor  # (1, T) int64, changes where a prompt or an answer starts
    branch: torch.Tensor  # (1, T) bool, True: in an answer
    answer: torch.Tensor  # (1, T) int64, number of the answer
    place: torch.Tensor  # (1, T) int64, of the target in its answer
    num_answers: int

    def padded(self, values):
        """values (N,) of the N tokens in mask -> (answers, longest), 0 where there is none"""
        answer, place = self.answer[self.mask], self.place[self.mask]
        longest = int(place.max()) + 1 if len(place) else 1
        out = torch.zeros(self.num_answers, longest, dtype=values.dtype, device=values.device)
        return out.index_put((answer, place), values)


def branches(groups, device):
    """
    groups: list of (prompt ids, [(answer ids, which are learned), ...]), arrays -> fields of
    Branches
    """
    # tokens, targets, learned, branch, answer, place
    parts, num_answers = [], 0
    for prompt, answers in groups:
        n = len(prompt) - 1
        nothing = np.zeros(n, dtype=np.int64)
        parts.append((prompt[:-1], nothing, nothing > 0, False, num_answers, nothing))
        for ids, learn in answers:
            tokens = np.concatenate([prompt[-1:], ids[:-1]])
            parts.append((tokens, ids, learn, True, num_answers, np.arange(len(ids))))
            num_answers += 1
    lengths = [len(part[0]) for part in parts]
    tokens, targets, mask, place = (
        np.concatenate([part[k] for part in parts]) for k in (0, 1, 2, 5)
    )
    branch, answer = (np.repeat([part[k] for part in parts], lengths) for k in (3, 4))
    docs = np.repeat(np.arange(len(parts)), lengths)
    rows = (tokens.astype(np.int64), targets.astype(np.int64), mask, docs, branch, answer, place)
    return *to_device(device, *(row[None] for row in rows)), num_answers


@dataclass
class Pairs(Branches):
    """
    A micro-batch of P pairs: answer 2 p is the chosen one of pair p, 2 p + 1 the rejected one.
    """

    ids: torch.Tensor  # (P,) int64, the pairs' numbers in the set
    valid: torch.Tensor  # (P,) bool, False: past the run's last pair

    def per_answer(self, values):
        """Sum values (N,) of the N tokens in mask over each answer -> (P, 2): chosen, rejected"""
        return self.padded(values).sum(dim=1).view(-1, 2)


@dataclass
class Sampled(Branches):
    """
    Answers that a policy has given, in one row with their prompts. N: tokens in mask, those that it
    learns from; the values of these are filled in as they become known.
    """

    # two (N,): the token's answer, its number among the answer's own ones
    index: tuple
    sampler_logps: torch.Tensor  # (N,)
    support: tuple | None  # what the sampler chose from, see losses.token_logps
    ref_logps: torch.Tensor | None = None  # (N,) of the reference
    old_logps: torch.Tensor | None = None  # (N,) of the policy before the first update
    advantages: torch.Tensor | None = None  # (N,)


def sampled_rows(prompts, answers, learn, device):
    """
    prompts: P lists of ids; answers: P G sampling.Answer, group after group; learn: list of bool,
    which of the answers are learned from -> Sampled
    """
    G = len(answers) // len(prompts)
    parts = [
        (np.array(answer.tokens), np.array(answer.learned) & keep)
        for answer, keep in zip(answers, learn)
    ]
    groups = [(np.array(prompt), parts[p * G : (p + 1) * G]) for p, prompt in enumerate(prompts)]
    own = [(i, answer) for i, answer in enumerate(answers) if learn[i]]
    index = [(i, n) for i, answer in own for n in range(len(answer.logps))]
    index = torch.tensor(index, dtype=torch.int64).view(-1, 2)
    logps = torch.tensor([logp for _, answer in own for logp in answer.logps], device=device)
    support = [ids for _, answer in own for ids in answer.support] or None
    if support:
        sizes = torch.tensor([len(ids) for ids in support], device=device)
        support = torch.cat(support).to(device), sizes
    return Sampled(*branches(groups, device), tuple(index.T), logps, support)
