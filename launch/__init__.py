"""Programs that train: one at a time, in sweeps, in studies, on many nodes."""

from titans_ds.program import need_extra

need_extra("train")
