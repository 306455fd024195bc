"""Quantisation of activations to int8, one scale for each token and group of channels."""
