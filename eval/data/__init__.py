"""What is evaluated on: rows of a benchmark, their cross-file context, the prompts made of them."""
