"""The demo corpus: English, Chinese and code with free licenses, from the user's own package registries."""
