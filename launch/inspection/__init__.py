"""What `prime`, `complete` and `inspect` share: repositories that are read, and the page of what a memory holds."""
