"""The command line: verbs, flags, aliases, configuration files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from medley import cli
from medley.utils.cli_options import Alias, find_config, parse, run_program
from medley.utils.extras import require_extra
from medley.version import __version__


@dataclass(frozen=True)
class Options:
    """Options of a program.

    Args:
        base_path: a path
        source: a text
        names: several texts
        on_error: what to do
        html_report: a switch
        trainer: more fields
    """

    base_path: Path
    source: str = "x"
    names: list[str] | None = None
    on_error: Literal["fail", "skip"] = "fail"
    html_report: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    spelling: ClassVar = {"source": "from"}
    aliases: ClassVar = {
        "base": Alias("base_path"),
        "skip_bad": Alias("on_error", when_set="skip", when_unset="fail"),
        "html": Alias("html_report"),
        "from": Alias("from", values={"old": "new"}),
    }


def options(*words: str) -> Options:
    return parse(Options, "program", words)


def error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        options(*words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_flags_give_options() -> None:
    found = options("--base_path", "a", "--names", "b", "c", "--html_report", "--from=d",
                    "--trainer", '{"tf32": true}')  # fmt: skip
    assert found == Options(Path("a"), "d", ["b", "c"], "fail", True, {"tf32": True})
    assert options("--base_path", "a", "--no_html_report").html_report is False
    assert options("--base_path", "a", "--trainer.tf32", "true").trainer == {"tf32": True}


def test_a_repeated_flag_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base_path", "a"]
    assert "--base_path is given twice" in error(capsys, *words, "--base_path", "b")
    assert "--base_path is given twice" in error(capsys, *words, "--base_path=b")
    assert "--names is given twice" in error(capsys, *words, "--names", "b", "--names", "c")
    repeated = error(capsys, *words, "--html_report", "--no_html_report")
    assert "--no_html_report is given twice" in repeated


def test_an_unknown_or_abbreviated_flag_proposes_the_whole_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "did you mean --base_path?" in error(capsys, "--base_p", "a")
    assert "did you mean --base_path?" in error(capsys, "--base-path", "a")
    assert "did you mean --names?" in error(capsys, "--base_path", "a", "--nmaes", "b")
    unlike = error(capsys, "--base_path", "a", "--qqq")
    assert "unknown flag --qqq" in unlike
    assert "did you mean" not in unlike


def test_a_deprecated_flag_warns_once_with_its_new_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = options("--base", "a", "--skip_bad", "--html", "--from", "old")
    assert found == Options(Path("a"), "new", None, "skip", True)
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [
        "program: warning: --base is deprecated, use --base_path",
        "program: warning: --skip_bad is deprecated, use --on_error skip",
        "program: warning: --html is deprecated, use --html_report",
        "program: warning: --from old is deprecated, use --from new",
    ]
    assert options("--base_path", "a", "--no_skip_bad").on_error == "fail"
    assert options("--base_path", "a", "--skip_bad", "false").on_error == "fail"
    assert options("--base_path", "a", "--from", "b").source == "b"
    assert "use --from" not in capsys.readouterr().err


def test_a_flag_and_its_deprecated_name_are_a_repetition(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        options("--base", "a", "--base_path", "b")
    assert "--base_path is given twice" in capsys.readouterr().err


def test_a_configuration_file_gives_way_to_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("base: a\nskip_bad: true\nfrom: b\ntrainer: {tf32: true}\n")
    found = options("--from", "c", "--config", str(config))
    assert found == Options(Path("a"), "c", None, "skip", False, {"tf32": True})
    assert "'base' is deprecated, use 'base_path'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_pth: a", "unknown option 'base_pth'; did you mean base_path?"),
        ("- a", "expected a mapping of options to values"),
        ("a: [", "cannot be read"),
        ("base: a\nbase_path: b", "two keys set 'base_path'"),
        ("base_path: a\non_error: maybe", "on_error"),
    ],
)
def test_a_bad_configuration_file_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert message in error(capsys, "--config", str(config))


def test_recipes_are_found_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert find_config("medmax_lora").name == "medmax_lora.yaml"
    assert "no recipe of that name (recipes: demo, full" in error(capsys, "--config", "nothing")


def test_a_missing_extra_is_named_with_its_command() -> None:
    require_extra("json", "serve", "medley serve")
    with pytest.raises(ValueError, match=r"--ui needs no_such_module, .* 'medley-mm\[serve\]'"):
        require_extra("no_such_module", "serve", "--ui")


def test_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Options) -> None:
        raise KeyboardInterrupt

    words = ["--base_path", "a"]
    assert run_program("program", Options, interrupted, words) == 130
    assert "program: interrupted" in capsys.readouterr().err
    assert run_program("program", Options, lambda o: None, words) == 0
    assert "base_path: a" in capsys.readouterr().out


# --- verbs ------------------------------------------------------------------------------------


def test_help_lists_all_verbs_by_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for stage, verbs in cli.STAGES.items():
        assert f"\n{stage}:\n" in text
        for name in verbs:
            assert f"\n  {name} " in text
    assert cli.main([]) == 2


def test_help_and_version_import_nothing_heavy() -> None:
    script = (
        "import sys; from medley.cli import main; main(['--help']); main(['--version'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'jsonargparse', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith(f"medley {__version__}\n")


def test_an_unknown_verb_proposes_a_known_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tokenise-images"]) == 2
    assert "Did you mean 'tokenize-images'?" in capsys.readouterr().err
    assert cli.main(["evaluate", "vqas"]) == 2
    assert "Did you mean 'evaluate vqa'?" in capsys.readouterr().err
    assert cli.main(["xxxxxxxx"]) == 2
    assert "Verbs: convert" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_help_for_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb = cli.VERBS[name]
    module = cli.load(verb)
    assert callable(getattr(module, verb.function))
    with pytest.raises(SystemExit) as stopped:
        cli.main([*name.split(), "--help"])
    assert stopped.value.code == 0
    assert f"medley {name}" in capsys.readouterr().out
    from medley.utils.cli_options import aliases_of, make_parser

    kind = getattr(module, verb.options)
    flags = {flag.removeprefix("--") for flag in make_parser(kind, name)._option_string_actions}
    for old, alias in aliases_of(kind).items():
        assert alias.flag in flags, f"--{old} is an alias of --{alias.flag}, which is not a flag"
        assert old == alias.flag or old not in flags, f"--{old} is a flag and an alias"


def test_names_that_medmax_users_know_are_synonyms() -> None:
    for old, new in cli.SYNONYMS.items():
        assert old not in cli.VERBS
        assert new in cli.VERBS


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_scripts_have_verbs_and_flags(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--completion", shell]) == 0
    script = capsys.readouterr().out
    assert "tokenize-images" in script
    assert "text_temperature" in script
    assert cli.main(["--completion", "fish"]) == 2


def test_torchrun_and_python_run_the_package() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "medley", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"medley {__version__}\n"
