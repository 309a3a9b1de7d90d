"""Backends: what runs one layer forward and backward under a feedback rule."""
