"""`compare`: strategies over scenarios and seeds, as ordinary runs that share what is the same for all."""
