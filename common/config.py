"""
A frozen dataclass is a command line.

    python train_pretrain.py configs/tiny.py --lr=3e-4 --model.n_layer=6

Later arguments win. A config file is Python made of plain assignments (or the config.json that a
run wrote):

    lr = 3e-4
    batch_size = 8 * 64                       # sequences per step
    model = dict(n_layer=6, n_embd=384)       # a section

An unknown name, a wrong type or a value outside a Literal is a UserError, never a guess. The
comment beside a field is its help text: `--help` prints every option with type, default and
comment.
"""

import difflib
import inspect
import json
import math
import os
import re
import sys
import textwrap
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints

from common.errors import UserError, show_user_errors


def parse_config(cls, argv=None):
    """
    -> an instance of the frozen dataclass cls. argv: config files and --name=value (default:
    sys.argv).
    """
    if argv is None:
        show_user_errors()
        argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        sys.exit(0)
    overrides = read_overrides(argv)
    config = build(cls(), overrides)
    object.__setattr__(config, "_asked", overrides)  # frozen; see `asked`
    return config


def asked(config):
    """
    What was given explicitly, nested dict of names to raw values: by config files and the command
    line, or of a config made in Python what differs from the defaults.
    """
    if hasattr(config, "_asked"):
        return config._asked
    values, defaults = {}, type(config)()
    for field in fields(config):
        value = getattr(config, field.name)
        if value != getattr(defaults, field.name):
            values[field.name] = asked(value) if is_dataclass(value) else value
    return values


def read_overrides(argv):
    """What config files and --name=value give: nested dict of names to raw values."""
    overrides = {}
    for arg, following in zip(argv, [*argv[1:], "--"]):
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            if not equals:
                given = "true to switch it on" if following.startswith("--") else following
                raise UserError(f"--{name}: expected --{name}=value, so --{name}={given}")
            *sections, leaf = name.split(".")
            for section in reversed(sections):
                leaf, value = section, {leaf: value}
            merge(overrides, {leaf: value})
        else:
            merge(overrides, read_config_file(arg))
    return overrides


def read_config_file(path):
    """path: a .py of plain assignments or a .json -> dict name -> value"""
    if not path.endswith((".py", ".json")):
        raise UserError(f"{path}: expected --name=value or a config file (.py or .json)")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        if path.endswith(".json"):
            names = json.loads(text)
            if not isinstance(names, dict):
                raise ValueError("expected an object of options")
            return names
        names = {}
        exec(compile(text, path, "exec"), {"__builtins__": {"dict": dict}}, names)
        return names
    except OSError as error:
        moved = path.replace("configs/", "demos/", 1)
        hint = f"; it is {moved} now" if os.path.isfile(moved) else ""
        raise UserError(f"{path}: cannot read this config file ({error.strerror}){hint}") from None
    except ImportError:
        raise UserError(f"{path}: a config file holds assignments only, no import") from None
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None


def merge(into, new):
    """Overlay the nested dict new on into, in place."""
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            merge(into[name], value)
        else:
            into[name] = value


def build(base, overrides, path=""):
    """A copy of the dataclass instance base with the nested dict overrides applied."""
    types = get_type_hints(type(base))
    changes = {}
    for name, value in overrides.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, 1) or [
                field
                for _, field, _, _, comment in options(base, "")
                if name.replace("_", " ") in comment
            ]
            hint = elsewhere(name) or (near and f"did you mean --{path}{near[0]}?")
            raise UserError(f"unknown option --{path}{name}; {hint or '--help lists them all'}")
        if types[name] is dict:
            if not isinstance(value, dict):
                raise UserError(f"--{path}{name} is a section: set --{path}{name}.FIELD=value")
            changes[name] = value
        elif is_dataclass(types[name]):
            if not isinstance(value, dict):
                raise UserError(f"--{path}{name} is a section: set --{path}{name}.FIELD=value")
            changes[name] = build(getattr(base, name), value, f"{path}{name}.")
        else:
            changes[name] = coerce(types[name], value, path + name)
    return replace(base, **changes)


