"""
The chat template, the same in every stage: `<role>` body `<end>` for each message, where the body
of an assistant is `<think>thoughts</think>` (if it has any) and `<answer>content</answer>`. A
prompt for the next reply ends with `<assistant>`. A tokenizer from a Hugging Face folder that has a
template of its own writes around the bodies what that says (`extras/hf_chat.py`).

    messages = [
        {"role": "user", "content": "Good morrow!"},
        {"role": "assistant", "content": "Well met."},
    ]
    ((ids, counts),) = encode_chat(tokenizer, [messages])
    ids = encode_user(tokenizer, "Good morrow!")              # a prompt

What a message says is encoded as plain text; only the template writes special tokens.
"""

import re

ROLES = ("system", "user", "assistant")
THOUGHTS = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def check_conversation(messages):
    """
    ValueError says what is wrong with a list of {"role", "content", "think"?}, where something is.
    A content is text, or a tuple of ids as they were sampled, which no file has.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected a list of messages")
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        content, role = fields.get("content"), fields.get("role")
        if isinstance(content, list) or "images" in fields:
            raise ValueError("images are for `data/prepare.py images` and train_sft.py only")
        if not isinstance(content, (str, tuple)):
            raise ValueError('a message is {"role": "...", "content": "..."}')
        if role not in ROLES:
            raise ValueError(f"unknown role {str(role)[:40]!r}, expected {', '.join(ROLES)}")
        if unknown := fields.keys() - {"role", "content", "think"}:
            raise ValueError(
                f"a message has role, content and maybe think, not {', '.join(sorted(unknown))}"
            )
        if "think" in fields and (role != "assistant" or not isinstance(fields["think"], str)):
            raise ValueError('"think" is text, and an assistant\'s')


def encode_chat(tokenizer, conversations, answer_tags=True, reply=False, begin=True):
    """
    The chat template. conversations: list of lists of {"role", "content", "think"?}. answer_tags:
    put <answer> tags around an assistant's content, unless it is ids. reply: end with <assistant>,
    for the model to go on. begin: False for messages that follow a turn of the assistant's.

    -> list of (ids, counts), one per conversation. counts: list of bool, True where the id is to be
    learned: an assistant's body and the <end> after it, not the <assistant> before it, and nothing
    of other roles. Raises ValueError where a conversation is not one.
    """
    for messages in conversations:
        check_conversation(messages)
    chats = [_lay_out(tokenizer, messages, answer_tags, reply, begin) for messages in conversations]
    # all texts at once, which the tokenizer encodes in parallel
    plain = [part for chat in chats for part, _ in chat if isinstance(part, str)]
    texts, encoded = iter(tokenizer.encode_batch(plain)), []
    for chat in chats:
        ids, counts = [], []
        for part, learn in chat:
            new = next(texts) if isinstance(part, str) else part
            ids += new
            counts += [learn] * len(new)
        encoded.append((ids, counts))
    return encoded


def encode_user(tokenizer, content, begin=True):
    """-> ids of a user's message and of the <assistant> after it; see `encode_chat`"""
    messages = [{"role": "user", "content": content}]
    ((ids, _),) = encode_chat(tokenizer, [messages], reply=True, begin=begin)
    return ids


def after_turn(tokenizer, text):
    """-> ids of a user's message after a turn of the assistant's, whose end token was sampled"""
    ids = encode_user(tokenizer, text, begin=False)
    return ids if tokenizer.template else tokenizer.markers["end"][1:] + ids


def _lay_out(tokenizer, messages, answer_tags, reply, begin):
    """-> list of (text or list of ids, whether it is learned)"""
    if tokenizer.template:
        from extras import hf_chat

        return hf_chat.lay_out(tokenizer, messages, answer_tags, reply, begin)
    markers, parts = tokenizer.markers, []
    if begin:
        parts.append((tokenizer.begin, False))
    for message in messages:
        learn = message["role"] == "assistant"
        parts.append((markers[message["role"]], False))
        body = thoughts(tokenizer, message) + said(tokenizer, message, answer_tags)
        parts += [(part, learn) for part in body]
        # generation stops at the first one, whatever is to follow
        parts += [(markers["end"][:1], learn), (markers["end"][1:], False)]
    if reply:
        parts.append((markers["assistant"], False))
    return parts


def thoughts(tokenizer, message):
    """-> list of a message's thoughts in their tags, texts and lists of ids; [] without thoughts"""
    if "think" not in message:
        return []
    return [tokenizer.markers["think"], message["think"], tokenizer.markers["/think"]]


def said(tokenizer, message, answer_tags):
    """-> list of what a message says, texts and lists of ids"""
    content = message["content"]
    if isinstance(content, tuple):
        return [list(content)]
    if answer_tags and message["role"] == "assistant":
        return [tokenizer.markers["answer"], content, tokenizer.markers["/answer"]]
    return [content]


def with_thoughts(message):
    """
    A message whose text begins with <think>...</think>, as models write it -> the same with its
    thoughts in "think", without the line breaks around them; else the message itself
    """
    said = message["content"]
    if message["role"] != "assistant" or "think" in message or isinstance(said, tuple):
        return message
    if found := THOUGHTS.fullmatch(said):
        return dict(message, think=found[1].strip("\n"), content=found[2].lstrip("\n"))
    return message
