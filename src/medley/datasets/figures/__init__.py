"""Figures of published articles: fetched, checked, taken out of their archives."""
