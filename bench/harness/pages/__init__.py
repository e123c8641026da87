"""What writes the generated parts of docs/: keys, promises, recipes, pictures."""
