"""What preflight finds on every node, and what it means."""
