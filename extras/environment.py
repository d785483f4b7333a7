"""
Answers of several turns: an environment reads the conversation after each turn of the model's and
says something back, or that it is done. For train_grpo.py --env=path/to/file.py:name.
"""

from common.chat import after_turn
from common.errors import UserError
from common.sampling import answer_prompts


def continue_turns(env_step, answers, model, tokenizer, prompts, cfg, seed=0, numbers=None):
    """
    Lengthen answers (G a prompt, from `answer_prompts`) in place. env_step(text) -> (done,
    feedback): when the model has ended a turn, it gets the whole conversation as text, and unless
    it is done, the feedback follows as a user's message and the model goes on. cfg.max_new_tokens
    counts all tokens after the prompt. Later turns have random streams of their own.
    """
    G, going, turn = len(answers) // len(prompts), list(range(len(answers))), 0
    while going := [i for i in going if answers[i].ended]:
        turn, contexts, rooms, again = turn + 1, [], [], []
        for i in going:
            answer, prompt = answers[i], prompts[i // G]
            text = tokenizer.decode([*prompt, *answer.tokens], show_special=True)
            done, feedback = ask(env_step, text)
            if done:
                continue
            answer.ended, ids = False, after_turn(tokenizer, feedback)
            longest = min(cfg.max_new_tokens, model.config.seq_len - len(prompt))
            room = longest - len(answer.tokens) - len(ids)
            if room > 0:
                answer.tokens, answer.learned = (
                    answer.tokens + ids,
                    answer.learned + [False] * len(ids),
                )
                contexts.append([*prompt, *answer.tokens])
                rooms.append(room)
                again.append(i)
        if not again:
            return
        streams = [(i // G if numbers is None else int(numbers[i // G])) * G + i % G for i in again]
        more = answer_prompts(
            model, contexts, cfg, tokenizer.ends, 1, seed + turn * 1_000_000_007, streams, rooms
        )
        for i, new in zip(again, more):
            for name in ("tokens", "learned", "logps", "support"):
                setattr(answers[i], name, getattr(answers[i], name) + getattr(new, name))
            answers[i].ended = new.ended
        going = again


def ask(env_step, text):
    """
    -> (done, feedback) of the user's function; UserError shows what it raised or returned instead
    """
    try:
        result = env_step(text)
    except Exception as error:  # whatever the user's function raises
        raise UserError(
            f"--env: raised {type(error).__name__}: {' '.join(str(error).split())}; the "
            f"conversation was {text!r}"
        ) from error
    if isinstance(result, (tuple, list)) and len(result) == 2:
        done, feedback = result
        if done or isinstance(feedback, str):
            return done, feedback
    raise UserError(f"--env: returned {result!r}, expected (done, feedback), feedback a text")
