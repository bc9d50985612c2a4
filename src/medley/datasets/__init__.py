"""Dataset formats: published datasets to documents and, for most formats, back.

`registry.FORMATS` maps the name of a format to its `FormatSpec`. `splits` finds
images that splits share; `figures` downloads the figures of articles; `instructions` has a chat
model write conversations.
"""
