"""
common/sampling.py against hand tables, chi-square and a naive uncached loop: one step, generation, streaming.
"""
import io
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from some_rewards import calculator

from common.chat import encode_chat
from common.errors import UserError
from common.losses import token_logps
from common.model import GPT, ModelConfig
from common.sampling import (
    SamplingConfig,
    answer_prompts,
    complete,
    for_vocabulary,
    generate,
    sample_next,
    stream,
    uniforms,
)
from common.tokenizer import Tokenizer
from data.train_tokenizer import train_sentencepiece
from extras.environment import continue_turns
from train_grpo import Rollout, answer_logps, learned_rows

PLAIN = SamplingConfig(temperature=1.0)
LARGEST = 1 - 2**-24                                     # the largest float32 that torch.rand can give
N = 100_000


def every_u(logits, cfg, seen=()):
    """
    Draw from the logits of one row with N evenly spaced u -> (each token's share of the draws, exp(logp))

    A token of probability p owns an interval of u of length p, so its share is p to 1/N: nothing is random.
    """
    logits = torch.tensor([logits])
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    mask[0, list(seen)] = True
    tokens, logps, _ = sample_next(logits.expand(N, -1), cfg, u.float(), mask.expand(N, -1) if seen else None)
    share, probs = [0.0] * logits.shape[1], [0.0] * logits.shape[1]
    for token in tokens.unique().tolist():
        of_token = logps[tokens == token]
        assert of_token.eq(of_token[0]).all()
        share[token], probs[token] = len(of_token) / N, of_token[0].exp().item()
    return share, probs


def logs(*weights):
    """Logits of softmax weights / sum(weights). Temperature T raises weights to 1/T."""
    return [math.log(w) for w in weights]


# -----------------------------------------------------------------------------
# one step against hand-computed tables

TABLES = {                     # logits, options, tokens seen, probabilities
    "plain": (logs(5, 3, 1, 1), {}, (), [0.5, 0.3, 0.1, 0.1]),
    "temperature 1/2 squares": (logs(3, 2, 1), dict(temperature=0.5), (), [9 / 14, 4 / 14, 1 / 14]),
    "temperature 2 takes roots": (logs(9, 4, 1), dict(temperature=2.0), (), [3 / 6, 2 / 6, 1 / 6]),
    "top_k": (logs(1, 5, 3, 1.5), dict(top_k=2), (), [0, 5 / 8, 3 / 8, 0]),
    "top_k of one": (logs(1, 5, 3, 1.5), dict(top_k=1), (), [0, 1, 0, 0]),
    "top_k of the vocabulary": (logs(5, 3, 2), dict(top_k=3), (), [0.5, 0.3, 0.2]),
    "top_k above the vocabulary": (logs(5, 3, 2), dict(top_k=50), (), [0.5, 0.3, 0.2]),
    "top_p keeps the token that crosses it": (logs(1, 5, 3, 1), dict(top_p=0.6), (), [0, 5 / 8, 3 / 8, 0]),
    "top_p just reached": (logs(1, 5, 3, 1), dict(top_p=0.499), (), [0, 1, 0, 0]),
    "top_p below the first": (logs(1, 5, 3, 1), dict(top_p=1e-9), (), [0, 1, 0, 0]),
    "top_p near one": (logs(50, 30, 19, 1), dict(top_p=0.98), (), [50 / 99, 30 / 99, 19 / 99, 0]),
    "suppress": (logs(5, 3, 1, 1), dict(suppress=(0, 3)), (), [0, 0.75, 0.25, 0]),
    "penalty divides positive logits": (logs(16, 4, 4), dict(repetition_penalty=2.0), (0,), [1 / 3] * 3),
    "penalty multiplies negative logits": (logs(1 / 4, 1 / 16, 1 / 16), dict(repetition_penalty=2.0), (0,),
                                           [1 / 3] * 3),
    # 4 -> 16, 1/4 -> 1/2
    "penalty below one favours": (logs(4, 1 / 4, 2), dict(repetition_penalty=0.5), (0, 1),
                                  [32 / 37, 1 / 37, 4 / 37]),
    "penalty leaves a zero logit": (logs(1, 1), dict(repetition_penalty=5.0), (0,), [0.5, 0.5]),
    # the order: each would be another table if the two were swapped
    "suppress before top_k": (logs(9, 5, 3, 1), dict(suppress=(0,), top_k=2), (), [0, 5 / 8, 3 / 8, 0]),
    "suppress before top_p": (logs(9, 5, 3, 2), dict(suppress=(0,), top_p=0.6), (), [0, 5 / 8, 3 / 8, 0]),
    "suppress with penalty": (logs(9, 1 / 9, 1), dict(suppress=(0, 1), repetition_penalty=2.0), (0, 1),
                              [0, 0, 1]),
    "penalty before top_k": (logs(16, 9, 2), dict(repetition_penalty=2.0, top_k=1), (0,), [0, 1, 0]),
    # [81, 16, 9] / 106: the first has .764; at temperature 1 it would have .5625 and the second would stay
    "temperature before top_p": (logs(9, 4, 3), dict(temperature=0.5, top_p=0.76), (), [1, 0, 0]),
    # of the best two the first has 5/8; of all it has .5 and the second would stay
    "top_k before top_p": (logs(5, 3, 1, 1), dict(top_k=2, top_p=0.6), (), [1, 0, 0, 0]),
    # without id 4; 16 -> 4, 1/4 -> 1/16; squares 16, 81, 9, 1/256; best three of 106; 81 < .8 * 106 < 97
    "all of them": (logs(16, 9, 3, 1 / 4, 100),
                    dict(suppress=(4,), repetition_penalty=2.0, temperature=0.5, top_k=3, top_p=0.8),
                    (0, 3, 4), [16 / 97, 81 / 97, 0, 0, 0]),
}


