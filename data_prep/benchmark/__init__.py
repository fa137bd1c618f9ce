"""Samples in CrossCodeEval's format from any repositories. One module a step; `languages.py` says what a language
needs."""
