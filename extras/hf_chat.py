"""
The chat template of a Hugging Face folder (jinja), written as `transformers.apply_chat_template`
writes it, but that a special token that somebody has typed stays text, what the model is to say is
encoded apart from what stands before it, so that a prompt's ids begin those of the whole
conversation, and thoughts come before the answer where the template knows none.

A template is rendered once for each sequence of roles, on marks in place of the contents: what it
writes around them, and what white space it strips from them. A conversation for which that does not
hold, because the template looks at what is said, is refused.
"""

import functools
import itertools
import json
import re
from datetime import datetime

from common import chat
from common.errors import BadText
from common.tokenizer import any_of, matches_and_gaps

MARK = re.compile("\ue000(\\d+)([ct])\ue001")  # number of a message, c(ontent) or t(houghts)
# on the left of a mark, and reversed on its right -> what is stripped where this is left of it:
# nothing, line breaks, all white space
SPACE = "\n\u2003"
LEFT = {SPACE: "", SPACE[1:]: "\n", "": None}


@functools.lru_cache
def compiled(template):
    """-> jinja2.Template, in the sandbox and with the additions of transformers"""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what a model says; nothing is written for it"""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def fail(message):
        raise ValueError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def marked(roles, space=""):
    """
    roles: ((role, whether it thinks), ...); space: beside each mark -> messages with marks in place
    of contents and thoughts
    """
    messages = []
    for i, (role, thinks) in enumerate(roles):
        content, think = (f"{space}\ue000{i}{kind}\ue001{space[::-1]}" for kind in "ct")
        messages.append(dict(role=role, content=content))
        if thinks:
            messages[-1]["think"] = think
    return messages


def render(extra, messages, reply):
    """
    extra: of the Tokenizer; reply: end with what stands before the model's answer -> str; BadText
    """
    theirs = []
    for message in messages:
        theirs.append(dict(role=message["role"], content=message["content"]))
        if "think" in message:
            theirs[-1]["reasoning_content"] = message["think"]
    try:
        return compiled(extra["template"]).render(
            messages=theirs,
            add_generation_prompt=reply,
            tools=None,
            documents=None,
            **extra["names"],
        )
    except Exception as error:  # whatever a template's code raises
        why = " ".join(str(error).split())
        raise BadText(f"the folder's chat template refuses it ({why})") from None


def stripped(literal, spaced):
    """
    What stands between two marks, without and with SPACE beside them -> what the template strips on
    the right of the first and on the left of the second, for str.strip
    """
    for right, left in itertools.product(LEFT, LEFT):
        if right[::-1] + literal + left == spaced:
            return LEFT[right], LEFT[left]
    raise BadText("the folder's chat template changes what is said")


class Layout:
    """
    How a template writes conversations of these roles.

    parts       list of (texts and lists of ids, the same as text, None, learned), the template's
                own, and of ((what is stripped left and right), "", (number of the message, "c" or
                "t"), learned)
    thinks      whether it writes thoughts itself
    """

    def __init__(self, extra, roles, reply):
        self.tokens = extra["tokens"]
        self.is_token = re.compile(any_of(self.tokens))
        text = render(extra, marked(roles), reply)
        marks, literals = list(MARK.finditer(text)), MARK.split(text)[::3]
        spaced = MARK.split(render(extra, marked(roles, SPACE), reply))[::3]
        sides = list(map(stripped, literals, spaced))
        written = {(int(mark[1]), mark[2]) for mark in marks}
        for i in range(len(roles)):
            if (i, "c") not in written:
                raise BadText(f"the folder's chat template leaves out message {i + 1}")
        one = render(extra, marked((("user", False), ("assistant", True))), False)
        last = list(MARK.finditer(one))[-1]
        self.thinks = any(mark[2] == "t" for mark in MARK.finditer(one))
        # the token that closes an answer, if one does
        closing = self.is_token.search(one, last.end())
        end = re.compile(re.escape(closing[0])) if closing else None
        self.turns = []
        for i, (role, _) in enumerate(roles):
            if role == "assistant":
                own = [mark for mark in marks if int(mark[1]) == i]
                self.turns.append(turn(extra, roles[:i], text, own, end, reply))
        self.parts, at = [], 0
        for mark, (_, left), (right, _) in zip(marks, sides, sides[1:]):
            self.add(text, at, mark.start())
            whose = int(mark[1]), mark[2]
            self.parts.append(((left, right), "", whose, self.learned(mark.start())))
            at = mark.end()
        self.add(text, at, len(text))

    def learned(self, place):
        return any(start <= place < end for start, end in self.turns)

    def add(self, text, start, end):
        """What the template writes from start to end, cut where learning begins or ends"""
        cuts = [place for span in self.turns for place in span if start < place < end]
        borders = [start, *sorted(cuts), end]
        for a, b in zip(borders, borders[1:]):
            if a < b:
                pieces = matches_and_gaps(self.is_token, text[a:b])
                ids = self.tokens
                pieces = [[ids[piece]] if piece in ids else piece for piece in pieces]
                self.parts.append((pieces, text[a:b], None, self.learned(a)))


def turn(extra, before, text, marks, end, reply):
    """
    before: roles of the messages before an assistant's; marks: its own; end: pattern of the token
    that closes an answer, or None -> where in text that what it says begins and where it ends, with
    that token. BadText: what stands before is no prompt (with reply, for which nothing is learned)
    """
    start, stop = marks[0].start(), marks[-1].end()
    prompt = render(extra, marked(before), True) if before else ""
    if prompt and text.startswith(prompt):
        start = len(prompt)
    elif prompt and not reply:
        raise BadText("the folder's chat template writes an answered prompt anew")
    following = MARK.search(text, stop)
    until = following.start() if following else len(text)
    found = end.search(text, stop, until) if end else None
    return start, found.end() if found else stop


@functools.lru_cache(maxsize=10_000)
def layout(tokenizer, roles, reply):
    """tokenizer: compared by identity -> Layout"""
    return Layout(tokenizer.extra, roles, reply)


def lay_out(tokenizer, messages, answer_tags, reply, begin):
    """
    -> list of (text or list of ids, whether it is learned); see `common.chat.encode_chat`. begin:
    False for messages that follow a turn of the assistant's, whose end was the last token
    """
    if not begin:
        messages = [dict(role="user", content=""), dict(role="assistant", content=""), *messages]
    roles = tuple((message["role"], "think" in message) for message in messages)
    plan = layout(tokenizer, roles, reply)
    parts, compared = plan.parts, begin
    if not begin:
        learned = [learn for *_, learn in parts]
        parts = parts[learned.index(False, learned.index(True)) :]
    result, written = [], ""
    for pieces, text, whose, learn in parts:
        if whose:
            sides, (number, kind) = pieces, whose
            pieces = body(tokenizer, messages[number], kind, answer_tags, plan.thinks)
            if len(pieces) == 1:
                pieces = [strip(*pieces, *sides)]
            text = pieces[0]
        # ids, or what we add to the template's words, are not to be compared
        compared = compared and isinstance(text, str) and (not whose or len(pieces) == 1)
        written += text if compared else ""
        for piece in pieces:
            # with what stands beside it, as one text
            joins = result and isinstance(piece, str) and isinstance(result[-1][0], str)
            if joins and result[-1][1] == learn:
                piece = result.pop()[0] + piece
            result.append((piece, learn))
    if compared and written != render(tokenizer.extra, messages, reply):
        raise BadText("the folder's chat template writes it in another way because of what is said")
    return result


def body(tokenizer, message, kind, answer_tags, thinks):
    """-> list of texts and lists of ids: a message's thoughts or its content, of `kind`"""
    if kind == "t":
        return [message["think"]]
    pieces = chat.said(tokenizer, message, answer_tags)
    return pieces if thinks else chat.thoughts(tokenizer, message) + pieces


def strip(piece, left, right):
    """left, right: characters, or None for white space; ids stay as they are"""
    return piece.lstrip(left).rstrip(right) if isinstance(piece, str) else piece
