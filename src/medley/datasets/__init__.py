"""Dataset formats: conversion of published datasets to documents and back.

`registry.FORMATS` maps the name of a format to its `FormatSpec`.
"""
