"""The language-model application: recipes in, run folders out; it uses only what `statefeed` exports."""
