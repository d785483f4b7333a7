"""The command line: what is read, in which order, what is refused and how, and what --help prints."""
import ast
import dataclasses
import importlib.util
import inspect
import io
import json
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from typing import Literal

import pytest
from conftest import ROOT, run

from common.config import as_dict, help_text, parse_config
from common.errors import UserError


@dataclass(frozen=True)
class Inner:
    depth: int = 2                     # layers
    scale: float = 0.5                 # of the residual


@dataclass(frozen=True)
class Config:
    # files
    name: str = "run"                  # what to call it
    paths: tuple[str, ...] = ("a", "b")  # files, in order
    # numbers
    steps: int = 10                    # updates
    rate: float = 1e-3                 # step size
    ids: tuple[int, ...] = ()          # token ids
    fast: bool = False                 # skip the checks
    kind: Literal["red", "green"] = "red"    # colour
    inner: Inner = Inner()             # the inside


def parse(*argv):
    return parse_config(Config, list(argv))


def error_of(*argv):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


# -----------------------------------------------------------------------------
# values

def test_no_arguments_give_the_defaults():
    assert parse() == Config()


@pytest.mark.parametrize("text, value", [
    ("7", 7), ("-3", -3), ("1e6", 1_000_000), ("10_000", 10_000), ("2.0", 2),
    ("9007199254740993", 9007199254740993),            # 2**53 + 1: no float holds it
])
def test_an_int_may_be_written_in_several_ways_and_stays_exact(text, value):
    steps = parse(f"--steps={text}").steps
    assert steps == value and type(steps) is int


@pytest.mark.parametrize("option, field, value", [
    ("--rate=3", "rate", 3.0), ("--rate=-1e-4", "rate", -1e-4), ("--rate=1e300", "rate", 1e300),
    ("--fast=true", "fast", True), ("--fast=False", "fast", False), ("--fast=1", "fast", True),
    ("--fast=0", "fast", False),
    ("--name=", "name", ""), ("--name=a=b,c d", "name", "a=b,c d"), ("--name=10", "name", "10"),
    ("--paths=x.txt", "paths", ("x.txt",)), ("--paths=x,y*.z", "paths", ("x", "y*.z")),
    ("--paths=", "paths", ()),
    ('--paths=["To be, or", "not"]', "paths", ("To be, or", "not")),
    ("--ids=1,1_000,2e3", "ids", (1, 1000, 2000)), ("--ids=[4, 5]", "ids", (4, 5)),
    ("--kind=green", "kind", "green"), ("--inner.depth=9", "inner", Inner(9, 0.5)),
])
def test_a_value_gets_the_type_of_its_field(option, field, value):
    config = parse(option)
    assert getattr(config, field) == value and type(getattr(config, field)) is type(value)
    undone = dataclasses.replace(config, **{field: getattr(Config(), field)})
    assert undone == Config(), "nothing else changed"


@pytest.mark.parametrize("option, expected", [
    ("--steps=1.5", "int"), ("--steps=many", "int"), ("--steps=", "int"), ("--steps=true", "int"),
    ("--steps=inf", "int"), ("--steps=nan", "int"), ("--steps=1,2", "int"), ("--rate=fast", "float"),
    ("--fast=yes", "bool"), ("--fast=2", "bool"), ("--kind=blue", "red or green"),
    ("--kind=", "red or green"),
    ("--ids=1,x", "int"), ("--ids=[1, 2", "int,..."), ("--ids=[1.5]", "int"), ("--paths=[1]", "str"),
    ("--inner.depth=deep", "int"), ("--steps.more=3", "int"),
])
def test_a_wrong_type_is_refused_with_option_value_and_the_type_expected(option, expected):
    message = error_of(option)
    assert message.startswith("--" + option[2:].split("=")[0].replace("steps.more", "steps"))
    assert message.endswith(f": expected {expected}")
    assert option.partition("=")[2].strip("[]").split(",")[-1].strip() in message


