"""Mixed-modal generation: options, grammar, guidance, key-value cache, engine."""

from medley.generation.engine import Engine, Request, Result
from medley.generation.options import GenerationOptions

__all__ = ["Engine", "GenerationOptions", "Request", "Result"]
