"""Data formats of the field <-> documents, one small module a format."""
