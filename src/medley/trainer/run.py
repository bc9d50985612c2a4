"""The parts of a training run: environment, datasets, model, trainer, resuming, result."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from medley.checkpoints.checkpoint import Checkpoint, open_checkpoint
from medley.checkpoints.conversion import write_hugging_face
from medley.data.vocabulary import Vocabulary
from medley.errors import UserError
from medley.generation import GenerationOptions, Mode
from medley.inference.batch import generate_all, save_response
from medley.inference.devices import local_device
from medley.inference.model import Model
from medley.inference.prompts import read_prompts
from medley.modeling.attention import set_attention
from medley.modeling.chameleon import LossOptions, tie_head_norms
from medley.modeling.quantization import quantize_layers
from medley.tiny.embedded import TINY
from medley.trainer import checkpointing, deepspeed
from medley.trainer.callbacks import (
    GradientCheckCallback,
    LossCurveCallback,
    SampleCallback,
    write_loss_curve,
)
from medley.trainer.checkpoint_safety import check_checkpoint
from medley.trainer.data import (
    PackedDataset,
    PackingConfig,
    WeightedSource,
    group_by_task,
    open_token_dataset,
)
from medley.trainer.identity import identify_run
from medley.trainer.options import TrainOptions
from medley.trainer.parameters import trainable_model
from medley.trainer.preflight import make_flop_counter
from medley.trainer.trainer import MixedModalTrainer
from medley.utils.cli_options import resolved
from medley.utils.distributed import barrier, is_main_rank, use_own_gpu, world_size
from medley.utils.extras import require_extra
from medley.utils.files import write_json
from medley.utils.manifest import write_manifest

SAMPLE_TEXT_TOKENS = 512  # text tokens of a sample, beside those of one image


def prepare_environment(options: TrainOptions) -> None:
    """Checks optional packages and sets environment variables, before any data is read."""
    require_extra("matplotlib", "train", "medley train")
    if options.ds is not None:
        require_extra("deepspeed", "train", "--ds")
    if options.quantize is not None:
        require_extra("bitsandbytes", "quantize", "--quantize")
    if options.report_to in ("wandb", "tensorboard"):
        reason = "--wandb" if options.wandb else f"--trainer.report_to {options.report_to}"
        require_extra(options.report_to, "train", reason)
    # Without this, PEFT asks the Hugging Face hub about the base model at every save.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"This machine has {torch.cuda.device_count()} GPUs, and this is a single process. "
            "Start it with torchrun --nproc-per-node=N, or select one GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    use_own_gpu()
    if options.ds is not None:
        deepspeed.prepare_environment()
    # transformers deprecates names that our oldest supported version needs; PEFT warns that it
    # does not find the base model on the hub.
    for message in (".*gradient_checkpointing.* is deprecated", ".*base_model_name_or_path.*",
                    "Could not find a config file"):  # fmt: skip
        warnings.filterwarnings("ignore", message=message)
    if options.wandb_entity:
        os.environ["WANDB_ENTITY"] = options.wandb_entity


def packing_config(options: TrainOptions, base: Checkpoint) -> PackingConfig:
    """How documents become sequences.

    Raises UserError for a --max_length above the model's context, or too small for one image.
    """
    context = base.config().max_position_embeddings
    length = options.max_length or context
    if length > context:
        raise UserError(f"--max_length is {length}, the model's context is {context}.")
    # The image codes, two special tokens around them, <s> and </s>.
    smallest = base.vqgan()[0].config.codes_per_image + 4
    if length < smallest:
        raise UserError(
            f"--max_length is {length}, too small for one image (expected at least {smallest})."
        )
    return PackingConfig(
        length, options.pack, options.train_on, options.compat == "medmax", options.seed,
        options.max_samples,
    )  # fmt: skip


def open_datasets(
    options: TrainOptions, packing: PackingConfig, base: Checkpoint, vocabulary: Vocabulary
) -> tuple[PackedDataset, dict[str, PackedDataset] | None]:
    """The training dataset, and the validation datasets by task."""
    weighted = [WeightedSource.parse(text) for text in options.train_data]
    sources = [(open_token_dataset(w.path, base, vocabulary), w.weight) for w in weighted]
    train = PackedDataset(sources, vocabulary, packing, multiple_of=options.global_batch_size)
    if options.val_data is None:
        return train, None
    source = open_token_dataset(options.val_data, base, vocabulary)
    batch_size = options.bs * world_size()
    by_task = {
        task: PackedDataset([(source, 1.0)], vocabulary, packing, documents, batch_size)
        for task, documents in group_by_task(source).items()
    }
    return train, by_task


def find_resume_checkpoint(
    options: TrainOptions, dataset: PackedDataset, base: Checkpoint
) -> Path | None:
    """The checkpoint to resume from, proven to contain no code; None for a new run.

    Raises UserError, see `resolve_resume` and `check_checkpoint`.
    """
    checkpoint = checkpointing.resolve_resume(
        options.output_dir, options.resume, identify_run(options, dataset, base),
        resume_anyway=options.resume_anyway or (), overwrite=options.overwrite,
    )  # fmt: skip
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    return checkpoint


def make_model(options: TrainOptions, base: Checkpoint, vocabulary: Vocabulary) -> Any:
    """The model to train: a PeftModel, or the decoder itself for `--trainable full`."""
    transformers.set_seed(options.seed)  # for the initial weights of the adapter
    decoder = base.decoder(options.dtype)
    decoder.loss_options = LossOptions(options.image_loss_weight, options.z_loss)
    kernel = set_attention(decoder, options.attention, options.compute_dtype)
    if is_main_rank():
        print(f"attention: {kernel}")
    if options.quantize is not None:
        quantize_layers(decoder, options.quantize, options.compute_dtype)
        decoder.to(local_device("auto" if torch.cuda.is_available() else "cpu"))
    if options.tie_head_norms:
        tie_head_norms(decoder)
    return trainable_model(
        decoder, options.trainable, vocabulary, base_name(options.ckpt),
        rank=options.lora_r, alpha=options.lora_alpha, rslora=options.lora_rslora,
        dropout=options.lora_dropout, targets=options.lora_target, start=options.adapter,
    )  # fmt: skip


def base_name(ckpt: str) -> str:
    """The base in adapter_config.json: an absolute path, so that any working folder finds it."""
    return ckpt if ckpt == TINY and not Path(ckpt).is_dir() else str(Path(ckpt).resolve())


def make_trainer(
    options: TrainOptions,
    arguments: TrainingArguments,
    model: Any,
    base: Checkpoint,
    train: PackedDataset,
    val: dict[str, PackedDataset] | None,
) -> MixedModalTrainer:
    """The trainer with all callbacks."""
    full = options.trainable == "full"
    flops = make_flop_counter(
        model, full, options.gradient_checkpointing, arguments.device, options.compute_dtype
    )
    limit = options.trainer.get("save_total_limit")
    trainer = MixedModalTrainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=val,
        data_collator=train.collate,
        callbacks=[checkpointing.VerifiedCheckpointCallback(limit), LossCurveCallback()],
        flops=flops, group_by_length=options.group_by_length,
    )  # fmt: skip
    trainer.add_callback(GradientCheckCallback(model, lambda: float(trainer.last_label_weight)))
    if options.sample_prompts is not None:
        trainer.add_callback(make_sample_callback(options, base, lambda: trainer.decoder))
    return trainer


def make_sample_callback(
    options: TrainOptions, base: Checkpoint, get_decoder: Callable[[], Any]
) -> SampleCallback:
    """Generates responses to --sample_prompts with the current weights at each validation."""
    assert options.sample_prompts is not None
    prompts = read_prompts(options.sample_prompts)
    text = base.text_tokenizer()

    def generate(folder: Path) -> None:
        decoder = get_decoder()
        # On the decoder's device, and only now: between validations it takes no memory there.
        images = base.image_tokenizer(device=decoder.device)
        model = Model(decoder, text, images)
        mode: Mode = "any" if images.has_decoder else "text"
        max_new_tokens = images.codes_per_image + 2 + SAMPLE_TEXT_TOKENS
        config = GenerationOptions(mode=mode, max_new_tokens=max_new_tokens, seed=options.seed)
        half = options.bf16 or options.fp16
        with torch.autocast(decoder.device.type, options.compute_dtype, half):
            requests = ((number, prompt, config) for number, prompt in enumerate(prompts))
            rows = [
                save_response(folder, number, response)
                for number, response in generate_all(model, requests)
            ]
        rows.sort(key=lambda row: row["index"])
        write_json(folder / "responses.json", rows)
        print(f"samples at this step: {rows}")

    return SampleCallback(generate)


def run_steps(trainer: MixedModalTrainer, checkpoint: Path | None) -> None:
    """Trains, from a checkpoint if one is given.

    A checkpoint of the last step is only loaded: its run was interrupted between the last step
    and the end.
    """
    if checkpoint is not None and checkpointing.is_last_step(checkpoint):
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def save_result(options: TrainOptions, trainer: MixedModalTrainer, base: Checkpoint) -> None:
    """Saves the adapter or the model, reads it back, and writes the manifest."""
    trainer.save_state()
    output = options.output_dir
    if options.trainable == "full":
        output = output / "model"
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers under ZeRO-3
        if is_main_rank():
            names = [name for name, _ in base.tensors()]
            dtype = base.dtype()
            tensors = ((name, state[name].detach().cpu().to(dtype)) for name in names)
            # Otherwise DeepSpeed would partition the decoder that is read back over the ranks.
            unset_hf_deepspeed_config()
            write_hugging_face(output, base, tensors)
            open_checkpoint(output).decoder()  # verifies names and shapes
    else:
        trainer.save_model(str(output))
        if is_main_rank():
            checkpointing.check_saved_adapter(output, trainer.model)
    if is_main_rank():
        data = [WeightedSource.parse(text).path for text in options.train_data]
        write_manifest(options.output_dir, resolved(options), data, base.fingerprint())
        print(f"saved and verified: {output}")
    barrier()


def validate_last_step(options: TrainOptions, trainer: MixedModalTrainer) -> None:
    """Validates the final weights, unless the last step had a validation."""
    history = trainer.state.log_history
    validated = {entry["step"] for entry in history if any("eval" in name for name in entry)}
    if trainer.eval_dataset is None or trainer.state.global_step in validated:
        return
    trainer.evaluate()
    trainer.save_state()
    if is_main_rank():
        write_loss_curve(options.output_dir, trainer.state.log_history)
