"""The embedded model's recipe: resuming, other options, packing, the narrow vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import make_tiny
from training.tiny import decoder, text
from training.tiny.decoder import (
    UNUSED_MARGIN,
    NarrowVocabulary,
    Optimizers,
    batches,
    best_fit,
    empty_decoder,
    widen,
)
from training.tiny.recipe import Options

from medley.checkpoints.checkpoint import open_checkpoint
from medley.data.packing import IGNORE_INDEX
from medley.errors import UserError
from medley.phantoms import curriculum
from medley.tiny.embedded import tiny_folder
from medley.utils.cli_options import resolved

SMALL = {
    "vqgan_steps": 3, "vqgan_batch": 4, "active_codes": 16, "codebook_start": 1, "merges": 40,
    "width": 32, "layers": 1, "heads": 2, "context": 1024, "decoder_steps": 7, "decoder_rows": 2,
    "row_length": 512,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes chunks of about three steps, so that seven steps need several."""
    monkeypatch.setattr(curriculum, "SCANS_PER_CHUNK", 8)
    monkeypatch.setattr(decoder, "FIT_BATCHES", 2)
    texts = text.phantom_texts
    monkeypatch.setattr(text, "phantom_texts", lambda seed, scans: texts(seed, scans // 100))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums that are split over threads may round differently from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(output: Path, **other: int) -> int:
    words = [f"--{name}={value}" for name, value in (SMALL | other).items()]
    return make_tiny.main([f"--output={output}", *words])


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(open_checkpoint(str(folder)).decoder(torch.float32).state_dict())


def test_interrupted_run_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make(tmp_path / "complete") == 0
    original_step = Optimizers.step

    def step(self: Optimizers, fraction: float) -> None:
        steps[0] += 1
        if steps[0] == stop_at:
            raise KeyboardInterrupt
        original_step(self, fraction)

    steps, stop_at = [0], 6
    with monkeypatch.context() as patch:
        patch.setattr(Optimizers, "step", step)
        assert make(tmp_path / "interrupted") == 130
    assert (tmp_path / "interrupted" / "decoder.part").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Optimizers, "step", step)
        steps, stop_at = [0], 0
        assert make(tmp_path / "interrupted") == 0
    assert 1 <= steps[0] < SMALL["decoder_steps"]
    one, other = weights(tmp_path / "complete"), weights(tmp_path / "interrupted")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [
        json.loads((tmp_path / n / "training_log.json").read_text())
        for n in ("complete", "interrupted")
    ]
    for name in ("vqgan", "decoder", "chunks"):
        assert logs[0][name] == logs[1][name]
        assert logs[0][name]


def test_resuming_with_other_options_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    options = resolved(Options(**SMALL)) | {"decoder_steps": 9}  # type: ignore[arg-type]
    log = {"options": options, "vqgan": [], "decoder": []}
    (tmp_path / "run" / "training_log.json").write_text(json.dumps(log))
    assert make(tmp_path / "run") == 2
    assert "decoder_steps was 9, now 7" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["training_log.json"]


def test_invalid_options_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path / "new", codebook_start=3) == 2
    assert "--vqgan_steps 3: Expected more" in capsys.readouterr().err
    (tmp_path / "old" / "tokenizer").mkdir(parents=True)
    assert make(tmp_path / "old") == 2
    assert "without training_log.json" in capsys.readouterr().err


def test_embedded_model_was_made_with_the_default_options() -> None:
    log = json.loads((tiny_folder() / "training_log.json").read_text())
    assert log["options"] == resolved(Options())
    assert log["decoder"][-1]["step"] == Options().decoder_steps
    assert log["chunks"] > 50


def test_best_fit_packing_is_unchanged() -> None:
    assert best_fit([3, 9, 4, 6, 7], 10) == [[1], [0, 4], [2, 3]]
    with pytest.raises(UserError, match="--row_length 10: A document has 11 tokens"):
        best_fit([11], 10)


def test_wide_decoder_gives_the_logits_of_the_narrow_one() -> None:
    options = Options(width=32, layers=1, heads=2, active_codes=1024, decoder_rows=2)
    tiny = open_checkpoint("tiny")
    tokenizer, vqgan = tiny.text_tokenizer(), tiny.vqgan()[0]
    narrow = NarrowVocabulary(tokenizer, options.active_codes)
    wide = next(batches(options, tokenizer, vqgan, 0))
    batch = narrow.convert(wide)
    assert torch.equal(narrow.to_wide[batch["input_ids"]], wide["input_ids"])
    trained_on = wide["labels"] != IGNORE_INDEX
    assert trained_on.any() and torch.equal(trained_on, batch["labels"] != IGNORE_INDEX)
    assert torch.equal(narrow.to_wide[batch["labels"][trained_on]], wide["labels"][trained_on])

    torch.manual_seed(0)
    trained = empty_decoder(options, tokenizer, vqgan, narrow.names).eval()
    decoder = widen(options, tokenizer, vqgan, narrow, trained)
    decoder.set_attn_implementation("sdpa")
    with torch.no_grad():
        shared = {"position_ids": wide["position_ids"], "use_cache": False}
        expected = trained(input_ids=batch["input_ids"], **shared).logits
        logits = decoder(input_ids=wide["input_ids"], **shared).logits
    torch.testing.assert_close(logits[..., narrow.to_wide], expected)
    unused = torch.ones(logits.shape[-1], dtype=torch.bool)
    unused[narrow.to_wide] = False
    before_image_tokens = torch.isin(wide["input_ids"][:, 1:], narrow.image_tokens)
    above = logits[:, :-1][..., unused] - expected[:, :-1].logsumexp(-1, keepdim=True)
    # A loose bound: the states of an untrained decoder fit badly.
    assert above[before_image_tokens].median() < -UNUSED_MARGIN / 3

    wide["input_ids"][0, 5] = tokenizer.vocabulary.image_codes.start + options.active_codes
    with pytest.raises(AssertionError, match="unused code"):
        narrow.convert(wide)
