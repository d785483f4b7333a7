"""
A mistake of the user's, and the one line that it is answered with.

    raise UserError("seq_len=64: a conversation has 80 tokens; raise it")
    show_user_errors()                 # a program's first line: from here on nobody sees a
                                       traceback of it
"""

import os
import sys


class UserError(Exception):
    """The message says what is wrong, where, and how to mend it, in one line."""


class BadText(UserError, ValueError):
    """A text or a conversation that cannot be encoded"""


def show_user_errors():
    """
    From here on a UserError that nobody caught ends the process with one line and exit code 2,
    Ctrl-C with code 130, and a reader that has gone (`... --help | head`) with code 1, without
    tracebacks.
    """
    sys.excepthook = _show


def _show(kind, error, traceback):
    if issubclass(kind, BrokenPipeError):
        os._exit(1)
    if not issubclass(kind, (UserError, KeyboardInterrupt)):
        return sys.__excepthook__(kind, error, traceback)
    interrupted = issubclass(kind, KeyboardInterrupt)
    print("interrupted" if interrupted else f"error: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    distributed = sys.modules.get("torch.distributed")
    joined = distributed and distributed.is_available() and distributed.is_initialized()
    # Gloo aborts in a normal exit when a peer has gone before it
    leave = os._exit if joined else sys.exit
    leave(130 if interrupted else 2)
