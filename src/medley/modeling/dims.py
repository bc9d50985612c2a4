"""The sizes of a decoder, and their two directions: from and to transformers' configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

from medley.data.vocabulary import Vocabulary

ARCHITECTURE = "ChameleonForConditionalGeneration"


@dataclass(frozen=True)
class ModelDims:
    """Sizes and options that determine the shapes and the computation of a decoder.

    Attributes:
        width: width of the hidden states
        layers: number of layers
        heads: number of query heads
        key_value_heads: number of heads for keys and values
        feed_forward: width inside a feed-forward block
        vocabulary_size: number of token ids
        context: maximum length of a sequence in tokens
        norm_eps: epsilon of the RMS norms
        rope_theta: base of the rotary frequencies
        swin_norm: whether norms follow attention and feed-forward (Chameleon 30B) or precede them
        shards: number of model-parallel shards, each with its own query and key norms
    """

    width: int
    layers: int
    heads: int
    key_value_heads: int
    feed_forward: int
    vocabulary_size: int
    context: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    swin_norm: bool = False
    shards: int = 1

    @classmethod
    def from_config(cls, config: transformers.ChameleonConfig) -> ModelDims:
        return cls(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            key_value_heads=config.num_key_value_heads,
            feed_forward=config.intermediate_size,
            vocabulary_size=config.vocab_size,
            context=config.max_position_embeddings,
            norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_parameters["rope_theta"],
            swin_norm=bool(config.swin_norm),
            shards=int(config.model_parallel_size or 1),
        )

    def to_config(
        self,
        vq_config: dict[str, Any],
        vocabulary_map: dict[str, int],
        vocabulary: Vocabulary,
    ) -> transformers.ChameleonConfig:
        """A configuration with the vocabulary's bos, pad and eos; transformers' defaults differ.

        Args:
            vq_config: fields of ChameleonVQVAEConfig
            vocabulary_map: token name -> id, for all tokens
            vocabulary: ids of the special tokens
        """
        config = transformers.ChameleonConfig(
            vocab_size=self.vocabulary_size,
            hidden_size=self.width,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=self.context,
            rms_norm_eps=self.norm_eps,
            rope_parameters={"rope_theta": self.rope_theta, "rope_type": "default"},
            swin_norm=self.swin_norm,
            model_parallel_size=self.shards,
            vq_config=vq_config,
            vocabulary_map=vocabulary_map,
            bos_token_id=vocabulary.bos,
            pad_token_id=vocabulary.pad,
            eos_token_id=vocabulary.eos,
        )
        config.architectures = [ARCHITECTURE]
        return config
