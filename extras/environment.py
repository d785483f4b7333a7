"""
Answers of several turns: an environment reads the conversation after each turn of the model's and
says something back, or that it is done. For train_grpo.py --env=path/to/file.py:name.
"""

from common.chat import after_turn
from common.errors import UserError
from common.sampling import answer_prompts


def continue_turns(env_step, answers, model, tokenizer, prompts, cfg, seed, numbers):
    """
    Lengthen answers (G a prompt, from `answer_prompts`) in place. env_step(text) -> (done,
    feedback): when the model has ended a turn, it gets the whole conversation as text, and unless
    it is done, the feedback follows as a user's message and the model goes on. cfg.max_new_tokens
    counts all tokens after the prompt. Later turns have random streams of their own.
    """
    G, rooms = len(answers) // len(prompts), range(len(answers))
    numbers = range(len(prompts)) if numbers is None else numbers
    while going := [i for i in rooms if answers[i].ended]:
        # of the answers that go on: the text so far, and how many tokens may follow
        contexts, rooms = [], {}
        seed += 1_000_000_007
        for i in going:
            answer, prompt = answers[i], prompts[i // G]
            text = tokenizer.decode([*prompt, *answer.tokens], show_special=True)
            done, feedback = ask(env_step, text)
            if done:
                continue
            answer.ended = False
            ids = after_turn(tokenizer, feedback)
            longest = min(cfg.max_new_tokens, model.config.seq_len - len(prompt))
            room = longest - len(answer.tokens) - len(ids)
            if room > 0:
                answer.tokens += ids
                answer.learned += [False] * len(ids)
                contexts.append([*prompt, *answer.tokens])
                rooms[i] = room
        if not rooms:
            return
        streams = [int(numbers[i // G]) * G + i % G for i in rooms]
        more = answer_prompts(
            model, contexts, cfg, tokenizer.ends, 1, seed, streams, list(rooms.values())
        )
        for i, new in zip(rooms, more):
            answer = answers[i]
            answer.tokens += new.tokens
            answer.learned += new.learned
            answer.logps += new.logps
            answer.support += new.support
            answer.ended = new.ended


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
