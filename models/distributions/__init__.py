"""Distributions that Pyro lacks: paths of chains, padded sequences, precision matrices; and emissions of states."""
