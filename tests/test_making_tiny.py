"""The embedded model's recipe: a run that was stopped, other options, the narrow vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import make_tiny
from training.tiny import decoder, text
from training.tiny.decoder import (
    BELOW,
    Narrow,
    Optimizers,
    batches,
    best_fit,
    empty_decoder,
    widened,
)
from training.tiny.recipe import Options

from medley.checkpoints.checkpoint import open_checkpoint, tiny_folder
from medley.data.packing import IGNORE_INDEX
from medley.errors import UserError
from medley.phantoms import lessons
from medley.utils.cli_options import resolved

SMALL = {
    "vqgan_steps": 3, "vqgan_batch": 4, "active_codes": 16, "codebook_start": 1, "merges": 40,
    "width": 32, "layers": 1, "heads": 2, "context": 1024, "decoder_steps": 7, "decoder_rows": 2,
    "row_length": 512,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of about three steps, so that seven steps need some."""
    monkeypatch.setattr(lessons, "SCANS", 8)
    monkeypatch.setattr(decoder, "QUIET_BATCHES", 2)
    texts = text.phantom_texts
    monkeypatch.setattr(text, "phantom_texts", lambda seed, scans: texts(seed, scans // 100))


def make(output: Path, **other: int) -> int:
    words = [f"--{name}={value}" for name, value in (SMALL | other).items()]
    return make_tiny.main([f"--output={output}", *words])


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(open_checkpoint(str(folder)).decoder(torch.float32).state_dict())


def test_a_stopped_run_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make(tmp_path / "whole") == 0
    steps = Optimizers.step

    def stopped(self: Optimizers, share: float) -> None:
        taken[0] += 1
        if taken[0] == stop:
            raise KeyboardInterrupt
        steps(self, share)

    taken, stop = [0], 6
    with monkeypatch.context() as patch:
        patch.setattr(Optimizers, "step", stopped)
        assert make(tmp_path / "stopped") == 130
    assert (tmp_path / "stopped" / "decoder.part").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Optimizers, "step", stopped)
        taken, stop = [0], 0
        assert make(tmp_path / "stopped") == 0
    assert 1 <= taken[0] < SMALL["decoder_steps"]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [
        json.loads((tmp_path / n / "training_log.json").read_text()) for n in ("whole", "stopped")
    ]
    for name in ("vqgan", "decoder", "chunks"):
        assert logs[0][name] == logs[1][name]
        assert logs[0][name]


def test_what_was_begun_with_other_options_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "begun").mkdir()
    begun = resolved(Options(**SMALL)) | {"decoder_steps": 9}  # type: ignore[arg-type]
    log = {"options": begun, "vqgan": [], "decoder": []}
    (tmp_path / "begun" / "training_log.json").write_text(json.dumps(log))
    assert make(tmp_path / "begun") == 2
    said = capsys.readouterr().err
    assert "begun with --decoder_steps 9, not 7" in said
    assert [path.name for path in (tmp_path / "begun").iterdir()] == ["training_log.json"]


def test_what_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path / "new", codebook_start=3) == 2
    assert "--vqgan_steps 3: expected more" in capsys.readouterr().err
    (tmp_path / "old" / "tokenizer").mkdir(parents=True)
    assert make(tmp_path / "old") == 2
    assert "without training_log.json" in capsys.readouterr().err


def test_the_embedded_model_is_what_its_recipe_makes() -> None:
    log = json.loads((tiny_folder() / "training_log.json").read_text())
    assert log["options"] == resolved(Options())
    assert log["decoder"][-1]["step"] == Options().decoder_steps
    assert log["chunks"] > 50


def test_the_recipe_packs_as_it_did() -> None:
    assert best_fit([3, 9, 4, 6, 7], 10) == [[1], [0, 4], [2, 3]]
    with pytest.raises(UserError, match="11 tokens, --row_length is 10"):
        best_fit([11], 10)


def test_the_whole_vocabulary_says_what_the_narrow_one_did() -> None:
    options = Options(width=32, layers=1, heads=2, active_codes=1024, decoder_rows=2)
    tiny = open_checkpoint("tiny")
    tokenizer, vqgan = tiny.text_tokenizer(), tiny.vqgan()[0]
    narrow = Narrow(tokenizer, options.active_codes)
    wide = next(batches(options, tokenizer, vqgan, 0))
    batch = narrow.batch(wide)
    assert torch.equal(narrow.kept[batch["input_ids"]], wide["input_ids"])
    asked = wide["labels"] != IGNORE_INDEX
    assert asked.any() and torch.equal(asked, batch["labels"] != IGNORE_INDEX)
    assert torch.equal(narrow.kept[batch["labels"][asked]], wide["labels"][asked])

    torch.manual_seed(0)
    trained = empty_decoder(options, tokenizer, vqgan, narrow.names).eval()
    whole = widened(options, tokenizer, vqgan, narrow, trained)
    whole.set_attn_implementation("sdpa")
    with torch.no_grad():
        places = {"position_ids": wide["position_ids"], "use_cache": False}
        one = trained(input_ids=batch["input_ids"], **places).logits
        other = whole(input_ids=wide["input_ids"], **places).logits
    torch.testing.assert_close(other[..., narrow.kept], one)
    unused = torch.ones(other.shape[-1], dtype=torch.bool)
    unused[narrow.kept] = False
    before_codes = torch.isin(wide["input_ids"][:, 1:], narrow.codes)
    above = other[:, :-1][..., unused] - one[:, :-1].logsumexp(-1, keepdim=True)
    assert above[before_codes].median() < -BELOW / 3  # of untrained states, which no line fits well

    wide["input_ids"][0, 5] = tokenizer.vocabulary.image_codes.start + options.active_codes
    with pytest.raises(AssertionError, match="should not use"):
        narrow.batch(wide)
