"""From a prompt to text and likelihoods: the model under evaluation, batched decoding, token healing."""