@pytest.mark.parametrize("value, option", [
    (dict(steps=1.5), "--steps=1.5: expected int"), (dict(steps=True), "--steps=True: expected int"),
    (dict(rate=False), "--rate=False: expected float"), (dict(rate=None), "--rate=None: expected float"),
    (dict(name=3), "--name=3: expected str"), (dict(ids=5), "--ids=5: expected int,..."),
    (dict(paths=[1]), "--paths=1: expected str"), (dict(fast="maybe"), "--fast=maybe: expected bool"),
    (dict(inner=dict(scale="big")), "--inner.scale=big: expected float"),
])
def test_a_wrong_type_in_a_config_file_is_refused_the_same_way(tmp_path, value, option):
    assert error_of(write(tmp_path / "c.json", value)) == option


# -----------------------------------------------------------------------------
# names and sections

@pytest.mark.parametrize("option, near", [
    ("--step=3", "--steps"), ("--nmae=x", "--name"),
    ("--inner.depht=3", "--inner.depth"), ("--iner.depth=3", "--inner"),
])
def test_an_unknown_option_is_refused_with_the_nearest_name(option, near):
    assert error_of(option) == f"unknown option {option.partition('=')[0].replace('iner.depth', 'iner')}; " \
                               f"did you mean {near}?"


def test_an_unknown_option_that_resembles_nothing_points_to_help():
    assert error_of("--zzzz=1") == "unknown option --zzzz; --help lists them all"


@pytest.mark.parametrize("option", ["--inner=3", "--inner=", "--inner={'depth': 3}"])
def test_a_section_cannot_be_assigned_a_value(option):
    assert error_of(option) == "--inner is a section: set --inner.FIELD=value"


def test_a_section_cannot_be_assigned_a_value_by_a_config_file(tmp_path):
    path = write(tmp_path / "c.py", "inner = 3\n")
    assert error_of(path) == "--inner is a section: set --inner.FIELD=value"


@pytest.mark.parametrize("argument, message", [
    ("--steps", "--steps: expected --steps=value, so --steps=true to switch it on"),
    ("steps=3", "steps=3: expected --name=value or a config file (.py or .json)"),
    ("-steps=3", "-steps=3: expected --name=value or a config file (.py or .json)"),
])
def test_an_argument_of_another_shape_is_refused(argument, message):
    assert error_of(argument) == message


# -----------------------------------------------------------------------------
# config files

def test_later_arguments_win(tmp_path):
    py = write(tmp_path / "c.py", "steps = 20\nrate = 0.5\ninner = dict(depth=4)\n")
    js = write(tmp_path / "c.json", dict(steps=30, inner=dict(scale=2)))
    assert parse(py) == Config(steps=20, rate=0.5, inner=Inner(4, 0.5))
    assert parse(py, js) == Config(steps=30, rate=0.5, inner=Inner(4, 2.0))    # sections are overlaid
    assert parse(js, py) == Config(steps=20, rate=0.5, inner=Inner(4, 2.0))
    assert parse("--steps=5", js) == Config(steps=30, inner=Inner(2, 2.0))
    assert parse(js, "--steps=5", "--inner.scale=3") == Config(steps=5, inner=Inner(2, 3.0))
    assert parse("--steps=5", "--steps=6").steps == 6


def test_a_config_file_is_plain_python_assignments(tmp_path):
    path = write(tmp_path / "c.py", "# a comment\nsteps = 8 * 64        # arithmetic\npaths = ['x', 'y']\n"
                                    "ids = (1, 2)\nfast = True\ninner = {'depth': steps // 2}\n")
    assert parse(path) == Config(steps=512, paths=("x", "y"), ids=(1, 2), fast=True, inner=Inner(256, 0.5))


def test_a_config_file_can_call_nothing_but_dict(tmp_path):
    canary = tmp_path / "canary"
    for line in (f"open({str(canary)!r}, 'w')", "import os", "__import__('os')"):
        assert "c.py: " in error_of(write(tmp_path / "c.py", line + "\n"))
    assert not canary.exists()


