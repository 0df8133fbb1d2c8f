"""How fast, against whom, and how far from what the machine can do: `python -m benchmarks`."""
