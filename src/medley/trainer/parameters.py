"""The weights that a run trains: a LoRA adapter, the image rows of the head, or all weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import peft
from peft.utils.constants import DUMMY_TARGET_MODULES

from medley.checkpoints.adapter import find_adapter, load_adapter
from medley.data.vocabulary import Vocabulary
from medley.errors import UserError
from medley.modeling.chameleon import ChameleonForConditionalGeneration

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Trainable = Literal["lora", "full", "image_head", "lora+image_head"]


def trainable_model(
    decoder: ChameleonForConditionalGeneration,
    trainable: Trainable,
    vocabulary: Vocabulary,
    base_name: str,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str],
    rslora: bool = False,
    start: Path | None = None,
) -> Any:
    """Freezes all weights of a decoder but those that `trainable` names.

    The VQGAN in the decoder is never trained.

    Args:
        decoder: the base's decoder
        trainable: `lora`, `image_head` (the head's rows of the image tokens, as Anole trains
            them), `lora+image_head`, or `full`
        vocabulary: the base's vocabulary
        base_name: name of the base in the saved adapter's configuration
        rank: rank of the adapter
        alpha: scale of the adapter, alpha / rank
        dropout: dropout before the adapter
        targets: names of the modules that get an adapter
        rslora: scale by alpha / sqrt(rank) instead
        start: adapter to continue training; its configuration then decides what is trained

    Returns a PeftModel, or the decoder itself for `full`. Raises UserError for a target that is
    not a module of the layers.
    """
    decoder.requires_grad_(False)
    if trainable == "full":
        decoder.requires_grad_(True)
        decoder.model.vqmodel.requires_grad_(False)
        return decoder
    if start is not None:
        return load_adapter(decoder, find_adapter(start), True)
    modules = [name.rpartition(".")[2] for name, _ in decoder.model.layers.named_modules()]
    unknown = [target for target in targets if target not in modules]
    if "lora" in trainable and unknown:
        raise UserError(
            f"--lora_target {', '.join(unknown)}: no such module (modules: "
            f"{', '.join(PROJECTIONS)})."
        )
    image_rows = {"lm_head": list(vocabulary.image_codes)} if "image_head" in trainable else None
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=list(targets) if "lora" in trainable else DUMMY_TARGET_MODULES,
        trainable_token_indices=image_rows,
        base_model_name_or_path=base_name,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(decoder, config)
    model.peft_config["default"].base_model_name_or_path = base_name
    return model
