"""Recurrent: a layer around any cell module, its protocol for cells, and the gradient of a feedback rule."""

from statefeed.custom.layer import Recurrent as Recurrent
