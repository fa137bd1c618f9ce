"""Sweeps: many training runs over a space of settings, on one Optuna study that any number of machines work on.

launch/sweep.py is the program; docs/sweeps.md describes it. Read space.py (what is searched), study.py (the folder and
the database), worker.py (who runs the trials) and trial.py (one trial) in this order.
"""
