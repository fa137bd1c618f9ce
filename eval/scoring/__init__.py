"""From predictions to scores: what is compared with the target, the metrics, and the arms they make."""
