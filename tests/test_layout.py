"""The architecture, checked: who imports whom, budgets that only go down, options that are read."""
import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

from common.model import ModelConfig
from common.run import RunConfig
from common.sampling import SamplingConfig

ROOT = Path(__file__).parent.parent
STAGES = sorted(ROOT.glob("train_*.py"))
SCRIPTS = [*STAGES, ROOT / "sample.py"]
# but what only gives the new name of a module that has moved
COMMON = [path for path in sorted((ROOT / "common").glob("*.py"))
          if not path.read_text().startswith("raise SystemExit")]
EXTRAS = sorted((ROOT / "extras").glob("*.py"))
DATA = sorted((ROOT / "data").glob("*.py"))
DEMOS = sorted((ROOT / "demos").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PRODUCT = [*SCRIPTS, *COMMON, *EXTRAS, *DATA, *DEMOS, *CONFIGS]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FIXED = {"torch", "numpy", "tiktoken", "sentencepiece"}
# what a file of common/ may import of common/: one direction, no circles; only run.py ties many together
MAY_IMPORT = {
    "errors": "", "schedule": "", "config": "errors", "dist": "errors", "branches": "",
    "data": "branches errors",
    "logger": "dist errors", "checkpoint": "dist errors", "tokenizer": "errors", "chat": "",
    "layers": "errors", "attention": "errors", "moe": "layers dist",
    "model": "attention layers moe dist errors", "losses": "dist errors",
    "optim": "", "zero1": "dist", "sampling": "errors", "rewards": "dist errors",
    "run": "checkpoint chat config data dist errors logger model optim sampling schedule tokenizer zero1",
}


def by_name(path):
    return str(path.relative_to(ROOT))


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(nodes):
    """Dotted names of the modules that nodes import: `from common import dist` is common.dist"""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("common", "extras"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def top_imports(path):
    """Of the top of a module, what `try:` tries included"""
    nodes = parse(path).body
    nodes += [inner for node in nodes if isinstance(node, ast.Try) for inner in node.body]
    return imports(nodes)


def all_imports(path):
    return imports(ast.walk(parse(path)))


# -----------------------------------------------------------------------------
# who may import whom

@pytest.mark.parametrize("path", COMMON, ids=by_name)
def test_common_imports_in_one_direction(path):
    if path.stem == "__init__":
        return
    ours = {name for name in top_imports(path) if name.split(".")[0] not in sys.stdlib_module_names}
    allowed = {f"common.{name}" for name in MAY_IMPORT[path.stem].split()}
    assert {name for name in ours if name.split(".")[0] not in FIXED} <= allowed


@pytest.mark.parametrize("path", PRODUCT, ids=by_name)
def test_extras_are_imported_only_where_they_are_asked_for(path):
    users = {name for name in top_imports(path) if name.split(".")[0] in ("extras", "data", "demos")}
    allowed = {"extras": ("extras", "data"), "data": ("data", "extras"), "demos": ("extras", "data", "demos")}
    home = path.relative_to(ROOT).parts[0]
    assert {name for name in users if name.split(".")[0] not in allowed.get(home, ())} == set()


@pytest.mark.parametrize("path", [*COMMON, *SCRIPTS, *EXTRAS, *DATA], ids=by_name)
def test_only_the_fixed_packages_are_needed_at_the_top_of_a_module(path):
    outside = {name.split(".")[0] for name in top_imports(path)} - set(sys.stdlib_module_names)
    assert outside <= FIXED | {"common", "extras", "data"}


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_scripts_do_not_import_scripts(path):
    assert not {name for name in all_imports(path)
                if name.split(".")[0] in ("sample", "data", "demos") or name.startswith("train_")}


def test_tokenizer_packages_are_imported_where_tokenizers_are_used_and_made():
    users = {path.name for path in PRODUCT if all_imports(path) & {"tiktoken", "sentencepiece"}}
    assert users == {"tokenizer.py", "train_tokenizer.py"}


def test_the_environment_is_read_in_one_place():
    environment = re.compile(r"\benviron\b|getenv")
    readers = {path.name for path in [*SCRIPTS, *COMMON, *EXTRAS, *DATA]
               if environment.search(path.read_text())}
    assert readers == {"dist.py"}


def test_run_never_computes_a_step():
    """Values and files only: the loop and what is in it stay in the script."""
    text = (ROOT / "common/run.py").read_text()
    code = text[text.index("import math"):]
    assert not re.search(r"\.backward\(|optimizer\.step\(|\bforward\(|import losses|losses\.", code)


# -----------------------------------------------------------------------------
# budgets, in Python tokens, of the finished product: they only go down

SKIP = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
        tokenize.ENDMARKER}


def count(path):
    """-> Python tokens without comments, docstrings and line ends; lines that hold them"""
    tokens, lines, at_start = 0, set(), True
    for token in tokenize.tokenize(io.BytesIO(path.read_bytes()).readline):
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            at_start = True
        elif token.type not in SKIP and not (at_start and token.type == tokenize.STRING):
            at_start = False
            tokens += 1
            lines.add(token.start[0])
    return tokens, len(lines)


def total(paths):
    tokens, lines = zip(*map(count, paths))
    return sum(tokens), sum(lines)


@pytest.mark.parametrize("paths, budget", [(SCRIPTS, 11_000), (COMMON, 35_000), (PRODUCT, 78_000)],
                         ids=["scripts", "common", "all but tests"])
def test_the_code_stays_small_and_is_not_dense(paths, budget):
    tokens, lines = total(paths)
    assert tokens <= budget
    assert tokens <= 10 * lines


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_a_script_fits_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 250


@pytest.mark.parametrize("path", PRODUCT, ids=by_name)
def test_a_file_is_read_in_one_sitting_and_its_lines_fit_100_columns(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= (600 if path in COMMON else 700)
    for number, line in enumerate(lines, 1):
        assert len(line) <= 100, f"{path.name}:{number}"


def test_the_readme_and_the_pages_are_short():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 220 and len(readme.split()) <= 2500
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 120
    for page in PAGES:
        assert len(page.read_text().splitlines()) <= 150, page.name


# -----------------------------------------------------------------------------
# options

def reads_of(tree, *names):
    """Attributes read from a variable or attribute of one of these names: cfg.lr, self.cfg.lr"""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value = node.value
            name = value.id if isinstance(value, ast.Name) else getattr(value, "attr", None)
            found |= {node.attr} if name in names else set()
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_every_option_is_read_and_every_read_is_an_option(path):
    tree = parse(path)
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    own = {n.target.id for n in config.body if isinstance(n, ast.AnnAssign)}
    inherited = set((SamplingConfig if path.stem == "sample" else RunConfig).__dataclass_fields__)
    reads = reads_of(tree, "cfg")
    assert own - inherited <= reads
    assert reads <= own | inherited


def test_every_shared_option_is_read():
    readers = [ROOT / f"common/{name}.py" for name in ("run", "config")]
    reads = set().union(*(reads_of(parse(path), "cfg") for path in readers))
    names = re.findall(r"(\w+)=\d", (ROOT / "common/run.py").read_text())     # check_options' table
    in_scripts = {"compile", "grad_clip"}
    assert set(RunConfig.__dataclass_fields__) - in_scripts <= reads | set(names)
    assert all(in_scripts <= reads_of(parse(path), "cfg") for path in STAGES)


def test_every_sampling_and_model_option_is_read():
    assert set(SamplingConfig.__dataclass_fields__) <= reads_of(parse(ROOT / "common/sampling.py"), "cfg")
    reads = set().union(*(reads_of(parse(path), "c", "self", "config") for path in COMMON))
    assert set(ModelConfig.__dataclass_fields__) <= reads


@pytest.mark.parametrize("path", PRODUCT, ids=by_name)
def test_options_have_comments(path):
    lines = path.read_text().splitlines()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            for option in (n for n in node.body if isinstance(n, ast.AnnAssign) and n.target.id != "model"):
                line = lines[option.end_lineno - 1]
                assert re.search(r"  # \S", line), f"{path.name}: {option.target.id} has no help text"


def test_no_silent_shortcuts():
    for path in [*COMMON, *SCRIPTS, *EXTRAS, *DATA]:
        text = path.read_text()
        shortcuts = r"strict=False|except:|warnings\.filter|NotImplementedError|TODO|FIXME"
        assert not re.search(shortcuts, text), path.name
        assert "weights_only=False" not in text, path.name
        assert not re.search(r"pickle\.loads?\(", text), path.name
