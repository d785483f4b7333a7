"""
The chat template, the same in every stage: `<role>` body `<end>` for each message, where the body
of an assistant is `<think>thoughts</think>` (if it has any) and `<answer>content</answer>`. A
prompt for the next reply ends with `<assistant>`.

    messages = [{"role": "user", "content": "Good morrow!"}, {"role": "assistant", "content": "Well
    met."}] (ids, counts), = encode_chat(tokenizer, [messages])
    ids = encode_user(tokenizer, "Good morrow!")              # a prompt

What a message says is encoded as plain text; only the template writes special tokens.
"""

ROLES = ("system", "user", "assistant")


def check_conversation(messages, with_images=False):
    """
    ValueError says what is wrong with a list of {"role", "content", "think"?}, where something is.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected a list of messages")
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        content, role = fields.get("content"), fields.get("role")
        in_parts = isinstance(content, list)
        if not with_images and (in_parts or "images" in fields):
            raise ValueError("images are for `data/prepare.py images` and train_sft.py only")
        if not isinstance(content, str) and not (in_parts and all(map(is_part, content))):
            raise ValueError('a message is {"role": "...", "content": "..."}')
        if role not in ROLES:
            raise ValueError(f"unknown role {str(role)[:40]!r}, expected {', '.join(ROLES)}")
        if unknown := fields.keys() - {"role", "content", "think"}:
            raise ValueError(
                f"a message has role, content and maybe think, not {', '.join(sorted(unknown))}"
            )
        if "think" in fields and (role != "assistant" or not isinstance(fields["think"], str)):
            raise ValueError('"think" is text, and an assistant\'s')
        if role == "assistant" and in_parts:
            raise ValueError("an assistant's content is text")


def is_part(part, kinds=("text", "image")):
    """-> whether it is a part of a content, and of one of these kinds"""
    if not isinstance(part, dict) or part.get("type") not in kinds:
        return False
    return isinstance(part.get("text"), str) == (part["type"] == "text")


def encode_chat(
    tokenizer, conversations, answer_tags=True, reply=False, tokens_per_image=0, begin=True
):
    """
    The chat template. conversations: list of lists of {"role", "content", "think"?}. answer_tags:
    put <answer> tags around an assistant's content. reply: end with <assistant>, for the model to
    go on. tokens_per_image: a content may be a list of {"type": "text", "text": ...} and {"type":
    "image"}, and this is how many <image> stand for the latter. begin: False for messages that go
    on with a conversation.

    -> list of (ids, counts), one per conversation. counts: list of bool, True where the id is to be
    learned: an assistant's body and the <end> after it, not the <assistant> before it, and nothing
    of other roles. Raises ValueError where a conversation is not one.
    """
    chats = [list(_template(messages, answer_tags, tokens_per_image)) for messages in conversations]
    if reply:
        for chat in chats:
            chat.append(("assistant", "", False))
    # all texts at once, which the tokenizer encodes in parallel
    texts = iter(
        tokenizer.encode_batch([text for chat in chats for special, text, _ in chat if not special])
    )
    encoded = []
    for chat in chats:
        ids = list(tokenizer.begin) if begin else []
        counts = [False] * len(ids)
        for special, _, learn in chat:
            new = tokenizer.markers[special] if special else next(texts)
            learned = [learn] * len(new)
            # generation stops there, whatever is to follow
            if special == "end":
                learned[1:] = [False] * (len(new) - 1)
            ids += new
            counts += learned
        encoded.append((ids, counts))
    return encoded


def encode_user(tokenizer, content, tokens_per_image=0, begin=True):
    """-> ids of a user's message and of the <assistant> after it; see `encode_chat`"""
    messages = [{"role": "user", "content": content}]
    ((ids, _),) = encode_chat(
        tokenizer, [messages], reply=True, tokens_per_image=tokens_per_image, begin=begin
    )
    return ids


def _template(messages, answer_tags, tokens_per_image):
    """Yield (special token, "", counts) or ("", text, counts)."""
    check_conversation(messages, with_images=tokens_per_image > 0)
    for message in messages:
        content, learn = message["content"], message["role"] == "assistant"
        yield message["role"], "", False
        if "think" in message:
            yield "think", "", True
            yield "", message["think"], True
            yield "/think", "", True
        if learn and answer_tags:
            yield "answer", "", True
        for part in [dict(type="text", text=content)] if isinstance(content, str) else content:
            if part["type"] == "text":
                yield "", part["text"], learn
            else:
                yield from [("image", "", False)] * tokens_per_image
        if learn and answer_tags:
            yield "/answer", "", True
        yield "end", "", learn
