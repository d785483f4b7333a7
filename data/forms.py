"""
Rows in the forms in which people keep conversations, to those of `data/prepare.py`: recognised by
their keys, whatever file they come from.

    messages        {"messages": [{"role": ..., "content": ...}, ...]}, or that list alone
    ShareGPT        {"conversations": [{"from": "human", "value": ...}, ...]}
    Alpaca          {"instruction": ..., "input": ..., "output": ...}, and "history": [[q, a], ...]
    two texts       a key of QUESTIONS and one of ANSWERS; as --fields says where it is given

Each may have "system", the text of a system message. A pair has "chosen" and "rejected" beside one
of these, texts or messages or lists of messages; the prompt may be in both of them. A prompt has
its answer beside it, or is a whole conversation whose last message is the answer.
"""

from common.chat import with_thoughts

QUESTIONS = ("prompt", "question", "query", "instruction", "problem")
ANSWERS = ("answer", "response", "output", "completion", "solution")
# ShareGPT's names of roles: ours
ROLES = dict(human="user", user="user", gpt="assistant", assistant="assistant", bot="assistant")
ROLES |= dict(model="assistant", system="system")
# columns that change what a row means: an error where they would be left out
MEANT = {"system", "input", "history", "tools", "functions", "images", "image", "videos"}


class BadRow(ValueError):
    """A row that is left out for another reason than being malformed."""

    def __init__(self, message, reason):
        super().__init__(message)
        self.reason = reason


class Columns:
    """The columns of a row but for those to ignore, and which of them have been read"""

    def __init__(self, row, ignore=()):
        self.whole, self.read = row, set()
        self.row = {name: value for name, value in row.items() if name not in ignore}

    def take(self, name):
        """-> its value; None where it is missing or null"""
        if name in self.row:
            self.read.add(name)
        return self.row.get(name)

    def first(self, names):
        """-> the first of these that the row has, and its value; ("", None) where it has none"""
        for name in names:
            if self.row.get(name) not in (None, []):
                return name, self.take(name)
        return "", None

    def unread(self):
        """-> names of the columns that hold something and have not been read"""
        held = [name for name, value in self.whole.items() if value not in (None, "", [], {})]
        return [name for name in held if name not in self.read]


def chat(columns, fields):
    """-> name of the form, messages; ValueError"""
    form, messages = conversation(columns, fields)
    if not fields and form in ("messages", "ShareGPT"):
        return form, messages
    name, said = columns.first(fields[1:] or ANSWERS)
    if not isinstance(said, str):
        raise ValueError(expected(fields, f"an assistant's text in {' or '.join(ANSWERS)}"))
    return f"{form}, {name}", [*messages, dict(role="assistant", content=said)]


def pairs(columns, fields):
    """-> name of the form, messages of the prompt ([] where the sides have it) and both sides"""
    chosen, rejected = fields[1:] or ("chosen", "rejected")
    sides = [columns.take(chosen), columns.take(rejected)]
    if None in sides:
        raise ValueError(expected(fields, '{"chosen": ..., "rejected": ...}'))
    form, prompt = conversation(columns, fields, needed=False)
    sides = [as_messages(side, "assistant") for side in sides]
    return ", ".join(filter(None, [form, "pairs"])), (prompt, *sides)


def prompts(columns, fields):
    """-> name of the form, {"prompt": messages, "answer": text}"""
    form, messages = conversation(columns, fields)
    name, answer = columns.first(fields[1:] or ANSWERS)
    whole = messages[-1]["role"] == "assistant" and len(messages) > 1
    if answer is None and whole and form in ("messages", "ShareGPT"):
        answer = with_thoughts(messages[-1])["content"]
        return f"{form}, its last message", dict(prompt=messages[:-1], answer=answer)
    if not isinstance(answer, str):
        raise ValueError(expected(fields, f"the answer, a text, in {' or '.join(ANSWERS)}"))
    return f"{form}, {name}", dict(prompt=messages, answer=answer)


def conversation(columns, fields, needed=True):
    """-> name of the form, messages up to the answer that another column has; ValueError"""
    row = columns.row
    if fields:
        form, content = fields[0], columns.take(fields[0])
        messages = None if content is None else as_messages(content, "user")
    elif row.get("messages") is not None:
        form, messages = "messages", as_messages(columns.take("messages"))
    elif row.get("conversations") is not None:
        form, messages = "ShareGPT", as_messages(columns.take("conversations"))
    else:
        form, messages = question(columns)
    if messages is None and needed:
        names = ", ".join(["messages", "conversations", *QUESTIONS])
        raise ValueError(expected(fields, f"one of {names}, or --fields"))
    messages, system = messages or [], columns.take("system")
    if system:
        if not isinstance(system, str) or messages and messages[0]["role"] == "system":
            raise ValueError('"system" is a text, and not in the messages too')
        messages = [dict(role="system", content=system), *messages]
    return form, messages


def expected(fields, form):
    """-> what a message says of a row without the columns that --fields names, or of no form"""
    return f"expected {', '.join(fields)} (--fields)" if fields else f"expected {form}"


def question(columns):
    """Alpaca's form, or a text or messages in a column -> name, messages (None without one)"""
    name, asked = columns.first(QUESTIONS)
    if asked is None:
        return "", None
    if name != "instruction":
        return name, as_messages(asked, "user")
    past = []
    history = columns.take("history") or []
    for turn in history if isinstance(history, list) else [None]:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise ValueError('"history" is a list of [question, answer]')
        past += [dict(role="user", content=turn[0]), dict(role="assistant", content=turn[1])]
    more = columns.take("input")
    if not all(isinstance(text, str) for text in (asked, more or "")):
        raise ValueError('"instruction" and "input" are texts')
    content = f"{asked}\n{more}" if more else asked
    return "Alpaca", [*past, dict(role="user", content=content)]


def as_messages(content, role=""):
    """content: a text of this role's, a message or a list of messages -> messages; ValueError"""
    if isinstance(content, str) and role:
        return [dict(role=role, content=content)]
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, list):
        raise ValueError("expected a text or messages")
    if not content or not all(isinstance(message, dict) for message in content):
        raise ValueError('expected [{"role": "...", "content": "..."}, ...]')
    return [as_message(message) for message in content]


def as_message(message):
    """-> a message in our names, without fields that hold nothing"""
    message = {name: value for name, value in message.items() if value is not None and value != []}
    if "from" in message and "role" not in message:
        role = message.pop("from")
        message = dict(message, role=ROLES.get(str(role).lower(), role))
        message["content"] = message.pop("value", None)
    if "reasoning_content" in message and "think" not in message:
        message["think"] = message.pop("reasoning_content")
    return message


def check_order(messages, is_prompt=False):
    """
    BadRow where messages are no conversation: an empty one, two of one role in a row, an assistant
    who speaks first; with is_prompt, one who has spoken last
    """
    turns = [message for message in messages if message["role"] != "system"]
    for before, message in zip([None, *turns], turns):
        if not message["content"].strip():
            raise BadRow(f"the {message['role']} says nothing", "with an empty message")
        if before and before["role"] == message["role"]:
            reason = "with two messages of one role in a row"
            raise BadRow(f"two messages of the {message['role']} in a row", reason)
    if turns and turns[0]["role"] == "assistant":
        raise BadRow("an assistant speaks first", "that an assistant begins")
    if is_prompt and (not turns or turns[-1]["role"] == "assistant"):
        raise BadRow("the prompt ends with an assistant's message", "that end with the assistant")
