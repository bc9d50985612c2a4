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
from transformers.modeling_outputs import CausalLMOutputWithPast

from medley.data.packing import IGNORE_INDEX
from medley.modeling.attention import sequence_lengths
from medley.modeling.chunked_loss import LOSS_CHUNK, LMHead


@dataclass(frozen=True)
class LossOptions:
    """Weights of the loss.

    Attributes:
        image_weight: factor of the loss of image tokens
        z_loss: weight of the squared log-partition
    """

    image_weight: float = 1.0
    z_loss: float = 0.0


class ChameleonForConditionalGeneration(transformers.ChameleonForConditionalGeneration):  # type: ignore[misc]
    """The decoder. It returns the loss if there are labels, otherwise logits.

    With labels it also sets `loss_sums`, detached, float64 (4,): the sum of the losses and the
    number of the positions, first for text, then for images.
    """

    loss_options = LossOptions()
    loss_sums: Tensor | None = None

    def __init__(self, config: transformers.ChameleonConfig) -> None:
        super().__init__(config)
        self.lm_head: LMHead = LMHead(config.hidden_size, config.vocab_size, bias=False)

    @property
    def uses_varlen_attention(self) -> bool:
        """Whether `attention.set_attention` chose a kernel that takes the documents' lengths."""
        return str(self.config._attn_implementation).startswith("medley_")

    def forward(
        self,
        input_ids: Tensor | None = None,
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
        The loss is the sum of weighted token losses, divided by `num_items_in_batch` (by default
        the sum of the weights in this batch). With labels, there is neither a cache nor an
        attention mask: positions that restart separate packed documents. transformers detects
        them only without a cache and without a 2-D mask.
        """
        if labels is not None:
            if attention_mask is not None:
                raise ValueError(
                    "attention_mask is not supported in training. position_ids separate documents."
                )
            use_cache = False
            if self.uses_varlen_attention and position_ids is not None:
                kwargs["document_lengths"] = sequence_lengths(position_ids)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if labels is not None:
            loss = self._loss(hidden, labels, num_items_in_batch)
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
        self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | float | None
    ) -> Tensor:
        targets = labels[:, 1:].reshape(-1)
        positions = (targets != IGNORE_INDEX).nonzero().squeeze(1)
        targets = targets[positions]
        states = hidden[:, :-1].reshape(-1, hidden.shape[-1])[positions]
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
        by_modality = torch.stack([~image, image]).double()
        sums, counts = (by_modality * losses.double()).sum(1), by_modality.sum(1)
        self.loss_sums = torch.stack([sums, counts], 1).reshape(-1)
        return total / (weights.sum().clamp(min=1e-8) if num_items is None else num_items)

    def _recompute_loss(
        self, states: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The result of `ChunkedCrossEntropy`; recomputes the logits of a chunk for its gradient."""
        total = torch.zeros((), device=states.device)
        losses = [states.new_zeros(0, dtype=torch.float32)]
        # ZeRO-3 gathers the head at each call. The number of calls must be equal on every rank,
        # therefore there is one chunk.
        is_partitioned = any(hasattr(p, "ds_id") for p in self.lm_head.parameters())
        size = max(len(targets), 1) if is_partitioned else LOSS_CHUNK
        # At least one chunk, so that a rank without labels has the same graph as the others.
        for start in range(0, max(len(targets), 1), size):
            chunk = slice(start, start + size)
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
