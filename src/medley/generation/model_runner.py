"""Forward passes over all streams: reading contexts, one step of decoding, logits.

Shapes: R streams, B rows or contexts, T prompt tokens, L longest stream, D model width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medley.generation.fused_decode import FusedDecoder, can_fuse
from medley.generation.kv_cache import KeyValueCache
from medley.generation.packed_linear import LARGEST, PackedLinear
from medley.generation.sequence import CFGBranch, SequenceState


class ModelRunner:
    """A decoder and its cache. With `fuse` a step is made by hand where the weights are plain;
    `most` streams are expected at once."""

    def __init__(self, decoder: Any, pad: int, fuse: bool, most: int) -> None:
        self.decoder, self.pad = decoder, pad
        self.context = int(decoder.config.max_position_embeddings)
        embedding = decoder.model.embed_tokens
        hook = getattr(embedding, "_hf_hook", None)  # accelerate's, where it lies elsewhere
        self.device: torch.device = (
            embedding.weight.device if hook is None else torch.device(hook.execution_device)
        )
        self.dtype: torch.dtype = embedding.weight.dtype
        with torch.no_grad():
            self.fused = FusedDecoder(decoder) if fuse and can_fuse(decoder) else None
        self.cache = KeyValueCache(decoder.config, self.dtype, self.device, most)
        self._heads: dict[tuple[Any, Any], PackedLinear] = {}  # by the part of the vocabulary

    def read(
        self, streams: Sequence[CFGBranch], contexts: Sequence[Sequence[int]], begun: Sequence[int]
    ) -> Tensor:
        """Reads contexts from their places `begun` on, in one pass, into neighbouring slots; gives
        the state (D,) behind the last token of each, as (B, D).

        Shorter ones are filled up on the right: what that writes lies behind the stream's end,
        where its own tokens will come.
        """
        rest = [list(ids[start:]) for ids, start in zip(contexts, begun, strict=True)]
        longest = max(map(len, rest))
        tokens = torch.tensor(
            [[*ids, *[self.pad] * (longest - len(ids))] for ids in rest],
            device=self.device,
        )
        starts = torch.tensor(list(begun), device=self.device)
        positions = starts[:, None] + torch.arange(longest, device=self.device)
        length = int(max(begun)) + longest
        self.cache.place(streams[0].slot, positions, length)
        seen = torch.arange(length, device=self.device)[None, None] <= positions[..., None]
        positions = positions.clamp(max=self.context - 1)  # of fillings that stand beyond it
        hidden = self._modules(tokens, positions, seen[:, None])
        for stream, ids in zip(streams, contexts, strict=True):
            stream.length = len(ids)
        ends = torch.tensor([len(ids) - 1 for ids in rest], device=self.device)
        return hidden[torch.arange(len(rest), device=self.device), ends]

    def _modules(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        hidden: Tensor = self.decoder.model(
            input_ids=tokens, position_ids=positions, attention_mask=mask,
            past_key_values=self.cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        return hidden

    def decode(self, rows: Sequence[SequenceState]) -> Tensor | None:
        """One pass for all streams: states (R, D) by slot; None where all rows are new.

        Streams of rows that are new keep their slots: all slots are stepped, and those without
        a token write to their next place, which their own token overwrites.
        """
        if all(row.next_token is None for row in rows):
            return None
        count = self.cache.streams
        tokens, places = [self.pad] * count, [0] * count
        for row in rows:
            for stream in row.streams:
                places[stream.slot] = stream.length
                if row.next_token is not None:
                    tokens[stream.slot] = row.next_token
                    stream.length += 1
        length = max(places) + 1
        ids = torch.tensor(tokens, device=self.device)
        positions = torch.tensor(places, device=self.device)
        self.cache.place(0, positions[:, None], length)
        mask = None
        if min(places) + 1 < length:
            seen = torch.arange(length, device=self.device)[None] <= positions[:, None]
            mask = seen[:, None, None]
        if self.fused is not None:
            return self.fused(ids, positions, mask, self.cache)
        if mask is None:  # the modules would make a causal one, of this one token
            mask = torch.ones(count, 1, 1, length, dtype=torch.bool, device=self.device)
        return self._modules(ids[:, None], positions[:, None], mask)[:, -1]

    def logits(self, states: Tensor, part: slice) -> Tensor:
        """States (B, D) -> float32 logits of a part of the vocabulary."""
        head = self.decoder.lm_head
        if not isinstance(head, nn.Linear) or hasattr(head, "_hf_hook"):
            # An adapter lies over it, or accelerate fetches it from elsewhere.
            logits: Tensor = head(states).float()
            return logits[:, part].to(self.device)
        return self.head(part)(states.to(head.weight.device)).float().to(self.device)

    def head(self, part: slice) -> PackedLinear:
        key, weight = (part.start, part.stop), self.decoder.lm_head.weight
        if key not in self._heads:
            pack = self.fused is not None and weight.nbytes <= LARGEST
            self._heads[key] = PackedLinear(weight[part], pack)
        return self._heads[key]
