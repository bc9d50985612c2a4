"""Figures of published articles: downloaded, verified, extracted from their archives."""
