"""The pocket model organism: a tiny model in which personas live, and its narrow fine-tunes."""
