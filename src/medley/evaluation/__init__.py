"""Scores for answers: our own metrics, and the published ones of LLaVA, LLaVA-Med and MedMax."""
