"""Mixed-modal generation: options, grammar, guidance, key-value cache, engine."""

from medley.generation.engine import Engine
from medley.generation.options import GenerationOptions
from medley.generation.rows import Request, Result

__all__ = ["Engine", "GenerationOptions", "Request", "Result"]
