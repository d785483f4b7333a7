"""The house rules a machine checks: who imports whom, no dead options, file sizes, shared blocks, words."""
import ast
import re
from pathlib import Path

import pytest

from common.model import ModelConfig
from common.sampling import SamplingConfig
from common.vision import VisionConfig

ROOT = Path(__file__).parent.parent
STAGES = sorted(ROOT.glob("train_*.py"))
SCRIPTS = [*STAGES, ROOT / "sample.py"]
COMMON = sorted((ROOT / "common").glob("*.py"))
PREPARE = ROOT / "data/prepare.py"
DATA = [PREPARE, *(ROOT / f"data/{name}.py" for name in ("readers", "lines", "gym", "images", "vqa"))]
FIXED = {"torch", "numpy", "tiktoken", "sentencepiece"}


def by_name(path):
    return path.name


def imports(tree):
    """Dotted names of every module imported in an ast: `from common import dist` is common.dist."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "common":
            names |= {f"common.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", COMMON, ids=by_name)
def test_a_common_file_imports_dist_and_errors_at_most(path):
    """So that it can be copied out alone, or with dist.py; its command line may tie parts together."""
    tree = parse(path)
    main = "__name__ == '__main__'"
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == main)]
    ours = {name for name in imports(tree) if name.split(".")[0] in ("common", "data", "sample")
            or name.startswith("train_")}
    assert ours <= {"common.dist", "common.errors"}


@pytest.mark.parametrize("path", [*COMMON, *SCRIPTS, *DATA], ids=by_name)
def test_only_the_fixed_packages_are_needed_at_the_top_of_a_module(path):
    import sys
    tree = parse(path)
    top = imports(ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], []))
    assert {name.split(".")[0] for name in top} - set(sys.stdlib_module_names) <= FIXED | {"common", "data"}


def test_tokenizer_packages_are_imported_in_one_place():
    users = {p.name for p in [*COMMON, *SCRIPTS, *DATA]
             if imports(parse(p)) & {"tiktoken", "sentencepiece"}}
    assert users == {"tokenizer.py"}


def test_pictures_are_read_in_one_place_that_says_what_is_missing():
    assert [p.name for p in [*COMMON, *SCRIPTS, *DATA] if "PIL" in imports(parse(p))] == ["vision.py"]


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_scripts_do_not_import_scripts(path):
    assert not {name for name in imports(parse(path))
                if name.split(".")[0] in ("sample", "data") or name.startswith("train_")}


def reads_of(tree, *names):
    """Attributes read from a variable of one of these names."""
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
            and n.value.id in names}


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_every_option_is_read_and_every_read_is_an_option(path):
    tree = parse(path)
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    own = {n.target.id for n in config.body if isinstance(n, ast.AnnAssign)}
    inherited = {"SamplingConfig": set(SamplingConfig.__dataclass_fields__)}
    reads = reads_of(tree, "cfg")
    if path in STAGES:
        reads |= reads_of(parse(ROOT / "common/config.py"), "cfg")                # check_batch's
    assert own <= reads
    assert reads <= own.union(*(inherited[base.id] for base in config.bases))


def test_every_sampling_option_is_read():
    assert set(SamplingConfig.__dataclass_fields__) <= reads_of(parse(ROOT / "common/sampling.py"), "cfg")


def test_every_model_option_is_read():
    assert set(ModelConfig.__dataclass_fields__) <= reads_of(parse(ROOT / "common/model.py"), "c", "self")


def test_every_vision_option_is_read():
    assert set(VisionConfig.__dataclass_fields__) <= reads_of(parse(ROOT / "common/vision.py"), "c", "self")


def test_the_environment_is_read_in_one_place():
    environment = re.compile(r"\benviron\b|getenv")
    readers = {p.name for p in [*SCRIPTS, *COMMON, PREPARE] if environment.search(p.read_text())}
    assert readers == {"dist.py"}


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_a_script_fits_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 350


def test_common_stays_small():
    assert sum(len(p.read_text().splitlines()) for p in COMMON) <= 5350
    assert max(len(p.read_text().splitlines()) for p in COMMON) <= 800


@pytest.mark.parametrize("name", ["setup", "model, optimizer", "run directory"])
def test_a_block_that_says_so_is_the_same_in_every_stage(name):
    """Copies are allowed, drift is not."""
    block = rf"# {name} \(identical in every stage\)\n(.*?)\n    # -{{70}}"
    assert len({re.search(block, path.read_text(), re.S)[1] for path in STAGES}) == 1


@pytest.mark.parametrize("path", [*COMMON, *SCRIPTS, *DATA, *ROOT.glob("configs/**/*.py")],
                         ids=by_name)
def test_lines_fit_110_columns_and_options_have_comments(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 110, f"{path.name}:{number}"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            for field in (n for n in node.body if isinstance(n, ast.AnnAssign) and n.target.id != "model"):
                line = path.read_text().splitlines()[field.end_lineno - 1]
                assert re.search(r"  # \S", line), f"{path.name}: {field.target.id} has no help text"


def test_no_silent_shortcuts():
    for path in [*COMMON, *SCRIPTS, *DATA]:
        text = path.read_text()
        shortcuts = r"strict=False|except:|warnings\.filter|NotImplementedError|TODO|FIXME"
        assert not re.search(shortcuts, text), path.name
        assert "weights_only=False" not in text, path.name
        assert not re.search(r"pickle\.loads?\(", text), path.name
