"""The early-fusion decoder: transformers' Chameleon with its image logits open.

transformers masks the logits of every image token, so that its Chameleon can neither learn
nor draw pictures. This subclass leaves them open and computes the training loss by modality,
on labelled places only. It keeps the stock class's name, so that what it saves says so.

Shapes: B batch, S sequence, D model width, V vocabulary, N labelled places.
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
    """`image_weight` scales the loss of image tokens; `z_loss` the squared log-partition."""

    image_weight: float = 1.0
    z_loss: float = 0.0


class ChameleonForConditionalGeneration(transformers.ChameleonForConditionalGeneration):  # type: ignore[misc]
    """The decoder. With `labels` it returns the loss alone, without them open logits.

    `loss_sums` is then set: detached sums of losses and counts of places by modality, as
    float64 (4,): text loss, text places, image loss, image places.
    """

    loss_options = LossOptions()
    loss_sums: Tensor | None = None

    def __init__(self, config: transformers.ChameleonConfig) -> None:
        super().__init__(config)
        sizes = (config.hidden_size, config.vocab_size)
        self.lm_head: LMHead = LMHead(*sizes, bias=False)

    @property
    def uses_varlen_attention(self) -> bool:
        """Whether `attention.set_attention` chose a kernel that is told of each document."""
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

        Labels are not shifted; the label at a place is predicted from the place before it.
        The loss is the sum of weighted token losses over `num_items_in_batch`, by default
        the sum of the weights here. While there are labels no cache is made and no mask is
        taken: positions that restart keep packed documents apart (transformers' packed
        sequence detection, which a cache or a 2-D mask turns off).
        """
        if labels is not None:
            if attention_mask is not None:
                raise ValueError(
                    "training takes no attention_mask: documents are kept apart by position_ids"
                )
            use_cache = False
            if self.uses_varlen_attention and position_ids is not None:
                kwargs["documents"] = sequence_lengths(position_ids)
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
            kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            kept = hidden[:, logits_to_keep]
        return CausalLMOutputWithPast(
            logits=self.lm_head(kept),
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
        ids = self.model.vocabulary_mapping.image_tokens  # sorted, one unbroken run
        return (labels >= ids[0]) & (labels <= ids[-1])

    def _loss(
        self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | float | None
    ) -> Tensor:
        targets = labels[:, 1:].reshape(-1)
        places = (targets != IGNORE_INDEX).nonzero().squeeze(1)
        targets = targets[places]
        states = hidden[:, :-1].reshape(-1, hidden.shape[-1])[places]
        weights = self.label_weights(targets)
        image = self._is_image(targets)
        if isinstance(self.lm_head, LMHead):
            z_loss = self.loss_options.z_loss
            total, losses = self.lm_head(states, targets, weights, z_loss)
        else:  # an adapter lies over it
            total, losses = self._checkpointed(states, targets, weights)
        # A row without labels still has a graph; one number of each row, lest a sum overflow.
        total = total + (hidden[:, 0, 0] * 0.0).sum()
        seen = torch.stack([~image, image]).double()
        self.loss_sums = torch.stack([(seen * losses.double()).sum(1), seen.sum(1)], 1).reshape(-1)
        return total / (weights.sum().clamp(min=1e-8) if num_items is None else num_items)

    def _checkpointed(
        self, states: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What `HeadLoss` gives, with the logits of a chunk made again for its gradient."""
        total = torch.zeros((), device=states.device)
        losses = [states.new_zeros(0, dtype=torch.float32)]
        # ZeRO-3 gathers the head at each call, which must be as many on every rank: one.
        taken_apart = any(hasattr(p, "ds_id") for p in self.lm_head.parameters())
        size = max(len(targets), 1) if taken_apart else LOSS_CHUNK
        # Once at least, so that a rank without labels has the same graph as the others.
        for chunk in range(0, max(len(targets), 1), size):
            part = slice(chunk, chunk + size)
            token_loss, z_loss = checkpoint(
                self._token_losses, states[part], targets[part], use_reentrant=False
            )
            total = total + (weights[part] * (token_loss + z_loss)).sum()
            losses.append(token_loss.detach())
        return total, torch.cat(losses)

    def _token_losses(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """States (N, D), targets (N,) -> cross entropy and weighted z-loss, float32 (N,)."""
        logits = self.lm_head(states).float()
        normaliser = logits.logsumexp(-1)
        token_loss = normaliser - logits.gather(1, targets[:, None]).squeeze(1)
        return token_loss, self.loss_options.z_loss * normaliser**2


def tie_head_norms(decoder: ChameleonForConditionalGeneration) -> None:
    """Lets the query and key norms of all heads of a shard learn as one.

    Chameleon's layout keeps one norm a shard. Heads that begin with equal norms and get the
    mean of their gradients keep equal norms, so that a decoder trained in full can be written
    to that layout.
    """
    shards = int(decoder.config.model_parallel_size or 1)

    def mean_of_shard(gradient: Tensor) -> Tensor:
        heads, width = gradient.shape
        grouped = gradient.reshape(shards, heads // shards, width)
        return grouped.mean(1, keepdim=True).expand_as(grouped).reshape(heads, width)

    for layer in decoder.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.register_hook(mean_of_shard)
            norm.bias.register_hook(mean_of_shard)


def decoder_config(
    *,
    width: int,
    layers: int,
    heads: int,
    key_value_heads: int | None,
    feed_forward: int,
    vocabulary_size: int,
    context: int,
    rope_theta: float,
    norm_eps: float,
    swin_norm: bool,
    model_parallel_size: int,
    vq_config: dict[str, Any],
    vocabulary_map: dict[str, int],
    marks: Any,
) -> transformers.ChameleonConfig:
    """A stock ChameleonConfig with the right bos, pad and eos (its defaults are not)."""
    config = transformers.ChameleonConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or heads,
        max_position_embeddings=context,
        rms_norm_eps=norm_eps,
        rope_parameters={"rope_theta": rope_theta, "rope_type": "default"},
        swin_norm=swin_norm,
        model_parallel_size=model_parallel_size,
        vq_config=vq_config,
        vocabulary_map=vocabulary_map,
        bos_token_id=marks.bos,
        pad_token_id=marks.pad,
        eos_token_id=marks.eos,
    )
    config.architectures = ["ChameleonForConditionalGeneration"]
    return config
