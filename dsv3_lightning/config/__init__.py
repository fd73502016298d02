"""From files and overrides to checked settings and live objects: compose, then check, then instantiate."""
