"""Pytest plugin: puts Medley's decoder in the place of the stock class, and records outcomes.

pytest -p peer_plugin --decoder medley --tiny_model FOLDER --outcomes FILE --only REGEX TESTS

The suites of transformers and PEFT import the class by its name, or load it by an Auto class from
the hub. Both give the class that `--decoder` names, the latter with the weights of FOLDER. FILE
receives one JSON object, test -> outcome.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

# Of PEFT's small models, this one has layers named like Chameleon's.
HUB_NAME = "trl-internal-testing/tiny-random-LlamaForCausalLM"
_RANK = {"passed": 0, "skipped": 1, "failed": 2}
_outcomes: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path)
    parser.addoption("--only", default="", help="regular expression of the tests to run")
    parser.addoption("--decoder", choices=("medley", "stock"), default="medley")
    parser.addoption("--tiny_model", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--decoder") == "medley":
        _substitute_decoder()
    folder: Path | None = config.getoption("--tiny_model")
    if folder is not None:
        _substitute_hub(str(folder))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    pattern = re.compile(config.getoption("--only"))
    items[:] = [item for item in items if pattern.search(item.nodeid)]
    folder: Path | None = config.getoption("--tiny_model")
    for module in list(sys.modules.values()):
        if hasattr(module, "hub_online_once"):  # PEFT's helper asks the hub before its cache
            module.hub_online_once = contextlib.nullcontext  # type: ignore[attr-defined]
    for item in items:
        suite = getattr(item, "cls", None)
        if folder is not None and hasattr(suite, "processor_class"):
            _substitute_processor(suite, folder)


def _substitute_decoder() -> None:
    """Lets transformers' names of the class, and its Auto classes, give Medley's."""
    import transformers
    from transformers.models.chameleon import modeling_chameleon

    from medley.modeling.chameleon import ChameleonForConditionalGeneration as Decoder

    for module in (transformers, transformers.models.chameleon, modeling_chameleon):
        module.ChameleonForConditionalGeneration = Decoder


def _substitute_hub(folder: str) -> None:
    """Loads the model of `folder` in place of PEFT's small one, with LoRA on the same layers."""
    import transformers
    from peft.utils import constants

    # PEFT's helpers import these, for tests that do not apply.
    _stub("datasets", load_dataset=lambda *_: pytest.skip("needs the package datasets"))
    _stub("diffusers", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))
    targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets["chameleon"] = targets["llama"]
    decoder = transformers.models.chameleon.ChameleonForConditionalGeneration
    for auto, target in (
        (transformers.AutoModelForCausalLM, decoder),
        (transformers.AutoTokenizer, transformers.AutoTokenizer),
        (transformers.AutoConfig, transformers.AutoConfig),
        (transformers.AutoModelForSeq2SeqLM, None),
    ):
        _redirect(auto, target and target.from_pretrained, folder)


def _stub(name: str, **attributes: Any) -> None:
    """A module with these attributes only, unless the package is installed."""
    if importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(attributes)
        sys.modules[name] = module


def _redirect(auto: Any, load: Any, folder: str) -> None:
    """`auto.from_pretrained` calls `load` for the model of `folder`. Nothing is downloaded."""
    original = auto.from_pretrained

    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
        if load is not None and str(name) in (HUB_NAME, folder):
            return load(folder, *args, **kwargs)
        if not Path(str(name)).exists():
            pytest.skip(f"{name} is another model, on the hub")
        return original(name, *args, **kwargs)

    auto.from_pretrained = from_pretrained


def _substitute_processor(suite: Any, folder: Path) -> None:
    """Gives the processor's suite the tokenizer and the image settings that Medley writes."""
    from transformers import AutoImageProcessor, AutoTokenizer

    suite._setup_tokenizer = classmethod(lambda _: AutoTokenizer.from_pretrained(folder))
    suite._setup_image_processor = classmethod(lambda _: AutoImageProcessor.from_pretrained(folder))


def pytest_runtest_logreport(report: Any) -> None:
    # Setup, call, teardown and subtests have reports of their own. The worst of them counts.
    known = _outcomes.get(report.nodeid, "passed")
    _outcomes[report.nodeid] = max(known, report.outcome, key=_RANK.__getitem__)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--outcomes")
    if path is not None and not hasattr(session.config, "workerinput"):
        path.write_text(json.dumps(_outcomes, indent=0, sort_keys=True))
