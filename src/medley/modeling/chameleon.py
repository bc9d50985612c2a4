"""The early-fusion decoder: transformers' Chameleon with image logits.

transformers masks the logits of all image tokens, so that its Chameleon can neither be trained on
images nor generate them. This subclass does not mask them. It computes the training loss by
modality, at labeled positions only. It keeps the name of the stock class, which is written to
`config.json`.

Shapes: B batch, S sequence, D model width, V vocabulary, N labeled positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from medley.data.packing import IGNORE_INDEX
from medley.modeling.attention import Documents, no_mask
from medley.modeling.chunked_loss import LMHead, chunks


@dataclass(frozen=True)
class LossOptions:
    """Weights of the loss.

    Attributes:
        image_weight: factor of the loss of image tokens
        z_loss: weight of the squared log-partition
    """

    image_weight: float = 1.0
    z_loss: float = 0.0


class ChameleonForConditionalGeneration(
    transformers.ChameleonForConditionalGeneration,  # type: ignore[misc]
    GenerationMixin,  # type: ignore[misc]
):
    """The decoder. It returns the loss if there are labels, otherwise logits.

    With labels it also sets `loss_sums`, detached, float64 (float32 on MPS, which has no float64)
    (4,): the sum of the losses and the number of the positions, first for text, then for images.
    """

    loss_options = LossOptions()
    loss_sums: Tensor | None = None

    def __init__(self, config: transformers.ChameleonConfig) -> None:
        super().__init__(config)
        # The stock head, with its initial or tied weights, gets a forward that computes the loss.
        self.lm_head.__class__ = LMHead

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle would look for the class under `__module__`, and find the stock class.
        if type(self) is ChameleonForConditionalGeneration:
            return _empty_decoder, (), self.__getstate__()
        return super().__reduce_ex__(protocol)

    @property
    def uses_varlen_attention(self) -> bool:
        """Whether `attention.set_attention` chose a kernel that takes the documents' lengths."""
        return str(self.config._attn_implementation).startswith("medley_")

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | float | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Ids int64 (B, S) -> logits (B, S, V), or with labels int64 (B, S) the loss.

        Labels are not shifted: the label at a position is predicted from the previous position.
        `shift_labels` are: the label at a position is predicted from that position.
        The loss is the sum of weighted token losses, divided by `num_items_in_batch` (by default
        the sum of the weights in this batch). With labels there is no cache: positions that
        restart separate packed documents, and transformers detects them only without a cache and
        without a 2-D mask. Raises ValueError for a mask together with such positions.
        `documents` (`Documents.of(position_ids)`) and `label_positions` (of the targets, by the
        function of that name) are optional: with them the device is not waited for.
        """
        # Not named parameters: transformers' Trainer would take them for columns of the data.
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        documents: Documents | None = kwargs.pop("documents", None)
        positions: Tensor | None = kwargs.pop("label_positions", None)
        targets = shift_labels if labels is None or shift_labels is not None else _shifted(labels)
        if targets is not None:
            use_cache = False
            if attention_mask is not None and position_ids is not None and _restarts(position_ids):
                raise ValueError(
                    "attention_mask and positions of packed documents exclude each other in "
                    "training: leave attention_mask out, position_ids separate the documents."
                )
            if self.uses_varlen_attention and position_ids is not None and attention_mask is None:
                documents = documents or Documents.of(position_ids)
                kwargs["documents"] = documents.to(position_ids.device)
                attention_mask = no_mask(position_ids.device)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if targets is not None:
            positions = label_positions(targets) if positions is None else positions
            loss = self._loss(hidden, targets, positions, num_items_in_batch)
            return CausalLMOutputWithPast(loss=loss)
        if isinstance(logits_to_keep, int):
            selected = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            selected = hidden[:, logits_to_keep]
        return CausalLMOutputWithPast(
            logits=self.lm_head(selected),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def label_weights(self, labels: Tensor) -> Tensor:
        """Labels int64 of any shape -> the weight of each in the loss, float32."""
        weights = (labels != IGNORE_INDEX).float()
        return torch.where(
            self._is_image(labels), weights * self.loss_options.image_weight, weights
        )

    def _is_image(self, labels: Tensor) -> Tensor:
        ids = self.model.vocabulary_mapping.image_tokens  # sorted and consecutive
        return (labels >= ids[0]) & (labels <= ids[-1])

    def _loss(
        self,
        hidden: Tensor,
        shifted: Tensor,
        positions: Tensor,
        num_items: Tensor | int | float | None,
    ) -> Tensor:
        """Hidden states (B, S, D), labels of the next tokens (B, S) or (B, S - 1) -> the loss.

        `positions` are those of `label_positions`.
        """
        states = hidden[:, : shifted.shape[1]].reshape(-1, hidden.shape[-1])
        targets, states = shifted.reshape(-1)[positions], states[positions]
        weights = self.label_weights(targets)
        image = self._is_image(targets)
        if isinstance(self.lm_head, LMHead):
            z_loss = self.loss_options.z_loss
            total, losses = self.lm_head(states, targets, weights, z_loss)
        else:  # an adapter wraps the head
            total, losses = self._recompute_loss(states, targets, weights)
        # Keeps a rank without labels in the autograd graph. One element of each sequence avoids
        # an overflow of the sum.
        total = total + (hidden[:, 0, 0] * 0.0).sum()
        exact = torch.float32 if hidden.device.type == "mps" else torch.float64
        by_modality = torch.stack([~image, image]).to(exact)
        sums, counts = (by_modality * losses.to(exact)).sum(1), by_modality.sum(1)
        self.loss_sums = torch.stack([sums, counts], 1).reshape(-1)
        return total / (weights.sum().clamp(min=1e-8) if num_items is None else num_items)

    def _recompute_loss(
        self, states: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Same result as `ChunkedCrossEntropy`. The gradient of a chunk recomputes its logits."""
        total = torch.zeros((), device=states.device)
        losses = [states.new_zeros(0, dtype=torch.float32)]
        # ZeRO-3 gathers the head at each call. The number of calls must be equal on every rank,
        # therefore there is one chunk.
        is_partitioned = any(hasattr(p, "ds_id") for p in self.lm_head.parameters())
        whole = [slice(0, len(targets))]
        # At least one chunk, so that a rank without labels has the same graph as the others.
        for chunk in whole if is_partitioned else chunks(states, self.vocab_size) or whole:
            token_loss, z_loss = checkpoint(
                self._token_losses, states[chunk], targets[chunk], use_reentrant=False
            )
            total = total + (weights[chunk] * (token_loss + z_loss)).sum()
            losses.append(token_loss.detach())
        return total, torch.cat(losses)

    def _token_losses(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """States (N, D), targets (N,) -> cross entropy and weighted z-loss, float32 (N,)."""
        logits = self.lm_head(states).float()
        log_partition = logits.logsumexp(-1)
        token_loss = log_partition - logits.gather(1, targets[:, None]).squeeze(1)
        return token_loss, self.loss_options.z_loss * log_partition**2


# An adapter without a task type names the module and the class of its base. PEFT's Auto classes
# import modules of transformers only, and load the stock class by this name.
ChameleonForConditionalGeneration.__module__ = (
    transformers.ChameleonForConditionalGeneration.__module__
)


def _empty_decoder() -> ChameleonForConditionalGeneration:
    """A decoder without state, which `pickle` and `copy` fill."""
    return ChameleonForConditionalGeneration.__new__(ChameleonForConditionalGeneration)


def _shifted(labels: Tensor) -> Tensor:
    return labels[:, 1:]


def label_positions(targets: Tensor) -> Tensor:
    """Targets of any shape -> the indices of those with a label, flattened, int64 (N,)."""
    return (targets.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)


def _restarts(position_ids: Tensor) -> bool:
    """Whether positions restart within a sequence, as those of packed documents do."""
    return bool((position_ids[:, 1:] < position_ids[:, :-1]).any())


def tie_head_norms(decoder: ChameleonForConditionalGeneration) -> None:
    """Averages the gradients of the query and key norms over the heads of each shard.

    Chameleon's layout stores one norm for each shard. Heads that start with equal norms keep equal
    norms with equal gradients, so that a fully trained decoder can be written in that layout.
    """
    shards = int(decoder.config.model_parallel_size or 1)

    def average_over_shard(gradient: Tensor) -> Tensor:
        heads, width = gradient.shape
        grouped = gradient.reshape(shards, heads // shards, width)
        return grouped.mean(1, keepdim=True).expand_as(grouped).reshape(heads, width)

    for layer in decoder.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.register_hook(average_over_shard)
            norm.bias.register_hook(average_over_shard)
