"""Recurrent networks trained without sequential backpropagation through time: the front door."""

__version__ = "0.1.0"
