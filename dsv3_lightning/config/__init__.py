"""Configuration: composing files and overrides, checking the settings, and instantiating objects."""