def elsewhere(name):
    """-> what an option of nanoGPT's, TRL's or llm_trainer's is called here, "" where it is none"""
    page = os.path.join(os.path.dirname(os.path.dirname(__file__)), "docs/moving.md")
    if not os.path.isfile(page):
        return ""
    with open(page, encoding="utf-8") as file:
        rows = [line.split(" | ")[:2] for line in file if line.startswith("| ")]
    rows = [(re.findall(r"`([^`]+)`", a), re.findall(r"`(--[^`]+)`", b)) for a, b in rows]
    # a row of its own says more than one that it shares
    for theirs, ours in sorted(rows, key=lambda row: len(row[0])):
        if name in theirs and ours:
            same = ours[theirs.index(name)] if len(ours) == len(theirs) else ", ".join(ours)
            return f"its name here is {same}" if same[2:] != name else ""
    return ""


def coerce(kind, value, name):
    """
    value (a string from the command line, or what a config file holds) as kind, or a UserError.
    """
    try:
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise ValueError
            return value
        if get_origin(kind) is tuple:  # a,b,c or a JSON list
            if isinstance(value, str):
                value = (
                    json.loads(value)
                    if value.startswith("[")
                    else [v for v in value.split(",") if v]
                )
            return tuple(coerce(get_args(kind)[0], v, name) for v in value)
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if kind is str:
            if not isinstance(value, str):
                raise ValueError
            return value
        if isinstance(value, bool):
            raise ValueError
        if kind is int and not isinstance(value, int):  # 10_000 and 1e6 are ints, 1.5 is not
            number = float(value)
            if number != int(number):
                raise ValueError
            digits = isinstance(value, str) and re.fullmatch(r"[-+]?[\d_]+", value)
            return int(value) if digits else int(number)
        if kind is float and not math.isfinite(float(value)):
            raise UserError(f"--{name}={value}: must be finite")
        return kind(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"--{name}={value}: expected {type_name(kind)}") from None


def type_name(kind):
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"{get_args(kind)[0].__name__},..."
    return kind.__name__


def as_dict(config):
    """The config as nested plain values, as config.json holds it."""
    return json.loads(json.dumps(asdict(config)))


# -----------------------------------------------------------------------------
# help


def help_text(cls, width=110):
    """
    The module's docstring, then every option: --name=default, type, comment; grouped as in the
    source.
    """
    lines = [
        (inspect.getmodule(cls).__doc__ or "").strip(),
        "",
        "Options (--name=value; the default is shown):",
    ]
    for group, name, kind, default, comment in options(cls(), ""):
        if group:
            lines += ["", group]
        left = (
            f"  --{name}={','.join(map(str, default)) if isinstance(default, tuple) else default}"
        )
        right = f"{type_name(kind).replace(' or ', '|')}: {comment}"
        indent = " " * 34
        column = f"{left:<33} " if len(left) < 34 else left + "\n" + indent
        text = ("\n" + indent).join(textwrap.wrap(right, width - len(indent)))
        lines.append(column + text)
    return "\n".join(lines)


def options(instance, path):
    """
    Yield (group or "", dotted name, type, default, comment) per field, sections too, in source
    order.
    """
    types, comments, groups = get_type_hints(type(instance)), {}, {}
    for cls in reversed([c for c in type(instance).__mro__ if is_dataclass(c)]):
        group = ""
        for line in textwrap.dedent(inspect.getsource(cls)).splitlines():
            if heading := re.fullmatch(r"    # (?!fmt: )(.+)", line):
                group = heading[1]
            if field := re.match(r"    (\w+): [^=]+=.*?(?:\s#\s(.*))?$", line):
                comments[field[1]] = field[2] or ""
                groups[field[1]], group = group or groups.get(field[1], ""), ""
    for field in fields(instance):
        value = getattr(instance, field.name)
        if is_dataclass(value):
            nested = list(options(value, f"{path}{field.name}."))
            yield (comments[field.name] or field.name, *nested[0][1:])
            yield from nested[1:]
        else:
            yield (
                groups[field.name],
                path + field.name,
                types[field.name],
                value,
                comments[field.name],
            )
