"""CUDA graphs: functions captured once and replayed, with the buffers that they share."""
