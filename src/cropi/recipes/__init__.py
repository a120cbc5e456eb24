"""Complete configs, by file name."""
