"""Trainings: settings, presets, the loop, checkpoints, evaluation, tracking, and the folders that they are kept in."""