def test_a_run_s_own_config_json_gives_the_same_config_back(tmp_path):
    config = parse("--ids=3,4", "--inner.depth=7", "--fast=true", "--rate=0.1", "--kind=green",
                   '--paths=["a, b"]')
    assert parse(write(tmp_path / "config.json", as_dict(config))) == config


@pytest.mark.parametrize("name, content, part", [
    ("missing.py", None, "missing.py: cannot read this config file (No such file or directory)"),
    ("missing.json", None, "missing.json: cannot read this config file (No such file or directory)"),
    ("bad.py", "steps = 3\nrate = = 2\n", "line 2"),
    ("bad.py", "steps = three\n", "bad.py: NameError: name 'three' is not defined"),
    ("bad.json", '{"steps": 3', "bad.json: JSONDecodeError"),
    ("unknown.py", "stepz = 3\n", "unknown option --stepz; did you mean --steps?"),
    ("list.json", "[1, 2]", "list.json"),
    ("number.json", "3", "number.json"),
])
def test_a_config_file_that_cannot_be_used_is_named(tmp_path, name, content, part):
    if content is not None:
        write(tmp_path / name, content)
    assert part in error_of(str(tmp_path / name))


def test_a_config_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "x.py").write_bytes(b"\xff\xfe\x00")
    assert "x.py: " in error_of(str(tmp_path / "x.py"))
    (tmp_path / "folder.py").mkdir()
    assert "folder.py: cannot read this config file" in error_of(str(tmp_path / "folder.py"))


# -----------------------------------------------------------------------------
# the real command lines

@pytest.mark.parametrize("args, message", [
    (["train_pretrain.py", "--num_step=3"], "error: unknown option --num_step; did you mean --num_steps?"),
    (["train_pretrain.py", "--batch_size=1.5"], "error: --batch_size=1.5: expected int"),
    (["train_pretrain.py", "configs/no_such.py"],
     "error: configs/no_such.py: cannot read this config file (No such file or directory)"),
    (["sample.py", "--top_k=few"], "error: --top_k=few: expected int"),
    (["data/prepare.py", "text", "--bad_rows=maybe"], "error: --bad_rows=maybe: expected error or skip"),
])
def test_a_mistake_ends_with_exit_code_2_and_one_line(args, message):
    result = run(*args, check=False)
    assert (result.returncode, result.stderr, result.stdout) == (2, message + "\n", "")