@pytest.mark.parametrize("name", TABLES)
def test_tokens_and_logps_follow_the_hand_computed_table(name):
    logits, options, seen, expected = TABLES[name]
    share, probs = every_u(logits, replace(PLAIN, **options), seen)
    assert probs == pytest.approx(expected, abs=2e-6)
    assert share == pytest.approx(expected, abs=1.5 / N)
    assert [s > 0 for s in share] == [e > 0 for e in expected]


@pytest.mark.parametrize("options, seen, token, logp", [
    ({}, (), 1, math.log(5 / 10)),
    (dict(top_k=2, top_p=0.1), (), 1, math.log(5 / 10)),                # the first is always kept
    (dict(suppress=(1,)), (), 2, math.log(3 / 5)),
    (dict(repetition_penalty=2.0), (1,), 2, math.log(3 / (5 + 5 ** 0.5))),
], ids=["plain", "top_k, top_p", "suppress", "penalty"])
@pytest.mark.parametrize("u", [0.0, LARGEST])
def test_temperature_0_is_greedy_with_logps_of_temperature_1(options, seen, token, logp, u):
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[0, list(seen)] = True
    logits = torch.tensor([logs(1, 5, 3, 1)])
    tokens, logps, _ = sample_next(logits, replace(PLAIN, temperature=0, **options), torch.tensor([u]), mask)
    assert tokens.tolist() == [token] and logps.tolist() == pytest.approx([logp], abs=1e-6)


def test_rows_are_drawn_independently():
    """Each row has its own logits, u and seen tokens."""
    torch.manual_seed(0)
    cfg = replace(PLAIN, repetition_penalty=1.7, top_k=6, top_p=0.9, temperature=0.8)
    logits, u, seen = 2 * torch.randn(50, 9), torch.rand(50), torch.rand(50, 9) < 0.3
    tokens, logps, _ = sample_next(logits, cfg, u, seen)
    for row in range(50):
        token, logp, _ = sample_next(logits[row:row + 1], cfg, u[row:row + 1], seen[row:row + 1])
        assert token == tokens[row] and logp == pytest.approx(logps[row].item(), abs=1e-6)


def test_the_logits_given_are_left_as_they_are():
    logits = torch.tensor([logs(1, 5, 3, 1)])
    before, seen = logits.clone(), torch.ones(1, 4, dtype=torch.bool)
    sample_next(logits, SamplingConfig(suppress=(0,), repetition_penalty=2.0, top_k=2, top_p=0.5),
                torch.tensor([0.3]), seen)
    assert logits.equal(before) and seen.all()


