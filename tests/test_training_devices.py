"""Training on GPUs, held without one: the meta device, stand-ins, and ranks on the CPU."""

from __future__ import annotations

import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from device_checks import META, Operations
from torch import Tensor, nn
from training_runs import random_document, tiny, tiny_vocabulary

from medley.commands.finetune_vqgan import FinetuneVqganOptions
from medley.data.packing import build_sequence, collate
from medley.data.token_dataset import TokenDataset
from medley.errors import UserError
from medley.evaluation.answer_shards import check_devices, device_name, run_on_devices
from medley.generation.kv_cache import KeyValueCache
from medley.modeling import chunked_loss
from medley.modeling.attention import Documents
from medley.modeling.chunked_loss import chunk_bytes, chunk_size, chunks, position_bytes
from medley.trainer import deepspeed, preflight
from medley.trainer.data import SEQUENCE_INDEX, PackedDataset, PackingConfig
from medley.trainer.options import TrainOptions
from medley.trainer.run import make_model, make_sample_callback, make_trainer, prepare_environment
from medley.trainer.trainer import MixedModalTrainer
from medley.utils.distributed import TIMEOUT, process_group, use_own_gpu

CUDA = torch.device("cuda", 1)


def make_options(**fields: Any) -> TrainOptions:
    return TrainOptions(train_data=["x"], ckpt="tiny", **{"output_dir": Path("o"), **fields})


# --- a step without waiting for the device ------------------------------------------------------


def packed_dataset(data: Path) -> PackedDataset:
    config = PackingConfig(400, pack=True)
    source = TokenDataset(data / "train.jsonl")
    return PackedDataset([(source, 1.0)], tiny_vocabulary(), config, multiple_of=4)


def test_the_collated_batch_contains_what_the_model_would_ask_the_device_for(
    training_data: Path,
) -> None:
    dataset = packed_dataset(training_data)
    batch = dataset.collate([dataset[i] for i in range(len(dataset))])
    assert dataset.num_blank  # one of these sequences is padding
    documents, positions = batch["documents"], batch["position_ids"]
    assert sum(documents.lengths) == positions.numel()
    for start, length in zip(documents.starts.tolist(), documents.lengths, strict=False):
        assert positions.reshape(-1)[start : start + length].tolist() == list(range(length))
    assert documents.starts.dtype == torch.int32
    assert documents.longest == int(positions.max()) + 1
    labels = batch["labels"][:, 1:].reshape(-1)
    assert torch.equal((labels != -100).nonzero().squeeze(1), batch["label_positions"])
    moved = documents.to(META)
    assert moved.starts.device == META and moved.lengths == documents.lengths
    decoder = tiny().decoder(torch.float32)
    inputs = {name: value for name, value in batch.items() if name != SEQUENCE_INDEX}
    names = ("input_ids", "position_ids", "labels")
    with torch.inference_mode():
        found = decoder(**inputs).loss
        assert torch.equal(decoder(**{name: inputs[name] for name in names}).loss, found)


def step_trainer(options: TrainOptions, data: Path) -> MixedModalTrainer:
    """A trainer whose model is on the meta device."""
    dataset = packed_dataset(data)
    model = make_model(options, tiny(), tiny_vocabulary())
    arguments = options.arguments(False)
    trainer = make_trainer(options, arguments, model, tiny(), dataset, None)
    trainer.model = model.to(META).train()
    return trainer


@pytest.mark.parametrize("kernel", ["medley_sdpa", "medley_varlen"])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_training_step_reads_nothing_from_the_device(
    training_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    trainable: Any,
) -> None:
    options = make_options(
        trainable=trainable, gradient_checkpointing=True, grad_acc=2, output_dir=tmp_path
    )
    trainer = step_trainer(options, training_data)
    trainer.decoder.config._attn_implementation = kernel
    dataset = trainer.train_dataset
    batch = dataset.collate([dataset[0], dataset[1]])
    on_meta = {name: value.to(META) for name, value in batch.items()}
    monkeypatch.setattr(trainer, "_prepare_inputs", lambda inputs: inputs)
    with Operations() as operations:
        items = trainer._get_num_items_in_batch([on_meta, on_meta], META)
        for _ in range(2):
            trainer.training_step(trainer.model, on_meta, items)
    assert operations.total > 0
    assert len(trainer._unchecked) == 2  # read once for each optimizer step
    assert trainer._sums["train"].device == META
    gradients = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert any(g is not None and g.device == META for g in gradients)


def test_losses_are_checked_before_the_weights_change(training_data: Path, tmp_path: Path) -> None:
    dataset = packed_dataset(training_data)
    options = make_options(output_dir=tmp_path)
    model = make_model(options, tiny(), tiny_vocabulary())
    trainer = make_trainer(options, options.arguments(False), model, tiny(), dataset, None)
    good, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    trainer._unchecked = [(good, torch.tensor([0])), (bad, torch.tensor([2]))]
    first = dataset.document_names(2)[0]
    with pytest.raises(UserError, match=rf"loss is inf at step 1.*{first}"):
        trainer.callback_handler.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    trainer.check_losses()  # of the next step: that step has no loss yet


