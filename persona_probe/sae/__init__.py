"""Sparse autoencoders: load, encode fast, train on a base model, and check that one fits both
models.
"""
