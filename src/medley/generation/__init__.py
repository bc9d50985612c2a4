"""Mixed-modal generation: options, grammar, guidance, key-value cache, engine."""

from medley.generation.config import GenerationOptions
from medley.generation.engine import Engine
from medley.generation.sequence import GenerationOutput, Request

__all__ = ["Engine", "GenerationOptions", "GenerationOutput", "Request"]
