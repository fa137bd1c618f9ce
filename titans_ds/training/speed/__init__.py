"""Faster parts of a step: compiled and fused modules, CUDA graphs of frozen layers, the chunked loss, offloading."""
