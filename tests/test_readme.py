"""What the README tells people to type works, on small budgets, and what it says of the tree is true."""
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, launch, run

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- runnable -->\n```bash\n(.*?)```", TEXT, re.S)
# options that make a command small; appended, so they win
SMALL = {"train_pretrain.py": ["--num_steps=3", "--eval_seqs=4", "--batch_size=2"],
         "train_sft.py": ["--num_steps=2", "--eval_seqs=2", "--batch_size=2"],
         "train_dpo.py": ["--num_steps=2", "--eval_seqs=2", "--batch_size=2"],
         "train_grpo.py": ["--num_steps=1", "--eval_seqs=2", "--batch_size=2", "--num_samples=2"],
         "train_kd.py": ["--num_steps=1", "--eval_seqs=2", "--batch_size=2"],
         "sample.py": ["--max_new_tokens=20"]}


def test_the_commands_run_in_their_order(tmp_path):
    for name in ("common", "configs", "data", *(path.name for path in ROOT.glob("*.py"))):
        (tmp_path / name).symlink_to(ROOT / name)             # so that out/ is made here
    for line in "".join(BLOCKS).replace("\\\n", " ").strip().splitlines():
        program, script, *options = shlex.split(line)
        assert program == "python"
        result = launch([script, *options, *SMALL.get(script, [])], cwd=tmp_path)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"


def test_there_are_runnable_blocks():
    assert len(BLOCKS) == 8


@pytest.mark.parametrize("kind", ["text", "chat", "pairs", "prompts", "images"])
def test_the_two_lines_of_each_format_are_what_prepare_takes(kind, tmp_path):
    lines = re.search(rf"<!-- format: {kind} -->\n```json\n(.*?)```", TEXT, re.S)[1]
    assert lines.count("\n") == 2
    (tmp_path / "rows.jsonl").write_text(lines)
    if kind == "images":
        Image = pytest.importorskip("PIL.Image", reason="the extra images")
        Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    out = run("data/prepare.py", kind, f"--input={tmp_path}/rows.jsonl", f"--out_dir={tmp_path}/set").stdout
    assert re.search(r"train\.npy: \w+ 2, ", out), out


def test_the_stage_table_says_how_long_each_script_is():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", TEXT, re.M)
    assert len(rows) == 7
    for name, lines in rows:
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 5, name


def test_options_that_the_readme_names_exist():
    """Everything written --name or --name=..., in text and tables, is an option of some command."""
    known = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("data/*.py"),
                 *ROOT.glob("configs/*/*.py")]:
        source = path.read_text()
        for config in re.findall(r"class \w*Config\b.*?:\n((?: +.*\n|\n)+)", source):
            known |= set(re.findall(r"^ +(\w+): ", config, re.M))
    named = set(re.findall(r"(?<![\w-])--([a-z]\w*(?:\.\w+)?)", TEXT))
    named -= {"standalone", "nproc_per_node", "help", "name"}
    assert not [name for name in named if name.split(".")[-1] not in known | {"model", "vision"}]


def test_the_python_example_streams(tmp_path):
    """The example under "More text from Python", on a model made here."""
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
    from common.sampling import ask
    names = {}
    exec(re.search(r"```python\n(def short.*?)```", TEXT, re.S)[1], names)
    rewards = {name: names[name] for name in ("short", "no_digits")}
    total, to_go = score(rewards, [1.0, 1.0], [[]], ["a1"], [""], [["a", "1", "<end>"]], 3)
    assert total.tolist() == pytest.approx([1 / 3 - 1])
    assert to_go.tolist() == [pytest.approx([1 / 3 - 1, 1 / 3 - 1, 1 / 3])]
    assert ask(names["again"], "<user>?<end><assistant>4<end>") == (False, "Are you sure?")


def test_the_example_tower_is_one():
    import torch

    from common.vision import Vision, VisionConfig
    names = {"torch": torch}
    exec(re.search(r"```python\n(class Tower.*?)```", TEXT, re.S)[1], names)
    images = dict(image_size=32, tokens_per_image=4, mean=[0.5] * 3, std=[0.5] * 3, token=9)
    vision = Vision(VisionConfig(tower="my/tower.py:Tower"), 12, images, names["Tower"])
    assert vision(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 4, 12)


def test_files_that_the_readme_names_exist():
    names = set(re.findall(r"\b(?:common|data|configs|tests)/[\w/]+\.(?:py|md)\b|(?<![\w/])\w+\.py\b", TEXT))
    assert not [name for name in names if not (ROOT / name).exists()]
