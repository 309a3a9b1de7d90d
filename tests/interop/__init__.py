"""Tests with packages of other people, each in an environment of its own."""
