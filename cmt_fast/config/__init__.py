"""What a user asks for: the schema, YAML and overrides, errors in one line, fingerprints."""