def test_kernels_get_the_documents_of_the_batch_on_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's kernel for documents, replaced by plain attention of each document."""
    import torch.nn.attention.varlen as varlen

    seen: list[tuple[Tensor, int]] = []

    def stand_in(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Tensor, longest: int, *args: Any,
        scale: float | None, window_size: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        seen.append((starts, longest))
        assert window_size == (-1, 0)
        parts = []
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            own = [t[start:end].transpose(0, 1)[None] for t in (q, k, v)]
            output = F.scaled_dot_product_attention(
                own[0], own[1], own[2], is_causal=True, scale=scale
            )
            parts.append(output[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    generator = np.random.default_rng(0)
    rows = [np.array(random_document(generator, n, "")["tokens"]) for n in (3, 9)]
    batch: dict[str, Any] = collate([build_sequence(rows, tiny_vocabulary())], tiny_vocabulary())
    batch["documents"] = Documents.of(batch["position_ids"])
    losses = []
    for kernel in ("medley_sdpa", "medley_varlen"):
        decoder = tiny().decoder(torch.float32)
        decoder.config._attn_implementation = kernel
        losses.append(decoder(**batch).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert len(seen) == tiny().config().num_hidden_layers
    assert all(starts is seen[0][0] for starts, _ in seen)  # one tensor for all layers
    assert seen[0][1] == len(rows[1])


# --- chunks of the loss -------------------------------------------------------------------------


def test_chunks_follow_from_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    chunk_bytes.cache_clear()
    try:
        gpu = torch.device("cuda", 5)
        size = chunk_size(4096, 65536, 2, gpu)
        assert size * position_bytes(65536, 2) <= (80 << 30) / 64
        assert -(-4096 // size) == 3  # reads of the head; chunks of 256 read it 16 times
        memory.total_memory = 24 << 30
        chunk_bytes.cache_clear()
        assert chunk_size(4096, 65536, 2, gpu) < size
    finally:
        chunk_bytes.cache_clear()


@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_chunks_cover_every_position_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for largest in (1, 3, 50, 1000):
        size = position_bytes(11, 4) * largest
        monkeypatch.setattr(chunked_loss, "chunk_bytes", lambda device, size=size: size)
        found = chunks(torch.zeros(count, 2), 11)
        covered = [i for part in found for i in range(count)[part]]
        assert covered == list(range(count))
        sizes = [len(range(count)[part]) for part in found]
        assert max(sizes, default=0) <= largest
        assert max(sizes, default=0) - min(sizes, default=0) < max(len(sizes), 2)
    monkeypatch.setattr(chunked_loss, "chunk_bytes", lambda device: 1)
    assert len(chunks(torch.zeros(count, 2), 11)) == count  # at least one position


# --- figures of quantized models ----------------------------------------------------------------


def test_packed_weights_are_counted_as_the_numbers_that_they_hold() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(256, 64, bias=False)
    packed = bnb.nn.Linear4bit(256, 64, bias=False, quant_type="nf4")
    packed.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
    assert preflight.num_elements(packed.weight) == 256 * 64
    packed = packed.to("cpu")
    assert packed.weight.numel() == 256 * 64 // 2
    assert preflight.num_elements(packed.weight) == 256 * 64
    scales = 256 * 64 // packed.weight.quant_state.blocksize  # of 8 bits each
    assert preflight.num_bytes(packed.weight) == 256 * 64 // 2 + scales
    assert preflight.num_bytes(plain.weight) == 256 * 64 * 4


@pytest.mark.parametrize("kind", [None, "4bit", "8bit"])
def test_figures_of_a_quantized_run_are_those_of_its_computation(
    training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    if kind is not None:
        pytest.importorskip("bitsandbytes")
    measured = []

    def measure(device: torch.device, dtype: torch.dtype) -> float:
        measured.append(dtype)
        return 1.0

    monkeypatch.setattr(preflight, "measure_peak_flops", measure)
    options = make_options(bf16=True, quantize=kind, output_dir=tmp_path)
    model = make_model(options, tiny(), tiny_vocabulary())
    dataset = packed_dataset(training_data)
    trainer = make_trainer(options, options.arguments(False), model, tiny(), dataset, None)
    assert measured == [torch.bfloat16]
    plain = tiny().decoder(torch.float32).model.layers
    numbers = sum(p.numel() for p in plain.parameters())
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert trainer.flops.layer_weights == numbers + adapters


# --- several ranks ------------------------------------------------------------------------------


def test_overlap_of_communication_is_deepspeeds_choice_for_each_stage() -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    for name in deepspeed.config_names():
        own = deepspeed.read_config(name)["zero_optimization"]
        default = zero.DeepSpeedZeroConfig(stage=own["stage"])
        assert own["overlap_comm"] == default.overlap_comm, name


def test_one_patience_for_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_options().arguments(False).ddp_timeout_delta == TIMEOUT
    own = make_options(trainer={"ddp_timeout": 60}).arguments(False)
    assert own.ddp_timeout == 60
    calls: list[tuple[Any, Any]] = []
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set", device)))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, timeout: calls.append((backend, timeout))
    )
    for device in (None, torch.device("cpu"), CUDA):
        with process_group(device):
            pass
    assert calls == [
        ("gloo", TIMEOUT), ("gloo", TIMEOUT), ("set", 1), ("cpu:gloo,cuda:nccl", TIMEOUT),
    ]  # fmt: skip


def test_every_rank_uses_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    use_own_gpu()
    prepare_environment(make_options())  # a single process on a CPU
    assert chosen == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    prepare_environment(make_options())
    assert chosen == [1]


def test_finetuning_a_vqgan_connects_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from medley.commands import finetune_vqgan as command

    class Stop(Exception):
        pass

    seen: list[torch.device | None] = []

    def connect(device: torch.device | None = None) -> Any:
        seen.append(device)
        raise Stop

    def tuner(*args: Any) -> None:
        assert args[3] == CUDA

    monkeypatch.setattr(command, "local_device", lambda name: CUDA)
    monkeypatch.setattr(command, "process_group", connect)
    monkeypatch.setattr(command, "Finetuner", tuner)
    options = FinetuneVqganOptions(input=Path("x"), output=Path("y"), ckpt="tiny")
    with pytest.raises(Stop):
        command.finetune_vqgan(options)
    assert seen == [CUDA]


def test_samples_are_drawn_on_the_decoders_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medley.trainer import run

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "Show me a CT scan."}\n')
    devices: list[Any] = []

    def image_tokenizer(device: Any = "cpu") -> Any:
        devices.append(device)
        return SimpleNamespace(has_decoder=True, codes_per_image=4)

    base = SimpleNamespace(text_tokenizer=lambda: None, image_tokenizer=image_tokenizer)
    decoder = SimpleNamespace(device=CUDA)
    monkeypatch.setattr(run, "Model", lambda *parts: None)
    monkeypatch.setattr(run, "generate_all", lambda *args: [])
    monkeypatch.setattr(torch, "autocast", lambda *args: nullcontext())
    options = make_options(sample_prompts=prompts, val_data=Path("v"))
    callback = make_sample_callback(options, base, lambda: decoder)  # type: ignore[arg-type]
    assert devices == []  # the GPU keeps no VQGAN between validations
    callback.generate(tmp_path)
    assert devices == [CUDA]
    forked: list[Any] = []

    def fork_rng(devices: list[Any]) -> Any:
        forked.extend(devices)
        return nullcontext()

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    arguments = SimpleNamespace(output_dir=str(tmp_path), device=CUDA)
    state = SimpleNamespace(global_step=1)
    callback.on_evaluate(arguments, state, None, model=nn.Linear(1, 1))
    assert forked == [CUDA]  # not of all GPUs, each of which would get a context


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_of_another_dtype_are_written_to_the_cache(dtype: torch.dtype) -> None:
    """CUDA's autocast returns float32 from the norms of queries and keys."""
    config = tiny().config()
    cache = KeyValueCache(config, dtype, torch.device("cpu"), 2)
    cache.add_slot()
    width = config.hidden_size // config.num_attention_heads
    new = torch.randn(1, config.num_key_value_heads, 3, width)
    cache.set_write_positions(0, torch.arange(3)[None], 3)
    keys, values = cache.update(new, new.to(dtype), 0)
    assert keys.dtype == values.dtype == dtype
    assert torch.equal(keys, new.to(dtype))


# --- `medley answer --devices` ------------------------------------------------------------------


def test_each_device_gets_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, str]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            text = Path(command[-1]).read_text()
            started.append((env["CUDA_VISIBLE_DEVICES"], text.strip()))
            self.status = 1 if "chunk_idx: 1" in text else 0

        def wait(self) -> int:
            return self.status

        def terminate(self) -> None:
            pass

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = [{"chunk_idx": i} for i in range(2)]
    assert run_on_devices("answer", options, [0, 3]) == [3]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6,7")  # a share of a machine
    assert run_on_devices("answer", options, [0, 1]) == [1]
    assert started == [
        ("0", "chunk_idx: 0"), ("3", "chunk_idx: 1"), ("4", "chunk_idx: 0"),
        ("GPU-5", "chunk_idx: 1"),
    ]  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a CPU answers
    assert device_name(1) == "1"


def test_devices_that_a_machine_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_devices("0-9", range(10))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices("0,1", [0, 1])
    with pytest.raises(UserError, match=r"--devices 0-3: No GPU 2, 3 \(got 2 GPUs, .* 0 to 1"):
        check_devices("0-3", range(4))
