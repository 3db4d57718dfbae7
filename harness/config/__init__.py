"""The settings of a run: schema, composing, validation, and the command line's overrides."""
