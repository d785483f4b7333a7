"""
A frozen dataclass is a command line.

    python train_pretrain.py configs/tiny.py --lr=3e-4 --model.n_layer=6

Later arguments win. A config file is Python made of plain assignments (or the config.json that a run wrote):

    lr = 3e-4
    batch_size = 8 * 64                       # sequences per step
    model = dict(n_layer=6, n_embd=384)       # a section

An unknown name, a wrong type or a value outside a Literal is a UserError, never a guess. The comment beside a
field is its help text: `--help` prints every option with type, default and comment.
"""
import difflib
import inspect
import json
import math
import re
import sys
import textwrap
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints

from common import dist
from common.errors import UserError, show_user_errors


def parse_config(cls, argv=None):
    """-> an instance of the frozen dataclass cls. argv: config files and --name=value (default: sys.argv)."""
    if argv is None:
        show_user_errors()
        argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        sys.exit(0)
    return build(cls(), read_overrides(argv))


def read_overrides(argv=None):
    """What was given explicitly, by config files and --name=value: nested dict of names to raw values."""
    argv, overrides = sys.argv[1:] if argv is None else argv, {}
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
        raise UserError(f"{path}: cannot read this config file ({error.strerror})") from None
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
                field for _, field, _, _, comment in options(base, "") if name.replace("_", " ") in comment]
            raise UserError(f"unknown option --{path}{name}" + (
                f"; did you mean --{path}{near[0]}?" if near else "; --help lists them all"))
        if is_dataclass(types[name]):
            if not isinstance(value, dict):
                raise UserError(f"--{path}{name} is a section: set --{path}{name}.FIELD=value")
            changes[name] = build(getattr(base, name), value, f"{path}{name}.")
        else:
            changes[name] = coerce(types[name], value, path + name)
    return replace(base, **changes)


def coerce(kind, value, name):
    """value (a string from the command line, or what a config file holds) as kind, or a UserError."""
    try:
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise ValueError
            return value
        if get_origin(kind) is tuple:                          # a,b,c or a JSON list
            if isinstance(value, str):
                value = json.loads(value) if value.startswith("[") else [v for v in value.split(",") if v]
            return tuple(coerce(get_args(kind)[0], v, name) for v in value)
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if kind is str:
            if not isinstance(value, str):
                raise ValueError
            return value
        if isinstance(value, bool):
            raise ValueError
        if kind is int and not isinstance(value, int):         # 10_000 and 1e6 are ints, 1.5 is not
            number = float(value)
            if number != int(number):
                raise ValueError
            digits = isinstance(value, str) and re.fullmatch(r"[-+]?[\d_]+", value)
            return int(value) if digits else int(number)
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


def as_asked(config):
    """as_dict, but of sections (model, ...) what was given: the rest follows from where a run starts"""
    asked = read_overrides()
    return {name: asked.get(name, {}) if is_dataclass(getattr(config, name)) else value
            for name, value in as_dict(config).items()}


def check_batch(cfg, world_size):
    """
    The options that every stage has, compared with each other and the number of ranks; UserError where one
    cannot be -> sequences in a micro-batch, micro-batches of a step on each rank
    """
    for name, least in dict(seq_len=1, batch_size=world_size, micro_batch_size=0, lr=0, eval_seqs=0, seed=0,
                            keep_last=1, log_every=1, max_bad_steps=1).items():
        if getattr(cfg, name) < least:
            raise UserError(f"--{name}={getattr(cfg, name)}: must be at least {least}")
    micro_batch_size = cfg.micro_batch_size or cfg.batch_size // world_size
    if cfg.batch_size % (micro_batch_size * world_size):
        raise UserError(f"--batch_size={cfg.batch_size}: must be a multiple of ranks x micro_batch_size = "
                        f"{world_size} x {cfg.micro_batch_size or 1}")
    if min(cfg.num_steps, cfg.num_epochs) < 0 or not (cfg.num_steps or cfg.num_epochs):
        raise UserError(f"--num_steps={cfg.num_steps} --num_epochs={cfg.num_epochs}: set one of them")
    return micro_batch_size, cfg.batch_size // (micro_batch_size * world_size)


def count_steps(cfg, num_samples):
    """-> number of updates, of samples that the run may use (inf = no end); num_samples: of an epoch"""
    num_steps, total = cfg.num_steps, math.inf
    if cfg.num_epochs:
        total = round(cfg.num_epochs * num_samples)
        num_steps = -(-total // cfg.batch_size)
    if total < 1:
        raise UserError(f"--num_epochs={cfg.num_epochs}: not one of {num_samples} sequences")
    if cfg.warmup_steps >= num_steps and dist.world()[0] == 0:
        print(f"note: --warmup_steps={cfg.warmup_steps} in a run of {num_steps} steps: lr never gets to "
              f"{cfg.lr:g}; try --warmup_steps={num_steps // 10}", flush=True)
    return num_steps, total


# -----------------------------------------------------------------------------
# help

def help_text(cls, width=110):
    """The module's docstring, then every option: --name=default, type, comment; grouped as in the source."""
    lines = [(inspect.getmodule(cls).__doc__ or "").strip(), "",
             "Options (--name=value; the default is shown):"]
    for group, name, kind, default, comment in options(cls(), ""):
        if group:
            lines += ["", group]
        left = f"  --{name}={','.join(map(str, default)) if isinstance(default, tuple) else default}"
        right = f"{type_name(kind).replace(' or ', '|')}: {comment}"
        indent = " " * 34
        column = f"{left:<33} " if len(left) < 34 else left + "\n" + indent
        text = ""
        for word in right.split():
            if len(text.rsplit("\n", 1)[-1]) + len(word) + 1 > width - 34:
                text += "\n" + indent + word
            else:
                text += (" " if text else "") + word
        lines.append(column + text)
    return "\n".join(lines)


def options(instance, path):
    """Yield (group or "", dotted name, type, default, comment) per field, sections too, in source order."""
    types, comments, groups = get_type_hints(type(instance)), {}, {}
    for cls in reversed([c for c in type(instance).__mro__ if is_dataclass(c)]):
        group = ""
        for line in textwrap.dedent(inspect.getsource(cls)).splitlines():
            if heading := re.fullmatch(r"    # (.+)", line):
                group = heading[1]
            if field := re.match(r"    (\w+): [^=]+=.*?(?:\s#\s(.*))?$", line):
                comments[field[1]] = field[2] or ""
                groups[field[1]], group = group, ""
    for field in fields(instance):
        value = getattr(instance, field.name)
        if is_dataclass(value):
            nested = list(options(value, f"{path}{field.name}."))
            yield (comments[field.name] or field.name, *nested[0][1:])
            yield from nested[1:]
        else:
            yield groups[field.name], path + field.name, types[field.name], value, comments[field.name]
