"""The repository: its rooms, the direction of imports, the programs at the root, the wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

import medley
from medley.cli import VERBS
from medley.doctor import TESTED
from medley.trainer.options import TrainOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest there

PACKAGE = ROOT / "src" / "medley"
STAGES = ("tokenizer", "training", "conversion")
NO_ROOMS = {"templates", "recipes", "deepspeed"}  # folders of data
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def test_architecture_lists_the_rooms_on_disk() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = re.findall(r"^\| `(\w+)` \| .+ \|$", text, re.MULTILINE)
    folders = {
        p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name not in {*NO_ROOMS, "__pycache__"}
    }
    loose = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert set(table) == folders | loose
    assert len(table) == len(set(table))
    for name in NO_ROOMS:
        assert f"`{name}`" in text
        assert not list(modules(PACKAGE / name))


def test_the_import_contract_lists_the_rooms_in_the_same_order() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = re.findall(r"^\| `(\w+)` \| .+ \|$", text, re.MULTILINE)
    (layers,) = (c["layers"] for c in PROJECT["tool"]["importlinter"]["contracts"] if "layers" in c)
    listed = [re.findall(r"medley\.(\w+)", layer) for layer in layers]
    assert {name for layer in listed for name in layer} == set(table)
    floors = {name: number for number, layer in enumerate(listed) for name in layer}
    assert [floors[name] for name in table] == sorted(floors[name] for name in table)


def test_the_library_has_few_loose_modules_and_no_large_ones() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    for path in modules(ROOT / "src"):
        lines = path.read_text().count("\n")
        assert lines <= 400, f"{path} has {lines} lines"


def test_an_init_only_exports() -> None:
    for path in modules(PACKAGE):
        if path.name != "__init__.py" or path.parent == PACKAGE:
            continue
        for node in ast.parse(path.read_text()).body:
            names = getattr(node, "targets", [None])[0]
            exports = isinstance(names, ast.Name) and names.id == "__all__"
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            imports = isinstance(node, ast.Import | ast.ImportFrom)
            for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            lazy = for_types or getattr(node, "name", None) == "__getattr__"  # on first use
            assert exports or docstring or imports or lazy, f"{path}:{node.lineno} is logic"


def test_utils_imports_no_room_of_the_domain() -> None:
    allowed = ("medley.utils", "medley.errors", "medley.version")
    for path in modules(PACKAGE / "utils"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medley"):
                assert node.module.startswith(allowed), f"{path} imports {node.module}"


@pytest.mark.parametrize("stage", STAGES)
def test_root_programs_are_a_docstring_and_one_call(stage: str) -> None:
    for path in sorted((ROOT / stage).glob("*.py")):
        if path.name == "__init__.py" or path.name in ("make_tiny.py", "pipeline_report.py"):
            continue
        text = path.read_text()
        tree = ast.parse(text)
        docstring = ast.get_docstring(tree) or ""
        program = f"{stage}.{path.stem}"
        assert f"-m {program}" in docstring, f"{path} does not show its command"
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
        assert [f.name for f in functions] == ["main"]
        assert [a.arg for a in functions[0].args.args] == ["argv"]
        verb, prog = re.search(r'run_verb\("([\w-]+)", argv, prog="([\w.]+)"\)', text).groups()  # type: ignore[union-attr]
        assert verb in VERBS
        assert prog == program
        assert f"medley {verb}" in docstring


def test_the_public_api_is_listed_and_importable() -> None:
    assert medley.__all__ == [
        "Document", "GenerationOptions", "ImagePart", "ImageTokenizer", "Model", "Response",
        "StreamEvent", "Turn", "Vocabulary", "__version__", "load",
    ]  # fmt: skip
    for name in medley.__all__:
        assert getattr(medley, name) is not None
    with pytest.warns(DeprecationWarning, match=r"use medley\.ImagePart"):
        assert medley.Picture is medley.ImagePart  # alias
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = medley.nothing


@pytest.mark.slow
def test_the_wheel_alone_has_every_verb(tmp_path: Path) -> None:
    """An installed wheel, in an empty folder: verbs, recipes, prompts, DeepSpeed files."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"medley"}
    for name in ("tiny/tokenizer/vqgan.ckpt", "py.typed", "templates/base.html",
                 "deepspeed/zero2.json", "recipes/medmax_lora.yaml"):  # fmt: skip
        assert f"medley/{name}" in names
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(installed)
    empty.mkdir()
    script = (
        "import contextlib, io, sys; sys.path.insert(0, sys.argv[1])\n"
        "import medley.cli as cli; assert cli.__file__.startswith(sys.argv[1])\n"
        "for name in cli.VERBS:\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):\n"
        "        cli.main([*name.split(), '--help'])\n"
        "    assert f'medley {name}' in out.getvalue() and '--' in out.getvalue(), name\n"
        "status = cli.main(['train', '--config', 'medmax_lora', '--ckpt', 'tiny', "
        "'--train_data', 'none.jsonl', '--output_dir', 'out'])\n"
        "assert status == 2, status\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(installed)], cwd=empty, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "none.jsonl" in done.stderr  # the recipe was found; the data is what is missing


def test_the_embedded_model_is_small() -> None:
    files = [p for p in (PACKAGE / "tiny").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 24 * 2**20


def test_every_recipe_is_valid() -> None:
    recipes = sorted((PACKAGE / "recipes").glob("*.yaml"))
    assert len(recipes) == 11
    for path in recipes:
        keys = {**yaml.safe_load(path.read_text()), "global_bs": None}
        ds = keys.pop("ds", None)
        assert ds is None or (PACKAGE / "deepspeed" / f"{ds}.json").is_file(), path
        TrainOptions(train_data=["x"], ckpt="tiny", output_dir=Path("y"), **keys)


def test_paths_that_medmax_users_know_lead_to_the_package_data() -> None:
    for old, new in {
        "training/recipes": "recipes", "training/deepspeed": "deepspeed",
        "training/ds_config.json": "deepspeed/zero2.json",
        "conversion/prompts": "datasets/instructions/prompts",
    }.items():  # fmt: skip
        assert (ROOT / old).resolve() == (PACKAGE / new).resolve()


def test_the_two_commands_of_the_readme_are_make_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "test-quick", "format", "lint", "types"} <= targets
    assert "make demo" in (ROOT / "README.md").read_text()
    assert "make lint types test" in (ROOT / ".ci" / "run").read_text()


def test_pins_lie_within_the_ranges_that_users_get() -> None:
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = [text for group in groups for text in group]
    pins: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if "==" in line:
            pin = Requirement(line)
            pins.setdefault(pin.name.lower(), []).append(str(pin.specifier)[2:])
    for text in wanted:
        requirement = Requirement(text)
        versions = pins.get(requirement.name.lower())
        assert versions, f"requirements.txt has no {requirement.name}; run make lock"
        for version in versions:
            assert requirement.specifier.contains(version), f"{text}, pinned {version}"


def test_doctor_checks_the_ranges_of_the_package() -> None:
    project = PROJECT["project"]
    ranges = {
        r.name: {s.operator: s.version for s in r.specifier}
        for r in map(Requirement, [*project["dependencies"],
                                   *project["optional-dependencies"]["train"]])
    }  # fmt: skip
    for name, (first, last) in TESTED.items():
        assert ranges[name][">="] == first, name
        assert ranges[name].get("<", last) == last, name
