"""Instructions out of figure captions, as LLaVA-Med makes them: asked of a model, then cleaned."""
