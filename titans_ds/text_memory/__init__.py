"""Memories of a repository that are asked alike: write files, predict a text, count bytes. See interface.py."""

from titans_ds.text_memory.interface import Reader, Rights, State, TextMemory
from titans_ds.text_memory.key_values import KeyValueStore

__all__ = ["KeyValueStore", "Reader", "Rights", "State", "TextMemory"]
