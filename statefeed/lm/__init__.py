"""Language-model application on the public API of statefeed: recipes in, run folders out."""
