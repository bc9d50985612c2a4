"""Answers to scores: LLaVA-Med's published ones bug for bug, and our own."""
