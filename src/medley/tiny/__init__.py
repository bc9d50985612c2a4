"""The embedded model `tiny`: package data, and the function that finds it."""
