"""titans-ds: test-time neural memory grafted onto pretrained causal language models."""
