"""Calibration: a codec profile out of a model's own forward and backward passes over text (`kvstore calibrate`).

`run` is the order of the steps; each step is a module. Needs torch and transformers.
"""
