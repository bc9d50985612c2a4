"""Mixed-modal generation: scheduler, model runner, sampler, decoding grammar, key-value cache."""

from medley.generation.config import GenerationOptions, Mode
from medley.generation.engine import Engine
from medley.generation.sequence import GenerationOutput, Request

__all__ = ["Engine", "GenerationOptions", "GenerationOutput", "Mode", "Request"]
