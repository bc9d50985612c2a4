"""The estimate of activations equals the bytes of the tensors that autograd saves.

The operations are those of CUDA, on the meta device or on the CPU: dropout keeps a mask of bytes,
autocast computes LayerNorm in float32, attention is a kernel for documents.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import tiny, tiny_vocabulary
from transformers import AttentionInterface

from medley.modeling import attention
from medley.modeling.attention import Documents
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.trainer.activations import ActivationEstimate
from medley.trainer.options import TrainOptions
from medley.trainer.parameters import PROJECTIONS
from medley.trainer.preflight import TrainingMemoryEstimate
from medley.trainer.run import make_model
from medley.trainer.summary import estimate_memory

TOKENS = 512  # shorter documents are computed in float32 on a CPU
CPU, META = torch.device("cpu"), torch.device("meta")


# On the CPU, an attention kernel that copies nothing, as CUDA's do.
AttentionInterface.register(
    "medley_one",
    attention._attention(lambda q, k, v, _, scale: attention._sdpa_document(q, k, v, scale)),
)


def small_config(**changes: int) -> Any:
    config = copy.deepcopy(tiny().config())
    sizes = {
        "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4,
        "num_key_value_heads": 4, "num_hidden_layers": 1,
    }  # fmt: skip
    for name, value in {**sizes, **changes}.items():
        setattr(config, name, value)
    return config


@pytest.fixture
def cuda_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_norm = F.layer_norm

    def dropout(
        values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Any:
        return torch.native_dropout(values, p, training)[0]

    def layer_norm_in_autocast(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return layer_norm(values, *args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return layer_norm(values.float(), *args, **kwargs)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "layer_norm", layer_norm_in_autocast)


def make_layer(
    config: Any, dtype: torch.dtype, device: torch.device, lora: dict[str, Any] | None, cast: bool
) -> tuple[ChameleonForConditionalGeneration, nn.Module]:
    """A decoder with one layer in training mode, and what is trained: it, or adapters on it."""
    with device:
        decoder = ChameleonForConditionalGeneration(config).to(dtype)
    decoder.config._attn_implementation = "medley_varlen" if device == META else "medley_one"
    if lora is None:
        return decoder, decoder.train()
    decoder.requires_grad_(False)
    options = peft.LoraConfig(r=16, task_type="CAUSAL_LM", **lora)
    return decoder, peft.get_peft_model(decoder, options, autocast_adapter_dtype=cast).train()


@contextlib.contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the bytes of the tensors that autograd has saved here.

    Weights and their copies in another dtype are not counted: those do not depend on the tokens.
    """
    storages: dict[int, Tensor] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    shapes = {tuple(p.shape[::order]) for p in model.parameters() for order in (1, -1)}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and tuple(tensor.shape) not in shapes:
            storages[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(t.untyped_storage().nbytes() for t in storages.values())


def measure(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    lora: dict[str, Any] | None = None,
    cast: bool = False,
) -> float:
    """Bytes that a layer saves for each token. `cast`: under autocast, with trained float32."""
    decoder, model = make_layer(config, dtype, device, lora, cast)
    residual = torch.float32 if cast and lora is None else dtype
    states = torch.zeros(1, TOKENS, config.hidden_size, device=device, dtype=residual)
    states.requires_grad_()
    positions = torch.arange(TOKENS, device=device)[None]
    starts = torch.tensor([0, TOKENS], dtype=torch.int32, device=device)
    rotary = decoder.model.rotary_emb(states, position_ids=positions)
    inner = torch.autocast("cpu", torch.bfloat16) if cast else contextlib.nullcontext()
    with saved_bytes(model) as total, inner:
        decoder.model.layers[0](
            states, attention_mask=torch.empty(1, 1, 1, 1, device=device), position_ids=positions,
            position_embeddings=rotary, documents=Documents((TOKENS,), starts),
        )  # fmt: skip
        # The sines and cosines are those of all layers.
        return (total() - sum(part.nbytes for part in rotary)) / TOKENS


@pytest.mark.usefixtures("cuda_operations")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize(
    "targets", [PROJECTIONS, ("q_proj", "v_proj"), ("o_proj", "down_proj"), None]
)
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_estimate_equals_the_saved_tensors(
    mode: str, targets: tuple[str, ...] | None, dropout: float, kv_heads: int
) -> None:
    cast = mode == "autocast"
    half = torch.bfloat16
    dtype = torch.float32 if mode == "float32" or (cast and targets is None) else half
    config = small_config(num_key_value_heads=kv_heads)
    lora = None if targets is None else {"target_modules": targets, "lora_dropout": dropout}
    found = measure(config, dtype, CPU if cast else META, lora, cast)
    estimate = ActivationEstimate(
        config, half.itemsize if cast else dtype.itemsize, full=targets is None,
        adapted=targets or (), rank=16, dropout=dropout > 0, autocast=cast, on_cuda=True,
    )  # fmt: skip
    assert estimate.layer_bytes == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_estimate_for_a_cpu(dropout: float) -> None:
    """Without the operations of CUDA: dropout keeps a factor for each number."""
    config = small_config()
    lora = {"target_modules": PROJECTIONS, "lora_dropout": dropout}
    found = measure(config, torch.float32, CPU, lora)
    estimate = ActivationEstimate(config, 4, adapted=PROJECTIONS, rank=16, dropout=dropout > 0)
    assert estimate.layer_bytes == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("trainable", ["lora", "lora+image_head", "image_head", "full"])
@pytest.mark.parametrize("fields", [{}, {"bf16": True}, {"bf16": True, "ds": "zero2"}])
def test_the_estimate_of_a_run_follows_from_its_model(
    trainable: Any, fields: dict[str, Any]
) -> None:
    options = TrainOptions(["x"], "tiny", Path("o"), trainable=trainable, **fields)
    model = make_model(options, tiny(), tiny_vocabulary())
    found = estimate_memory(options, model, 100, 10, CPU)
    activations = found.activations
    assert activations.autocast == (fields == {"bf16": True})
    assert activations.itemsize == (2 if fields else 4)
    assert activations.full == (trainable == "full")
    assert activations.dropout == (trainable != "full")
    assert set(activations.adapted) == (set(PROJECTIONS) if "lora" in trainable else set())
    # Without DeepSpeed, trained weights are float32 and only their computation is in half.
    assert found.bytes_per_param == (2 if "ds" in fields else 4)
    assert "gradient buffer" not in found.memory()
    assert options.gradient_bucket == (10**8 if "ds" in fields else 0)
    buffered = replace(found, bucket_numbers=options.gradient_bucket).memory()
    assert buffered.get("gradient buffer", 0) == 2 * options.gradient_bucket
    assert found.weight_bytes == sum(p.nbytes for p in model.parameters())
    copies = found.memory().get("half precision copies", 0)
    assert copies == (
        2 * found.trainable_params if activations.full and activations.autocast else 0
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_at_7b_widths_stays_within_the_estimate(
    cuda_operations: None, checkpointing: bool
) -> None:
    """The largest number of bytes alive in a step on the meta device, without the weights."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
             "num_key_value_heads": 32, "num_hidden_layers": 4, "vocab_size": 65536}  # fmt: skip
    config = small_config(**sizes)
    options = peft.LoraConfig(r=16, target_modules=list(PROJECTIONS), lora_dropout=0.05)
    with META:
        decoder = ChameleonForConditionalGeneration(config).to(torch.bfloat16)
    decoder.config._attn_implementation = "medley_varlen"
    model = peft.get_peft_model(decoder, options, autocast_adapter_dtype=False).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens, labels = 4096, 1500
    batch = meta_batch(tokens, labels)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    with PeakBytes() as alive:
        model(**batch).loss.backward()
    estimate = TrainingMemoryEstimate(
        sum(p.numel() for p in trained), sum(p.numel() for p in parameters), tokens, labels, 2,
        checkpointing, 0, 1,
        ActivationEstimate(config, 2, adapted=PROJECTIONS, rank=16, dropout=True, on_cuda=True),
    )  # fmt: skip
    memory = estimate.memory()
    needed = memory["activations"] + memory["loss"] + memory["gradients"]
    assert alive.peak <= needed
    assert needed < 1.2 * alive.peak
    if not checkpointing:  # 27 GB for a 7B with 32 layers was an earlier estimate
        assert 32 * tokens * estimate.activations.layer_bytes > 33e9


def meta_batch(tokens: int, labels: int) -> dict[str, Any]:
    """A batch of two documents on the meta device, with what the data collator adds."""
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    positions = torch.arange(tokens)[None] % (tokens // 2)
    documents = Documents.of(positions)
    on_meta: dict[str, Any] = {
        "input_ids": ids, "position_ids": positions, "labels": ids, "documents": documents,
        "label_positions": torch.arange(labels),
    }  # fmt: skip
    return {name: value.to("meta") for name, value in on_meta.items()}


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that were made in its block and are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.alive = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        for tensor in tree_leaves(result):
            if is_tensor(tensor) and tensor.untyped_storage()._cdata not in before | self.known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def release() -> None:
            self.known.discard(key)
            self.alive -= size

        weakref.finalize(storage, release)


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
