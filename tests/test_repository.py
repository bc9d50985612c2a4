"""The house itself: README's tree, the direction of imports, the wheel, the recipes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from medley.trainer.options import TrainOptions

STAGES = ("tokenizer", "training", "conversion")


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_the_tree_in_the_readme_is_the_one_on_disk() -> None:
    block = re.search(r"```\n(README\.md.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    listed: set[str] = set()
    folders: list[str] = []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:depth]
        path = "".join(folders) + name
        if name.endswith("/"):
            folders.append(name)
        assert (ROOT / path).exists(), f"README names {path}, which is not there"
        listed.add(path.rstrip("/"))
    for name in tracked():
        if not name.endswith(".py") or name.startswith(("tests/", "benchmarks/")):
            continue
        if Path(name).name == "__init__.py" and Path(name).parent.name != "medley":
            continue
        covered = name in listed or (str(Path(name).parent) in listed and name.count("/") > 2)
        assert covered, f"README's tree lacks {name}"


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_imports_run_from_stage_to_library_only() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        assert not imports(path) & set(STAGES), f"{path} imports a stage"
    for stage in STAGES:
        others = set(STAGES) - {stage}
        for path in (ROOT / stage).glob("*.py"):
            assert not imports(path) & others, f"{path} imports another stage"


@pytest.mark.parametrize("stage", STAGES)
def test_programs_have_a_main_and_do_nothing_at_import(stage: str) -> None:
    assert (ROOT / stage / "__init__.py").exists()
    for path in (ROOT / stage).glob("*.py"):
        if path.name == "__init__.py":
            continue
        tree = ast.parse(path.read_text())
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
        assert len(functions) == 1, f"{path} has no main(argv=None)"
        assert [a.arg for a in functions[0].args.args] == ["argv"]
        calls = [n for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
        assert not calls, f"{path} works at import"


def test_the_wheels_only_top_level_name_is_medley(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"medley"}
    assert "medley/tiny/tokenizer/vqgan.ckpt" in names
    assert "medley/py.typed" in names


def test_the_embedded_model_is_small() -> None:
    files = [p for p in (ROOT / "src" / "medley" / "tiny").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 24 * 2**20


def test_every_recipe_can_be_parsed() -> None:
    recipes = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
    assert len(recipes) == 11
    for path in recipes:
        keys = {**yaml.safe_load(path.read_text()), "global_bs": None}
        ds = keys.pop("ds", None)
        assert ds is None or (ROOT / ds).is_file()
        TrainOptions(train_data=["x"], ckpt="tiny", output_dir=Path("y"), **keys)


def test_the_readmes_two_commands_are_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert "make demo" in (ROOT / "README.md").read_text()
    assert "make lint types test" in (ROOT / ".ci" / "run").read_text()
