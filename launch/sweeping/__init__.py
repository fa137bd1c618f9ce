"""Sweeps: many training runs over a space of settings, by any number of processes that share one folder.

launch/sweep.py is the program; docs/sweeps.md describes it. Read space.py (what is searched), study.py (the folder),
claims.py (who may run what), keeper.py (one running trial), worker.py (the loop) in this order.
"""