def import_script(path):
    spec = importlib.util.spec_from_file_location("script_" + path.replace("/", "_")[:-3], ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                  # dataclasses and inspect look the module up by name
    spec.loader.exec_module(module)
    return module


def written_comments(cls):
    """field -> the comment on its line, read with ast and tokenize from the class's file."""
    source = open(inspect.getsourcefile(cls), encoding="utf-8").read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    return {n.target.id: comments.get(n.end_lineno, "") for n in node.body if isinstance(n, ast.AnnAssign)}


def all_fields(instance, path=""):
    """Every option as (dotted name, default, comment), sections opened, inherited ones included."""
    comments = {}
    for cls in reversed([c for c in type(instance).__mro__ if dataclasses.is_dataclass(c)]):
        comments |= written_comments(cls)
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            yield from all_fields(value, f"{path}{field.name}.")
        else:
            yield path + field.name, value, comments[field.name]


@pytest.mark.parametrize("script, command, class_name", [
    ("train_pretrain.py", [], "Config"), ("sample.py", [], "Config"),
    ("data/prepare.py", ["text"], "TextConfig"), ("data/prepare.py", ["tokenizer"], "TokenizerConfig"),
])
def test_help_lists_every_field_with_default_and_comment_within_110_columns(script, command, class_name):
    text = run(script, *command, "--help").stdout
    module = import_script(script)
    cls = getattr(module, class_name)
    assert module.__doc__.strip() in text
    options = text[text.index("\nOptions"):]
    words = " ".join(options.split())
    names = []
    for name, default, comment in all_fields(cls()):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert comment, f"--{name} has no comment"
        start = words.index(f"--{name}={shown} ")
        described = words[start:].split(": ", 1)[1]            # after the type
        assert described.startswith(comment), name
        names.append(name)
    listed = [line.strip()[2:].split("=")[0] for line in options.splitlines() if line.startswith("  --")]
    assert listed == names, "each once, in the order of the source"
    assert [line for line in text.splitlines() if len(line) > 110] == []


def test_help_shows_groups_types_and_sections():
    assert help_text(Config).partition("is shown):\n")[2] == """
files
  --name=run                      str: what to call it
  --paths=a,b                     str,...: files, in order

numbers
  --steps=10                      int: updates
  --rate=0.001                    float: step size
  --ids=                          int,...: token ids
  --fast=False                    bool: skip the checks
  --kind=red                      red|green: colour

the inside
  --inner.depth=2                 int: layers
  --inner.scale=0.5               float: of the residual"""


def test_help_is_printed_instead_of_running_and_before_other_arguments_are_read(capsys):
    for argv in (["--help"], ["-h"], ["--nonsense=1", "--help"]):
        with pytest.raises(SystemExit) as stop:
            parse_config(Config, argv)
        assert stop.value.code == 0
        assert "--inner.scale=0.5" in capsys.readouterr().out


@dataclass(frozen=True)
class Derived(Inner):
    # more
    scale: float = 0.25                # of the residual, smaller here
    width: int = 3                     # channels


def test_help_lists_a_field_that_a_subclass_sets_anew_once():
    listed = [line.split()[0] for line in help_text(Derived).splitlines() if line.startswith("  --")]
    assert sorted(listed) == ["--depth=2", "--scale=0.25", "--width=3"]


@pytest.mark.parametrize("command", [
    *(["-m", f"extras.{name}"] for name in ("plot", "hf", "capacity")), ["data/lines.py"],
    ["extras/gym.py"], ["data/vqa.py"],
    *(["data/prepare.py", kind] for kind in ("text", "chat", "pairs", "prompts", "images", "tokenizer"))],
    ids=" ".join)
def test_every_command_has_help_that_fits(command):
    result = run(*command, "--help")
    assert "\nOptions (--name=value; the default is shown):\n" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 110


@pytest.mark.parametrize("command, new", [
    (["-m", "common.hf", "export"], "python -m extras.hf"), (["-m", "common.plot", "out/x"], "extras.plot"),
    (["-m", "common.estimate"], "python -m extras.capacity"), (["data/gym.py"], "python extras/gym.py"),
    (["-c", "from common.rewards import load_function\nload_function('reward', 'data/gym.py:reward')"],
     "--reward=extras/gym.py:reward")], ids=str)
def test_a_command_that_has_moved_names_the_new_one(command, new):
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode and result.stderr.startswith("error: ") and new in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("theirs, ours", [
    ("max_iters", "--num_steps"), ("block_size", "--seq_len"), ("n_layer", "--model.n_layer"),
    ("learning_rate", "--lr"), ("per_device_train_batch_size", "--micro_batch_size"),
    ("model_name_or_path", "--init_from"), ("dataset", "--data_dir"),
    ("eval_interval", "--eval_every"), ("max_length", "--seq_len"), ("output_dir", "--out_dir")])
def test_an_option_of_another_code_base_is_told_its_name_here(theirs, ours):
    """By the tables of docs/moving.md."""
    result = run("train_sft.py", f"--{theirs}=1", check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: unknown option --{theirs}; its name here is {ours}")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_number_that_is_not_finite_is_refused_by_name(value):
    with pytest.raises(UserError, match=f"--inner.scale={value}: must be finite"):
        parse_config(Config, [f"--inner.scale={value}"])


def test_an_import_in_a_config_file_is_named(tmp_path):
    (tmp_path / "c.py").write_text("import math\nlr = math.pi\n")
    with pytest.raises(UserError, match="c.py: a config file holds assignments only, no import"):
        parse_config(Config, [str(tmp_path / "c.py")])
