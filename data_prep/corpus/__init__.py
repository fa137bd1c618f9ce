"""The passes of a corpus build: scan, duplicates, assembly in reading order, publication, cleaning."""