@pytest.mark.parametrize("options", [{}, dict(top_k=20), dict(top_p=0.9), dict(top_k=20, top_p=0.9)], ids=str)
@pytest.mark.parametrize("u", [0.0, LARGEST])
def test_the_ends_of_u_give_tokens_of_positive_probability(u, options):
    """The first and last ids are impossible, and so are those 200 below the rest: exp of that is 0."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 3000, generator=generator)
    logits[:, 1:50] -= 200
    logits[:, -50:] -= 200
    cfg = replace(PLAIN, suppress=(0, 2999), **options)
    tokens, logps, _ = sample_next(logits, cfg, torch.full((200,), u))
    assert logps.isfinite().all()
    assert tokens.min() >= 50 and tokens.max() < 2950
    if not options:                                      # by id: 0 is the first possible token
        first, last = tokens == 50, tokens == 2949
        assert (first if u == 0 else last).float().mean() > 0.9


@pytest.mark.parametrize("vocab_size", [1, 2, 5])
def test_a_vocabulary_with_one_possible_token_gives_it_for_every_u(vocab_size):
    logits = torch.full((3, vocab_size), -torch.inf)
    logits[:, -1] = -1e4
    tokens, logps, _ = sample_next(logits, PLAIN, torch.tensor([0.0, 0.5, LARGEST]))
    assert tokens.tolist() == [vocab_size - 1] * 3 and logps.tolist() == [0.0] * 3


# -----------------------------------------------------------------------------
# chi-square

def p_value(counts, probs):
    """Pearson: probability of counts as far from probs or further. Probability 0 must have count 0."""
    counts, probs = counts.double(), probs.double()
    assert counts[probs == 0].sum() == 0 and (probs > 0).sum() > 1
    counts, expected = counts[probs > 0], counts.sum() * probs[probs > 0] / probs.sum()
    assert expected.min() > 5                            # else the statistic is not chi-square
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


TRUNCATIONS = [{}, dict(top_k=3), dict(top_p=0.8), dict(top_k=4, top_p=0.7)]


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_samples_have_the_distribution_that_their_logps_claim(temperature, options):
    logits = [1.0, -0.5, 2.0, 0.3, 1.4]
    cfg = replace(PLAIN, temperature=temperature, **options)
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    tokens, logps, _ = sample_next(torch.tensor([logits]).expand(len(u), -1), cfg, u)
    claimed = torch.zeros(5).scatter(0, tokens, logps.exp())
    assert claimed.sum().item() == pytest.approx(1, abs=1e-5)
    counts = tokens.bincount(minlength=5)
    assert p_value(counts, claimed) > 1e-3
    other = (torch.tensor(logits) / (temperature + 0.15)).softmax(0) * (claimed > 0)
    assert p_value(counts, other) < 1e-3                 # a slightly other temperature would be noticed


@pytest.mark.parametrize("options", TRUNCATIONS[:1] + TRUNCATIONS[-1:], ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_first_tokens_of_many_samples_have_the_distribution_that_their_logps_claim(temperature, options):
    """Through generate, so the random streams of the rows take part."""
    model = tiny_model(vocab_size=5, tie_embeddings=False)
    cfg = replace(PLAIN, temperature=temperature, max_new_tokens=1, **options)
    (_, tokens, logps, _), = generate(model, [[1, 2, 3]], cfg, num_samples=4000, seed=11)
    claimed = torch.zeros(5).scatter(0, torch.tensor(tokens), torch.tensor(logps).exp())
    assert claimed.sum().item() == pytest.approx(1, abs=1e-5)
    assert p_value(torch.tensor(tokens).bincount(minlength=5), claimed) > 1e-3


@pytest.mark.parametrize("suppress", [(), (1,), (0, 4)], ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_first_tokens_of_groups_have_the_distribution_that_their_logps_claim(temperature, suppress):
    """As in rollouts: few samples of a prompt at a time, in many batches with numbers that go on."""
    model = tiny_model(vocab_size=5, tie_embeddings=False)
    cfg = replace(PLAIN, temperature=temperature, suppress=suppress, max_new_tokens=1)
    tokens, claimed = [], torch.zeros(5)
    for first in range(0, 500, 100):
        (_, drawn, logps, _), = generate(model, [[1, 2, 3]] * 100, cfg, (), 8, 3, range(first, first + 100))
        tokens += drawn
        claimed[drawn] = torch.tensor(logps).exp()
    assert claimed.sum().item() == pytest.approx(1, abs=1e-5) and not claimed[list(suppress)].any()
    assert p_value(torch.tensor(tokens).bincount(minlength=5), claimed) > 1e-3
    logits = (model(torch.tensor([[1, 2, 3]]))[0, -1] @ model.head.T) / temperature
    logits[list(suppress)] = -torch.inf
    assert claimed.tolist() == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)


@pytest.mark.parametrize("streams", [[(5, row) for row in range(4000)], [(seed, 0) for seed in range(4000)]],
                         ids=["rows", "seeds"])
def test_the_random_streams_of_rows_and_of_seeds_are_independent(streams):
    """Pairs within a stream, and first numbers of neighbouring streams, fill an 8 x 8 grid evenly."""
    u = torch.stack([uniforms(seed, row, 2) for seed, row in streams])
    cells = (u * 8).long()                                                      # (4000, 2)
    for a, b in ((cells[:, 0], cells[:, 1]), (cells[:-1, 0], cells[1:, 0])):
        assert p_value((8 * a + b).bincount(minlength=64), torch.ones(64)) > 1e-3


def test_a_random_stream_is_a_function_of_seed_and_row_and_longer_ones_go_on():
    long = uniforms(3, 2, 100)
    for n in (1, 7, 16, 40):
        assert uniforms(3, 2, n).equal(long[:n])
    assert not uniforms(2, 3, 100).eq(long).any() and not uniforms(3, 1, 100).eq(long).any()
    assert 0 <= long.min() and long.max() < 1
    assert uniforms(-5, 0, 3).shape == uniforms(2**62, 9, 3).shape == (3,)      # any int is a seed


# -----------------------------------------------------------------------------
# generation against a naive loop

def tiny_model(seed=0, **changes):
    """A GPT with weights so large that its distributions depend on every token."""
    options = dict(vocab_size=40, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, d_ff=48, seq_len=20) | changes
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**options)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.25)
    return model


@torch.no_grad()
def naive(model, prompt, cfg, row, end=None, seed=0):
    """One row, no cache: a whole forward for every token -> tokens, logps"""
    ids, logps = list(prompt), []
    u = uniforms(seed, row, cfg.max_new_tokens)
    for n in range(cfg.max_new_tokens):
        if len(ids) > model.config.seq_len or (ids[len(prompt):] and ids[-1] == end):
            break
        logits = model(torch.tensor([ids]))[:, -1] @ model.head.T
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, ids] = True
        token, logp, _ = sample_next(logits, cfg, u[n:n + 1], seen)
        ids.append(token.item())
        logps.append(logp.item())
    return ids[len(prompt):], logps


def assert_same(result, expected):
    """result: what complete returns; expected: list of (tokens, logps), one for each row"""
    assert result[0] == [tokens for tokens, _ in expected]
    for got, (_, wanted) in zip(result[1], expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-5)


PROMPTS = [[5, 7, 9], [1], [2, 4, 6, 8, 10, 12, 14]]     # lengths 3, 1, 7
CONFIGS = {
    "plain": replace(PLAIN, max_new_tokens=10),
    "greedy": SamplingConfig(temperature=0, max_new_tokens=10),
    "greedy with penalty": SamplingConfig(temperature=0, repetition_penalty=1.5, max_new_tokens=10),
    "everything": SamplingConfig(max_new_tokens=10, suppress=(0, 3), repetition_penalty=1.3, temperature=1.2,
                                 top_k=15, top_p=0.9),
}


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_of_prompts_is_generated_as_by_a_naive_uncached_loop(name, num_samples):
    model, cfg = tiny_model(), CONFIGS[name]
    expected = [naive(model, PROMPTS[row // num_samples], cfg, row, seed=4) for row in range(3 * num_samples)]
    result = complete(model, PROMPTS, cfg, num_samples=num_samples, seed=4)
    assert_same(result, expected)
    assert len({tuple(row) for row in result[0]}) >= 3   # the rows are not all alike


def test_a_row_does_not_depend_on_the_others_in_its_batch():
    model, cfg = tiny_model(), CONFIGS["everything"]
    tokens, logps, _ = complete(model, PROMPTS, cfg, seed=4)
    for row, prompt in enumerate(PROMPTS):               # the same row among others of another length
        result = complete(model, [[11] * 9] * row + [prompt], cfg, seed=4)
        assert_same(([result[0][row]], [result[1][row]]), [(tokens[row], logps[row])])
    assert complete(model, PROMPTS, cfg, seed=4)[0] == tokens
    assert complete(model, PROMPTS, cfg, seed=5)[0] != tokens
    # a longer budget goes on from the same tokens
    assert [row[:4] for row in tokens] == complete(model, PROMPTS, replace(cfg, max_new_tokens=4), seed=4)[0]


@torch.no_grad()
def logps_of(model, prompt, tokens, temperature=1.0, suppress=()):
    """What a loss computes for tokens after prompt, in one forward -> list"""
    ids = torch.tensor([prompt + tokens])
    logps = token_logps(model(ids[:, :-1]), model.head, ids[:, 1:], temperature, suppress=suppress)
    return logps[0, len(prompt) - 1:].tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logps_are_those_that_training_computes_for_the_same_tokens(temperature):
    """The ratio of a policy update starts at 1."""
    model, cfg = tiny_model(), replace(PLAIN, temperature=temperature, max_new_tokens=10)
    tokens, logps, _ = complete(model, PROMPTS, cfg, num_samples=2)
    for row in range(6):
        recomputed = logps_of(model, PROMPTS[row // 2], tokens[row], temperature)
        for new, old in zip(recomputed, logps[row], strict=True):
            assert abs(math.exp(new - old) - 1) < 1e-5


def test_a_numbered_prompt_has_its_samples_in_any_batch_and_place():
    model, cfg, numbers = tiny_model(), CONFIGS["everything"], [70, 3, 12]
    tokens, logps, _ = complete(model, PROMPTS, cfg, num_samples=3, seed=4, numbers=numbers)
    for places in ([0], [1], [2], [2, 0, 1], [1, 2], [0, 0, 2, 0]):
        result = complete(model, [PROMPTS[p] for p in places], cfg, num_samples=3, seed=4,
                          numbers=torch.tensor(numbers)[places])
        assert_same(result, [(tokens[3 * p + g], logps[3 * p + g]) for p in places for g in range(3)])
    assert complete(model, PROMPTS, cfg, num_samples=3, seed=4)[0] == \
        complete(model, PROMPTS, cfg, num_samples=3, seed=4, numbers=range(3))[0] != tokens


def test_samples_of_a_prompt_differ_from_each_other_and_from_those_under_other_numbers():
    model, cfg = tiny_model(), replace(PLAIN, max_new_tokens=8)
    tokens, _, _ = complete(model, [PROMPTS[0]] * 20, cfg, num_samples=4, numbers=range(100, 120))
    assert len({tuple(row) for row in tokens}) == 80
    first = [row[0] for row in tokens]
    assert all(len({first[4 * p + g] for p in range(20)}) > 5 for g in range(4))
    other, _, _ = complete(model, [PROMPTS[0]] * 20, cfg, num_samples=4, numbers=range(100, 120), seed=1)
    assert not {tuple(row) for row in tokens} & {tuple(row) for row in other}


PADDED = 36                                              # ids of a vocabulary whose head has 40 rows
GROUPS = [[5, 7, 9], [2, 4], [2, 4, 6, 8, 10, 12, 14]]   # prompts of 3, 2 and 7 tokens


def one_row(prompts, answers):
    """As the stage learns them"""
    G = len(answers) // len(prompts)
    valid, rewards = torch.ones(len(prompts), dtype=torch.bool), torch.zeros(len(prompts), G)
    cfg = SimpleNamespace(drop_flat_groups=False, mask_truncated=False)
    return learned_rows(Rollout(prompts, answers, valid, rewards, rewards[..., None], 0.0), cfg,
                          torch.device("cpu"))


@pytest.mark.parametrize("options", [dict(), dict(suppress=(0, 3, 20)), dict(top_k=5), dict(top_p=0.8),
                                     dict(top_k=20, top_p=0.9, suppress=(7,))], ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_ratio_before_any_update_is_1_in_the_row_of_branches_that_learns(temperature, options):
    model, numbers, words = tiny_model(), [8, 2, 5], SimpleNamespace(vocab_size=PADDED)
    cfg = for_vocabulary(replace(PLAIN, temperature=temperature, max_new_tokens=12, **options), model, words)
    assert cfg.suppress == (*options.get("suppress", ()), *range(PADDED, 40))
    first = complete(model, GROUPS, cfg, (), 3, 4, numbers)[0][4][0]
    words.ends = (first,)                                     # so that row 4 is one token
    answers = rollout(model, words, GROUPS, cfg, 3, 4, numbers)
    assert len(answers[4].tokens) == 1 and max(len(a.tokens) for a in answers) == 12
    assert not set(cfg.suppress) & {token for a in answers for token in a.tokens}
    learned = one_row(GROUPS, answers)
    sampled = learned.sampler_logps
    assert torch.stack(learned.index, dim=1).tolist() == [
        [i, n] for i, a in enumerate(answers) for n in range(len(a.tokens))]
    assert sampled.tolist() == pytest.approx([logp for a in answers for logp in a.logps])
    with torch.no_grad():
        recomputed = answer_logps(model, learned, cfg)
        unlike = [answer_logps(model, learned, replace(cfg, temperature=temperature + 0.01))]
        if options:                                                # and without what cut the distribution
            whole = replace(learned, support=None)
            unlike.append(answer_logps(model, whole, replace(cfg, suppress=())))
    assert ((recomputed - sampled).exp() - 1).abs().max() < 1e-5
    for other in unlike:                                                # what either mistake would make of it
        assert ((other - recomputed).exp() - 1).abs().max() > 1e-3


def test_packed_weights_sample_as_a_model_of_weights_rounded_to_float16():
    """The parameters themselves stay as they are, and the next call sees new ones."""
    model, cfg = tiny_model(tie_embeddings=False), replace(PLAIN, max_new_tokens=10, packed=True)
    for _ in range(2):
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        tokens, logps, _ = complete(model, PROMPTS, cfg, num_samples=2)
        assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
        exact = torch.tensor([logps_of(model, PROMPTS[row // 2], tokens[row]) for row in range(6)])
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(module.weight.half())
        rounded = torch.tensor([logps_of(model, PROMPTS[row // 2], tokens[row]) for row in range(6)])
        torch.testing.assert_close(torch.tensor(logps), rounded, atol=1e-5, rtol=0)
        assert (rounded - exact).abs().max() > 1e-4
        with torch.no_grad():
            model.head.mul_(-1.0003)


def test_packed_weights_are_refused_where_there_are_no_such_products():
    with pytest.raises(UserError, match="--packed=true: for float32 on an x86 CPU only"):
        complete(tiny_model().bfloat16(), PROMPTS, replace(PLAIN, packed=True))


# -----------------------------------------------------------------------------
# conversations with an environment

def rollout(model, tokenizer, prompts, cfg, num_samples=1, seed=0, numbers=None, env_step=None):
    """As train_grpo.py has its answers"""
    answers = answer_prompts(model, prompts, cfg, tokenizer.ends, num_samples, seed, numbers)
    if env_step:
        continue_turns(env_step, answers, model, tokenizer, prompts, cfg, seed, numbers)
    return answers


def say(tokenizer):
    return lambda text: encode_chat(tokenizer, [[dict(role="user", content=text)]], reply=True)[0][0]


def test_a_model_uses_a_calculator_and_the_answer_has_both_turns():
    tokenizer = Tokenizer("bytes")
    prompt = say(tokenizer)("What is 12 + 30?")
    turns = ["=12+30", "<answer>42</answer>"]
    ids = [tokenizer.encode(text) + [tokenizer.end] for text in turns]
    model = Scripted(ids[0] + ids[1], tokenizer.vocab_size)
    cfg = replace(PLAIN, temperature=0.0)
    answer, = rollout(model, tokenizer, [prompt], cfg, env_step=calculator)
    feedback = say(tokenizer)("42")
    assert answer.tokens == ids[0] + feedback + ids[1] and answer.ended
    assert answer.learned == [True] * len(ids[0]) + [False] * len(feedback) + [True] * len(ids[1])
    assert len(answer.logps) == len(ids[0] + ids[1])
    assert answer.texts(tokenizer) == ("=12+30<end><user>42<end><assistant><answer>42</answer>", [
        *turns[0], "<end>", *turns[1], "<end>"])


def test_what_the_environment_says_counts_but_is_not_learned():
    """Rows that go on, end and are cut, in two turns and more; log-probs are those of the whole sequence."""
    model = tiny_model(vocab_size=270, seq_len=64)
    tokenizer, seen = Tokenizer("bytes"), []
    cfg = for_vocabulary(replace(PLAIN, temperature=1.0, max_new_tokens=30), model, tokenizer)

    def env_step(text):
        seen.append(text)
        return text.count("<assistant>") == 3, "go"
    with torch.no_grad():
        model.head[tokenizer.end] += 2 * model.head.std()               # now and then an answer ends
    prompts = [say(tokenizer)(text) for text in ("one", "three", "4")]
    answers = rollout(model, tokenizer, prompts, cfg, 40, 3, [5, 1, 9], env_step)
    turns = [sum(not own for own in a.learned) // len(say(tokenizer)("go")) for a in answers]
    assert set(turns) >= {0, 1, 2} and {a.ended for a in answers} == {True, False}
    for a, n in zip(answers, turns):
        assert len(a.tokens) <= 30 and (n == 2 or not a.ended) and len(a.logps) == sum(a.learned)
    for i in [*range(0, 120, 9)]:
        a, prompt = answers[i], prompts[i // 40]
        whole = torch.tensor(logps_of(model, prompt, a.tokens, suppress=cfg.suppress))
        torch.testing.assert_close(whole[torch.tensor(a.learned)], torch.tensor(a.logps), atol=2e-5, rtol=0)
        alone = rollout(model, tokenizer, [prompt], cfg, 40, 3, [[5, 1, 9][i // 40]], env_step)[i % 40]
        assert alone.tokens == a.tokens                                 # in another batch
    learned = one_row(prompts, answers)
    rows, sampled = learned, learned.sampler_logps
    own = [token for a in answers for token, is_own in zip(a.tokens, a.learned) if is_own]
    assert rows.targets[rows.mask].tolist() == own and len(sampled) == len(own) == len(learned.index[0])
    with torch.no_grad():
        assert ((answer_logps(model, learned, cfg) - sampled).exp() - 1).abs().max() < 1e-4


@pytest.mark.parametrize("env_step, message", [
    (lambda text: 1 / 0, "--env: raised ZeroDivisionError: division by zero; the conversation was '<user>hi"),
    (lambda text: True, r"--env: returned True, expected \(done, feedback\)"),
    (lambda text: (False, None), r"--env: returned \(False, None\), expected \(done, feedback\)")])
def test_an_environment_that_fails_is_shown_with_the_conversation(env_step, message):
    tokenizer = Tokenizer("bytes")
    model = Scripted([65, tokenizer.end], tokenizer.vocab_size)
    with pytest.raises(UserError, match=message):
        rollout(model, tokenizer, [say(tokenizer)("hi")], PLAIN, env_step=env_step)


def naive_probs(logits, cfg, seen):
    """The processors as their definitions read, in plain Python -> dict of id to probability"""
    z = {i: x for i, x in enumerate(logits) if i not in cfg.suppress}
    z = {i: (x / cfg.repetition_penalty if x > 0 else x * cfg.repetition_penalty) if i in seen else x
         for i, x in z.items()}
    w = {i: math.exp(x / cfg.temperature) for i, x in z.items()}
    order = sorted(w, key=w.get, reverse=True)[:cfg.top_k or None]
    total, kept, reached = sum(w[i] for i in order), [], 0.0
    for i in order:
        if reached < cfg.top_p:
            kept.append(i)
        reached += w[i] / total
    total = sum(w[i] for i in kept)
    return {i: w[i] / total for i in kept}


@pytest.mark.parametrize("options", [
    dict(), dict(top_k=5), dict(top_p=0.7), dict(repetition_penalty=1.5), dict(suppress=(1, 2, 3)),
    dict(suppress=(7,), repetition_penalty=1.3, top_k=8, top_p=0.9)], ids=str)
def test_logps_are_those_of_an_uncached_forward_under_the_same_processors(options):
    model, cfg = tiny_model(), replace(PLAIN, temperature=0.9, max_new_tokens=8, **options)
    tokens, logps, _ = complete(model, PROMPTS, cfg, num_samples=2)
    for row in range(6):
        ids = PROMPTS[row // 2] + tokens[row]
        with torch.no_grad():
            logits = (model(torch.tensor([ids]))[0] @ model.head.T).tolist()
        for i, logp in enumerate(logps[row], start=len(ids) - 8):
            probs = naive_probs(logits[i - 1], cfg, set(ids[:i]))
            assert logp == pytest.approx(math.log(probs[ids[i]]), abs=2e-5)


def record_shapes(model):
    """-> list that grows by the shape of the tokens of every forward"""
    shapes = []
    model.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    return shapes


def test_each_prompt_is_prefilled_once_for_all_its_samples_which_differ():
    model = tiny_model()
    shapes = record_shapes(model)
    tokens, _, _ = complete(model, PROMPTS[:2], replace(PLAIN, max_new_tokens=4), num_samples=8)
    assert shapes == [(2, 3)] + [(16, 1)] * 3            # the last token needs no forward after it
    for prompt in (tokens[:8], tokens[8:]):
        assert len({row[0] for row in prompt}) > 2       # not one first token for the whole group
        assert len({tuple(row) for row in prompt}) > 6


def test_rows_leave_the_batch_after_their_end_token_and_the_others_go_on_unchanged():
    model, cfg = tiny_model(), replace(PLAIN, max_new_tokens=12)
    free, free_logps, _ = complete(model, PROMPTS, cfg, num_samples=2, seed=1)
    end = free[2][3]  # so that row 2 ends at its fourth token at the latest
    lengths = [row.index(end) + 1 if end in row else 12 for row in free]
    assert min(lengths) < max(lengths)
    shapes = record_shapes(model)
    steps = list(generate(model, PROMPTS, cfg, (end,), num_samples=2, seed=1))
    for n, (rows, tokens, logps, _) in enumerate(steps):
        assert sorted(rows) == [row for row in range(6) if lengths[row] > n]
        assert tokens == [free[row][n] for row in rows]
        assert logps == pytest.approx([free_logps[row][n] for row in rows], abs=1e-5)
    assert len(steps) == max(lengths)
    assert shapes == [(3, 7)] + [(len(rows), 1) for rows, *_ in steps[1:]]


def test_rows_stop_when_the_context_is_full_each_at_its_own_time():
    """Positions for 20 tokens: the last one given is sampled from position 20 and never fed back."""
    model, cfg = tiny_model(), replace(PLAIN, max_new_tokens=50)
    prompts = [[3] * 18, [1, 2, 3, 4, 5], [4] * 20, [6]]
    expected = [naive(model, prompt, cfg, row) for row, prompt in enumerate(prompts)]
    assert [len(tokens) for tokens, _ in expected] == [3, 16, 1, 20]
    assert_same(complete(model, prompts, cfg), expected)


def test_prompts_that_cannot_be_continued_are_refused_with_the_lengths():
    model = tiny_model()
    for prompts in ([[1], []], [[1] * 21, [2]]):
        with pytest.raises(ValueError, match=f"1 to 20 tokens.*{max(map(len, prompts))}"):
            complete(model, prompts, PLAIN)
    assert not model.training


class Stop(Exception):
    pass


@pytest.mark.parametrize("leave", ["finish", "break", "raise"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_training_state_and_random_state_are_left_alone(training, leave):
    model = tiny_model(attn_dropout=0.5).train(training)
    expected = complete(tiny_model(), PROMPTS, CONFIGS["plain"])[0]
    before = torch.get_rng_state()
    tokens = []
    try:
        for n, (_, step, *_) in enumerate(generate(model, PROMPTS, CONFIGS["plain"])):
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()  # in the caller's loop
            tokens.append(step)
            if n == 3 and leave == "break":
                break
            if n == 3 and leave == "raise":
                raise Stop
    except Stop:
        pass
    assert model.training == training and all(m.training == training for m in model.modules())
    assert torch.get_rng_state().equal(before)
    # dropout was off: the tokens are those of a model without it
    assert tokens == [list(step) for step in zip(*expected)][:len(tokens)] and len(tokens) >= 4
    model(torch.tensor([[1, 2, 3]])).sum().backward()    # nothing of inference mode stays behind
    assert all(p.grad is not None for p in model.parameters())


def test_generation_changes_no_gradient_of_a_training_step():
    losses = []
    for sample_between in (False, True):
        model = tiny_model(attn_dropout=0.3).train()
        torch.manual_seed(5)
        if sample_between:
            complete(model, PROMPTS, CONFIGS["plain"])
        loss = model(torch.tensor([PROMPTS[2]])).pow(2).mean()
        loss.backward()
        losses.append((loss.item(), model.embed.weight.grad))
    assert losses[0][0] == losses[1][0] and losses[0][1].equal(losses[1][1])


def test_logps_under_autocast_are_as_exact_as_those_that_training_computes():
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        tokens, logps, _ = complete(model, PROMPTS, CONFIGS["plain"], seed=4)
        training = [logps_of(model, prompt, row) for prompt, row in zip(PROMPTS, tokens)]
    exact = torch.tensor([logps_of(model, prompt, row) for prompt, row in zip(PROMPTS, tokens)])
    error, rounding = (torch.tensor(logps) - exact).abs(), (torch.tensor(training) - exact).abs()
    assert 0 < error.mean() < 1.5 * rounding.mean() and error.max() < 2 * rounding.max()


# -----------------------------------------------------------------------------
# streamed text

class Scripted(torch.nn.Module):
    """A model that says the given ids whatever it reads. `fed` lists the tokens of each forward."""
    def __init__(self, ids, vocab_size, seq_len=1000):
        super().__init__()
        self.config = ModelConfig(vocab_size=vocab_size, seq_len=seq_len)
        self.head, self.ids, self.fed = torch.eye(vocab_size), list(ids), []

    def forward(self, tokens, cache, inputs=None):
        self.fed.append(tokens[0].tolist())
        cache.add(tokens.shape[1])
        return 100 * self.head[self.ids[len(self.fed) - 1]].expand(1, tokens.shape[1], -1)

    input_only, blocks, untied_head = {}, torch.nn.ModuleList(), "not asked"

    def __deepcopy__(self, _):
        return self

    def logits(self, hidden):
        return hidden @ self.head.T

    def new_cache(self, B, T):
        return CountingCache(T)


class CountingCache:
    """Only knows how many positions are taken."""
    def __init__(self, capacity):
        self.capacity, self.used = capacity, 0

    def add(self, T):
        self.used += T
        assert self.used <= self.capacity, f"{self.used} positions in a cache of {self.capacity}"

    def select(self, rows):
        assert len(rows) == 1


TEXT = "  Grüße, naïve  Welt!\n你好，世界。👋🏽👨‍👩‍👧 結尾\n\n end"


@pytest.fixture(scope="module")
def lines():
    return [f"Grüße an die Welt, naïve {i}: 你好，世界。 The end of the line, {i * 7}!" for i in range(40)]


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request, lines):
    if request.param == "bytes":
        return Tokenizer("bytes")
    return Tokenizer("sentencepiece", train_sentencepiece(lines, 360))


def test_streamed_text_is_the_whole_text_and_arrives_as_soon_as_it_can(tokenizer):
    ids = tokenizer.encode(TEXT)
    pieces = list(stream(Scripted(ids + [tokenizer.end, 0, 0], tokenizer.vocab_size), tokenizer, "Prompt"))
    assert "".join(pieces) == TEXT
    assert len(ids) < len(TEXT.encode()) or tokenizer.kind == "bytes"
    data = b""
    for n, token in enumerate(ids):  # after each token: every character that is complete, no more
        data += tokenizer.token_bytes[token]
        assert "".join(pieces[:n + 1]) == data.decode(errors="ignore")
    assert any(piece == "" for piece in pieces)          # some tokens end inside a character


def test_streaming_stops_at_the_end_token_and_samples_nothing_after_it(tokenizer):
    ids = [*tokenizer.encode("Stop."), tokenizer.end, *tokenizer.encode("never")]
    model = Scripted(ids, tokenizer.vocab_size)
    assert "".join(stream(model, tokenizer, "Prompt")) == "Stop."
    assert len(model.fed) == len(tokenizer.encode("Stop.")) + 1
    assert model.fed[0] == tokenizer.encode("Prompt")


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8])
def test_streaming_goes_on_past_the_context_from_its_second_half(tokenizer, seq_len):
    ids = tokenizer.encode(TEXT * 2)
    model = Scripted(ids + [tokenizer.end], tokenizer.vocab_size, seq_len)
    prompt = tokenizer.encode("P")
    assert "".join(stream(model, tokenizer, "P")) == TEXT * 2
    # one token at a time until the context is full, then the last half of it is prefilled
    everything, end, half = prompt + ids, len(prompt), max(1, seq_len // 2)
    held = 0
    for fed in model.fed:
        prefill = held in (0, seq_len)
        start = end - half if prefill and end >= seq_len else 0 if prefill else end - 1
        assert fed == everything[start:end]
        held, end = len(fed) if prefill else held + 1, end + 1
    assert held <= seq_len


@pytest.mark.parametrize("budget", [1, 2, 3, 9, 20])
def test_streaming_gives_max_new_tokens_at_most_and_marks_a_cut_character(tokenizer, budget):
    ids = tokenizer.encode("世👋" + TEXT)
    for seq_len in (1000, 6):
        model = Scripted(ids, tokenizer.vocab_size, seq_len)
        text = "".join(stream(model, tokenizer, "P", SamplingConfig(max_new_tokens=budget)))
        assert text == b"".join(tokenizer.token_bytes[i] for i in ids[:budget]).decode(errors="replace")
        assert len(model.fed) == budget


def test_streaming_without_a_prompt_starts_a_document(tokenizer):
    for prompt in ("", []):
        model = Scripted([*tokenizer.encode("Hi"), tokenizer.end], tokenizer.vocab_size)
        assert "".join(stream(model, tokenizer, prompt)) == "Hi"
        assert model.fed[0] == [tokenizer.end]


def test_a_prompt_of_ids_is_not_changed_and_is_the_prompt_of_its_text(tokenizer):
    model, prompt = tiny_model(vocab_size=tokenizer.vocab_size), tokenizer.encode("Grüße")
    cfg = SamplingConfig(max_new_tokens=8)
    before = list(prompt)
    assert list(stream(model, tokenizer, prompt, cfg)) == list(stream(model, tokenizer, "Grüße", cfg))
    assert prompt == before


def test_a_model_streams_what_it_completes(tokenizer):
    model, cfg = tiny_model(vocab_size=tokenizer.vocab_size, seq_len=64), replace(PLAIN, max_new_tokens=30)
    for seed in range(3):
        (tokens,), *_ = complete(model, [tokenizer.encode("Grüße")], cfg, tokenizer.ends, seed=seed)
        text = "".join(stream(model, tokenizer, "Grüße", cfg, seed))
        assert text == tokenizer.decode(tokens, continues=True)


def test_a_model_streams_past_its_context_with_new_random_numbers():
    """24 tokens from a context of 6: the same for the same seed, and not the same few over and over."""
    tokenizer = Tokenizer("bytes")
    model = tiny_model(vocab_size=tokenizer.vocab_size, seq_len=6)
    cfg = replace(PLAIN, max_new_tokens=24, suppress=tuple(range(128, tokenizer.vocab_size)))
    texts = ["".join(stream(model, tokenizer, "abc", cfg, seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and [len(text) for text in texts] == [24] * 3
    # 4 tokens until the context is full, then 4 at a time from its last 3
    ids, part = list(b"abc"), 0
    while len(ids) < 27:
        window, rest = ids if len(ids) < 6 else ids[-3:], replace(cfg, max_new_tokens=27 - len(ids))
        tokens, _ = naive(model, window, rest, 0, seed=1 + 7919 * part)
        ids, part = ids + tokens, part + 1
    assert bytes(ids[3:]).decode() == texts[0]


def test_only_the_first_text_of_a_document_loses_the_space_that_sentencepiece_adds(lines):
    """A Llama-like vocabulary puts a space before the first word; after a prompt it is a real one."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, minloglevel=2,
                                             model_type="bpe", vocab_size=360, byte_fallback=True)
    tokenizer = Tokenizer("sentencepiece", out.getvalue())
    ids = tokenizer.encode("end of line")
    for prompt, expected in (("The", " end of line"), ("", "end of line")):
        model = Scripted(ids + [tokenizer.end], tokenizer.vocab_size)
        assert "".join(stream(model, tokenizer, prompt)) == expected
