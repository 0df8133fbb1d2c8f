"""What the judges are made of; `persona_probe.evaluation.judges` is the way in."""
