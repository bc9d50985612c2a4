"""Converts Chameleon's layout to Hugging Face's, which transformers, PEFT and DeepSpeed load.

medley to-hf --input_dir CHAMELEON --model_size 7b --output_dir HF --verify
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medley.checkpoints.checkpoint import Checkpoint, open_checkpoint
from medley.checkpoints.conversion import max_abs_diff, write_hugging_face
from medley.checkpoints.logits import logit_difference
from medley.errors import UserError
from medley.utils.cli_options import resolved
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class ToHfOptions:
    """Converts a checkpoint to Hugging Face's layout.

    Args:
        input_dir: checkpoint in Chameleon's layout, or tiny
        output_dir: folder of the new checkpoint
        model_size: name of the folder below models/, if there are several
        verify: read the new checkpoint and compare all tensors and the logits
    """

    input_dir: str
    output_dir: Path
    model_size: str | None = None
    verify: bool = False


def to_hf(options: ToHfOptions) -> None:
    source = open_checkpoint(options.input_dir, options.model_size)
    if source.layout != "chameleon":
        raise UserError(
            f"{options.input_dir}: Wrong layout (expected Chameleon's with models/ and tokenizer/)."
        )

    def verify(new: Checkpoint) -> None:
        difference = max_abs_diff(source, new)
        logits = logit_difference(source, new)
        print(f"largest tensor difference: {difference:.3g}")
        print(f"largest logit difference: {logits.largest:.3g}")
        for what, value, limit in (
            ("tensors", difference, 0.0),
            ("logits", logits.largest, logits.limit()),
        ):
            if value > limit:
                raise UserError(
                    f"{options.output_dir}: The {what} differ from those of {options.input_dir} "
                    f"(got {value:.3g}, expected at most {limit:.3g}). Nothing was written."
                )

    check = verify if options.verify else None
    write_hugging_face(options.output_dir, source, verify=check)
    inputs = [source.model_folder / "params.json"]
    write_manifest(options.output_dir, resolved(options), inputs, source.fingerprint())
    print(f"wrote {options.output_dir}")
