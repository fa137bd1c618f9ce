"""What a run is trained on: a packed corpus, cut in segments, handed out in lanes."""
