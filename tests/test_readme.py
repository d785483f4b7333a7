"""What README and docs tell people to type works, on small budgets, and what they say of the tree is true."""
import functools
import re
import runpy
import shlex
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, launch, run

from common.config import parse_config

# pages whose commands build on those before them come first, in this order
ORDER = ["README.md", *(f"docs/{name}.md" for name in (
    "data", "chat", "images", "preferences", "rewards", "distillation"))]
ORDER += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")
                if str(path.relative_to(ROOT)) not in ORDER)
ORDER += ["CONTRIBUTING.md"]
# commands of other programs are in ```sh
PAGES = {name: re.sub(r"```sh\n.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.S)
         for name in ORDER}
TEXT = "\n".join(PAGES.values())
RUNNABLE = r"<!-- runnable -->\n```bash\n(.*?)```"
BLOCKS = {name: re.findall(RUNNABLE, text, re.S) for name, text in PAGES.items()}
# options that make a command small; appended, so they win
SMALL = {"train_pretrain.py": ["--num_steps=3", "--eval_seqs=4", "--batch_size=2"],
         "train_sft.py": ["--num_steps=2", "--eval_seqs=2", "--batch_size=2"],
         "train_dpo.py": ["--num_steps=2", "--eval_seqs=2", "--batch_size=2"],
         "train_grpo.py": ["--num_steps=1", "--eval_seqs=2", "--batch_size=2", "--num_samples=2"],
         "train_kd.py": ["--num_steps=1", "--eval_seqs=2", "--batch_size=2"],
         "sample.py": ["--max_new_tokens=20"]}
FOLDERS = ("common", "configs", "data", "demos", "extras", "tests")


def lines_of(blocks):
    return "".join(blocks).replace("\\\n", " ").strip().splitlines()


def commands():
    """What test_the_commands_run_in_their_order leaves out: lines of bash blocks, `python ...` in a text"""
    for page, text in PAGES.items():
        rest = re.sub(RUNNABLE, "", text, flags=re.S)
        blocks = re.findall(r"```bash\n(.*?)```", rest, re.S)
        spans = re.findall(r"`((?:python|torchrun|make) [^`]+)`", re.sub(r"```.*?```", "", rest, flags=re.S))
        for line in [*lines_of(blocks), *(" ".join(span.split()) for span in spans)]:
            yield pytest.param(line, id=f"{page}: {line[:60]}")


def test_the_commands_run_in_their_order(tmp_path):
    for path in [*(ROOT / name for name in FOLDERS), *ROOT.glob("*.py")]:
        (tmp_path / path.name).symlink_to(path)               # so that out/ is made here
    for line in lines_of(block for blocks in BLOCKS.values() for block in blocks):
        program, script, *options = shlex.split(line)
        assert program == "python"
        result = launch([script, *options, *SMALL.get(script, [])], cwd=tmp_path)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"


def test_there_are_runnable_blocks():
    expected = {"README.md": 2, "CONTRIBUTING.md": 1}
    for name in ORDER[1:7]:
        expected[name] = 1
    assert expected.items() <= {name: len(blocks) for name, blocks in BLOCKS.items()}.items()


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_that_is_not_run_is_understood(line):
    """Its program exists and takes these options."""
    for command in line.split(" && "):
        program, *args = shlex.split(command, comments=True)
        if program == "torchrun":
            while args[0].startswith("--"):
                del args[0]
        if program == "make":
            assert re.search(rf"^{args[0]}:", (ROOT / "Makefile").read_text(), re.M)
        elif program == "pip":
            assert args[:2] == ["install", "-r"] and (ROOT / args[2]).exists()
        elif program in ("git", "cd", "."):
            assert args
        elif program == "python3":
            assert args == ["-m", "venv", ".venv"]
        elif args[0] == "-c":
            compile(args[1], "-c", "exec")
        elif args[:2] == ["-m", "pytest"]:
            assert all((ROOT / arg).exists() for arg in args if arg.startswith("tests/"))
        else:
            assert program in ("python", "torchrun")
            check_options(*args)


def check_options(script, *options):
    if script == "-m":
        script, *options = options
        script = script.replace(".", "/") + ".py"
    assert (ROOT / script).exists(), script
    if script.startswith(("demos/", "tests/")):               # programs without options
        assert not [option for option in options if option.startswith("-")]
    elif not options or "--help" in options:
        assert launch([script, *options]).returncode == 0
    elif "Config" in names_of(script):
        commands = [option for option in options[:1] if option in ("import", "export")]
        assert not commands or script == "extras/hf.py"
        parse_config(names_of(script)["Config"], options[len(commands):])
    else:                                                     # refused is what is appended, nothing before it
        result = launch([script, *options, "--no_such_option=1"])
        assert result.returncode == 2 and "--no_such_option" in result.stderr, result.stderr


@functools.cache
def names_of(script):
    return runpy.run_path(str(ROOT / script))


@pytest.mark.parametrize("kind", ["text", "chat", "pairs", "prompts", "images"])
def test_the_two_lines_of_each_format_are_what_prepare_takes(kind, tmp_path):
    (lines,) = re.findall(rf"<!-- format: {kind} -->\n```json\n(.*?)```", TEXT, re.S)
    assert lines.count("\n") == 2
    (tmp_path / "rows.jsonl").write_text(lines)
    if kind == "images":
        Image = pytest.importorskip("PIL.Image", reason="the extra images")
        Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    out = run("data/prepare.py", kind, f"--input={tmp_path}/rows.jsonl", f"--out_dir={tmp_path}/set").stdout
    assert re.search(r"train\.npy: \w+ 2, ", out), out


def test_the_stage_table_names_every_script_with_its_data_and_page():
    table = re.search(r"## Stages\n(.*?)\n\n", PAGES["README.md"].replace("\n\n|", "\n|"), re.S)[1]
    rows = [line.split(" | ") for line in table.splitlines()[2:] if line.startswith("| `")]
    scripts = {row[0].strip("| `") for row in rows}
    assert scripts == {path.name for path in [*ROOT.glob("train_*.py"), ROOT / "sample.py"]}
    kinds = set(re.findall(r"`data/prepare.py (\w+)`", table))
    assert kinds == {"text", "chat", "images", "pairs", "prompts"}
    assert all(re.search(r"\]\(docs/\w+\.md", row[-1]) for row in rows)


def test_what_changes_no_result_is_proved_by_tests_that_exist():
    listed = subprocess.run([sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/test_stages.py"],
                            cwd=ROOT, capture_output=True, text=True, timeout=100).stdout.splitlines()
    table = re.search(r"## What does not change your results\n(.*?)\n## ", PAGES["README.md"], re.S)[1]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 5
    for row in rows:
        words = row[2].strip("`\"").split(" and ")
        assert [name for name in listed if all(word in name for word in words)], row[2]


def test_options_that_the_pages_name_exist():
    """Everything written --name or --name=..., in text and tables, is an option of some command."""
    known = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "demos").glob("*/*.py"),
                 *(path for name in ("common", "data", "extras") for path in (ROOT / name).glob("*.py"))]:
        source = path.read_text()
        for config in re.findall(r"class \w*Config\b.*?:\n((?: +.*\n|\n)+)", source):
            known |= set(re.findall(r"^ +(\w+): ", config, re.M))
    named = set(re.findall(r"(?<![\w-])--([a-z]\w*(?:\.\w+)?)", TEXT))
    named -= {"standalone", "nproc_per_node", "help", "name"}
    assert not [name for name in named if name.split(".")[-1] not in known | {"model", "vision"}]


def test_extras_that_the_pages_name_exist():
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    (installed,) = re.findall(r"\.\[([\w,]+)\]", TEXT)
    named = set(re.findall(r"the\s+extra\s+`(\w+)`", TEXT)) | set(installed.split(","))
    assert named == set(extras) - {"test"}


def test_the_python_example_streams(tmp_path):
    """The example under "A model from Python", on a model made here."""
    code = re.search(r"```python\n(from sample .*?)```", TEXT, re.S)[1]
    (tmp_path / "t.txt").write_text("To be, or not to be, that is the question.\n" * 20)
    run("data/prepare.py", "text", f"--input={tmp_path}/t.txt", f"--out_dir={tmp_path}/set")
    run("train_pretrain.py", f"--data_dir={tmp_path}/set", f"--out_dir={tmp_path}/run", "--num_steps=2",
        "--seq_len=16", "--batch_size=2", "--eval_seqs=0", "--model.n_layer=1", "--model.n_head=2",
        "--model.n_embd=16")
    code = code.replace("out/shakespeare_cpu", f"{tmp_path}/run")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                            timeout=100)
    assert result.returncode == 0 and len(result.stdout) > 20, result.stderr


def test_the_example_rewards_and_environment_are_what_the_stage_takes():
    from common.rewards import score
    from extras.environment import ask
    names = {}
    exec(re.search(r"```python\n(def short.*?)```", TEXT, re.S)[1], names)
    rewards = {name: names[name] for name in ("short", "no_digits")}
    total, to_go = score(rewards, [1.0, 1.0], [[]], ["a1"], [""], [["a", "1", "<end>"]], 3)
    assert total.tolist() == pytest.approx([1 / 3 - 1])
    assert to_go.tolist() == [pytest.approx([1 / 3 - 1, 1 / 3 - 1, 1 / 3])]
    assert ask(names["again"], "<user>?<end><assistant>4<end>") == (False, "Are you sure?")


def test_the_example_tower_is_one():
    import torch

    from extras.images import Vision, VisionConfig
    names = {"torch": torch}
    exec(re.search(r"```python\n(class Tower.*?)```", TEXT, re.S)[1], names)
    images = dict(image_size=32, tokens_per_image=4, mean=[0.5] * 3, std=[0.5] * 3, token=9)
    vision = Vision(VisionConfig(tower="my/tower.py:Tower"), 12, images, names["Tower"])
    assert vision(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 4, 12)


def test_files_that_the_pages_name_exist():
    folders = "|".join((*FOLDERS, "docs"))
    names = set(re.findall(rf"(?<![\w/])(?:{folders})/[\w/]+\.(?:py|md|png)\b", TEXT))
    # without blocks: commands have a test above, the tree in CONTRIBUTING.md below
    bare = re.sub(r"^```.*?^```", "", TEXT, flags=re.S | re.M)
    names |= set(re.findall(r"(?<![\w/])\w+\.py\b", bare))
    assert not [name for name in names if not (ROOT / name).exists()]


def test_the_tree_names_every_file_of_common_and_extras():
    tree = re.search(r"```\n(train_pretrain .*?)```", PAGES["CONTRIBUTING.md"], re.S)[1]
    for folder in ("common", "extras"):
        part = re.search(rf"^{folder}/ .*\n((?:  .*\n)+)", tree, re.M)[1]
        files = {path.name for path in (ROOT / folder).glob("[a-z]*.py")
                 if not path.read_text().startswith("raise SystemExit")}      # has moved
        assert set(re.findall(r"\w+\.py", part)) == files


def anchors(text):
    """The names that GitHub gives to headings"""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target
